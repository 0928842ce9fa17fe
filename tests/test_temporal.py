"""Windows and the gated delta rule: every fast form equals its reference, forward and gradients."""

import math

import pytest
import torch

from worldmodel.errors import ConfigError
from worldmodel.nn import apply_rope, rope_table
from worldmodel.synthesis.delta import GatedDelta, gated_delta_chunked, gated_delta_recurrent, invert_unit_lower
from worldmodel.synthesis.hopper import chunk_gradients
from worldmodel.synthesis.temporal import (
    Keys,
    WindowAttention,
    dense_window_mask,
    frame_offsets,
    windowed_attention,
    windowed_attention_dense,
    windowed_attention_flex,
)


def test_offsets_and_dense_mask_are_the_same_window():
    for window, dilation in ((1, 1), (3, 1), (3, 4), (2, 2)):
        mask = dense_window_mask(12, 12, 0, window, dilation)
        expected = torch.zeros(12, 12, dtype=torch.bool)
        for query in range(12):
            for offset in frame_offsets(window, dilation):
                if 0 <= query + offset < 12:
                    expected[query, query + offset] = True
        assert torch.equal(mask, expected)


@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (3, 2), (2, 4), (1, 1)])
@pytest.mark.parametrize("actions", [0, 3])
def test_folded_window_equals_dense(window, dilation, actions):
    g = torch.Generator().manual_seed(0)
    b, tq, tk, n, e, d = 2, 4, 7, 3, 2, 8
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    q, k, v = draw(b, tq, n, e, d), draw(b, tk, n, e, d), draw(b, tk, n, e, d)
    extra = (draw(b, actions, e, d), draw(b, actions, e, d)) if actions else None
    mask = torch.rand(b, tk, n, generator=g) < 0.7
    mask[..., 0] = True
    results = []
    for form in (windowed_attention, windowed_attention_dense):
        out = form(q, Keys(k, v, mask), window=window, dilation=dilation, extra=extra)
        leaves = [q, k, v, *(extra or ())]
        results.append((out, torch.autograd.grad(out.square().sum(), leaves)))
    (folded, grads), (dense, dense_grads) = results
    torch.testing.assert_close(folded, dense)
    for a, c in zip(grads, dense_grads, strict=True):
        torch.testing.assert_close(a, c)
    with torch.no_grad():
        single = [x.float() for x in (q, k, v)]
        more = (extra[0].float(), extra[1].float()) if extra else None
        keys = Keys(single[1], single[2], mask)
        flex = windowed_attention_flex(single[0], keys, window=window, dilation=dilation, extra=more)
    torch.testing.assert_close(flex, dense.float(), atol=1e-5, rtol=1e-5)


def test_forms_that_cannot_run_here_say_so():
    x, mask = torch.randn(1, 2, 3, 16), torch.ones(1, 2, 3, dtype=torch.bool)
    rope = (torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match="flex has no gradient on a CPU; folded and dense have"):
        WindowAttention(width=16, heads=2, window=2, dilation=1, attention="flex")(x, mask, rope, None, None)
    with pytest.raises(ConfigError, match="unknown 'sparse'; one of folded, dense, flex"):
        WindowAttention(width=16, heads=2, window=2, dilation=1, attention="sparse")
    with pytest.raises(ConfigError, match="unknown 'fast'; one of auto, chunked, recurrent, fused"):
        GatedDelta(width=16, heads=2, form="fast")
    with pytest.raises(ConfigError, match=r"fused (needs `pip install flash-linear-attention`|works on a GPU)"):
        GatedDelta(width=16, heads=2, form="fused")(x, mask, None)


