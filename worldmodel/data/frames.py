"""Where the pictures of a stored episode lie, so that a clip reads and decodes only those it shows."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from worldmodel.data.media import decode_picture, decode_video
from worldmodel.errors import DataError

_PICTURE = re.compile(r"rgb\.(?P<camera>.+)\.(?P<step>\d{6})\.jpg")
_VIDEO = re.compile(r"rgb\.(?P<camera>.+)\.mp4")
_SPARSE = 64
"""Numbers beyond this many times the count of a camera's pictures are left out: one must not make a table endless."""


def camera_and_step(name: str) -> tuple[str, int | None] | None:
    """Which picture member `name` holds, step None for a whole video; None for any other member."""
    if match := _PICTURE.fullmatch(name):
        return match["camera"], int(match["step"])
    match = _VIDEO.fullmatch(name)
    return (match["camera"], None) if match else None


class FrameTable(NamedTuple):
    """Byte ranges of an episode's pictures inside its section of a shard."""

    pictures: dict[str, np.ndarray]  # camera -> (T, 2) int64 offset and size, size 0 where there is none
    videos: dict[str, tuple[int, int]]  # camera -> offset and size

    @classmethod
    def of(cls, places: Mapping[str, tuple[int, int]]) -> "FrameTable":
        """The table of members given by extension, offset and size."""
        found: dict[str, dict[int, tuple[int, int]]] = {}
        videos = {}
        for name, place in places.items():
            camera, step = camera_and_step(name) or ("", None)
            if step is not None:
                found.setdefault(camera, {})[step] = place
            elif camera:
                videos[camera] = place
        pictures = {}
        for camera, steps in found.items():
            pictures[camera] = np.zeros((min(max(steps) + 1, _SPARSE * len(steps)), 2), np.int64)
            for step, place in steps.items():
                if step < len(pictures[camera]):
                    pictures[camera][step] = place
        return cls(pictures, videos)

    def place(self, camera: str, step: int) -> tuple[int, int] | None:
        """Offset and size of one picture; None if it is not stored."""
        table = self.pictures.get(camera)
        if table is None or step >= len(table) or not table[step, 1]:
            return None
        return int(table[step, 0]), int(table[step, 1])

    def picture(self, camera: str, step: int, read: Callable[[int, int], bytes]) -> np.ndarray:
        """(3, h, w) uint8: one stored picture; `read` gives bytes by offset and size. Raises `DataError`."""
        name, place = f"rgb.{camera}.{step:06d}.jpg", self.place(camera, step)
        if place is None:
            counts = {camera: int((table[:, 1] > 0).sum()) for camera, table in self.pictures.items()}
            raise DataError(f"{name}: member is missing; stored pictures by camera: {counts}")
        return channels_first(decode_picture(read(*place), name))

    def video(self, camera: str, most: int, read: Callable[[int, int], bytes]) -> np.ndarray:
        """(T, 3, h, w) uint8: the first `most` frames of a stored video. Raises `DataError`."""
        return channels_first(decode_video(read(*self.videos[camera]), f"rgb.{camera}.mp4", most=most))

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(table.nbytes for table in self.pictures.values()) + 100 * len(self.videos)


def channels_first(pictures: np.ndarray) -> np.ndarray:
    """(..., h, w, 3) -> (..., 3, h, w), contiguous, so that cutting a clip is a plain copy."""
    return np.ascontiguousarray(np.moveaxis(pictures, -1, -3))
