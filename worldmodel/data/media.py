"""Pictures and videos that others encoded, decoded to RGB within bounds; what is wrong with them is a `DataError`."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import DataError

LARGEST_PICTURE = 1 << 26
"""Pixels of one picture: a few kilobytes can stand for any number of them."""


def decode_picture(data: bytes, where: str, *, formats: tuple[str, ...] = ("JPEG",)) -> np.ndarray:
    """(h, w, 3) uint8 from a picture file of one of `formats`. Raises `DataError` if it is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise ValueError(f"{image.width} × {image.height} pixels, at most {LARGEST_PICTURE} are read")
            # Converting what is RGB already would copy it.
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # Pillow lets through whatever its decoders stumble over
        raise DataError(f"{where}: not a readable {' or '.join(formats)} picture ({error})") from error


def decode_mask(data: bytes, where: str) -> np.ndarray:
    """(h, w) uint8 from a greyscale PNG of 8 bits, unchanged. Raises `DataError` if it is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > LARGEST_PICTURE:
                raise ValueError(f"{image.width} × {image.height} pixels, at most {LARGEST_PICTURE} are read")
            if image.mode != "L":
                raise ValueError(f"mode {image.mode}, masks are greyscale of 8 bits, L")
            return np.asarray(image)
    except Exception as error:  # as above
        raise DataError(f"{where}: not a readable mask in PNG ({error})") from error


@contextmanager
def opened_video(source: bytes | Path, where: str) -> Iterator[tuple[Any, Any]]:
    """Container and first video stream of an MP4 file.

    Raises:
        DataError: there is none, or what is read of it inside the block is damaged.
    """
    import av
    import av.error

    try:
        # Left to guess the container, FFmpeg takes a playlist for a video and opens the files that it names.
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, mode="r", format="mp4") as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise ValueError("no decoder for its codec")
            stream.codec_context.options = {"max_pixels": str(LARGEST_PICTURE)}
            yield container, stream
    except (av.error.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{where}: not a readable video ({error})") from error


def decode_video(data: bytes, where: str, *, most: int) -> np.ndarray:
    """(T, h, w, 3) uint8: at most the first `most` frames of a video. Raises `DataError` if it is none."""
    frames: list[np.ndarray] = []
    with opened_video(data, where) as (container, stream):
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == most:
                break
        # None at all, or sizes that change, are a ValueError of `stack`.
        return np.stack(frames)
