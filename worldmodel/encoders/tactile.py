"""Touch to tokens: one per sensor and history frame, from its wrench series and its taxel grid."""

import torch
from torch import Tensor, nn

from worldmodel.nn import FeedForward


class TactileEncoder(nn.Module):
    """A sensor may give a wrench series, a taxel grid or both; each has its own presence."""

    def __init__(self, *, width: int, sensors: int, history: int, stride: int, taxels: tuple[int, int, int]) -> None:
        super().__init__()
        self.wrench = FeedForward(width=6 * stride, hidden=width, out=width)
        self.taxels = FeedForward(width=taxels[0] * taxels[1] * taxels[2], hidden=width, out=width)
        self.slot = nn.Parameter(torch.randn(history, sensors, width) * 0.02)

    def forward(self, force: Tensor, taxels: Tensor, has_wrench: Tensor, has_taxels: Tensor) -> Tensor:
        """force (B, H, R, S, 6), taxels (B, H, S, C, rows, columns) -> (B, H, S, W)."""
        wrench = self.wrench(force.permute(0, 1, 3, 2, 4).flatten(-2)) * has_wrench[:, None, :, None]
        return wrench + self.taxels(taxels.flatten(3)) * has_taxels[:, None, :, None] + self.slot[-force.shape[1] :]
