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


def decode_video(path: Path, fps: float, where: str) -> np.ndarray:
    """(T, h, w, 3) uint8: every frame of the first video stream, which must be shown at a constant `fps`.

    Raises:
        DataError: not a readable video, one without frames, or frames off their time by half a period; names the step.
    """
    import av
    import av.error

    frames: list[np.ndarray] = []
    times: list[float] = []
    try:
        with av.open(str(path), mode="r") as container:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
                times.append(len(times) / fps if frame.time is None else frame.time)
        # Sizes that change within a video are a ValueError of `stack`.
        images = np.stack(frames)
    except (av.error.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{where}: {path.name}: not a readable video ({error})") from error
    off = np.abs(np.array(times) - times[0] - np.arange(len(times)) / fps)
    if (off > 0.5 / fps).any():
        step = int((off > 0.5 / fps).argmax())
        raise DataError(
            f"{where}: {path.name}: frame {step} is shown {off[step]:.3f} s off its time at {fps:g} frames per second; "
            "the rate must be constant: encode the video again, or correct the stated rate"
        )
    return images


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
    except (av.error.FFmpegError, ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{where}: {path.name}: not a readable video ({error})") from error
    if not rate:
        raise DataError(f"{where}: {path.name}: the video states no frame rate; encode it with a constant one")
    return float(rate), size
