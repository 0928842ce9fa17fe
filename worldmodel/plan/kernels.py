"""Kernels of a GPU as far as a count is concerned: what they multiply and what they keep for the backward pass."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from worldmodel.model import WorldModel
from worldmodel.plan.ledger import Ledger
from worldmodel.synthesis import temporal
from worldmodel.synthesis.delta import GatedDelta
from worldmodel.synthesis.temporal import Keys, dense_window_mask

PRECISE = {
    *("layer_norm", "group_norm", "softmax", "log_softmax", "softplus", "exp", "expm1", "log", "log1p", "rsqrt"),
    *("reciprocal", "pow", "cumsum", "norm", "sinh", "acos", "asin", "sum", "prod"),
}
"""Functions that autocast runs in float32 on a GPU and not on a CPU (torch's lists of operations)."""
CHUNK = 64
"""Tokens of a chunk in the fused kernels of the gated delta rule; they keep one row of that length per token."""


class Kernel(torch.autograd.Function):
    """A fused kernel of `flops` FLOPs that keeps what it reads, its answer and some numbers more.

    The backward pass takes twice the FLOPs of the forward pass: two products for each of its own. That flash attention
    multiplies its scores again is not counted, as nothing is that is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any, ledger: Ledger, flops: float, shape: Sequence[int], more: Sequence[tuple[Any, ...]], *read: Tensor
    ) -> Tensor:
        """Answer of `shape` in the type of the last tensor read; `more` has (dtype, shape) of what else is kept."""
        ledger.add(flops)
        out = read[-1].new_empty(shape)
        rest = [torch.empty(size, dtype=dtype, device=out.device) for dtype, size in more]
        ctx.save_for_backward(*read, out, *rest)
        ctx.ledger, ctx.flops, ctx.part, ctx.count = ledger, flops, ledger.part, len(read)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of what was read."""
        ctx.ledger.add(2 * ctx.flops, ctx.part)
        read = ctx.saved_tensors[: ctx.count]
        wanted = zip(read, ctx.needs_input_grad[4:], strict=True)
        return (None, None, None, None, *(torch.empty_like(x) if needed else None for x, needed in wanted))


class AsOnGPU(TorchFunctionMode):
    """On fake tensors of a CPU under autocast, does what a GPU would: types of `PRECISE`, and flash attention."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.needed: float | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self.attention(*args, **kwargs)
        if name in PRECISE and torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args)
        return func(*args, **kwargs)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Flash attention (Dao 2023, arXiv 2307.08691): scores are never stored, one number per query is."""
        q, k, v = same_type(query, key, value)
        flops = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (k.shape[-1] + v.shape[-1])
        flops = flops if self.needed is None else self.needed
        kept = [(torch.float32, q.shape[:-1])]
        shape = (*q.shape[:-1], v.shape[-1])
        return Kernel.apply(self.ledger, flops, shape, kept, q, k, v)  # pyright: ignore[reportReturnType]

    def window(
        self,
        form: str,
        q: Tensor,
        keys: Keys,
        *,
        window: int,
        dilation: int,
        extra: tuple[Tensor, Tensor] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> Tensor:
        """Windowed attention: 4 d per pair of tokens that see each other, whatever a form multiplies besides."""
        b, tq, n, e, d = q.shape
        tk, m = keys.k.shape[1], keys.k.shape[2]
        # The mask is numbers, not a tensor of the step.
        with _disable_current_modes():
            seen = int(dense_window_mask(tq, tk, tk - tq, window, dilation, blocks).sum()) * n * m
        self.needed = 4.0 * b * e * d * (seen + (0 if extra is None else tq * n * extra[0].shape[1]))
        try:
            if form != "flex":
                exact = temporal.windowed_attention if form == "folded" else temporal.windowed_attention_dense
                return exact(q, keys, window=window, dilation=dilation, extra=extra, blocks=blocks)
            k, v = keys.k.flatten(1, 2), keys.v.flatten(1, 2)
            if extra is not None:
                k, v = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
            q, k, v = (x.transpose(1, 2) for x in (q.flatten(1, 2), k, v))
            return self.attention(q, k, v).transpose(1, 2).unflatten(1, (tq, n))
        finally:
            self.needed = None

    def rule(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Gated delta rule in the fused form: 6 dk dv per token and head; kept as flash-linear-attention does."""
        b, m, e, dv = v.shape
        flops = 6.0 * b * m * e * q.shape[3] * dv
        kept = [(v.dtype, (b, m, e, CHUNK))]
        read = (state.float(), g.float(), *(x.to(v.dtype) for x in (beta, q, k)), v)
        out = Kernel.apply(self.ledger, flops, v.shape, kept, *read)
        last = Kernel.apply(self.ledger, 0, state.shape, [], k.to(v.dtype), read[0])
        return out, last  # pyright: ignore[reportReturnType]


def same_type(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast makes of the arguments of an attention."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    kind = v.dtype
    return q.to(kind), k.to(kind), v


def inside(mode: AsOnGPU, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `mode`, whenever it runs."""

    def run(*args: Any) -> Any:
        with mode:
            return function(*args)

    return run


@contextmanager
def gpu_kernels(models: Sequence[WorldModel], ledger: Ledger) -> Iterator[None]:
    """Until it is left, attention and the gated delta rule of `models` are counted instead of computed."""
    mode = AsOnGPU(ledger)

    def form(name: str) -> Any:
        return lambda q, keys, **settings: mode.window(name, q, keys, **settings)

    with ExitStack() as stack:
        stack.enter_context(patch.dict(temporal.FORMS, {name: form(name) for name in temporal.FORMS}))
        for block in (block for model in models for block in model.denoiser.blocks):
            if isinstance(block.mix, GatedDelta):
                stack.enter_context(patch.object(block.mix, "rule", mode.rule))
            # What checkpointing computes again runs inside the backward pass, which leaves the mode.
            stack.enter_context(patch.object(block, "forward", inside(mode, block.forward)))
        stack.enter_context(mode)
        yield
