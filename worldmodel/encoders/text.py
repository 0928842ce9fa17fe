"""The instruction to tokens: a small encoder over bytes, so that no vocabulary has to be downloaded."""

import torch
from torch import Tensor, nn

from worldmodel.nn import AttentionPool


class ByteTextEncoder(nn.Module):
    """UTF-8 bytes + 1 (0 pads) -> a fixed number of tokens, by convolutions and attention pooling."""

    def __init__(self, *, width: int, inner: int, tokens: int, heads: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, inner)
        self.position = nn.Parameter(torch.randn(length, inner) * 0.02)
        self.conv = nn.Sequential(
            nn.Conv1d(inner, inner, 5, padding=2), nn.SiLU(), nn.Conv1d(inner, inner, 5, padding=2), nn.SiLU()
        )
        self.pool = AttentionPool(width=inner, heads=heads, queries=tokens)
        self.out = nn.Linear(inner, width)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, L) int64 -> tokens (B, tokens, W), all of them present."""
        if self.training:  # a batch holds few distinct sentences
            distinct, row = torch.unique(text, dim=0, return_inverse=True)
            tokens = self.encode(distinct)[row]
        else:
            tokens = self.encode(text)
        return tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool)

    def encode(self, text: Tensor) -> Tensor:
        """Every row on its own."""
        present = text > 0
        x = (self.embed(text) + self.position) * present.unsqueeze(-1)
        return self.out(self.pool(x + self.conv(x.mT).mT, present))
