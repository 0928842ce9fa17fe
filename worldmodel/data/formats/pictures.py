"""Encoded pictures and videos of foreign datasets, decoded to RGB."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from worldmodel.data.media import decode_picture, opened_video
from worldmodel.errors import DataError


def decode_pictures(pictures: Iterable[bytes], where: str) -> np.ndarray:
    """(T, h, w, 3) uint8 from JPEG or PNG files in memory, one per step; `where` names the episode and the field.

    Raises:
        DataError: none at all, one that cannot be read, or sizes that differ; names the step.
    """
    images: list[np.ndarray] = []
    for step, data in enumerate(pictures):
        images.append(decode_picture(data, f"{where}: step {step}", formats=("JPEG", "PNG")))
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{where}: step {step}: picture of {images[-1].shape[:2]}, the first has {images[0].shape[:2]}; "
                "all pictures of a camera must have one size"
            )
    if not images:
        raise DataError(f"{where}: no pictures; there must be one per step")
    return np.stack(images)


def decode_video(path: Path, fps: float, where: str, *, most: int) -> np.ndarray:
    """(T, h, w, 3) uint8: at most the first `most` frames of a video, which must be shown at a constant `fps`.

    Raises:
        DataError: not a readable video, one without frames, or frames off their time by half a period; names the step.
    """
    frames: list[np.ndarray] = []
    times: list[float] = []
    with opened_video(path, f"{where}: {path.name}") as (container, stream):
        for frame in container.decode(stream):
            frames.append(frame.to_ndarray(format="rgb24"))
            times.append(len(times) / fps if frame.time is None else frame.time)
            if len(frames) == most:
                break
        # None at all, or sizes that change, are a ValueError of `stack`.
        images = np.stack(frames)
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
    with opened_video(path, f"{where}: {path.name}") as (_, stream):
        rate, size = stream.average_rate, (stream.height, stream.width)
    if not rate:
        raise DataError(f"{where}: {path.name}: the video states no frame rate; encode it with a constant one")
    return float(rate), size
