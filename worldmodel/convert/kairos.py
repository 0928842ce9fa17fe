"""Public Kairos weights to ours and back, by the table in `names`, strictly: nothing is guessed, added or dropped."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from worldmodel.convert.names import (
    PATCH,
    SHOWN,
    ActionLayout,
    Layout,
    Shape,
    layers_of,
    published_layout,
    published_shapes,
    rows,
    shape_of,
    strip_prefix,
    with_prefix,
)
from worldmodel.errors import ConfigError, DataError

PREFIX = "kairos_prefix"
"""Key of a converted file's metadata: what the public names began with."""
OURS = ("denoiser.", "expert.")
ADDED = (
    *(f"denoiser.{part}.{name}" for part in ("embed_in", "embed_out") for name in ("camera", "points", "force")),
    "denoiser.embed_anchor",
    "denoiser.slot",
    "denoiser.embed_rays",
    "denoiser.no_rays",
    "expert.position",
    "expert.embodiment",
)
"""What our transformers may have beside the published ones; without it the rest still is a whole network."""


def check(expected: Mapping[str, Shape], found: Mapping[str, Shape], what: str) -> None:
    """Raises `DataError` that names missing, unexpected and wrongly shaped tensors."""
    faults = [
        ("missing", [f"{name} {expected[name]}" for name in expected if name not in found]),
        ("unexpected", [f"{name} {found[name]}" for name in found if name not in expected]),
        (
            "of another shape",
            [
                f"{name} {found[name]} instead of {expected[name]}"
                for name in expected
                if name in found and found[name] != expected[name]
            ],
        ),
    ]
    lines = [
        f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
        for kind, names in faults
        if names
    ]
    if lines:
        raise DataError("\n".join([f"{what} is not the network that its sizes say:", *lines]))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def renamed(published: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Published tensors, checked, by our names."""
    return {row.ours: row.join([published[name] for name in row.published]) for row in rows(layout)}


def our_shapes(layout: Layout) -> dict[str, Shape]:
    """Every tensor of ours that a public file of these sizes becomes; computed on the meta device."""
    empty = {name: torch.empty(shape, device="meta") for name, shape in published_shapes(layout).items()}
    return shapes_of(renamed(empty, layout))


def from_kairos(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Public tensors (names from `video_dit.` and `action_dit.` on) -> ours (`denoiser.`, `expert.`).

    Raises `DataError` that names every tensor that is missing, unexpected or of another shape than the others imply.
    """
    found = shapes_of(published)
    layout = published_layout(found)
    check(published_shapes(layout), found, "the public file")
    return renamed(published, layout)


def to_kairos(ours: Mapping[str, Tensor], *, drop_added: bool = False) -> dict[str, Tensor]:
    """Ours -> public tensors, names from `video_dit.` and `action_dit.` on. `drop_added` leaves out what we `ADDED`.

    Raises `DataError` as `from_kairos` does.
    """
    added = [name for name in ours if name.startswith(ADDED)]
    if added and not drop_added:
        raise DataError(
            f"{len(added)} tensors have no place in the published network: {', '.join(added[:SHOWN])}"
            f"{', ...' if len(added) > SHOWN else ''}; --drop-added leaves them out"
        )
    kept = {name: tensor for name, tensor in ours.items() if name not in set(added)}
    found = shapes_of(kept)
    layout = our_layout(found)
    check(our_shapes(layout), found, "the checkpoint")
    shapes = published_shapes(layout)
    done: dict[str, Tensor] = {}
    for row in rows(layout):
        parts = row.split(kept[row.ours], [shapes[name] for name in row.published])
        done.update(zip(row.published, parts, strict=True))
    return done


def our_layout(shapes: Mapping[str, Shape]) -> Layout:
    """Sizes of our transformers from a few of their tensors."""
    gated = layers_of(shapes, "denoiser", "mix.a_log")
    if True not in gated:
        raise DataError("the denoiser has no gated delta layer; every Kairos model has them")
    delta = f"denoiser.blocks.{gated.index(True)}.mix"
    width, cells = shape_of(shapes, "denoiser.embed_in.video.weight", 2)
    values = shape_of(shapes, f"{delta}.out.weight", 2)[1]
    action = None
    if any(name.startswith("expert.") for name in shapes):
        query = shape_of(shapes, "expert.blocks.0.q.weight", 2)
        action = ActionLayout(
            width=query[1],
            attention=query[0],
            hidden=shape_of(shapes, "expert.blocks.0.feed_forward.0.weight", 2)[0],
            actions=shape_of(shapes, "expert.embed_in.weight", 2)[1],
            proprio=shape_of(shapes, "expert.token.0.weight", 2)[1],
        )
    return Layout(
        width=width,
        channels=cells // PATCH**2,
        text=shape_of(shapes, "denoiser.embed_context.0.weight", 2)[1],
        frequencies=shape_of(shapes, "denoiser.time.mlp.0.weight", 2)[1],
        hidden=shape_of(shapes, "denoiser.blocks.0.feed_forward.0.weight", 2)[0],
        gated=gated,
        heads=shape_of(shapes, f"{delta}.a_log", 1)[0],
        keys=(shape_of(shapes, f"{delta}.qkv.weight", 2)[0] - values) // 2,
        values=values,
        kernel=shape_of(shapes, f"{delta}.conv.weight", 3)[2],
        action=action,
    )


def convert_file(source: Path, out: Path, *, back: bool, drop_added: bool = False, force: bool = False) -> int:
    """Converts a file; `back` goes from ours to the public form. Returns the number of tensors written.

    `source` is a safetensors file or, going back, a run folder too. Written by rename, so never half. Raises
    `ConfigError` if `out` exists (unless `force`), `DataError` for a file that is not what it should be.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: the name of the file to write ends in .safetensors")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists; choose another name, or --force replaces it")
    weights = source / "model.safetensors" if source.is_dir() else source
    if not weights.is_file():
        raise DataError(f"{weights} is missing" + (" (a run folder of train.py has it)" if source.is_dir() else ""))
    tensors, metadata = read(weights)
    if back:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(OURS)}
        if not own:
            raise DataError(f"{weights} has no tensor named {' or '.join(f'{part}*' for part in OURS)}")
        prefix = metadata.get(PREFIX, "")
        done = {with_prefix(n, prefix): t for n, t in to_kairos(own, drop_added=drop_added).items()}
        said = {"format": "pt"}
    else:
        prefix, names = strip_prefix(list(tensors))
        done = from_kairos({name: tensors[spelled] for name, spelled in names.items()})
        said = {"format": "pt", PREFIX: prefix}
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    save_file(done, part, metadata=said)
    os.replace(part, out)
    return len(done)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises `DataError` if it is none."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except Exception as error:  # the library's own error type is not public
        raise DataError(f"{path} is no safetensors file: {error}") from error
