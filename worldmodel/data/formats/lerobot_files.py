"""The growing files of a LeRobot v3.0 dataset: parquet tables and videos that hold many episodes each."""

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.formats.lerobot_meta import arrow

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CHUNK_FILES = 1000
DATA_BYTES = 100 << 20
VIDEO_BYTES = 200 << 20
KEY_FRAME_EVERY = 10
"""Frames between key frames: readers of single frames seek often."""
QUALITY = 18
"""x264's constant rate factor; 18 is near the eye's limit."""


class Numbered:
    """Place of the file that is being written: a file number within a chunk folder."""

    def __init__(self, root: Path, template: str, **names: str) -> None:
        self.root, self.template, self.names, self.number = root, template, names, 0

    @property
    def place(self) -> tuple[int, int]:
        """Chunk and file index."""
        return divmod(self.number, CHUNK_FILES)

    def path(self) -> Path:
        """The file, whose folder exists."""
        chunk, file = self.place
        path = self.root / self.template.format(chunk_index=chunk, file_index=file, **self.names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class TableFiles:
    """Appends episodes to parquet files, one row group each, and starts a new file when one is large."""

    def __init__(self, root: Path) -> None:
        self._files = Numbered(root, DATA_PATH)
        self._writer: Any = None

    def add(self, columns: dict[str, Any]) -> tuple[int, int]:
        """Write one episode (name -> arrow array); returns its chunk and file index."""
        pa, pq = arrow()
        table = pa.table(columns)
        path = self._files.path()
        if self._writer is None:
            self._writer = pq.ParquetWriter(path, table.schema)
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        place = self._files.place
        if path.stat().st_size > DATA_BYTES:
            self.close()
            self._files.number += 1
        return place

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class VideoFiles:
    """Appends the pictures of episodes to H.264 files of one camera; each episode starts with a key frame."""

    def __init__(self, root: Path, key: str, fps: float) -> None:
        self._files = Numbered(root, VIDEO_PATH, video_key=key)
        self._rate = Fraction(fps).limit_denominator(1001)
        self._container: tuple[Any, Any] | None = None  # and its stream
        self._count = self._bytes = 0  # frames and encoded bytes in the file

    def add(self, images: np.ndarray) -> dict[str, int | float]:
        """Encode (T, h, w, 3) uint8; returns chunk_index, file_index, from_timestamp and to_timestamp in seconds."""
        import av
        from av.video.frame import PictureType

        container, stream = self._open(*images.shape[1:3]) if self._container is None else self._container
        first = self._count
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = self._count, 1 / self._rate
            frame.pict_type = PictureType.NONE if i else PictureType.I
            packets = stream.encode(frame)
            self._bytes += sum(packet.size for packet in packets)
            container.mux(packets)
            self._count += 1
        chunk, file = self._files.place
        times = {"from_timestamp": float(first / self._rate), "to_timestamp": float(self._count / self._rate)}
        if self._bytes > VIDEO_BYTES:
            self.close()
            self._files.number += 1
        return {"chunk_index": chunk, "file_index": file} | times

    def close(self) -> None:
        """Finish the file."""
        if self._container is not None:
            container, stream = self._container
            container.mux(stream.encode())
            container.close()
            self._container, self._count, self._bytes = None, 0, 0

    def _open(self, height: int, width: int) -> tuple[Any, Any]:
        import av

        container = av.open(str(self._files.path()), mode="w")
        # Without B-frames the first frame is at 0 and every frame at its own time.
        options = {"crf": str(QUALITY), "g": str(KEY_FRAME_EVERY), "bf": "0"}
        stream = container.add_stream("libx264", rate=self._rate, options=options, width=width, height=height)
        stream.pix_fmt = pixel_format(height, width)
        self._container = container, stream
        return self._container


def pixel_format(height: int, width: int) -> str:
    """Halved colour resolution needs even sizes."""
    return "yuv444p" if height % 2 or width % 2 else "yuv420p"


class Moments:
    """Running minimum, maximum, mean and spread of a feature over steps, as meta/stats.json holds them."""

    def __init__(self) -> None:
        self._count = 0
        self._low: Any = np.inf
        self._high: Any = -np.inf
        self._sum: Any = 0.0
        self._squares: Any = 0.0
        self._shift: Any = None

    def add(self, values: np.ndarray) -> None:
        """Take (T, *shape)."""
        values = values.astype(np.float64)
        if self._shift is None:
            self._shift = values[0]  # sums of squares about a typical value keep their digits
        self._count += len(values)
        self._low, self._high = np.minimum(self._low, values.min(0)), np.maximum(self._high, values.max(0))
        self._sum = self._sum + (values - self._shift).sum(0)
        self._squares = self._squares + ((values - self._shift) ** 2).sum(0)

    def summary(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """min, max, mean, std of `shape`, and count."""
        mean = self._sum / self._count
        std = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0))
        values = {"min": self._low, "max": self._high, "mean": mean + self._shift, "std": std}
        return {name: np.reshape(value, shape).tolist() for name, value in values.items()} | {"count": [self._count]}


def column(value: np.ndarray) -> Any:
    """An arrow array of T rows: scalars, lists of a fixed length, or nested lists."""
    pa, _ = arrow()
    if value.ndim == 1 or value.shape[1:] == (1,):
        return pa.array(value.reshape(len(value)))
    if value.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(value.ravel()), value.shape[1])
    kind = pa.from_numpy_dtype(value.dtype)
    for _ in value.shape[1:]:
        kind = pa.list_(kind)
    return pa.array(value.tolist(), type=kind)


def png_column(images: np.ndarray) -> Any:
    """Pictures as the {bytes, path} that Hugging Face datasets decode."""
    from PIL import Image

    pa, _ = arrow()
    rows = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    return pa.array(rows, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def task_table(tasks: dict[str, int]) -> Any:
    """task_index by sentence; LeRobot reads it with pandas and expects the sentence as the index."""
    pa, _ = arrow()
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, (kind, numpy) in kinds.items()
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    table = pa.table(
        {"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(list(tasks), pa.string())}
    )
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
