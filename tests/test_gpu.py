"""On a GPU: what has no gradient on a CPU, or no kernel, equals its reference there. Skipped where there is none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_acceleration import step_loss
from test_model import future_of, generator, observation_of
from torch import Tensor

from worldmodel.acceleration import accelerated
from worldmodel.contracts import Batch
from worldmodel.synthesis.delta import (
    FORMS,
    GatedDelta,
    fused_installed,
    gated_delta_chunked,
    gated_delta_fused,
    gated_delta_recurrent,
)
from worldmodel.synthesis.temporal import Keys, WindowAttention, windowed_attention_dense, windowed_attention_flex

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # compilers and kernels warn of what is not ours
]
needs_fla = pytest.mark.skipif(not fused_installed(), reason="needs flash-linear-attention")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.5e-2}
"""Largest length of an error over that of the reference: what the type's own rounding leaves."""


def error(found: Tensor, reference: Tensor) -> float:
    """Length of the error over that of the reference, which is in float64."""
    return float((found.detach().double() - reference).norm() / reference.norm())


def run(form: Callable[..., Any], inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Output and gradients of a weighted sum of it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = form(*leaves)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out)).sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "dilation", "actions", "blocks"), [(3, 1, 0, None), (3, 2, 5, None), (3, 1, 5, (1, 3))]
)
def test_flex_gradients_equal_dense(dtype, window, dilation, actions, blocks):
    """With keys from before, absent tokens, and keys that every query sees; frames fill no block of the kernel."""
    g = generator(int(dtype == torch.float32))
    b, tq, tk, n, e, d = 2, 4, 7, 75, 2, 32
    draw = lambda *shape: torch.randn(*shape, generator=g).to("cuda", dtype)  # noqa: E731
    inputs = [draw(b, tq, n, e, d), draw(b, tk, n, e, d), draw(b, tk, n, e, d)]
    inputs += [draw(b, actions, e, d), draw(b, actions, e, d)] if actions else []
    mask = torch.rand(b, tk, n, generator=g).cuda() < 0.7

    def attention(form: Any) -> Any:
        def apply(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
            keys, more = Keys(k, v, mask), extra or None
            return form(q, keys, window=window, dilation=dilation, extra=more, blocks=blocks)

        return apply

    weights = draw(b, tq, n, e, d)
    reference = run(attention(windowed_attention_dense), [x.double() for x in inputs], weights)
    found = run(attention(windowed_attention_flex), inputs, weights)
    for name, value, expected in zip(("out", "q", "k", "v", "extra k", "extra v"), found, reference, strict=False):
        assert error(value, expected) < TOLERANCE[dtype], name


def delta_inputs(strong: float) -> list[Tensor]:
    """Random inputs of the gated delta rule, rounded to bfloat16 as far as the kernels do."""
    g = generator(5)
    b, length, e, dk, dv = 2, 300, 2, 64, 128
    draw = lambda *shape: torch.randn(*shape, generator=g).cuda()  # noqa: E731
    q, k = (torch.nn.functional.normalize(draw(b, length, e, dk), dim=-1) for _ in range(2))
    q, k, v = (x.bfloat16().float() for x in (q, k, draw(b, length, e, dv)))
    gate = -strong * draw(b, length, e).abs()
    return [q, k, v, gate, draw(b, length, e).sigmoid().bfloat16().float(), draw(b, e, dk, dv)]


def joined(form: Callable[..., Any]) -> Callable[..., Tensor]:
    """Output and last state as one vector."""
    return lambda *x: torch.cat([part.float().flatten() for part in form(*x)])


@pytest.mark.parametrize("strong", [0.05, 1.0])
def test_chunked_delta_rule_equals_recurrent_in_float32(strong):
    inputs = delta_inputs(strong)
    weights = torch.randn(2 * 300 * 2 * 128 + 2 * 2 * 64 * 128, generator=generator(6)).cuda()
    reference = run(
        lambda *x: torch.cat([part.flatten() for part in gated_delta_recurrent(*x)]),
        [x.double() for x in inputs],
        weights,
    )
    found = run(joined(gated_delta_chunked), inputs, weights)
    for name, value, expected in zip(("out", "q", "k", "v", "g", "beta", "state"), found, reference, strict=True):
        assert error(value, expected) < 1e-4, name


@needs_fla
@pytest.mark.parametrize("strong", [0.05, 1.0])
def test_fused_delta_rule_equals_recurrent(strong):
    """Forward, last state and gradients, from a state that is not zero, over a length that fills no chunk."""
    inputs = delta_inputs(strong)
    weights = torch.randn(2 * 300 * 2 * 128 + 2 * 2 * 64 * 128, generator=generator(6)).cuda()
    reference = run(
        lambda *x: torch.cat([part.flatten() for part in gated_delta_recurrent(*x)]),
        [x.double() for x in inputs],
        weights,
    )

    def fused(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        return joined(gated_delta_fused)(q, k, v.bfloat16(), *rest)

    found = run(fused, inputs, weights)
    for name, value, expected in zip(("out", "q", "k", "v", "g", "beta", "state"), found, reference, strict=True):
        assert error(value, expected) < 1.5e-2, name


def gradients(model: Any, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss and all gradients of the joint mode, in one vector."""
    move = lambda values: type(values)(*(x.cuda() for x in values))  # noqa: E731
    o, f = move(observation_of(model.spec)), move(future_of(model.spec))
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = step_loss(model, Batch(o, f, torch.zeros(2, 3, dtype=torch.int64), ["a", "b"]), "joint")
    loss.backward()
    loss = loss.detach()
    trained = [p for part in (model.denoiser, model.expert) for p in part.parameters() if p.grad is not None]
    return float(loss), torch.cat([p.grad.flatten() for p in trained])


@needs_fla
@pytest.mark.parametrize(("compiled", "checkpointing"), [(False, "none"), (True, "full")])
def test_fast_paths_train_like_the_plain_ones(tiny_model, compiled, checkpointing):
    """Flex and fused kernels in bfloat16, compiled and checkpointed, against plain torch in float32."""
    model = tiny_model.cuda().train()
    loss, expected = gradients(model, torch.float32)
    plain, rounded = gradients(model, torch.bfloat16)
    for block in model.denoiser.blocks:
        if isinstance(block.mix, GatedDelta):
            block.mix.rule = FORMS["fused"]
        else:
            assert isinstance(block.mix, WindowAttention)
            block.mix.attention = "flex"
    with accelerated(model, compiled=compiled, checkpointing=checkpointing):
        fast, found = gradients(model, torch.bfloat16)
    assert fast == pytest.approx(loss, rel=2e-2)
    # Rounding is that of the type; the fast paths must not add to it.
    assert error(found, expected.double()) < 1.5 * error(rounded, expected.double()) + 1e-3
    assert plain == pytest.approx(loss, rel=2e-2)
