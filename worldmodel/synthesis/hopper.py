"""The step of the gated delta rule's backward pass that Triton 3.4 to 3.7.0 compiles wrongly on Hopper GPUs.

flash-linear-attention refuses it there (its issue 640), and torch 2.10 to 2.12 bring no newer Triton. It needs no loop
over chunks, so matrix products of torch do it. Shapes: b batch, t tokens, n chunks of c, e heads, k and v sizes of keys
and values.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 where half precision is multiplied on a GPU."""
    if not a.is_cuda or a.dtype == torch.float32:
        return a @ b
    rows = [x.flatten(0, -3) for x in (a, b.to(a.dtype))]
    return torch.bmm(*rows, out_dtype=torch.float32).unflatten(0, a.shape[:-2])


def chunk_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    h: Tensor,
    dh: Tensor,
    dv: Tensor,
    g: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, w (b, t, e, k) and of the decay (b, t, e), from what the other steps leave.

    q, k (b, t, e, k); written values v, their gradient dv and that of the output do (b, t, e, v); states before each
    chunk h and the gradients of those after it dh (b, n, e, k, v); g (b, t, e) cumulative decay within a chunk, to base
    2. Within a chunk o = scale (exp(g) q h + (scores of causal pairs) v), v = u - w h, and the next state is
    exp(g_last) h + (exp(g_last - g) k)^T v (Yang et al. 2024, arXiv 2412.06464, section 3.3).
    """
    t = q.shape[1]
    pad = -t % chunk

    def split(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk)).transpose(2, 3)

    def join(x: Tensor, like: Tensor) -> Tensor:
        return x.transpose(2, 3).flatten(1, 2)[:, :t].to(like.dtype).contiguous()

    q_, k_, v_, do_, dv_ = (split(x) for x in (q, k, v, do, dv))
    g_ = torch.cat([g, g[:, -1:].expand(-1, pad, -1)], 1).unflatten(1, (-1, chunk)).transpose(2, 3)  # (b, n, e, c)
    last = g_[..., -1:]
    between = g_.unsqueeze(-1) - g_.unsqueeze(-2)
    index = torch.arange(chunk, device=q.device)
    between = between.masked_fill(index[:, None] < index[None], -torch.inf).exp2()
    dq = product(do_, h.mT) * (scale * g_.exp2()).unsqueeze(-1)
    dk = product(v_, dh.mT) * (last - g_).exp2().unsqueeze(-1)
    dw = -product(dv_, h.mT)
    both = product(h.flatten(-2).unsqueeze(-2), dh.flatten(-2).unsqueeze(-1))[..., 0, 0]
    dlast = both * last.squeeze(-1).exp2() + (dk * k_).sum((-2, -1))
    ds = (product(do_, v_.mT) * between * scale).to(k.dtype)
    dq = dq + product(ds, k_)
    dk = dk + product(ds.mT, q_)
    dg = (dq * q_).sum(-1) - (dk * k_).sum(-1)
    dg[:, :-1, :, -1] += dlast[:, :-1]
    dg[:, -1, :, (t - 1) % chunk] += dlast[:, -1]
    dg = dg.transpose(2, 3).flatten(1, 2)[:, :t].contiguous()
    return join(dq, q), join(dk, k), join(dw, k), dg


@lru_cache(maxsize=1)
def install() -> None:
    """Gives flash-linear-attention this step where it refuses to run and TileLang, its own way out, is missing."""
    from fla.backends import BaseBackend, register  # pyright: ignore[reportMissingImports]
    from fla.utils import (  # pyright: ignore[reportMissingImports]
        IS_NVIDIA_HOPPER,
        TRITON_ABOVE_3_4_0,
        TRITON_ABOVE_3_7_1,
    )

    if not IS_NVIDIA_HOPPER or not TRITON_ABOVE_3_4_0 or TRITON_ABOVE_3_7_1:
        return

    class Products(BaseBackend):
        """This file as a choice of the library's dispatcher, after its own."""

        backend_type = "torch_products"
        priority = 10

        def chunk_bwd_dqkwg_verifier(self, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[bool, str | None]:
            """Whether it is the case written out here."""
            plain = not rest.get("state_v_first") and rest.get("cu_seqlens") is None and rest.get("g_gamma") is None
            gated = all(rest.get(name) is not None for name in ("g", "w", "dv"))
            return plain and gated and q.shape[2] == v.shape[2], "only the gated delta rule on equal lengths"

        def chunk_bwd_dqkwg(self, q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> tuple[Tensor, ...]:
            """The step, in the library's own arguments."""
            scale = k.shape[-1] ** -0.5 if rest.get("scale") is None else rest["scale"]
            do, h, dh, dv, g = (rest[name] for name in ("do", "h", "dh", "dv", "g"))
            with torch.autocast(q.device.type, enabled=False):
                return chunk_gradients(q, k, v, do, h, dh, dv, g, scale, rest.get("chunk_size", 64))

    register("common")(Products)
