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
        self.steps = np.concatenate([self.history, self.ends])
        self.touch = (self.history[:, None] + np.arange(1 - spec.stride, 1)).ravel()
        self.future = np.arange(1, spec.window + 1)
        self.series = np.concatenate([self.touch, self.future, self.chunk])


class Clip(NamedTuple):
    """One item: its place in an episode whose rows are at hand, and its pictures. `collate` cuts out the rest."""

    layout: Layout
    data: Aligned
    step: int
    first: int  # number of the episode's first frame in the dataset
    episode: str  # its key
    rgb: np.ndarray | None  # (H or fewer, V, 3, h, w) uint8, the newest frames; None where no pictures are wanted
    future_rgb: np.ndarray | None  # (F*R, V, 3, h, w) uint8
    skip: Skip | None = None  # what this clip stands in for
    masks: tuple[np.ndarray, ...] | None = None  # of `Masks`, in its order
    elements: tuple[str, ...] = ()
    lens: np.ndarray | None = None  # (V, 3, 3) what resizing the pictures made of pixel coordinates

    @property
    def pictures(self) -> tuple[np.ndarray, np.ndarray]:
        """Pictures of the history and of the future, of a clip that was cut with both."""
        assert self.rgb is not None and self.future_rgb is not None
        return self.rgb, self.future_rgb

    @property
    def key(self) -> str:
        """Sample key and step."""
        return f"{self.episode}@{self.step}"


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
    h, f, stride, sensors = spec.history, spec.future, spec.stride, len(spec.sensors)
    step = np.array([[clip.step] for clip in clips])
    last = np.array([[len(clip.data.steps) - 1] for clip in clips])
    steps = np.empty((b, len(layout.steps), clips[0].data.steps.shape[1]), np.float32)
    series = np.empty((b, len(layout.series), clips[0].data.series.shape[1]), np.float32)
    for i, (clip, rows, dense) in enumerate(zip(clips, layout.steps + step, layout.series + step, strict=True)):
        # Before the start the first row repeats, past the end the last.
        clip.data.steps.take(rows, axis=0, out=steps[i], mode="clip")
        clip.data.series.take(dense, axis=0, out=series[i], mode="clip")
    record = clips[0].data.constant.dtype
    constant = np.frombuffer(bytearray().join([clip.data.constant.data for clip in clips]), record)

    def cut(name: str, rows: slice) -> np.ndarray:
        place, shape = layout.columns[name]
        chosen = steps[:, rows, place]
        return chosen.reshape(*chosen.shape[:2], *shape)

    def pictures(rgb: Sequence[np.ndarray | None], frames: int) -> np.ndarray:
        shown = [images for images in rgb if images is not None]
        return np.stack(shown) if shown else np.zeros((b, frames, len(spec.cameras), 3, 0, 0), np.uint8)

    past, coming = slice(h), slice(h, h + f)
    wrench, actions = series[:, : -spec.chunk, : sensors * 6], series[:, -spec.chunk :, sensors * 6 :]
    observation = {
        "rgb": pictures([clip.rgb for clip in clips], h),
        **{name: cut(name, past) for name in ("intrinsics", "camera_to_base", "points", "taxels", "proprio")},
        "visible": cut("visible", past) > 0,
        "wrench": wrench[:, : h * stride].reshape(b, h, stride, sensors, 6),
        **{name: constant[name] for name in record.fields or () if name in Observation._fields},
    }
    lenses = [clip.lens for clip in clips if clip.lens is not None]
    if lenses:
        observation["intrinsics"] = np.stack(lenses)[:, None] @ observation["intrinsics"]
    dims = constant["action_dims"]
    future = {
        "rgb": pictures([clip.future_rgb for clip in clips], spec.window),
        **{name: cut(name, coming) for name in ("camera_to_base", "points")},
        "visible": cut("visible", coming) > 0,
        "wrench": wrench[:, h * stride :].reshape(b, f, stride, sensors, 6).mean(2),
        "actions": actions,
        "proprio": np.stack(
            [clip.data.proprio.take(clip.step + 1 + layout.chunk, axis=0, mode="clip") for clip in clips]
        ),
        "valid": step + layout.ends <= last,
        "action_valid": (step + layout.chunk <= last) & dims.any(1, keepdims=True),
        "action_dims": dims,
    }

    def tensors(fields: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fields.items()}

    first, masks = np.array([[clip.first] for clip in clips]), [clip.masks for clip in clips if clip.masks is not None]
    parts = [torch.from_numpy(np.stack(part)) for part in zip(*masks, strict=True)]
    return Batch(
        observation=Observation(**tensors(observation)),
        future=Future(**tensors(future)),
        frame=torch.from_numpy(first + np.clip(step + layout.history, 0, last)),
        key=[clip.key for clip in clips],
        masks=Masks(*parts, elements=clips[0].elements) if masks else None,
    )
