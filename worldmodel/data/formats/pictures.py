"""Encoded pictures and videos of foreign datasets, decoded to RGB."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from worldmodel.errors import DataError


def decode_pictures(pictures: Iterable[bytes], where: str) -> np.ndarray:
    """(T, h, w, 3) uint8 from JPEG or PNG files in memory, one per step; `where` names the episode and the field.

    Raises:
        DataError: none at all, one that cannot be read, or sizes that differ; names the step.
    """
    from PIL import Image, UnidentifiedImageError

    images: list[np.ndarray] = []
    for step, data in enumerate(pictures):
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
                images.append(np.asarray(image.convert("RGB")))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: step {step}: not a readable JPEG or PNG picture ({error})") from error
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{where}: step {step}: picture of {images[-1].shape[:2]}, the first has {images[0].shape[:2]}; "
                "all pictures of a camera must have one size"
            )
    if not images:
        raise DataError(f"{where}: no pictures; there must be one per step")
    return np.stack(images)


def decode_video(path: Path, where: str) -> np.ndarray:
    """(T, h, w, 3) uint8 from the first video stream of the file at `path`.

    Raises:
        DataError: not a readable video, or one without frames.
    """
    import av
    import av.error

    try:
        with av.open(str(path), mode="r") as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise DataError(f"{where}: {path.name}: not a readable video ({error})") from error
    if not frames:
        raise DataError(f"{where}: {path.name}: a video without frames")
    return np.stack(frames)


def video_rate(path: Path, where: str) -> tuple[float, tuple[int, int]]:
    """Frames per second and (height, width) that the head of a video file states.

    Raises:
        DataError: not a readable video, or no constant rate.
    """
    import av
    import av.error

    try:
        with av.open(str(path), mode="r") as container:
            stream = container.streams.video[0]
            rate, size = stream.average_rate, (stream.height, stream.width)
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise DataError(f"{where}: {path.name}: not a readable video ({error})") from error
    if not rate:
        raise DataError(f"{where}: {path.name}: the video states no frame rate; encode it with a constant one")
    return float(rate), size
