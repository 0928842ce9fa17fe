"""One clip, cut from an episode's rows at a time step, and the batch of tensors that many of them make.

Shape legend: see `worldmodel.contracts`. Clips are numpy until `collate` makes a batch of tensors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from worldmodel.contracts import Batch, ClipSpec, Future, Masks, Observation
from worldmodel.data.align import Aligned, columns


class Skip(NamedTuple):
    """A damaged episode that a clip was asked of, and what is wrong with it."""

    key: str
    reason: str


class Layout:
    """Which rows of an episode make a clip at a step, by their distance to it."""

    def __init__(self, spec: ClipSpec) -> None:
        self.spec, self.columns = spec, columns(spec)
        self.history = spec.stride * np.arange(1 - spec.history, 1)
        self.ends = spec.stride * np.arange(1, spec.future + 1)
        self.chunk = np.arange(spec.chunk)
        self.steps = np.concatenate([self.history, self.ends, self.chunk])
        self.touch = (self.history[:, None] + np.arange(1 - spec.stride, 1)).ravel()
        self.future = np.arange(1, spec.window + 1)
        self.series = np.concatenate([self.touch, self.future])


class Clip(NamedTuple):
    """One item: the pictures and the rows of one episode that its fields are cut from when a batch is made."""

    layout: Layout
    data: Aligned
    step: int
    steps: np.ndarray  # rows of `Aligned.steps` at `Layout.steps`
    series: np.ndarray  # rows of `Aligned.series` at `Layout.series`
    rgb: np.ndarray  # (H, V, 3, h, w) uint8
    future_rgb: np.ndarray  # (F*R, V, 3, h, w) uint8
    frame: np.ndarray  # (H,) int64
    key: str
    skip: Skip | None = None  # what this clip stands in for
    masks: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # (H, V, h, w), (F*R, V, h, w) uint8, (K,) int64
    elements: tuple[str, ...] = ()


class Delivery(NamedTuple):
    """A batch as it leaves a worker, with what was passed over to fill it."""

    batch: Batch
    skips: list[Skip]


def deliver(clips: Sequence[Clip]) -> Delivery:
    """`collate` with the report of what was passed over, which is how it leaves a worker process."""
    return Delivery(collate(clips), [clip.skip for clip in clips if clip.skip is not None])


def collate(clips: Sequence[Clip]) -> Batch:
    """One batch of tensors from clips of one dataset."""
    layout, spec, b = clips[0].layout, clips[0].layout.spec, len(clips)
    h, f, sensors = spec.history, spec.future, len(spec.sensors)
    steps, series = np.stack([clip.steps for clip in clips]), np.stack([clip.series for clip in clips])
    step = np.array([[clip.step] for clip in clips])
    last = np.array([[len(clip.data.steps) - 1] for clip in clips])
    dims = np.stack([clip.data.action_dims for clip in clips])

    def cut(name: str, rows: slice) -> np.ndarray:
        place, shape = layout.columns[name]
        return steps[:, rows, place].reshape(b, -1, *shape)

    past, coming = slice(h), slice(h, h + f)
    observation = {
        "rgb": np.stack([clip.rgb for clip in clips]),
        **{name: cut(name, past) for name in ("intrinsics", "camera_to_base", "points", "taxels", "proprio")},
        "visible": cut("visible", past) > 0,
        "wrench": series[:, : h * spec.stride].reshape(b, h, spec.stride, sensors, 6),
        **{name: np.stack([clip.data.constant[name] for clip in clips]) for name in clips[0].data.constant},
    }
    future = {
        "rgb": np.stack([clip.future_rgb for clip in clips]),
        **{name: cut(name, coming) for name in ("camera_to_base", "points")},
        "visible": cut("visible", coming) > 0,
        "wrench": series[:, h * spec.stride :].reshape(b, f, spec.stride, sensors, 6).mean(2),
        "actions": cut("action", slice(h + f, None)),
        "valid": step + layout.ends <= last,
        "action_valid": (step + layout.chunk <= last) & dims.any(1, keepdims=True),
        "action_dims": dims,
    }

    def tensors(fields: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fields.items()}

    masks = [clip.masks for clip in clips if clip.masks is not None]
    parts = [torch.from_numpy(np.stack(part)) for part in zip(*masks, strict=True)]
    return Batch(
        observation=Observation(**tensors(observation)),
        future=Future(**tensors(future)),
        frame=torch.from_numpy(np.stack([clip.frame for clip in clips])),
        key=[clip.key for clip in clips],
        masks=Masks(*parts, elements=clips[0].elements) if masks else None,
    )
