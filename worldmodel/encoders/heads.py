"""What stage 1 understands: read-outs that are evaluated, not only trained."""

from torch import Tensor, nn

from worldmodel.contracts import Fused
from worldmodel.nn import AttentionPool, FeedForward


class CameraHead(nn.Module):
    """Pose and vertical field of view from the tokens of one image."""

    def __init__(self, *, width: int, heads: int, queries: int) -> None:
        super().__init__()
        self.pool = AttentionPool(width=width, heads=heads, queries=queries)
        self.out = FeedForward(width=queries * width, hidden=2 * width, out=10)

    def forward(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, V, cells, W) -> standardised pose (B, V, 9) and field of view (B, V) in radians."""
        b, v = image_tokens.shape[:2]
        flat = image_tokens.flatten(0, 1)
        pooled = self.pool(flat, flat.new_ones(flat.shape[:2]).bool())
        out = self.out(pooled.flatten(1)).unflatten(0, (b, v))
        return out[..., :9], 0.8 + 0.2 * out[..., 9]


class QueryHead(nn.Module):
    """One learned question per slot (point or sensor) to the fused tokens."""

    def __init__(self, *, width: int, heads: int, slots: int, out: int) -> None:
        super().__init__()
        self.pool = AttentionPool(width=width, heads=heads, queries=slots)
        self.out = FeedForward(width=width, hidden=width, out=out)

    def forward(self, fused: Fused) -> Tensor:
        """-> (B, slots, out)."""
        return self.out(self.pool(fused.tokens, fused.mask))
