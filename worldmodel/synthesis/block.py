"""One block of the video transformer: AdaLN, hybrid temporal mixing, cross-attention to the context, feed-forward."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from worldmodel.contracts import Fused
from worldmodel.errors import ConfigError
from worldmodel.nn import CrossAttention, FeedForward, modulate, modulation_table
from worldmodel.synthesis.delta import DeltaState, GatedDelta
from worldmodel.synthesis.temporal import Keys, WindowAttention

LAYERS = ("swa", "dswa", "gated")


class SynthesisBlock(nn.Module):
    """AdaLN -> temporal mixing -> cross-attention to the context -> feed-forward, with six modulation vectors."""

    def __init__(
        self,
        *,
        kind: str,
        width: int,
        heads: int,
        hidden: int,
        context: int,
        window: int,
        dilation: int,
        gate: float,
        attention: str,
        delta: Mapping[str, Any],
    ) -> None:
        super().__init__()
        if kind not in LAYERS:
            raise ConfigError(f"unknown layer kind {kind!r} in the pattern; one of {', '.join(LAYERS)}")
        self.kind = kind
        step = dilation if kind == "dswa" else 1
        self.reach = 0 if kind == "gated" else (window - 1) * step
        if kind == "gated":
            self.mix = GatedDelta(width=width, heads=heads, **delta)
        else:
            self.mix = WindowAttention(width=width, heads=heads, window=window, dilation=step, attention=attention)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross = CrossAttention(width=width, context=context, heads=heads)
        self.feed_forward = FeedForward(width=width, hidden=hidden)
        self.table = modulation_table(width, gate)

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        vectors: Tensor,
        rope: tuple[Tensor, Tensor],
        context: Fused,
        past: Keys | DeltaState | None,
        extra: tuple[Tensor, Tensor] | None,
        blocks: Sequence[int] | None = None,
    ) -> tuple[Tensor, Keys | DeltaState]:
        """x (B, T, N, W), vectors (B, 1 or T, N, 6, W) -> x and what this layer keeps of these frames."""
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = (vectors + self.table).unbind(-2)
        normed = modulate(self.norm(x), scale_a, shift_a)
        if isinstance(self.mix, GatedDelta):
            mixed, kept = self.mix(normed, mask, past if isinstance(past, DeltaState) else None)
        else:
            mixed, kept = self.mix(normed, mask, rope, past if isinstance(past, Keys) else None, extra, blocks)
        x = x + gate_a * mixed
        t, n = x.shape[1:3]
        x = x + self.cross(self.cross_norm(x).flatten(1, 2), context.tokens, context.mask).unflatten(1, (t, n))
        return x + gate_f * self.feed_forward(modulate(self.norm(x), scale_f, shift_f)), kept
