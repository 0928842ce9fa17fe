"""Camera poses to tokens (one per view and frame) and Pluecker rays to features of image tokens."""

import torch
from torch import Tensor, nn

from worldmodel.nn import FeedForward


class CameraEncoder(nn.Module):
    """Poses of every history frame as tokens, rays of the newest frame as additions to the image tokens."""

    def __init__(self, *, width: int, views: int, history: int, rays: int) -> None:
        super().__init__()
        self.rays = rays
        self.pose = FeedForward(width=9, hidden=width, out=width)
        self.slot = nn.Parameter(torch.randn(history, views, width) * 0.02)
        self.embed_rays = nn.Linear(6 * rays**2, width)
        self.no_rays = nn.Parameter(torch.zeros(width))

    def forward(self, camera: Tensor) -> Tensor:
        """camera (B, H, V, 9) -> (B, H, V, W)."""
        return self.pose(camera) + self.slot[-camera.shape[1] :]

    def ray_features(self, rays: Tensor, known: Tensor) -> Tensor:
        """rays (B, V, 6, h', w') and whether each pose is known (B, V) -> (B, V, cells, W)."""
        b, v, c, h, w = rays.shape
        r = self.rays
        x = rays.reshape(b, v, c, h // r, r, w // r, r).permute(0, 1, 3, 5, 2, 4, 6).reshape(b, v, -1, c * r * r)
        return torch.where(known[..., None, None], self.embed_rays(x), self.no_rays)
