"""Blocks that two or more stages use. Shapes: see the legend in `contracts.py`; E = heads, M = keys."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e9
"""Added to the score of an absent key. Finite, so that a query without any key gets a harmless mean and no NaN."""


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias of a boolean mask in the queries' type (any other is misread): 0 where True, `MASKED` where False."""
    return torch.where(mask, 0.0, MASKED).to(dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Multi-head attention of q (B, N, E, d) over k, v (B, M, E, d) -> (B, N, E, d).

    `mask` is boolean and broadcasts to (B, E, N, M), True where a query may look.
    """
    bias = None if mask is None else attention_bias(mask, q.dtype)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2)


def timestep_embedding(t: Tensor, size: int, base: float = 10000.0) -> Tensor:
    """Sinusoidal embedding of timesteps in [0, 1000], any shape -> (..., size), cosines first."""
    freqs = torch.exp(-math.log(base) * torch.arange(size // 2, device=t.device, dtype=torch.float32) / (size // 2))
    angle = t.float().unsqueeze(-1) * freqs
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def fourier_features(x: Tensor, bands: int) -> Tensor:
    """x (..., c) -> (..., c (1 + 2 bands)): x, its sines and cosines at octaves: millimetres stay visible."""
    scale = math.pi * 2.0 ** torch.arange(bands, device=x.device, dtype=x.dtype)
    angle = (x.unsqueeze(-1) * scale).flatten(-2)
    return torch.cat([x, angle.sin(), angle.cos()], dim=-1)


def rope_table(positions: Tensor, head_dim: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding for positions (..., 3) = (frame, row, column) or (..., 1) = (step,).

    Rows and columns take a third of the head's pairs each, frames the rest; a step alone takes them all. Returns two
    (..., head_dim / 2) tensors, computed in float64.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    angles = []
    for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial) if positions.shape[-1] == 3 else (pairs,)):
        freqs = base ** (-torch.arange(count, device=positions.device, dtype=torch.float64) / max(count, 1))
        angles.append(positions[..., axis : axis + 1].double() * freqs)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates interleaved pairs of x (..., N, E, d) by the table (N, d / 2) or a shape that broadcasts with it."""
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in table)
    if torch.compiler.is_exporting():
        # The same in a third of the nodes, which cost a small graph more than the larger product does.
        swap = torch.eye(x.shape[-1]).to(x).unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        both, turned = torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)
        return x * both + (x @ swap) * turned
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Adaptive layer norm's affine part (Peebles & Xie 2023, DiT): x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def modulation_table(width: int, gate: float = 0.5) -> nn.Parameter:
    """Learned modulation (6, W) of a block: scale, shift and gate of its mixing, then of its feed-forward.

    Gates start half open: closed ones (DiT, `gate` 0) suit deep stacks and long schedules, and cost short ones their
    first steps.
    """
    table = torch.randn(6, width) / width**0.5
    table[2::3] += gate
    return nn.Parameter(table)


class TimeEmbedding(nn.Module):
    """Timestep -> the width's embedding and its projection to `vectors` modulation vectors."""

    def __init__(self, *, width: int, frequencies: int = 256, vectors: int = 6) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.vectors = vectors
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.project = nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))

    def forward(self, t: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """t (...) in [0, 1000], condition (..., W) added to it -> embedding (..., W), vectors (..., vectors, W)."""
        embedding = self.mlp(timestep_embedding(t, self.frequencies))
        if condition is not None:
            embedding = embedding + condition
        return embedding, self.project(embedding).unflatten(-1, (self.vectors, -1))


class FeedForward(nn.Sequential):
    """Linear, SiLU, linear."""

    def __init__(self, *, width: int, hidden: int, out: int | None = None) -> None:
        super().__init__(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, out or width))


class CrossAttention(nn.Module):
    """Attention of x (B, N, W) over a context (B, M, Wc) under its mask (B, M); q and k are RMS-normalised."""

    def __init__(self, *, width: int, context: int, heads: int, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or width
        self.heads = heads
        self.q = nn.Linear(width, inner)
        self.k = nn.Linear(context, inner)
        self.v = nn.Linear(context, inner)
        self.out = nn.Linear(inner, width)
        self.q_norm = nn.RMSNorm(inner, eps=1e-6)
        self.k_norm = nn.RMSNorm(inner, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """-> (B, N, W). A context of batch B / n serves n consecutive rows of x, and is projected only once."""
        q = self.q_norm(self.q(x)).unflatten(-1, (self.heads, -1))
        k = self.k_norm(self.k(context)).unflatten(-1, (self.heads, -1))
        v = self.v(context).unflatten(-1, (self.heads, -1))
        draws = q.shape[0] // k.shape[0]
        k, v, mask = repeat_rows(k, draws), repeat_rows(v, draws), repeat_rows(mask, draws)
        return self.out(attend(q, k, v, mask[:, None, None]).flatten(-2))


def repeat_rows(x: Tensor, count: int) -> Tensor:
    """Every row of the batch `count` times in a row; nothing is copied for a count of one."""
    return x if count == 1 else x.repeat_interleave(count, dim=0)


def at_grid(position: Tensor, own: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Learned positions (rows * columns, W) of the cells of a picture, as they are for another number of cells."""
    if own == grid:
        return position
    field = position.mT.unflatten(-1, own).unsqueeze(0)
    return F.interpolate(field, grid, mode="bilinear", antialias=True)[0].flatten(1).mT


class AttentionPool(nn.Module):
    """Reads `queries` learned questions out of tokens (B, N, W) under a mask (B, N) -> (B, queries, W)."""

    def __init__(self, *, width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width=width, context=width, heads=heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), FeedForward(width=width, hidden=2 * width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """-> (B, queries, W)."""
        x = self.queries.expand(tokens.shape[0], -1, -1)
        x = x + self.attention(x, self.norm(tokens), mask)
        return x + self.mlp(x)
