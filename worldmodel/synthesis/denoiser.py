"""The video transformer: all predicted streams as tokens of a latent frame, AdaLN blocks with hybrid temporal mixing.

Two passes share every weight. `remember` reads the clean history once and returns what the layers keep of it; the
blocks then read noisy future frames after that memory, beside the actions (the loop over both is in `joint.py`).
History never looks at the future, so the memory is exact for any number of denoising steps and for actions alone; and
it goes on from an earlier memory, so that a stream of any length is read piece by piece.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.contracts import STREAMS, Fused, WorldState
from worldmodel.errors import ConfigError
from worldmodel.nn import FeedForward, TimeEmbedding, modulate, rope_table
from worldmodel.synthesis.block import SynthesisBlock
from worldmodel.synthesis.conditions import ConditionEncoder, Given
from worldmodel.synthesis.source import Source, SourceEncoder
from worldmodel.synthesis.state import StreamState, carry
from worldmodel.synthesis.temporal import block_ends, block_sizes


class Tokens(NamedTuple):
    """Embedded streams: tokens (B, T, N, W), presence (B, T, N), number of each token's stream (length N)."""

    x: Tensor
    mask: Tensor
    stream: tuple[int, ...]


class Denoiser(nn.Module):
    """Velocity of every future stream given noisy futures, clean history, context and, if coupled, actions.

    `streams` are those it reads and predicts, as far as the robot has any of them; `anchored` those whose tokens are
    given the newest observed frame too; `rays` adds the Pluecker rays of known cameras to video tokens. `embed_context`
    puts a two-layer perceptron between the context and the cross-attention of all blocks; `gate` is where the gates of
    the blocks start; `attention` names the form of windowed attention, `delta` has settings of `GatedDelta`. `block` is
    how many frames of the history look ahead at one another (null: all that are read at once): with it, a long history
    read at once is what the same history is when it is read block by block. `conditions` reads what is given of the
    future (null: nothing can be), `source` another clip that the future follows (null: none can be). With the video
    stream alone, one view, no rays, neither of these two and `embed_context` this is the network of Kairos 3
    (arXiv 2606.16533).
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        hidden: int,
        context: int,
        pattern: Sequence[str],
        repeats: int,
        window: int,
        dilation: int,
        latent_channels: int,
        latent_size: tuple[int, int],
        patch: int,
        views: int,
        points: int,
        sensors: int,
        anchored: Sequence[str],
        streams: Sequence[str] = STREAMS,
        rays: bool = True,
        embed_context: bool = False,
        gate: float = 0.5,
        attention: str = "folded",
        delta: Mapping[str, Any] | None = None,
        block: int | None = None,
        conditions: ConditionEncoder | None = None,
        source: SourceEncoder | None = None,
        frequencies: int = 256,
    ) -> None:
        super().__init__()
        if block is not None and block < 1:
            raise ConfigError(f"synthesis.denoiser.block is {block}; it is a number of frames, 1 or more, or null")
        self.block = block
        for option, named in (("streams", streams), ("anchored", anchored)):
            if unknown := sorted(set(named) - set(STREAMS if option == "streams" else streams)):
                raise ConfigError(f"{option}: unknown stream {unknown[0]!r}; one of {', '.join(STREAMS)}")
        if not streams:
            raise ConfigError(f"streams: the video transformer needs at least one of {', '.join(STREAMS)}")
        self.patch = patch
        self.rows, self.columns = latent_size[0] // patch, latent_size[1] // patch
        self.head_dim = width // heads
        self.counts = {"video": views * self.rows * self.columns, "camera": views, "points": points, "force": sensors}
        self.streams = tuple(name for name in STREAMS if name in streams and self.counts[name])
        sizes = {"video": latent_channels * patch**2, "camera": 9, "points": 3, "force": 6}
        self.embed_in = nn.ModuleDict({name: nn.Linear(sizes[name], width) for name in self.streams})
        self.embed_anchor = nn.ModuleDict(
            {name: nn.Linear(sizes[name], width) for name in anchored if name in self.streams}
        )
        self.embed_rays = nn.Linear(6 * patch**2, width) if rays else None
        self.no_rays = nn.Parameter(torch.zeros(width)) if rays else None
        slots = {"video": views if views > 1 else 0, "camera": views, "points": points, "force": sensors}
        self.slot = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(count, width) * 0.02)
                for name, count in slots.items()
                if count and name in self.streams
            }
        )
        self.embed_context = FeedForward(width=context, hidden=width, out=width) if embed_context else None
        self.conditions, self.source = conditions, source
        self.time = TimeEmbedding(width=width, frequencies=frequencies)
        self.blocks = nn.ModuleList(
            SynthesisBlock(
                kind=kind,
                width=width,
                heads=heads,
                hidden=hidden,
                context=width if embed_context else context,
                window=window,
                dilation=dilation,
                gate=gate,
                attention=attention,
                delta=delta or {},
            )
            for kind in list(pattern) * repeats
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.embed_out = nn.ModuleDict({name: nn.Linear(width, sizes[name]) for name in self.streams})
        for head in self.embed_out.values():
            nn.init.zeros_(head.weight)  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(head.bias)  # pyright: ignore[reportArgumentType]

    def embed(
        self,
        state: WorldState,
        anchors: dict[str, Tensor],
        rays: Tensor,
        presence: dict[str, Tensor],
        streams: Sequence[str],
        given: Given | None = None,
        source: Source | None = None,
    ) -> Tokens:
        """Streams of T frames -> tokens.

        anchors holds the newest observed frame of each stream (B, 1, ...), a second input of every token of an anchored
        stream: what hardly changes need not be found by attention. A video that begins with these frames has none.
        rays (B, T or 1, V, 6, h', w') belong to the poses that are known; presence holds `video`, `camera`, `rays`
        (B, V), `points` (B, K) and `force` (B, S) as far as they are in `streams`. Streams not named in `streams` cost
        nothing. `given` is what is given of a future, `source` the clip it follows.
        """
        parts, masks, index = [], [], []
        for name in self.chosen(streams):
            value = getattr(state, name)
            if name == "video":
                x = self.embed_in[name](self.patchify(value))
                if self.embed_rays is not None and self.no_rays is not None:
                    known = presence["rays"][:, None, :, None, None]
                    x = x + torch.where(known, self.embed_rays(self.patchify(rays)), self.no_rays)
                if given is not None and self.conditions is not None:
                    x = x + self.conditions.heat(self.patchify(given.heat))
                    x = x + self.conditions.moved(self.patchify(given.moved))
                if source is not None and self.source is not None:
                    x = x + self.source(source, self.patchify)
                if name in self.embed_anchor and name in anchors:
                    x = x + self.embed_anchor[name](self.patchify(anchors[name]))
                if name in self.slot:
                    x = x + self.slot[name][:, None]
                x = x.flatten(2, 3)
                mask = presence[name].repeat_interleave(self.rows * self.columns, dim=1)
            else:
                x = self.embed_in[name](value) + self.slot[name]
                if name in self.embed_anchor:
                    x = x + self.embed_anchor[name](anchors[name])
                mask = presence[name]
            parts.append(x)
            masks.append(mask[:, None].expand(-1, x.shape[1], -1))
            index += [STREAMS.index(name)] * x.shape[2]
        return Tokens(torch.cat(parts, 2), torch.cat(masks, 2), tuple(index))

    def chosen(self, streams: Sequence[str]) -> list[str]:
        """Which of `streams` it has, in token order. Raises `ConfigError` if that is none."""
        names = [name for name in self.streams if name in streams]
        if not names:
            raise ConfigError(
                f"the video transformer has the streams {', '.join(self.streams)} and none of those is left: a batch "
                "without images needs another stream"
            )
        return names

    def read(self, context: Fused) -> Fused:
        """The context as the blocks read it."""
        return context if self.embed_context is None else context._replace(tokens=self.embed_context(context.tokens))

    def patchify(self, x: Tensor) -> Tensor:
        """(B, T, V, C, h', w') -> (B, T, V, rows * columns, C * patch^2)."""
        b, t, v, c, _, _ = x.shape
        x = x.reshape(b, t, v, c, self.rows, self.patch, self.columns, self.patch)
        return x.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(b, t, v, self.rows * self.columns, -1)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Inverse of `patchify` for (B, T, V * rows * columns, C * patch^2)."""
        b, t, n, size = x.shape
        p = self.patch
        x = x.reshape(b, t, n // (self.rows * self.columns), self.rows, self.columns, size // p**2, p, p)
        return x.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(b, t, -1, size // p**2, self.rows * p, self.columns * p)

    def rope(self, tokens: Tokens, start: int) -> tuple[Tensor, Tensor]:
        """Rotary table (T, N, d / 2): frame number for all tokens, row and column for video patches."""
        frames, n = tokens.x.shape[1:3]
        device = tokens.x.device
        patches = tokens.stream.count(STREAMS.index("video"))
        cell = torch.arange(n, device=device) % (self.rows * self.columns)
        grid = torch.stack([cell // self.columns, cell % self.columns], -1)
        grid = grid * (torch.arange(n, device=device) < patches).unsqueeze(-1)
        frame = torch.arange(start, start + frames, device=device)
        position = torch.cat([frame[:, None, None].expand(-1, n, 1), grid.expand(frames, -1, -1)], dim=-1)
        return rope_table(position, self.head_dim)

    def remember(
        self, tokens: Tokens, context: Fused, past: StreamState | None = None, *, least: int = 0
    ) -> StreamState:
        """One pass over clean frames (noise level 0) after `past` -> what every layer keeps; `context` is `read`.

        Layers of windows keep `least` frames or more, if there were that many: those that actions see.
        """
        level = tokens.x.new_zeros(1, len(STREAMS))
        _, vectors = self.vectors(level, tokens.stream)
        start = 0 if past is None else past.frames
        rope, count = self.rope(tokens, start), int(tokens.x.shape[1])
        sizes = block_sizes(count, self.block)
        x, layers = tokens.x, []
        for block, before in zip(self.blocks, past.layers if past else [None] * len(self.blocks), strict=True):
            assert isinstance(block, SynthesisBlock)
            x, own = block(x, tokens.mask, vectors, rope, context, before, None, sizes)
            layers.append(carry(before, own, max(block.reach, least)))
        return StreamState(layers, start + count)

    def anchor_frames(self, count: int) -> list[int] | None:
        """Of each of `count` frames read at once the newest of its block; None where that is the last for all."""
        sizes = block_sizes(count, self.block)
        return None if sizes is None else [end - 1 for end in block_ends(count, sizes)]

    def vectors(self, t: Tensor, stream: Sequence[int], given: Given | None = None) -> tuple[Tensor, Tensor]:
        """Noise level of each stream t (B, 4) in [0, 1] -> per-token embedding and modulation (B, 1 or F, N, ...).

        Tokens of what is `given` are at level 0 instead.
        """
        index = torch.tensor(stream, device=t.device)
        if given is None or self.conditions is None:
            embedding, vectors = self.time(1000.0 * t)
            return embedding[:, index].unsqueeze(1), vectors[:, index].unsqueeze(1)
        levels = torch.cat([t, torch.zeros_like(t)], 1).unsqueeze(1)
        embedding, vectors = self.time(1000.0 * levels, self.conditions(given).unsqueeze(2))
        clean = given.tokens(stream)[:, None, :, None]
        at_zero = index + len(STREAMS)
        embedding = torch.where(clean, embedding[:, :, at_zero], embedding[:, :, index])
        return embedding, torch.where(clean.unsqueeze(-1), vectors[:, :, at_zero], vectors[:, :, index])

    def lead(self, x: Tensor, given: Given) -> Tensor | None:
        """How much of the moved pictures the video takes over, cell by cell: (B, T, V, C, h', w') from all tokens."""
        if self.conditions is None or "video" not in self.streams:
            return None
        gate = self.conditions.gate(self.norm(x[:, :, : self.counts["video"]]))
        channels = given.moved.shape[3]
        return self.unpatchify(gate.unsqueeze(-2).expand(*gate.shape[:-1], channels, -1).flatten(-2)) * given.moved

    def decode(
        self, x: Tensor, embedding: Tensor, streams: Sequence[str], *, follows: bool = False, given: Given | None = None
    ) -> dict[str, Tensor]:
        """Tokens (B, T, N, W) -> answer for each stream in the shape of `WorldState`; video may follow a source, or be
        led by what is `given`."""
        shift, scale = (embedding.unsqueeze(-2) + self.head_table).unbind(-2)
        x = modulate(self.norm(x), scale, shift)
        names = self.chosen(streams)
        parts = x.split([self.counts[name] for name in names], dim=2)
        heads = {name: self.embed_out[name] for name in names}
        if follows and self.source is not None:
            heads["video"] = self.source.head
        out = {name: heads[name](part) for name, part in zip(names, parts, strict=True)}
        if "video" in out:
            if given is not None and self.conditions is not None and self.conditions.head is not None:
                led = given.led().repeat_interleave(self.rows * self.columns, 1)[:, None, :, None]
                corrected = self.conditions.head(parts[names.index("video")])
                out["video"] = torch.where(led, corrected, out["video"])
            out["video"] = self.unpatchify(out["video"])
        return out
