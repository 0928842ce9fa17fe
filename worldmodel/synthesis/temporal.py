"""Windows over frames, plain and dilated: attention that is linear in the number of frames.

Shapes: T frames, N tokens a frame, E heads, d head size. One definition of a window (`frame_offsets`, `block_ends`)
serves the folded form that runs by default and the block-sparse one for GPUs; the dense reference states it a second
time, to test by.
"""

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.errors import ConfigError
from worldmodel.nn import apply_rope, attend, attention_bias


class Keys(NamedTuple):
    """Rotated keys and values of consecutive frames, with the presence of every token."""

    k: Tensor  # (B, T, N, E, d)
    v: Tensor  # (B, T, N, E, d)
    mask: Tensor  # (B, T, N)


def frame_offsets(window: int, dilation: int) -> list[int]:
    """Frame differences key - query that a query may see: fewer than `window` dilated steps away, on both sides."""
    return [step * dilation for step in range(1 - window, window)]


def block_ends(queries: int, blocks: Sequence[int] | None) -> list[int]:
    """For each query frame, the number of the first one that it may not see: frames of one block see each other and
    what came before them. `blocks` are the sizes of consecutive blocks; None is one block of all.

    Raises `ConfigError` if the blocks do not make up the frames.
    """
    sizes = [queries] if blocks is None else list(blocks)
    if sum(sizes) != queries:
        raise ConfigError(f"blocks of {sizes} frames do not make up {queries} frames")
    return [sum(sizes[: i + 1]) for i, size in enumerate(sizes) for _ in range(size)]