def delta_inputs(length, strong=1.0):
    g = torch.Generator().manual_seed(1)
    b, e, dk, dv = 2, 2, 8, 12
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q = torch.nn.functional.normalize(draw(b, length, e, dk), dim=-1)
    k = torch.nn.functional.normalize(draw(b, length, e, dk), dim=-1)
    gate = -strong * draw(b, length, e).abs()
    values = [q, k, draw(b, length, e, dv), gate, draw(b, length, e).sigmoid(), draw(b, e, dk, dv)]
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize("length", [1, 5, 16, 37])
@pytest.mark.parametrize("strong", [0.05, 1.0, 200.0])
def test_chunked_delta_rule_equals_recurrent(length, strong):
    inputs = delta_inputs(length, strong)
    results = []
    for form in (gated_delta_recurrent, lambda *x: gated_delta_chunked(*x, chunk=8)):
        out, state = form(*inputs)
        results.append((out, state, torch.autograd.grad(out.square().sum() + state.square().sum(), inputs)))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    for a, c in zip(results[0][2], results[1][2], strict=True):
        assert torch.isfinite(c).all()
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("length", [8, 13])
def test_the_step_for_hopper_is_the_gradient(length):
    """Of what one chunk computes from its state, its written values given: by automatic differentiation."""
    g = torch.Generator().manual_seed(2)
    b, e, dk, dv, chunk, scale = 2, 3, 5, 6, 4, 0.7
    n = -(-length // chunk)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    q, k, w = (draw(b, length, e, dk).requires_grad_() for _ in range(3))
    v, do, d_values = (draw(b, length, e, dv) for _ in range(3))
    h, dh = draw(b, n, e, dk, dv), draw(b, n, e, dk, dv)
    decay = -draw(b, length, e).abs().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    sums = []
    for i, part in enumerate(range(0, length, chunk)):
        at = slice(part, min(part + chunk, length))
        c = decay[:, at].cumsum(1)
        sums.append(c)
        scores = torch.einsum("bieh,bjeh->beij", q[:, at], k[:, at])
        between = (c[:, :, None] - c[:, None]).permute(0, 3, 1, 2).exp().tril()
        out = torch.einsum("bieh,behv->biev", q[:, at] * c.exp()[..., None], h[:, i])
        out = scale * (out + torch.einsum("beij,bjev->biev", scores * between, v[:, at]))
        keys = k[:, at] * (c[:, -1:] - c).exp()[..., None]
        state = c[:, -1].exp()[..., None, None] * h[:, i] + torch.einsum("bieh,biev->behv", keys, v[:, at])
        written = v[:, at] - torch.einsum("bieh,behv->biev", w[:, at], h[:, i])
        total = total + (out * do[:, at]).sum() + (state * dh[:, i]).sum() + (written * d_values[:, at]).sum()
    expected = torch.autograd.grad(total, [q, k, w, decay])
    cumulative = torch.cat(sums, 1).detach() / math.log(2)
    with torch.no_grad():
        *found, dg = chunk_gradients(q, k, v, do, h, dh, d_values, cumulative, scale, chunk)
    # The library adds up the decay's gradient from the end of each chunk in a step after this one.
    parts = [part.flip(1).cumsum(1).flip(1) for part in dg.split(chunk, 1)]
    for value, reference in zip([*found, torch.cat(parts, 1)], expected, strict=True):
        torch.testing.assert_close(value, reference)


def test_chunks_are_exact_under_autocast():
    inputs = [x.detach().float() for x in delta_inputs(37)]
    expected = gated_delta_chunked(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = gated_delta_chunked(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_inverse_survives_identical_keys():
    """Equal keys written at full strength make L a matrix of ones: powers of it explode, block doubling does not."""
    lower = torch.ones(64, 64).tril(-1)
    inverse = invert_unit_lower(lower)
    torch.testing.assert_close(inverse @ (lower + torch.eye(64)), torch.eye(64))


@pytest.mark.parametrize("layer", ["window", "delta"])
def test_layers_continue_from_what_they_kept(layer):
    """Reading frames in two parts equals reading them at once, where the first part may not look ahead."""
    torch.manual_seed(0)
    x, mask = torch.randn(2, 5, 6, 16), torch.rand(2, 5, 6) < 0.8
    if layer == "delta":
        module = GatedDelta(width=16, heads=2)
        whole, _ = module(x, mask, None)
        first, kept = module(x[:, :3], mask[:, :3], None)
        second, _ = module(x[:, 3:], mask[:, 3:], kept)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-5)
        return
    module = WindowAttention(width=16, heads=2, window=3, dilation=1)
    rope = (torch.ones(5, 6, 4), torch.zeros(5, 6, 4))
    part = lambda a, b: tuple(r[a:b] for r in rope)  # noqa: E731
    mask[..., 0] = True
    _, kept = module(x[:, :3], mask[:, :3], part(0, 3), None, None)
    second, _ = module(x[:, 3:], mask[:, 3:], part(3, 5), kept, None)
    whole, _ = module(x, mask, rope, None, None)
    torch.testing.assert_close(second, whole[:, 3:])


def test_absent_tokens_leave_no_trace():
    """What stands in a masked token changes no other token's output, in either kind of layer."""
    torch.manual_seed(0)
    x, mask = torch.randn(1, 4, 5, 16), torch.ones(1, 4, 5, dtype=torch.bool)
    mask[:, :, 2] = False
    other = x.clone()
    other[:, :, 2] = 100.0
    rope = (torch.ones(4, 5, 4), torch.zeros(4, 5, 4))
    for out in (
        lambda y: GatedDelta(width=16, heads=2)(y, mask, None)[0],
        lambda y: WindowAttention(width=16, heads=2, window=2, dilation=2)(y, mask, rope, None, None)[0],
    ):
        torch.manual_seed(1)
        a = out(x)
        torch.manual_seed(1)
        b = out(other)
        torch.testing.assert_close(a[:, :, [0, 1, 3, 4]], b[:, :, [0, 1, 3, 4]])


def test_an_exported_rotation_is_the_rotation() -> None:
    class Rotation(torch.nn.Module):
        def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return apply_rope(x, rope_table(places, 12))

    x, places = torch.randn(2, 5, 3, 12, generator=torch.Generator().manual_seed(0)), torch.arange(15.0).view(5, 3)
    exported = torch.export.export(Rotation(), (x, places), strict=False).module()
    torch.testing.assert_close(exported(x, places), Rotation()(x, places), atol=1e-6, rtol=0)
