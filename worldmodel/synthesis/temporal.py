"""Temporal mixing, linear in the number of frames: sliding windows, dilated windows, gated delta rule.

Shapes: T frames, N tokens a frame, E heads, d head size. One definition of a window (`frame_offsets`) serves a dense
reference and the folded form that runs by default.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.nn import apply_rope, attend


class Keys(NamedTuple):
    """Rotated keys and values of consecutive frames, with the presence of every token."""

    k: Tensor  # (B, T, N, E, d)
    v: Tensor  # (B, T, N, E, d)
    mask: Tensor  # (B, T, N)


class DeltaState(NamedTuple):
    """Memory of a gated delta layer after some frames."""

    state: Tensor  # (B, E, dk, dv)
    tail: Tensor  # (B, kernel - 1, channels), inputs that the causal convolution still needs


def frame_offsets(window: int, dilation: int) -> list[int]:
    """Frame differences key - query that a query may see: fewer than `window` dilated steps away, on both sides."""
    return [step * dilation for step in range(1 - window, window)]


def dense_window_mask(queries: int, keys: int, start: int, window: int, dilation: int) -> Tensor:
    """Reference: (queries, keys) boolean mask of frames, where query frame i stands at position start + i."""
    difference = torch.arange(keys)[None] - (start + torch.arange(queries))[:, None]
    return (difference % dilation == 0) & (difference.abs() < window * dilation)


def windowed_attention_dense(
    q: Tensor, keys: Keys, *, window: int, dilation: int, extra: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Reference form of `windowed_attention`: every pair of tokens under one dense mask."""
    b, tq, n, e, d = q.shape
    tk, m = keys.k.shape[1], keys.k.shape[2]
    frames = dense_window_mask(tq, tk, tk - tq, window, dilation).to(q.device)
    mask = frames[None, :, None, :, None] & keys.mask[:, None, None]
    mask = mask.expand(b, tq, n, tk, m).reshape(b, 1, tq * n, tk * m)
    k, v = keys.k.flatten(1, 2), keys.v.flatten(1, 2)
    if extra is not None:
        k, v = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
        mask = F.pad(mask, (0, extra[0].shape[1]), value=True)
    return attend(q.flatten(1, 2), k, v, mask).unflatten(1, (tq, n))


