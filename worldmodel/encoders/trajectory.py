"""Tracked 3D points to tokens, one per point and frame."""

import torch
from torch import Tensor, nn

from worldmodel.nn import FeedForward, fourier_features


class TrajectoryEncoder(nn.Module):
    """A point enters by its position in the base frame, its visibility, its step since the frame before and, where
    proprioception is present, its position relative to the end effector; fine differences through Fourier features."""

    def __init__(self, *, width: int, points: int, history: int, bands: int) -> None:
        super().__init__()
        self.bands = bands
        self.embed = FeedForward(width=6 * (1 + 2 * bands) + 5, hidden=width, out=width)
        self.slot = nn.Parameter(torch.randn(history, points, width) * 0.02)

    def forward(self, points: Tensor, visible: Tensor, effector: Tensor, has_effector: Tensor) -> Tensor:
        """points (B, H, K, 3), visible (B, H, K), effector (B, H, 3), has_effector (B,) -> (B, H, K, W)."""
        known = has_effector[:, None, None, None].to(points.dtype)
        relative = (points - effector.unsqueeze(2)) * known
        step = torch.cat([torch.zeros_like(points[:, :1]), points[:, 1:] - points[:, :-1]], dim=1)
        features = fourier_features(torch.cat([points, relative], -1), self.bands)
        flags = torch.stack([visible.to(points.dtype), known.squeeze(-1).expand_as(visible)], -1)
        return self.embed(torch.cat([features, 4.0 * step, flags], -1)) + self.slot[-points.shape[1] :]
