"""Fused kernels of a GPU as far as a count is concerned: what they multiply, and what they keep to go backward."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from worldmodel.model import WorldModel
from worldmodel.plan.meter import Meter
from worldmodel.synthesis import temporal
from worldmodel.synthesis.delta import GatedDelta
from worldmodel.synthesis.temporal import Keys, dense_window_mask

CHUNK = 64
"""Tokens of a chunk in the fused kernels of the gated delta rule, which keep one row of that length per token."""


def needed(form: Callable[..., Tensor], meter: Meter) -> Callable[..., Tensor]:
    """A form of windowed attention that counts 4 d per pair of tokens that see each other, whatever it pads."""

    def run(
        q: Tensor,
        keys: Keys,
        *,
        window: int,
        dilation: int,
        extra: tuple[Tensor, Tensor] | None = None,
        blocks: Sequence[int] | None = None,
    ) -> Tensor:
        tq, (tk, m) = q.shape[1], keys.k.shape[1:3]
        with _disable_current_modes():  # the mask is no tensor of the step
            seen = int(dense_window_mask(tq, tk, tk - tq, window, dilation, blocks).sum()) * m
        more = 0 if extra is None else tq * extra[0].shape[1]
        # Folded, every query has as many keys as there are offsets; else all.
        offsets = [o for o in temporal.frame_offsets(window, dilation) if -tk < o < tq]
        columns = len(offsets) if form is temporal.windowed_attention else tk
        meter.share = (seen + more) / (tq * columns * m + more)
        try:
            return form(q, keys, window=window, dilation=dilation, extra=extra, blocks=blocks)
        finally:
            meter.share = 1.0

    return run


class Rule(torch.autograd.Function):
    """The fused gated delta rule: 6 dk dv FLOPs per token and head, twice that backward; keeps what it reads, its
    answer and a row of numbers per token."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Any:
        """Answer and last state."""
        out = torch.empty_like(v)
        ctx.save_for_backward(q, k, v, g, beta, state, out, v.new_empty(*v.shape[:3], CHUNK))
        return out, torch.empty_like(state)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of all that was read."""
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:6])


class Norm(torch.autograd.Function):
    """The fused root-mean-square norm, in float32 under autocast; keeps what it reads and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Answer."""
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of input and weight."""
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:2])


def flex(q: Tensor, keys: Keys, *, extra: tuple[Tensor, Tensor] | None = None, **_: Any) -> Tensor:
    """Block-sparse attention, which has no gradient on a CPU: as attention that copies no keys and stores no scores."""
    tq, n = q.shape[1:3]
    k, v = keys.k.flatten(1, 2), keys.v.flatten(1, 2)
    if extra is not None:
        k, v = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
    q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q.flatten(1, 2), k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(1, (tq, n))


@contextmanager
def gpu_kernels(model: WorldModel, meter: Meter) -> Iterator[None]:
    """Until it is left, norms, flex attention and the delta rule are fused, and windows count as needed.

    Other operations are those of a CPU, attention's flash kernel among them. Autocast is that of a CPU too: but for
    these norms, what it would keep in float32 on a GPU is small.
    """

    def norm(x: Tensor, shape: Any, weight: Tensor, eps: float | None = None) -> Tensor:
        return Norm.apply(x.float(), weight)  # pyright: ignore[reportReturnType]

    def rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        b, m, e, dv = v.shape
        flops = 6 * b * m * e * q.shape[3] * dv
        meter.add(flops, 2 * flops)
        return Rule.apply(q.to(v.dtype), k.to(v.dtype), v, g.float(), beta.to(v.dtype), state.float())  # pyright: ignore

    with ExitStack() as stack:
        forms = {name: needed(form, meter) for name, form in (temporal.FORMS | {"flex": flex}).items()}
        stack.enter_context(patch.dict(temporal.FORMS, forms))
        stack.enter_context(patch.object(F, "rms_norm", norm))
        for block in model.denoiser.blocks:
            if isinstance(block.mix, GatedDelta):
                stack.enter_context(patch.object(block.mix, "rule", rule))
        yield
