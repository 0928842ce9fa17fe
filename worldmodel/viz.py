"""Predicted against true pictures as small playable videos, encoded for a page that loads nothing else."""

import base64
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from worldmodel.errors import ContractError

_FIRST = "23262b8d99aec9a2274361ee4cc9f0f72585ff8c4270e000b5179ee5e5e59d02082a9d8fffd1667f5539"
PALETTE = np.resize(np.frombuffer(bytes.fromhex(_FIRST), np.uint8), (256, 3))
"""Colours of the values of masks, (256, 3) uint8; they repeat after the first fourteen."""
GAP = 8
"""Pixels of neutral grey between two pictures."""


def enlarged(frames: np.ndarray, least: int = 192) -> np.ndarray:
    """Frames (T, 3, h, w) in [0, 1] or uint8 as (T, h', w', 3) uint8, at least `least` pixels high.

    They grow by a whole factor, nearest neighbour: what the model drew stays visible as pixels. Sides come out even,
    as 4:2:0 video requires.
    """
    factor = max(1, -(-least // frames.shape[2]))
    factor += factor * frames.shape[2] % 2 or factor * frames.shape[3] % 2
    shown = frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)
    return shown.repeat(factor, 2).repeat(factor, 3).transpose(0, 2, 3, 1)


def ringed(frames: np.ndarray, places: np.ndarray, least: int = 192) -> np.ndarray:
    """Enlarged frames (T, 3, h', w') uint8 of frames (T, 3, h, w), with a ring around places (T, M, 2), NaN for none.

    Places are pixels of the frames as they were; rings are yellow, two pixels wide, as large as a twentieth of the
    height and cut at the border.
    """
    shown = enlarged(frames, least).copy()
    rows, columns = shown.shape[1:3]
    y, x = np.mgrid[:rows, :columns] + 0.5
    factor = rows / frames.shape[2]
    for picture, marks in zip(shown, places, strict=True):
        for place in marks[np.isfinite(marks).all(-1)]:
            distance = np.hypot(x - place[0] * factor, y - place[1] * factor)
            picture[np.abs(distance - rows / 20) < 1] = (255, 230, 0)
    return shown.transpose(0, 3, 1, 2)


def side_by_side(*clips: np.ndarray, least: int = 192) -> np.ndarray:
    """Join n enlarged clips of frames (T, 3, h, w), predicted and true for example, into (T, h', n (w' + gap) - gap, 3)
    uint8."""
    shapes = {clip.shape for clip in clips}
    if len(shapes) != 1 or clips[0].ndim != 4 or clips[0].shape[1] != 3:
        raise ContractError(f"frames must be (T, 3, h, w) in all clips, got {[clip.shape for clip in clips]}")
    shown = [enlarged(clip, least) for clip in clips]
    gap = np.full((*shown[0].shape[:2], GAP, 3), 128, np.uint8)
    return np.concatenate([part for clip in shown for part in (gap, clip)][1:], axis=2)


def encode_mp4(frames: np.ndarray, fps: int = 5) -> bytes:
    """Encode frames (T, h, w, 3) uint8 as an H.264 mp4 that browsers play while loading (yuv420p, faststart).

    The default rate is a quarter of the control rate: a clip lasts only a few tenths of a second.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ContractError(f"need (T, h, w, 3) uint8 with even sides, got {frames.shape} {frames.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        # A file, not a buffer: to move the index to the front, the muxer opens its own output a second time.
        path = Path(folder) / "clip.mp4"
        with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as container:
            options = {"crf": "20", "preset": "veryfast", "threads": "1"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, fps)
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()


def video_data_uri(*clips: np.ndarray, fps: int = 5) -> str:
    """Encode clips of one view side by side, (T, 3, h, w) each, as a `data:video/mp4` URI."""
    return "data:video/mp4;base64," + base64.b64encode(encode_mp4(side_by_side(*clips), fps)).decode()


def video_tag(uri: str, caption: str) -> str:
    """Wrap a video URI in a figure that loops silently; `caption` must be HTML already."""
    return (
        f'<figure class="clip"><video src="{uri}" loop muted playsinline controls preload="auto"></video>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
