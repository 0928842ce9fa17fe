"""The metadata of LeRobot datasets, v2.x (a file per episode) and v3.0 (many episodes in a file), in one form."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worldmodel.data.formats.base import inside
from worldmodel.data.plain import loads, read_json
from worldmodel.errors import DataError

INFO = "meta/info.json"
MODALITY = "meta/modality.json"
OWN = "meta/worldmodel.json"
"""What our exporter adds: the map that imports the dataset again."""
OWN_COLUMN = "worldmodel/meta"
"""Column of the episode table in which our exporter keeps an episode's metadata, as JSON."""
_PLACEHOLDER = re.compile(r"\{(\w+)(?::0?(\d{1,2})d)?\}")
_MOST_ROWS = 1 << 24
"""Repeated values take no room in a file, but they do in memory."""
_WHAT = "the description of a LeRobot dataset (v2.0, v2.1 or v3.0); give the folder that holds meta/"


@dataclass(frozen=True)
class Piece:
    """Where the pictures of an episode lie in a video file."""

    path: Path
    start: float  # seconds


@dataclass(frozen=True)
class EpisodeInfo:
    """One row of the episode table."""

    index: int
    length: int
    data: Path  # parquet file
    videos: dict[str, Piece] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)


class LeRobotMeta:
    """`info`, `tasks` and `episodes` of the dataset in `root`.

    Raises:
        DataError: not a LeRobot dataset, another version, or metadata that do not hold together; names file and field.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.info = read_json(root / INFO, _WHAT)
        where = str(root / INFO)
        self.version = str(self.info.get("codebase_version", ""))
        if not re.fullmatch(r"v[23]\.\d+", self.version):
            raise DataError(f"{where}: codebase_version {self.version!r}; v2.0, v2.1 and v3.0 are read")
        features = self.info.get("features")
        if not isinstance(features, dict) or not all(isinstance(f, dict) and "dtype" in f for f in features.values()):
            raise DataError(f"{where}: features must map each name to an object with dtype and shape")
        self.features: dict[str, dict[str, Any]] = features
        self.video_keys = [name for name, feature in features.items() if feature["dtype"] == "video"]
        self.v3 = self.version.startswith("v3")
        self.tasks = dict(self._tasks())
        self.episodes = {episode.index: episode for episode in (self._v3() if self.v3 else self._v2())}
        if not self.episodes:
            raise DataError(f"{root}: the episode table is empty")

    @property
    def fps(self) -> float:
        """Steps per second."""
        fps = self.info.get("fps")
        if not isinstance(fps, int | float) or not 0 < fps < 1e5:
            raise DataError(f"{self.root / INFO}: fps {fps!r} must be a positive number")
        return float(fps)

    def splits(self) -> dict[str, range]:
        """The source's splits as ranges of episode numbers, cut to the episodes that exist."""
        out = {}
        splits = self.info.get("splits")
        for name, text in (splits if isinstance(splits, dict) else {}).items():
            match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", str(text))
            if match is None:
                raise DataError(f"{self.root / INFO}: split {name!r} is {text!r}; expected first:last+1")
            out[str(name)] = range(int(match[1]), min(int(match[2]), max(self.episodes) + 1))
        return {name: chosen for name, chosen in out.items() if len(chosen)}

    def _path(self, kind: str, suffix: str, values: dict[str, int | str], fallback: str) -> Path:
        """The file that template `kind` of info.json leads to."""
        where = f"{self.root / INFO}: {kind}"
        template = self.info.get(kind)
        if not isinstance(template, str):
            raise DataError(f"{where}: must be a path template, got {template!r}")

        def fill(match: re.Match[str]) -> str:
            name, digits = match[1], int(match[2] or 0)
            if name not in values:
                raise DataError(f"{where}: {template!r} asks for {name!r}; known: {sorted(values)}")
            return str(values[name]).zfill(digits)

        relative = _PLACEHOLDER.sub(fill, template)
        if "{" in relative or not relative.endswith(suffix):
            raise DataError(f"{where}: {template!r} is no template of a {suffix} file with {{name:03d}} in it")
        path = inside(self.root, relative, where)
        if path.is_file() or not fallback:
            return path
        # Some v2 datasets carry a template that their own files do not follow.
        found = sorted(self.root.glob(fallback))
        return found[0] if len(found) == 1 else path

    def _v2(self) -> Iterator[EpisodeInfo]:
        chunk = _whole({"chunks_size": 1000, **self.info}, "chunks_size", self.root / INFO)
        for where, row in self._lines("meta/episodes.jsonl"):
            index, length = _whole(row, "episode_index", where), _whole(row, "length", where)
            values: dict[str, int | str] = {"episode_index": index, "episode_chunk": index // max(chunk, 1)}
            name = f"episode_{index:06d}"
            data = self._path("data_path", ".parquet", values, f"data/*/{name}.parquet")
            videos = {
                key: Piece(
                    self._path("video_path", ".mp4", values | {"video_key": key}, f"videos/*/{key}/{name}.mp4"), 0
                )
                for key in self.video_keys
                if re.fullmatch(r"[\w.\-]+", key)
            }
            yield EpisodeInfo(index, length, data, videos)

    def _v3(self) -> Iterator[EpisodeInfo]:
        for path in sorted((self.root / "meta/episodes").glob("*/*.parquet")):
            names = read_columns(path, None)
            for row in read_table(path, [name for name in names if not name.startswith("stats/")]).to_pylist():
                index, length = _whole(row, "episode_index", path), _whole(row, "length", path)
                where = f"{path}: episode {index}"
                chunk = _whole(row, "data/chunk_index", where), _whole(row, "data/file_index", where)
                data = self._path("data_path", ".parquet", {"chunk_index": chunk[0], "file_index": chunk[1]}, "")
                videos = {}
                for key in self.video_keys:
                    if row.get(f"videos/{key}/chunk_index") is None:
                        continue
                    values: dict[str, int | str] = {
                        "video_key": key,
                        "chunk_index": _whole(row, f"videos/{key}/chunk_index", where),
                        "file_index": _whole(row, f"videos/{key}/file_index", where),
                    }
                    start = row.get(f"videos/{key}/from_timestamp")
                    if not isinstance(start, int | float) or not 0 <= start < 1e9:
                        raise DataError(f"{where}: videos/{key}/from_timestamp {start!r} must be seconds")
                    videos[key] = Piece(self._path("video_path", ".mp4", values, ""), float(start))
                yield EpisodeInfo(index, length, data, videos, _own(row, where))

    def _tasks(self) -> Iterator[tuple[int, str]]:
        if not self.v3:
            for where, row in self._lines("meta/tasks.jsonl"):
                yield _whole(row, "task_index", where), str(row.get("task", ""))
            return
        path = self.root / "meta/tasks.parquet"
        names = read_columns(path, None)
        # pandas calls an index without a name so.
        sentence = next((name for name in ("task", "__index_level_0__") if name in names), None)
        if sentence is None or "task_index" not in names:
            raise DataError(f"{path}: has columns {names}; expected task and task_index")
        for row in read_table(path, ["task_index", sentence]).to_pylist():
            yield _whole(row, "task_index", path), str(row[sentence])

    def _lines(self, relative: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The JSON objects of a .jsonl file with their places."""
        path = self.root / relative
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); a LeRobot {self.version} dataset has it") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = loads(line)
            except ValueError as error:
                raise DataError(f"{path}: line {number}: not valid JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {number}: must be an object, got {type(row).__name__}")
            yield f"{path}: line {number}", row


def read_columns(path: Path, wanted: list[str] | None) -> list[str]:
    """Column names of a parquet file; with `wanted`, those of them that it has.

    Raises:
        DataError: not a readable parquet file, or pyarrow is missing.
    """
    pa, pq = arrow()
    try:
        names = pq.read_schema(path).names
    except (OSError, ValueError, pa.lib.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
    return [name for name in names if wanted is None or name in wanted]


def read_table(path: Path, columns: list[str], filters: Any = None) -> Any:
    """The `pyarrow.Table` of some columns of a parquet file, and of the rows that pass `filters`.

    Raises:
        DataError: not a readable parquet file, or pyarrow is missing.
    """
    pa, pq = arrow()
    try:
        if (rows := pq.read_metadata(path).num_rows) > _MOST_ROWS:
            raise DataError(f"{path}: {rows} rows, at most {_MOST_ROWS} in a file are read; split it")
        table = pq.read_table(path, columns=columns, filters=filters)
        table.validate(full=True)
        return table
    except (OSError, ValueError, pa.lib.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error


def arrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`, or `DataError` naming the extra that brings them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError("LeRobot datasets need pyarrow: pip install 'worldmodel[formats]'") from error
    return pyarrow, pyarrow.parquet


def _whole(row: dict[str, Any], name: str, where: object) -> int:
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise DataError(f"{where}: {name} {value!r} must be a whole number of 0 or more")
    return value


def _own(row: dict[str, Any], where: str) -> dict[str, Any]:
    if (text := row.get(OWN_COLUMN)) is None:
        return {}
    try:
        value = loads(text)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {OWN_COLUMN}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {OWN_COLUMN}: must be an object, got {type(value).__name__}")
    return value