def block_sizes(frames: int, block: int | None) -> tuple[int, ...] | None:
    """Blocks of `block` frames that end with the newest frame; the first takes the rest. None is one block of all."""
    if block is None or block >= frames:
        return None
    rest = frames % block
    return (*([rest] if rest else []), *([block] * (frames // block)))


def joined(past: Keys | None, own: Keys) -> Keys:
    """The frames of `past`, then those of `own`."""
    return own if past is None else Keys(*(torch.cat(pair, dim=1) for pair in zip(past, own, strict=True)))


def newest(keys: Keys, frames: int) -> Keys:
    """The last `frames` frames, or all where there are no more."""
    return keys if keys.k.shape[1] <= frames else Keys(*(x[:, -frames:] for x in keys))


def dense_window_mask(
    queries: int, keys: int, start: int, window: int, dilation: int, blocks: Sequence[int] | None = None
) -> Tensor:
    """Reference: (queries, keys) boolean mask of frames, where query frame i stands at position start + i."""
    position = start + torch.arange(queries)
    difference = torch.arange(keys)[None] - position[:, None]
    seen = (difference % dilation == 0) & (difference.abs() < window * dilation)
    if blocks is None:
        return seen
    number = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))
    return seen & (F.pad(number, (start, 0), value=-1)[None] <= number[:, None])


def windowed_attention_dense(
    q: Tensor,
    keys: Keys,
    *,
    window: int,
    dilation: int,
    extra: tuple[Tensor, Tensor] | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:
    """Reference form of `windowed_attention`: every pair of tokens under one dense mask."""
    b, tq, n, e, d = q.shape
    tk, m = keys.k.shape[1], keys.k.shape[2]
    frames = dense_window_mask(tq, tk, tk - tq, window, dilation, blocks).to(q.device)
    mask = frames[None, :, None, :, None] & keys.mask[:, None, None]
    mask = mask.expand(b, tq, n, tk, m).reshape(b, 1, tq * n, tk * m)
    k, v = keys.k.flatten(1, 2), keys.v.flatten(1, 2)
    if extra is not None:
        k, v = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1)
        mask = F.pad(mask, (0, extra[0].shape[1]), value=True)
    return attend(q.flatten(1, 2), k, v, mask).unflatten(1, (tq, n))


def windowed_attention(
    q: Tensor,
    keys: Keys,
    *,
    window: int,
    dilation: int,
    extra: tuple[Tensor, Tensor] | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:
    """Attention of the last frames over a (dilated) window of frames, with the frames folded into the batch.

    q is (B, Tq, N, E, d) and stands for the last Tq of the Tk frames of `keys`. `extra` holds keys and values
    (B, A, E, d) that every query sees; `blocks` bounds how far queries look ahead (see `block_ends`).
    -> (B, Tq, N, E, d). Cost grows with Tq, not with Tq Tk.
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
    if blocks is not None:
        seen = torch.tensor([[i + o < end for o in offsets] for i, end in enumerate(block_ends(tq, blocks))])
        mask = mask & seen.to(mask.device).repeat_interleave(keys.k.shape[2], dim=1).repeat(b, 1)
    if extra is not None:
        more_k, more_v = (x[:, None].expand(-1, tq, -1, -1, -1).flatten(0, 1) for x in extra)
        k, v = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], more_k.shape[1])], 1)
    return attend(q.flatten(0, 1), k, v, mask[:, None, None]).unflatten(0, (b, tq))


@lru_cache(maxsize=64)
def window_blocks(
    queries: int,
    keys: int,
    start: int,
    tokens: tuple[int, int],
    extra: int,
    window: int,
    dilation: int,
    blocks: tuple[int, ...] | None,
    device: str,
) -> Any:
    """Block mask of `flex_attention` for frames of `tokens` (queries, keys) tokens, before `extra` keys for all."""
    from torch.nn.attention.flex_attention import create_block_mask

    place = torch.arange(keys, device=device)
    difference = place - (start + torch.arange(queries, device=device))[:, None]
    sees = torch.isin(difference, torch.tensor(frame_offsets(window, dilation), device=device))
    sees &= place < start + torch.tensor(block_ends(queries, blocks), device=device)[:, None]
    sees = F.pad(sees, (0, 1), value=True)  # the frame after the last stands for the extra keys

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return sees[query // tokens[0], (key // tokens[1]).clamp(max=keys)]

    size = (queries * tokens[0], keys * tokens[1] + extra)
    return create_block_mask(visible, None, None, *size, device=device)


untraced_blocks: Any = torch.compiler.disable(window_blocks)
"""`window_blocks` in compiled code, whose tracer looks through the cache and would make them at every call."""


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """`flex_attention` as a fused kernel, one for each shape."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def windowed_attention_flex(
    q: Tensor,
    keys: Keys,
    *,
    window: int,
    dilation: int,
    extra: tuple[Tensor, Tensor] | None = None,
    blocks: Sequence[int] | None = None,
) -> Tensor:
    """The same as `windowed_attention` by block-sparse kernels, which copy no keys: for GPUs.

    Raises `ConfigError` where a gradient is asked for on a CPU, for which torch has none.
    """
    from torch.nn.attention.flex_attention import flex_attention

    b, tq, n, e, d = q.shape
    tk, m = keys.k.shape[1], keys.k.shape[2]
    more, sizes = 0 if extra is None else extra[0].shape[1], None if blocks is None else tuple(blocks)
    pattern = untraced_blocks(tq, tk, tk - tq, (n, m), more, window, dilation, sizes, str(q.device))
    k, v, mask = keys.k.flatten(1, 2), keys.v.flatten(1, 2), keys.mask.flatten(1, 2)
    if extra is not None:
        k, v, mask = torch.cat([k, extra[0]], 1), torch.cat([v, extra[1]], 1), F.pad(mask, (0, more), value=True)
    bias = attention_bias(mask, torch.float32)

    def absent(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[batch, key]

    q, k, v = (x.transpose(1, 2) for x in (q.flatten(1, 2), k, v))
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast knows no flex_attention and leaves normalised ones in float32
    cpu = q.device.type == "cpu"
    if cpu and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ConfigError("attention: flex has no gradient on a CPU; folded and dense have")
    if torch.compiler.is_compiling():
        out = flex_attention(q, k, v, score_mod=absent, block_mask=pattern)
    elif cpu:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*flex_attention.*")  # it says that it is slow here
            out = flex_attention(q, k, v, score_mod=absent, block_mask=pattern)
    else:
        with torch._dynamo.config.patch(recompile_limit=64):
            out = compiled_flex()(q, k, v, score_mod=absent, block_mask=pattern)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).unflatten(1, (tq, n))


FORMS = {"folded": windowed_attention, "dense": windowed_attention_dense, "flex": windowed_attention_flex}


class WindowAttention(nn.Module):
    """Self-attention over a window of frames; with `dilation` > 1 over every dilation-th frame.

    `attention` names one of the `FORMS`, which differ in speed alone.
    """

    def __init__(self, *, width: int, heads: int, window: int, dilation: int, attention: str = "folded") -> None:
        super().__init__()
        if attention not in FORMS:
            raise ConfigError(f"synthesis.denoiser.attention: unknown {attention!r}; one of {', '.join(FORMS)}")
        self.attention = attention
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
        blocks: Sequence[int] | None = None,
    ) -> tuple[Tensor, Keys]:
        """x (B, T, N, W) under mask (B, T, N), after the frames of `past` -> output and the keys of x's own frames."""
        q = apply_rope(self.q_norm(self.q(x)).unflatten(-1, (self.heads, -1)), rope)
        k = apply_rope(self.k_norm(self.k(x)).unflatten(-1, (self.heads, -1)), rope)
        own = Keys(k, self.v(x).unflatten(-1, (self.heads, -1)), mask)
        seen = joined(past, own)
        form = FORMS[self.attention]
        out = form(q, seen, window=self.window, dilation=self.dilation, extra=extra, blocks=blocks)
        return self.out(out.flatten(-2)), own
