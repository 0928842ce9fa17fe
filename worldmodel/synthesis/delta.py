"""The gated delta rule: linear attention with a memory of constant size, token by token, in chunks, and fused.

Shapes: M tokens, E heads, dk and dv sizes of keys and values.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.errors import ConfigError
from worldmodel.synthesis.hopper import install

HALF = (torch.bfloat16, torch.float16)


class DeltaState(NamedTuple):
    """Memory of a gated delta layer after some frames."""

    state: Tensor  # (B, E, dk, dv)
    tail: Tensor  # (B, kernel - 1, channels), inputs that the causal convolution still needs


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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """The same as `gated_delta_recurrent` in chunks of tokens, with matrix products inside a chunk.

    `chunk` is a power of two: 32 on a CPU, 64 on a GPU, where launching small kernels takes the time.

    Within a chunk with cumulated log decay c_i the written values solve (I + L) x = beta (v - exp(c) S^T k),
    L_ij = beta_i exp(c_i - c_j) k_i . k_j for j < i. They are u - w S, and only that waits for the chunk before; all
    else is done for all chunks at once. Every exponent is at most zero, so strong gates cannot overflow. In float32 at
    least, under autocast too: a rounded inverse is none.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v, g, beta, state = (x.float() for x in (q, k, v, g, beta, state))
        with torch.autocast(q.device.type, enabled=False):
            return gated_delta_chunked(q, k, v, g, beta, state, chunk=chunk)
    chunk = chunk or (64 if q.is_cuda else 32)
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
    solve = invert_unit_lower((k @ k.mT) * between * strict * beta.unsqueeze(-1)) * beta.unsqueeze(-2)
    grown = decay.exp().unsqueeze(-1)
    last = decay[..., -1:]
    u, w = solve @ v, solve @ (grown * k)
    into = (k * (last - decay).exp().unsqueeze(-1)).mT
    kept = last.exp().unsqueeze(-1)
    states, written = [], []
    for i in range(q.shape[1]):
        states.append(state)
        written.append(u[:, i] - w[:, i] @ state)
        state = kept[:, i] * state + into[:, i] @ written[-1]
    before, values = torch.stack(states, 1), torch.stack(written, 1)
    out = grown * (q @ before) + ((q @ k.mT) * between) @ values
    return out.transpose(2, 3).flatten(1, 2)[:, :length], state


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x over its length along the last dimension, with `eps` added to the squared length."""
    if eps == 0:  # has a gradient at zero, where absent tokens stand
        return F.normalize(x, dim=-1)
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def gated_delta_fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `gated_delta_recurrent` by the Triton kernels of flash-linear-attention: on a GPU, in half precision.

    q and k are rounded to the type of v. Raises `ConfigError` for any other tensors.
    """
    if not v.is_cuda or v.dtype not in HALF:
        raise ConfigError(
            f"delta.form: fused works on a GPU in half precision, not on {v.device.type} in {v.dtype}; auto chooses"
        )
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    install()
    out, last = chunk_gated_delta_rule(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        g=g.float(),
        beta=beta.to(v.dtype),
        scale=1.0,
        initial_state=state.float(),
        output_final_state=True,
    )
    return out, last


@lru_cache(maxsize=1)
def fused_installed() -> bool:
    """Whether flash-linear-attention is there."""
    return find_spec("fla") is not None


def gated_delta_auto(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The fused kernels where they can run, else chunks."""
    fused = v.is_cuda and v.dtype in HALF and fused_installed()
    return (gated_delta_fused if fused else gated_delta_chunked)(q, k, v, g, beta, state)


FORMS = {
    "auto": gated_delta_auto,
    "chunked": gated_delta_chunked,
    "recurrent": gated_delta_recurrent,
    "fused": gated_delta_fused,
}


class GatedDelta(nn.Module):
    """Gated DeltaNet layer over the raster of all tokens (frame, then order within the frame).

    Parametrisation of flash-linear-attention: short causal convolution and SiLU on q, k, v; q and k L2-normalised;
    decay -exp(A) softplus(a + bias); output RMSNorm per head times SiLU of a gate. Absent tokens neither write nor
    decay the memory. `eps` is added to the squared length of q and k (1e-6 in that library's kernels). `form` names one
    of the `FORMS`, which differ in speed alone.
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
        form: str = "auto",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ConfigError(f"synthesis.denoiser.delta.form: unknown {form!r}; one of {', '.join(FORMS)}")
        if form == "fused" and not fused_installed():
            raise ConfigError("delta.form: fused needs `pip install flash-linear-attention`; chunked and auto do not")
        self.heads, self.eps, self.rule = heads, eps, FORMS[form]
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
        out, state = self.rule(q, k, v, g, beta, state)
        out = self.norm(out).flatten(-2) * F.silu(self.gate(x))
        return self.out(out).unflatten(1, (t, n)), DeltaState(state, tail)