def windowed_attention(
    q: Tensor, keys: Keys, *, window: int, dilation: int, extra: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Attention of the last frames over a (dilated) window of frames, with the frames folded into the batch.

    q is (B, Tq, N, E, d) and stands for the last Tq of the Tk frames of `keys`. `extra` holds keys and values
    (B, A, E, d) that every query sees. -> (B, Tq, N, E, d). Cost grows with Tq, not with Tq Tk.
    """
    b, tq, n, e, d = q.shape
    tk = keys.k.shape[1]
    offsets = [o for o in frame_offsets(window, dilation) if -tk < o < tq]
    pad = max(map(abs, offsets))

    def gather(x: Tensor) -> Tensor:
        padded = torch.cat([x.new_zeros(b, pad, *x.shape[2:]), x, x.new_zeros(b, pad, *x.shape[2:])], dim=1)
        first = pad + tk - tq
        return torch.cat([padded[:, first + o : first + o + tq] for o in offsets], dim=2).flatten(0, 1)

    k, v, mask = gather(keys.k), gather(keys.v), gather(keys.mask)
    if extra is not None:
        more_k, more_v = (x[:, None].expand(-1, tq, -1, -1, -1).flatten(0, 1) for x in extra)
        k, v = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], more_k.shape[1])], 1)
    return attend(q.flatten(0, 1), k, v, mask[:, None, None]).unflatten(0, (b, tq))


class WindowAttention(nn.Module):
    """Self-attention over a window of frames; with `dilation` > 1 over every dilation-th frame."""

    def __init__(self, *, width: int, heads: int, window: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.window, self.dilation = heads, window, dilation
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        rope: tuple[Tensor, Tensor],
        past: Keys | None,
        extra: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Keys]:
        """x (B, T, N, W) under mask (B, T, N), after the frames of `past` -> output and the keys of x's own frames."""
        q = apply_rope(self.q_norm(self.q(x)).unflatten(-1, (self.heads, -1)), rope)
        k = apply_rope(self.k_norm(self.k(x)).unflatten(-1, (self.heads, -1)), rope)
        own = Keys(k, self.v(x).unflatten(-1, (self.heads, -1)), mask)
        seen = own if past is None else Keys(*(torch.cat(pair, dim=1) for pair in zip(past, own, strict=True)))
        out = windowed_attention(q, seen, window=self.window, dilation=self.dilation, extra=extra)
        return self.out(out.flatten(-2)), own


def gated_delta_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Gated delta rule token by token (Yang et al. 2024, arXiv 2412.06464, eq. 10): the reference.

    q, k (B, M, E, dk), v (B, M, E, dv), log decay g <= 0 and write strength beta (B, M, E), state (B, E, dk, dv).
    S <- exp(g) S; S <- S + beta k (v - S^T k)^T; o = S^T q. Returns o (B, M, E, dv) and the last state.
    """
    outputs = []
    for i in range(q.shape[1]):
        state = state * g[:, i, :, None, None].exp()
        error = v[:, i] - torch.einsum("bekv,bek->bev", state, k[:, i])
        state = state + torch.einsum("bek,bev->bekv", k[:, i] * beta[:, i, :, None], error)
        outputs.append(torch.einsum("bekv,bek->bev", state, q[:, i]))
    return torch.stack(outputs, dim=1), state


def invert_unit_lower(lower: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower L (..., c, c), c a power of two, by doubling blocks: stable, matmuls only."""
    c = lower.shape[-1]
    index = torch.arange(c, device=lower.device)
    inverse = torch.eye(c, device=lower.device, dtype=lower.dtype).expand(lower.shape)
    size = 1
    while size < c:
        block = index // size
        corner = (block[:, None] == block[None] + 1) & (block[:, None] % 2 == 1)
        inverse = inverse - inverse @ (lower * corner) @ inverse
        size *= 2
    return inverse


def gated_delta_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int = 32
) -> tuple[Tensor, Tensor]:
    """The same as `gated_delta_recurrent` in chunks of tokens (a power of two), with matrix products inside a chunk.

    Within a chunk with cumulated log decay c_i the written values u solve (I + L) u = beta (v - exp(c) S^T k),
    L_ij = beta_i exp(c_i - c_j) k_i . k_j for j < i. Every exponent is at most zero, so strong gates cannot overflow.
    """
    length = q.shape[1]
    pad = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk)).transpose(2, 3) for x in (q, k, v))
    g, beta = (F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, chunk)).transpose(2, 3) for x in (g, beta))
    decay = g.cumsum(-1)  # (B, chunks, E, c)
    index = torch.arange(chunk, device=q.device)
    strict = index[:, None] > index[None]
    causal = index[:, None] >= index[None]
    between = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    between = between.masked_fill(~causal, -torch.inf).exp()
    solve = invert_unit_lower((k @ k.mT) * between * strict * beta.unsqueeze(-1))
    scores = (q @ k.mT) * between
    grown = decay.exp().unsqueeze(-1)
    last = decay[..., -1:]
    to_end = (last - decay).exp().unsqueeze(-1)
    outputs = []
    for i in range(q.shape[1]):
        wanted = (v[:, i] - grown[:, i] * (k[:, i] @ state)) * beta[:, i].unsqueeze(-1)
        written = solve[:, i] @ wanted
        outputs.append(grown[:, i] * (q[:, i] @ state) + scores[:, i] @ written)
        state = last[:, i].exp().unsqueeze(-1) * state + (k[:, i] * to_end[:, i]).mT @ written
    out = torch.stack(outputs, dim=1).transpose(2, 3).flatten(1, 2)
    return out[:, :length], state


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x over its length along the last dimension, with `eps` added to the squared length."""
    if eps == 0:  # has a gradient at zero, where absent tokens stand
        return F.normalize(x, dim=-1)
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


class GatedDelta(nn.Module):
    """Gated DeltaNet layer over the raster of all tokens (frame, then order within the frame).

    Parametrisation of flash-linear-attention: short causal convolution and SiLU on q, k, v; q and k L2-normalised;
    decay -exp(A) softplus(a + bias); output RMSNorm per head times SiLU of a gate. Absent tokens neither write nor
    decay the memory. `eps` is added to the squared length of q and k (1e-6 in that library's kernels).
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        expansion: int = 2,
        kernel: int = 4,
        head_dim: int | None = None,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads, self.eps = heads, eps
        self.head_dim = head_dim or width // heads
        keys, values = heads * self.head_dim, heads * self.head_dim * expansion
        self.sizes = (keys, keys, values)
        self.kernel = kernel
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(sum(self.sizes), sum(self.sizes), kernel, groups=sum(self.sizes), bias=False)
        self.decay = nn.Linear(width, heads, bias=False)
        self.beta = nn.Linear(width, heads, bias=False)
        self.gate = nn.Linear(width, values, bias=False)
        self.out = nn.Linear(values, width, bias=False)
        self.norm = nn.RMSNorm(self.head_dim * expansion, eps=1e-6)
        self.a_log = nn.Parameter(torch.linspace(1.0, 16.0, heads).log())
        self.dt_bias = nn.Parameter(torch.logspace(-3, -1, heads).expm1().log())  # softplus gives 0.001 to 0.1

    def forward(self, x: Tensor, mask: Tensor, past: DeltaState | None) -> tuple[Tensor, DeltaState]:
        """x (B, T, N, W) under mask (B, T, N), after `past` -> output (B, T, N, W) and the memory after x."""
        b, t, n, _ = x.shape
        x, present = x.flatten(1, 2), mask.flatten(1, 2).unsqueeze(-1)
        mixed = self.qkv(x) * present
        if past is None:
            tail = mixed.new_zeros(b, self.kernel - 1, mixed.shape[-1])
            state = mixed.new_zeros(b, self.heads, self.head_dim, self.sizes[2] // self.heads)
        else:
            state, tail = past
        mixed = torch.cat([tail, mixed], dim=1)
        tail = mixed[:, 1 - self.kernel :]
        mixed = F.silu(self.conv(mixed.mT)).mT
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in mixed.split(self.sizes, dim=-1))
        q, k = unit_length(q, self.eps) * self.head_dim**-0.5, unit_length(k, self.eps)
        g = -self.a_log.exp() * F.softplus(self.decay(x) + self.dt_bias) * present
        beta = self.beta(x).sigmoid() * present
        out, state = gated_delta_chunked(q, k, v, g, beta, state)
        out = self.norm(out).flatten(-2) * F.silu(self.gate(x))
        return self.out(out).unflatten(1, (t, n)), DeltaState(state, tail)
