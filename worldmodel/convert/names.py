"""The public Kairos 3 weights (arXiv 2606.16533) and ours: one table of names, read in both directions, strictly.

A public file holds a video transformer and, for world-action models, an action transformer. Every tensor of it has one
place in our `denoiser` and `expert`, and back. Four forms differ from a plain renaming, none of which changes a value:

    fold   a leading 1, or the kernel of the patch convolution (W, C, 1, p, p), is folded into the next dimension
    join   the projections (and the convolutions) of q, k and v of a gated delta layer stand below one another in one
    cells  the rows of the video head run over (row, column, channel) of a patch there, (channel, row, column) here
    same   the rest

What the numbers mean is alike: modulation vectors in the order scale, shift, gate of the attention and then of the
feed-forward; shift, scale in the head; rotary pairs interleaved; the gated delta rule of flash-linear-attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from worldmodel.errors import DataError

PREFIXES = ("pipe.dit.", "dit.", "")
PATCH = 2
SHOWN = 8
"""Tensors that an error lists of each kind."""

Shape = tuple[int, ...]

ATTENTION = {"q": "q", "k": "k", "v": "v", "o": "out"}
DELTA = {"A_log": "a_log", "dt_bias": "dt_bias", "a_proj.weight": "decay.weight", "b_proj.weight": "beta.weight"}
DELTA |= {"g_proj.weight": "gate.weight", "o_norm.weight": "norm.weight", "o_proj.weight": "out.weight"}
"""Published -> ours, within a layer."""


@dataclass(frozen=True)
class Row:
    """One tensor of ours, the published ones it is made of, and how."""

    ours: str
    published: tuple[str, ...]
    form: str = "same"

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Published -> ours."""
        if self.form == "join":
            return torch.cat(list(parts))
        (part,) = parts
        if self.form == "fold":
            return part.reshape(part.shape[1:] if part.shape[0] == 1 else (part.shape[0], -1))
        if self.form == "cells":
            cells = part.unflatten(0, (PATCH, PATCH, -1))
            return cells.movedim(2, 0).flatten(0, 2).contiguous()
        return part

    def split(self, tensor: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """Ours -> published, whose shapes are known."""
        if self.form == "join":
            return [part.contiguous() for part in tensor.split([shape[0] for shape in shapes])]
        if self.form == "cells":
            cells = tensor.unflatten(0, (-1, PATCH, PATCH))
            return [cells.movedim(0, 2).flatten(0, 2).contiguous()]
        return [tensor.reshape(shapes[0])]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a pair of transformers; the action part is None in files of a video model."""

    width: int
    channels: int
    text: int
    frequencies: int
    hidden: int
    gated: tuple[bool, ...]
    heads: int
    keys: int
    values: int
    kernel: int
    action: "ActionLayout | None"


@dataclass(frozen=True, kw_only=True)
class ActionLayout:
    """Sizes of an action transformer."""

    width: int
    attention: int
    hidden: int
    actions: int
    proprio: int


def paired(ours: str, published: str) -> Iterator[Row]:
    """Weight and bias of a layer."""
    for kind in ("weight", "bias"):
        yield Row(f"{ours}.{kind}", (f"{published}.{kind}",))


def rows(layout: Layout) -> Iterator[Row]:
    """The name map."""
    yield Row("denoiser.embed_in.video.weight", ("video_dit.patch_embedding.weight",), "fold")
    yield Row("denoiser.embed_in.video.bias", ("video_dit.patch_embedding.bias",))
    yield Row("denoiser.head_table", ("video_dit.head.modulation",), "fold")
    for kind in ("weight", "bias"):
        yield Row(f"denoiser.embed_out.video.{kind}", (f"video_dit.head.head.{kind}",), "cells")
    parts = [("denoiser", "video_dit")]
    if layout.action is not None:
        parts.append(("expert", "action_dit"))
        for number in (0, 2):
            yield from paired(f"expert.token.{number}", f"action_dit.proprio_encoder.{number}")
        yield from paired("expert.embed_in", "action_dit.action_encoder")
        yield from paired("expert.embed_out", "action_dit.head")
    for ours, published in parts:
        for number in (0, 2):
            yield from paired(f"{ours}.embed_context.{number}", f"{published}.text_embedding.{number}")
            yield from paired(f"{ours}.time.mlp.{number}", f"{published}.time_embedding.{number}")
        yield from paired(f"{ours}.time.project.1", f"{published}.time_projection.1")
        for i, gated in enumerate(layout.gated):
            own = f"{ours}.blocks.{i}"
            yield from block_rows(own, f"{published}.blocks.{i}", gated=gated and ours == "denoiser")


def block_rows(ours: str, published: str, *, gated: bool) -> Iterator[Row]:
    """The name map of one layer."""
    yield Row(f"{ours}.table", (f"{published}.modulation",), "fold")
    if gated:
        for theirs, own in DELTA.items():
            yield Row(f"{ours}.mix.{own}", (f"{published}.gated_delta.{theirs}",))
        for own, ending in (("qkv", "_proj"), ("conv", "_conv1d")):
            names = tuple(f"{published}.gated_delta.{letter}{ending}.weight" for letter in "qkv")
            yield Row(f"{ours}.mix.{own}.weight", names, "join")
        attentions = {"cross": "cross_attn"}
    else:
        attentions = {"cross": "cross_attn", "mix" if ours.startswith("denoiser") else "": "self_attn"}
    for own, theirs in attentions.items():
        where = f"{ours}.{own}" if own else ours
        for letter, name in ATTENTION.items():
            yield from paired(f"{where}.{name}", f"{published}.{theirs}.{letter}")
        for letter in "qk":
            yield Row(f"{where}.{letter}_norm.weight", (f"{published}.{theirs}.norm_{letter}.weight",))
    yield from paired(f"{ours}.cross_norm", f"{published}.cross_attn_norm")
    for number in (0, 2):
        yield from paired(f"{ours}.feed_forward.{number}", f"{published}.ffn.{number}")


def published_shapes(layout: Layout) -> dict[str, Shape]:
    """Every tensor of a public file of these sizes."""
    w, cells = layout.width, layout.channels * PATCH**2
    shapes: dict[str, Shape] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def common(part: str, width: int, attention: int, hidden: int, gated: Sequence[bool]) -> None:
        linear(f"{part}.text_embedding.0", width, layout.text)
        linear(f"{part}.text_embedding.2", width, width)
        linear(f"{part}.time_embedding.0", width, layout.frequencies)
        linear(f"{part}.time_embedding.2", width, width)
        linear(f"{part}.time_projection.1", 6 * width, width)
        for i, delta in enumerate(gated):
            block = f"{part}.blocks.{i}"
            shapes[f"{block}.modulation"] = (1, 6, width)
            for name in ["cross_attn"] if delta else ["cross_attn", "self_attn"]:
                for letter in "qkv":
                    linear(f"{block}.{name}.{letter}", attention, width)
                linear(f"{block}.{name}.o", width, attention)
                shapes.update({f"{block}.{name}.norm_{letter}.weight": (attention,) for letter in "qk"})
            if delta:
                shapes.update(delta_shapes(f"{block}.gated_delta", layout))
            shapes.update({f"{block}.cross_attn_norm.{kind}": (width,) for kind in ("weight", "bias")})
            linear(f"{block}.ffn.0", hidden, width)
            linear(f"{block}.ffn.2", width, hidden)

    shapes["video_dit.patch_embedding.weight"] = (w, layout.channels, 1, PATCH, PATCH)
    shapes["video_dit.patch_embedding.bias"] = (w,)
    common("video_dit", w, w, layout.hidden, layout.gated)
    shapes["video_dit.head.modulation"] = (1, 2, w)
    linear("video_dit.head.head", cells, w)
    if (action := layout.action) is not None:
        common("action_dit", action.width, action.attention, action.hidden, [False] * len(layout.gated))
        linear("action_dit.proprio_encoder.0", layout.text, action.proprio)
        linear("action_dit.proprio_encoder.2", layout.text, layout.text)
        linear("action_dit.action_encoder", action.width, action.actions)
        linear("action_dit.head", action.actions, action.width)
    return shapes


def delta_shapes(name: str, layout: Layout) -> dict[str, Shape]:
    """Tensors of a gated delta layer."""
    sizes = {"q": layout.keys, "k": layout.keys, "v": layout.values}
    w, e = layout.width, layout.heads
    shapes: dict[str, Shape] = {"A_log": (e,), "dt_bias": (e,), "a_proj.weight": (e, w), "b_proj.weight": (e, w)}
    shapes |= {f"{letter}_proj.weight": (size, w) for letter, size in sizes.items()}
    shapes |= {f"{letter}_conv1d.weight": (size, 1, layout.kernel) for letter, size in sizes.items()}
    shapes |= {"g_proj.weight": (layout.values, w), "o_norm.weight": (layout.values // e,)}
    shapes["o_proj.weight"] = (w, layout.values)
    return {f"{name}.{own}": shape for own, shape in shapes.items()}


def strip_prefix(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The prefix that a file's names carry before `video_dit.`, and stripped name -> name.

    Files of a video model may name no part at all: theirs is `-`. Raises `DataError` for a file of something else.
    """
    for prefix in PREFIXES:
        if f"{prefix}video_dit.patch_embedding.weight" in names:
            return prefix, {name.removeprefix(prefix): name for name in names}
    if "patch_embedding.weight" in names:
        return "-", {f"video_dit.{name}": name for name in names}
    raise DataError(
        "these are no Kairos weights: there is no patch_embedding.weight, plain or after "
        f"{', '.join(prefix + 'video_dit.' for prefix in PREFIXES)}; it begins with {', '.join(sorted(names)[:3])}"
    )


def with_prefix(name: str, prefix: str) -> str:
    """A published name as a file with this prefix spells it."""
    return name.removeprefix("video_dit.") if prefix == "-" else prefix + name


def shape_of(shapes: Mapping[str, Shape], name: str, rank: int) -> Shape:
    """Shape of a tensor from which sizes are read. Raises `DataError` if it is missing or of another rank."""
    if name not in shapes:
        raise DataError(f"{name} is missing; sizes are read from it")
    if len(shapes[name]) != rank:
        raise DataError(f"{name} has shape {shapes[name]}; it needs {rank} dimensions")
    return shapes[name]


def layers_of(shapes: Mapping[str, Shape], part: str, mark: str) -> tuple[bool, ...]:
    """Which of the layers of a part have tensors named `mark`."""
    found = {name.removeprefix(f"{part}.blocks.").split(".", 1)[0] for name in shapes if f"{part}.blocks." in name}
    count = 1 + max((int(number) for number in found if number.isdigit()), default=-1)
    return tuple(f"{part}.blocks.{i}.{mark}" in shapes for i in range(count))


def published_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Sizes of a public file from a few of its tensors."""
    gated = layers_of(shapes, "video_dit", "gated_delta.A_log")
    if True not in gated:
        raise DataError("video_dit has no layer with gated_delta.A_log; every Kairos model has gated delta layers")
    patch = shape_of(shapes, "video_dit.patch_embedding.weight", 5)
    delta = f"video_dit.blocks.{gated.index(True)}.gated_delta"
    action = None
    if any(name.startswith("action_dit.") for name in shapes):
        query = shape_of(shapes, "action_dit.blocks.0.self_attn.q.weight", 2)
        action = ActionLayout(
            width=query[1],
            attention=query[0],
            hidden=shape_of(shapes, "action_dit.blocks.0.ffn.0.weight", 2)[0],
            actions=shape_of(shapes, "action_dit.action_encoder.weight", 2)[1],
            proprio=shape_of(shapes, "action_dit.proprio_encoder.0.weight", 2)[1],
        )
    return Layout(
        width=patch[0],
        channels=patch[1],
        text=shape_of(shapes, "video_dit.text_embedding.0.weight", 2)[1],
        frequencies=shape_of(shapes, "video_dit.time_embedding.0.weight", 2)[1],
        hidden=shape_of(shapes, "video_dit.blocks.0.ffn.0.weight", 2)[0],
        gated=gated,
        heads=shape_of(shapes, f"{delta}.A_log", 1)[0],
        keys=shape_of(shapes, f"{delta}.q_proj.weight", 2)[0],
        values=shape_of(shapes, f"{delta}.v_proj.weight", 2)[0],
        kernel=shape_of(shapes, f"{delta}.q_conv1d.weight", 3)[2],
        action=action,
    )
