"""Where the pictures of a stored episode lie, so that a clip reads and decodes only those it shows."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from worldmodel.data.media import decode_mask, decode_picture, decode_video
from worldmodel.data.plain import picture_array
from worldmodel.errors import DataError

_PICTURE = re.compile(r"rgb\.(?P<camera>.+)\.(?P<step>\d{6})\.jpg")
_MASK = re.compile(r"mask\.(?P<camera>.+)\.(?P<step>\d{6})\.png")
_WHOLE = re.compile(r"rgb\.(?P<camera>.+)\.(?P<kind>mp4|npy)")
_HEAD = 1024
"""Bytes that hold the head of an array of pictures."""
_SPARSE = 64
"""Numbers beyond this many times the count of a camera's pictures are left out: one must not make a table endless."""


def camera_and_step(name: str) -> tuple[str, int | None] | None:
    """Which picture or mask member `name` holds, step None for all of a camera; None for any other member."""
    if match := _PICTURE.fullmatch(name) or _MASK.fullmatch(name):
        return match["camera"], int(match["step"])
    match = _WHOLE.fullmatch(name)
    return (match["camera"], None) if match else None


class Raw(NamedTuple):
    """Pictures (T, 3, h, w) that are stored as they are."""

    offset: int
    shape: tuple[int, ...]

    def read(self, camera: str, steps: Sequence[int], into: Callable[[int, np.ndarray], object]) -> np.ndarray:
        """(n, 3, h, w) uint8: the pictures at `steps`; `into` fills an array from an offset on. Raises `DataError`."""
        if max(steps) >= self.shape[0]:
            raise DataError(f"rgb.{camera}.npy: {self.shape[0]} pictures, step {max(steps)} is asked for")
        out = np.empty((len(steps), *self.shape[1:]), np.uint8)
        first = 0
        for i in range(1, len(steps) + 1):
            if i == len(steps) or steps[i] != steps[i - 1] + 1:
                into(self.offset + steps[first] * out[0].nbytes, out[first:i])
                first = i
        return out


class FrameTable(NamedTuple):
    """Byte ranges of an episode's pictures inside its section of a shard."""

    pictures: dict[str, np.ndarray]  # camera -> (T, 2) int64 offset and size, size 0 where there is none
    videos: dict[str, tuple[int, int]]  # camera -> offset and size
    raw: dict[str, Raw]
    masks: dict[str, np.ndarray]  # as `pictures`

    @classmethod
    def of(cls, data: bytes, places: Mapping[str, tuple[int, int]]) -> "FrameTable":
        """The table of the members in `data`, given by extension, offset and size. Raises `DataError`."""
        found: dict[str, dict[int, tuple[int, int]]] = {}
        masked: dict[str, dict[int, tuple[int, int]]] = {}
        videos, raw = {}, {}
        for name, place in places.items():
            camera, step = camera_and_step(name) or ("", None)
            if step is not None:
                (masked if name.startswith("mask.") else found).setdefault(camera, {})[step] = place
            elif camera and name.endswith(".mp4"):
                videos[camera] = place
            elif camera:
                offset, size = place
                try:
                    start, shape = picture_array(data[offset : offset + min(size, _HEAD)], size)
                except ValueError as error:
                    raise DataError(f"{name}: not pictures as a plain numpy array ({error})") from error
                raw[camera] = Raw(offset + start, shape)
        return cls(_tables(found), videos, raw, _tables(masked))

    def picture(self, camera: str, step: int, read: Callable[[int, int], bytes]) -> np.ndarray:
        """(3, h, w) uint8: one stored picture; `read` gives bytes by offset and size. Raises `DataError`."""
        name = f"rgb.{camera}.{step:06d}.jpg"
        return channels_first(decode_picture(read(*_place(self.pictures, camera, step, name)), name))

    def mask(self, camera: str, step: int, read: Callable[[int, int], bytes]) -> np.ndarray:
        """(h, w) uint8: one stored mask. Raises `DataError`."""
        name = f"mask.{camera}.{step:06d}.png"
        return decode_mask(read(*_place(self.masks, camera, step, name)), name)

    def video(self, camera: str, most: int, read: Callable[[int, int], bytes]) -> np.ndarray:
        """(T, 3, h, w) uint8: the first `most` frames of a stored video. Raises `DataError`."""
        return channels_first(decode_video(read(*self.videos[camera]), f"rgb.{camera}.mp4", most=most))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        tables = (*self.pictures.values(), *self.masks.values())
        return sum(table.nbytes for table in tables) + 100 * (len(self.videos) + len(self.raw))


def _tables(found: Mapping[str, Mapping[int, tuple[int, int]]]) -> dict[str, np.ndarray]:
    tables = {}
    for camera, steps in found.items():
        tables[camera] = np.zeros((min(max(steps) + 1, _SPARSE * len(steps)), 2), np.int64)
        for step, place in steps.items():
            if step < len(tables[camera]):
                tables[camera][step] = place
    return tables


def _place(tables: Mapping[str, np.ndarray], camera: str, step: int, name: str) -> tuple[int, int]:
    """Offset and size of the member `name`. Raises `DataError` if it is not stored."""
    table = tables.get(camera)
    if table is None or step >= len(table) or not table[step, 1]:
        counts = {camera: int((table[:, 1] > 0).sum()) for camera, table in tables.items()}
        kind = "masks" if name.startswith("mask.") else "pictures"
        raise DataError(f"{name}: member is missing; stored {kind} by camera: {counts}")
    return int(table[step, 0]), int(table[step, 1])


def channels_first(pictures: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) -> (..., 3, h, w), contiguous, so that cutting a clip is a plain copy."""
    return np.ascontiguousarray(np.moveaxis(pictures, -1, -3))
