"""Proprioception to tokens, one per history frame."""

import torch
from torch import Tensor, nn

from worldmodel.nn import FeedForward


class ProprioEncoder(nn.Module):
    """State vector (B, H, P), padded over embodiments, plus the embodiment's embedding."""

    def __init__(self, *, width: int, proprio: int, history: int, embodiments: int) -> None:
        super().__init__()
        self.embed = FeedForward(width=proprio, hidden=width, out=width)
        self.embodiment = nn.Embedding(embodiments, width)
        self.time = nn.Parameter(torch.randn(history, width) * 0.02)

    def forward(self, proprio: Tensor, embodiment: Tensor) -> Tensor:
        """-> (B, H, W)."""
        return self.embed(proprio) + self.time[-proprio.shape[1] :] + self.embodiment(embodiment)[:, None]
