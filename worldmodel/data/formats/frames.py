"""Frames of a video file at given times."""

from pathlib import Path

import numpy as np

from worldmodel.data.media import opened_video
from worldmodel.errors import DataError


def frames_at(path: Path, times: np.ndarray, tolerance: float, where: str) -> np.ndarray:
    """(T, h, w, 3) uint8: the frames of the first video stream whose presentation times are `times`.

    Args:
        path: video file.
        times: (T,) seconds, increasing.
        tolerance: seconds by which a frame may be off.
        where: file and episode, for messages.

    Raises:
        DataError: unreadable, or no frame within `tolerance` of a time; names the step and the nearest frame.
    """
    frames: np.ndarray | None = None
    step, before = 0, float("nan")
    with opened_video(path, f"{where}: {path.name}") as (container, stream):
        if stream.time_base is None:
            raise DataError(f"{where}: {path.name}: the video has no time base")
        if times[0] > 0:
            # To the key frame at or before the first time; a file may hold hundreds of episodes.
            container.seek(max(0, int((times[0] - tolerance) / stream.time_base)), stream=stream, backward=True)
        for frame in container.decode(stream):
            time = frame.time
            if time is None or time < times[step] - tolerance:
                before = before if time is None else time
                continue
            if time > times[step] + tolerance:
                raise DataError(_no_frame(where, path, step, times[step], tolerance, f"{before:.6f} and {time:.6f}"))
            picture = frame.to_ndarray(format="rgb24")
            if frames is None:
                frames = np.empty((len(times), *picture.shape), np.uint8)
            if picture.shape != frames.shape[1:]:
                raise DataError(f"{where}: {path.name}: picture size changes at step {step}; it must be constant")
            frames[step], before, step = picture, time, step + 1
            if step == len(times):
                return frames
    raise DataError(_no_frame(where, path, step, times[step], tolerance, f"{before:.6f}, the last one"))


def _no_frame(where: str, path: Path, step: int, time: float, tolerance: float, nearest: str) -> str:
    return (
        f"{where}: {path.name}: frame of step {step}: none at {time:.6f} s within {tolerance:.6f} s; the nearest are "
        f"at {nearest} s. The video and the time stamps must belong together"
    )
