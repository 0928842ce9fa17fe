"""What moves and what stands in a clip: a mask and a 3D track for each slot, from the frames of all views.

The network reads pixels, not the latents of the tokeniser, whose cells are larger than many an object. Masks are dot
products of a pixel's features with a slot's kernel (Cheng et al. 2021, MaskFormer, arXiv 2107.06278, eq. 3); slots have
a fixed order, so that they need no matching.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.contracts import MOVERS
from worldmodel.errors import ConfigError
from worldmodel.nn import AttentionPool, FeedForward, attend, timestep_embedding

_INPUTS = 9
"""Channels of a frame as the network sees it: its colours, what changed since the frame before, and how it differs from
the mean of its clip."""


class Mixing(nn.Module):
    """Pre-norm self-attention with a mask of keys."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, W), mask (B, N)."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        bias = None if mask is None else mask[:, None, None]
        return x + self.out(attend(q, k, v, bias).flatten(-2))


class MotionBlock(nn.Module):
    """Attention over the frames of each cell, then over all cells of all views of each frame."""

    def __init__(self, *, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.time, self.space = Mixing(width=width, heads=heads), Mixing(width=width, heads=heads)
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), FeedForward(width=width, hidden=hidden))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (B, T, V, cells, W), seen (B, V)."""
        b, t, v, n, _ = x.shape
        x = self.time(x.permute(0, 2, 3, 1, 4).flatten(0, 2)).unflatten(0, (b, v, n)).permute(0, 3, 1, 2, 4)
        mask = seen[:, None, :, None].expand(b, t, v, n).reshape(b * t, v * n)
        x = self.space(x.flatten(2, 3).flatten(0, 1), mask).unflatten(0, (b, t)).unflatten(2, (v, n))
        return x + self.feed_forward(x)


class MotionEncoder(nn.Module):
    """Frames of all views, with camera rays where poses are known -> masks, motion and tracks of every slot.

    Args:
        width: of the tokens, one for every eight pixels of height and width.
        channels: of the feature maps at a half and at a quarter of the picture's size.
        features: of the pixels that masks are read from, at half the size.
        heads: of attention.
        hidden: width inside the blocks' feed-forward parts.
        layers: blocks.
        views: cameras.
        size: rows and columns of a picture, multiples of 8.
    """

    def __init__(
        self,
        *,
        width: int,
        channels: Sequence[int],
        features: int,
        heads: int,
        hidden: int,
        layers: int,
        views: int,
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        if size[0] % 8 or size[1] % 8:
            raise ConfigError(f"motion.size: pictures of {tuple(size)} pixels, both must be multiples of 8")
        self.grid = (size[0] // 8, size[1] // 8)
        self.slots = tuple(MOVERS)
        half, quarter = channels
        self.stem, self.middle = down(_INPUTS, half), down(half, quarter)
        self.coarse = nn.Conv2d(quarter, width, 3, stride=2, padding=1)
        self.place = nn.Parameter(torch.randn(views, self.grid[0] * self.grid[1], width) * 0.02)
        self.rays, self.no_rays = nn.Linear(6, width), nn.Parameter(torch.zeros(width))
        self.moment = nn.Linear(width, width)
        self.blocks = nn.ModuleList(MotionBlock(width=width, heads=heads, hidden=hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.to_quarter, self.to_half = up(width + quarter, quarter), up(quarter + half, features)
        self.clip = AttentionPool(width=width, heads=heads, queries=len(MOVERS))
        self.frame = AttentionPool(width=width, heads=heads, queries=len(MOVERS))
        self.kernel = FeedForward(width=width, hidden=width, out=features + 1)
        self.moves = nn.Linear(width, 1)
        self.track = FeedForward(width=width, hidden=width, out=3)

    def forward(self, rgb: Tensor, rays: Tensor, seen: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reads a clip of any number T of frames.

        Args:
            rgb: (B, T, V, 3, h, w) in [-1, 1].
            rays: (B, T, V, 6, h / 8, w / 8) Pluecker rays.
            seen: (B, V) which views there are.
            known: (B, V) of which views the rays are true; others are not read.

        Returns:
            Masks (B, T, V, M, h, w) and motion (B, M) as logits, and standardised tracks (B, T, M, 3).
        """
        b, t, v = rgb.shape[:3]
        before = torch.cat([rgb[:, :1], rgb[:, :-1]], 1)
        frames = torch.cat([rgb, rgb - before, rgb - rgb.mean(1, keepdim=True)], 3).flatten(0, 2)
        half = self.stem(frames)
        quarter = self.middle(half)
        x = self.coarse(quarter).flatten(2).mT.unflatten(0, (b, t, v)) + self.place
        cast = self.rays(rays.flatten(-2).mT)
        x = x + torch.where(known[:, None, :, None, None], cast, self.no_rays)
        moments = timestep_embedding(torch.arange(t, device=x.device) * (1000.0 / max(t - 1, 1)), x.shape[-1])
        x = x + self.moment(moments)[:, None, None]
        for block in self.blocks:
            x = block(x, seen)
        x = self.norm(x)
        shown = seen[:, None, :, None].expand(*x.shape[:-1])
        slots = self.clip(x.flatten(1, 3), shown.flatten(1, 3))
        features = self.pixels(x, half, quarter)
        kernels = self.kernel(slots)
        masks = torch.einsum("btvchw,bmc->btvmhw", features, kernels[..., 1:])
        masks = masks + kernels[:, None, None, :, :1, None]
        large = F.interpolate(masks.flatten(0, 2), scale_factor=2, mode="bilinear").unflatten(0, (b, t, v))
        where = self.frame(x.flatten(2, 3).flatten(0, 1), shown.flatten(2, 3).flatten(0, 1)).unflatten(0, (b, t))
        return large, self.moves(slots)[..., 0], self.track(where + slots[:, None])

    def pixels(self, x: Tensor, half: Tensor, quarter: Tensor) -> Tensor:
        """Tokens (B, T, V, cells, W) with the maps that they came from -> (B, T, V, features, h / 2, w / 2)."""
        y = x.flatten(0, 2).mT.unflatten(-1, self.grid)
        for layer, fine in ((self.to_quarter, quarter), (self.to_half, half)):
            y = layer(torch.cat([F.interpolate(y, scale_factor=2, mode="nearest"), fine], 1))
        return y.unflatten(0, x.shape[:3])


def down(before: int, after: int) -> nn.Sequential:
    """Half the size of a map."""
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.SiLU())


def up(before: int, after: int) -> nn.Sequential:
    """A map that was enlarged, joined with a finer one."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.SiLU())
