"""Images to tokens: a small convolutional stem, one token per cell of its last map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from worldmodel.nn import at_grid


class ImageEncoder(nn.Module):
    """Strided convolutions (B, V, 3, h, w) -> (B, V, rows * columns, W), with a position embedding per cell.

    Pictures of another size than `size` have other numbers of cells, between whose positions theirs are interpolated.
    """

    def __init__(self, *, width: int, channels: Sequence[int], size: tuple[int, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for out in channels:
            layers += [nn.Conv2d(before, out, 3, stride=2, padding=1), nn.GroupNorm(4, out), nn.SiLU()]
            before = out
        layers.append(nn.Conv2d(before, width, 3, padding=1))
        self.stem = nn.Sequential(*layers)
        scale = 2 ** len(channels)
        self.rows, self.columns = size[0] // scale, size[1] // scale
        self.position = nn.Parameter(torch.randn(self.rows * self.columns, width) * 0.02)

    def forward(self, rgb: Tensor) -> Tensor:
        """rgb in [-1, 1]."""
        b, v = rgb.shape[:2]
        x = self.stem(rgb.flatten(0, 1))
        # A traced graph has one size, and comparing it would make a constant of it with a warning.
        grid = (self.rows, self.columns) if is_tracing() else (x.shape[-2], x.shape[-1])
        return (x.flatten(2).mT + at_grid(self.position, (self.rows, self.columns), grid)).unflatten(0, (b, v))
