"""Read LeRobot datasets, v2.0, v2.1 and v3.0, with GR00T's modality.json, without importing lerobot.

Layout after huggingface/lerobot, src/lerobot/datasets (Apache-2.0). A step is a row of the parquet file; the time of
its picture in the video is the episode's from_timestamp plus the row's timestamp.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.formats.assemble import assemble
from worldmodel.data.formats.base import Field, Fields, Part, Recording, Ref, episode_key
from worldmodel.data.formats.frames import frames_at
from worldmodel.data.formats.lerobot_meta import (
    INFO,
    MODALITY,
    OWN,
    EpisodeInfo,
    LeRobotMeta,
    read_columns,
    read_table,
)
from worldmodel.data.formats.mapping import PAIRINGS, WIDEST, Mapping
from worldmodel.data.formats.pictures import decode_pictures
from worldmodel.data.plain import read_json
from worldmodel.data.schema import Episode
from worldmodel.errors import DataError

_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index", "next.reward", "next.done")
_NUMBERS = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool")
_GENERIC = re.compile(r"(?:[a-z]*_)?\d+")
"""Column names that say nothing, such as motor_7; GR00T's part names are better."""
TOLERANCE = 0.25
"""Share of a step by which a time stamp or a frame may be off: beyond it, it might be the neighbour's."""


class LeRobotSource:
    """The LeRobot dataset in folder `root`; see `formats.base.Source`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meta = LeRobotMeta(root)

    def fields(self) -> Fields:
        """What the dataset has: features of info.json whose data are there."""
        first = next(iter(self.meta.episodes.values()))
        columns = read_columns(first.data, None)
        cameras: dict[str, tuple[int, int] | None] = {}
        vectors: dict[str, Field] = {}
        texts = ["task"] if self.meta.tasks else []
        missing: dict[str, str] = {}
        for name, feature in self.meta.features.items():
            dtype, shape = feature["dtype"], _shape(feature, f"{self.root / INFO}: {name}")
            if dtype in ("video", "image"):
                if why := self._no_pictures(name, feature, columns):
                    missing[name] = why
                else:
                    cameras[name] = _size(feature, shape)
            elif name in _BOOKKEEPING or name not in columns:
                if name not in columns and name not in _BOOKKEEPING:
                    missing[name] = f"declared in info.json, but {first.data.name} has no such column"
            elif name.startswith("annotation.") or dtype == "string":
                texts.append(name)
            elif dtype in _NUMBERS and math.prod(shape) > WIDEST:
                missing[name] = f"{math.prod(shape)} columns; at most {WIDEST} are read"
            elif dtype in _NUMBERS:
                vectors[name] = Field(shape, _names(feature), {"action": "action"}.get(name, ""))
            else:
                missing[name] = f"dtype {dtype!r} is not read"
        parts = self._parts(vectors)
        for name, vector in vectors.items():
            vectors[name] = Field(vector.shape, _better(name, vector, parts), vector.role)
        robot = self.meta.info.get("robot_type")
        own = read_json(self.root / OWN, "written by our exporter") if (self.root / OWN).is_file() else {}
        return Fields(
            where=str(self.root),
            fps=self.meta.fps,
            embodiment=robot if isinstance(robot, str) and robot != "unknown" else "",
            cameras=cameras,
            vectors=vectors,
            parts=parts,
            texts=tuple(texts),
            splits=tuple(self.meta.splits()),
            missing=missing,
            questions=self._questions(first) if any(camera in first.videos for camera in cameras) else {},
            mapping=own.get("mapping"),
        )

    def refs(self) -> list[Ref]:
        """Every episode of the episode table."""
        splits = self.meta.splits()
        return [
            Ref(
                str(episode.own.get("episode_id") or episode_key("episode", index)),
                (index,),
                str(episode.own.get("split") or next((name for name, own in splits.items() if index in own), "")),
            )
            for index, episode in sorted(self.meta.episodes.items())
        ]

    def read(self, ref: Ref, mapping: Mapping) -> Episode:
        """The episode of `ref`; loads only what `mapping` uses.

        Raises:
            DataError: a file, column or frame is missing or damaged; names file, episode and frame.
        """
        index = int(ref.place[0])
        if index not in self.meta.episodes:
            raise DataError(f"{self.root}: no episode {index}; it has {len(self.meta.episodes)}")
        episode = self.meta.episodes[index]
        where = f"{episode.data}: episode {index}"
        pictures = {name for name in mapping.images() if self.meta.features[name]["dtype"] == "image"}
        text = mapping.instruction.field
        column = "task_index" if text == "task" else text
        wanted = mapping.vectors() | pictures | {"timestamp", "frame_index", "episode_index", "next.success"}
        table = self._table(episode, sorted(wanted | ({column} if column else set())), where)
        recording = Recording(where, episode.length, self.meta.fps, meta=dict(episode.own))
        for name in sorted(mapping.vectors()):
            recording.vectors[name] = self._vector(table, name, where)
        if column is not None and text is not None:
            recording.texts[text] = self._sentence(table, column, where)
            if text == "task" and "instruction" in episode.own:
                recording.texts[text] = str(episode.own["instruction"])
        recording.task = str(episode.own.get("task", ""))
        if "success" in episode.own:
            recording.success = bool(episode.own["success"])
        elif "next.success" in table.column_names:
            recording.success = bool(self._plain(table, "next.success", where).any())
        times = self._times(table, mapping, where)
        for name in sorted(mapping.images()):
            if name in pictures:
                recording.images[name] = decode_pictures(_bytes(table[name], f"{where}: {name}"), f"{where}: {name}")
            else:
                piece = episode.videos.get(name)
                if piece is None or not piece.path.is_file():
                    raise DataError(f"{where}: {name}: no video file {piece.path if piece else 'in the episode table'}")
                recording.images[name] = frames_at(
                    piece.path, piece.start + times, TOLERANCE / self.meta.fps, f"{where}: {name}"
                )
        return assemble(recording, mapping)

    def _no_pictures(self, name: str, feature: dict[str, Any], columns: list[str]) -> str:
        """Why the pictures of camera `name` cannot be read, or nothing."""
        places = [
            place for place in (feature, feature.get("info"), feature.get("video_info")) if isinstance(place, dict)
        ]
        if any(place.get(key) for place in places for key in ("is_depth_map", "video.is_depth_map")):
            return "a depth map; depth is not imported"
        if feature["dtype"] == "image":
            return "" if name in columns else "declared in info.json, but the data files have no such column"
        pieces = (episode.videos.get(name) for episode in self.meta.episodes.values())
        if any(piece is not None and piece.path.is_file() for piece in pieces):
            return ""
        return "declared in info.json, but there is not one video file of it"

    def _parts(self, vectors: dict[str, Field]) -> dict[str, Part]:
        """GR00T's names for columns of the state and the action."""
        path = self.root / MODALITY
        if not path.is_file():
            return {}
        modality, parts = read_json(path, "GR00T's names of columns"), {}
        for kind, default in (("state", "observation.state"), ("action", "action")):
            entries = modality.get(kind, {})
            for name, entry in (entries if isinstance(entries, dict) else {}).items():
                start, stop = (entry.get("start"), entry.get("end")) if isinstance(entry, dict) else (None, None)
                field = str(entry.get("original_key") or default) if isinstance(entry, dict) else default
                if field not in vectors:
                    raise DataError(f"{path}: {kind}.{name}: no column {field!r}; the data has {sorted(vectors)}")
                count = math.prod(vectors[field].shape)
                if not isinstance(start, int) or not isinstance(stop, int) or not 0 <= start < stop <= count:
                    raise DataError(f"{path}: {kind}.{name}: {start}..{stop} is not within the {count} of {field}")
                parts[f"{kind}.{name}"] = Part(field, start, stop)
        return parts

    def _questions(self, first: EpisodeInfo) -> dict[str, str]:
        """Time stamps that do not start at 0 leave open which frame belongs to which row."""
        table = self._table(first, ["timestamp", "episode_index"], str(first.data))
        start = self._plain(table, "timestamp", str(first.data))[0] if "timestamp" in table.column_names else 0.0
        if abs(start) <= TOLERANCE / self.meta.fps:
            return {}
        return {
            "pair_video": f"time stamps start at {start:.3f} s, not at 0: does row i belong to the frame at its time "
            f"stamp ({PAIRINGS[0]}), or to frame i of the episode ({PAIRINGS[1]})?"
        }

    def _table(self, episode: EpisodeInfo, columns: list[str], where: str) -> Any:
        """The rows of one episode with those of `columns` that the file has."""
        have = read_columns(episode.data, columns)
        filters = [("episode_index", "=", episode.index)] if "episode_index" in have else None
        table = read_table(episode.data, have, filters)
        if table.num_rows != episode.length or not episode.length:
            raise DataError(f"{where}: {table.num_rows} rows, the episode table says {episode.length}; both must agree")
        return table

    def _vector(self, table: Any, name: str, where: str) -> np.ndarray:
        """(T, *shape) of a numeric column."""
        if name not in table.column_names:
            raise DataError(f"{where}: column {name!r} is missing; the file has {table.column_names}")
        shape = _shape(self.meta.features[name], f"{where}: {name}")
        try:
            value = np.array(table[name].to_pylist(), np.float64)
            return value.reshape(table.num_rows, *shape)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: {name}: not {shape} numbers in every row ({error})") from error

    def _sentence(self, table: Any, column: str, where: str) -> str:
        """The one sentence of the episode; a number is looked up in the task table."""
        if column not in table.column_names:
            raise DataError(f"{where}: column {column!r} is missing; the file has {table.column_names}")
        values = list({repr(value): value for value in table[column].to_pylist()}.values())
        if len(values) != 1:
            raise DataError(
                f"{where}: {column}: {len(values)} different sentences in one episode; one per episode is read. Cut "
                "the episode, or give the instruction in the map: {text: ...}"
            )
        if isinstance(values[0], str):
            return values[0]
        if not isinstance(values[0], int | float) or values[0] not in self.meta.tasks:
            raise DataError(f"{where}: {column}: task {values[0]!r} is not in the task table {sorted(self.meta.tasks)}")
        return self.meta.tasks[values[0]]

    def _times(self, table: Any, mapping: Mapping, where: str) -> np.ndarray:
        """(T,) seconds of the rows' pictures from the start of the episode in the video."""
        steps, fps = np.arange(table.num_rows), self.meta.fps
        if "frame_index" in table.column_names:
            numbers = self._plain(table, "frame_index", where)
            if (wrong := np.flatnonzero(numbers != steps)).size:
                step = int(wrong[0])
                raise DataError(f"{where}: frame_index: {numbers[step]:g} at row {step}; rows must be in order from 0")
        if "timestamp" not in table.column_names:
            return steps / fps
        stamps = self._plain(table, "timestamp", where)
        off = np.abs(stamps - stamps[0] - steps / fps)
        if (wrong := np.flatnonzero(~(off <= TOLERANCE / fps))).size:
            step = int(wrong[0])
            raise DataError(
                f"{where}: timestamp: frame {step} is at {stamps[step]:.6f} s, by {fps:g} fps it should be at "
                f"{stamps[0] + step / fps:.6f} s; steps must be evenly spaced (record or resample at a constant rate)"
            )
        return steps / fps if mapping.pair_video == "number" else stamps

    def _plain(self, table: Any, name: str, where: str) -> np.ndarray:
        """(T,) of a column of scalars, whether stored so or as lists of one."""
        try:
            return np.array(table[name].to_pylist(), np.float64).reshape(table.num_rows)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: {name}: must hold one number in every row ({error})") from error


def _shape(feature: dict[str, Any], where: str) -> tuple[int, ...]:
    shape = feature.get("shape", [1])
    if not isinstance(shape, list) or not all(isinstance(size, int) and 0 < size < 1 << 20 for size in shape):
        raise DataError(f"{where}: shape {shape!r} must list positive whole numbers")
    return tuple(shape)


def _size(feature: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(height, width) of a camera; older files say channels first."""
    if len(shape) != 3:
        return None
    names = feature.get("names")
    first = names[0] if isinstance(names, list) and names else ""
    return (shape[1], shape[2]) if str(first).startswith("channel") else (shape[0], shape[1])


def _names(feature: dict[str, Any]) -> tuple[str, ...]:
    """Column names: a list, or lists within an object."""
    names = feature.get("names")
    if isinstance(names, dict):
        names = [item for value in names.values() for item in (value if isinstance(value, list) else [value])]
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _better(name: str, vector: Field, parts: dict[str, Part]) -> tuple[str, ...]:
    """Names from GR00T's parts where the columns' own names are missing or only numbers."""
    if vector.names and not all(_GENERIC.fullmatch(own) for own in vector.names):
        return vector.names
    names = list(vector.names) or [f"{name}.{i}" for i in range(math.prod(vector.shape))]
    for part_name, part in parts.items():
        if part.field == name and part.stop <= len(names):
            short = part_name.partition(".")[2]
            names[part.start : part.stop] = [f"{short}.{i}" for i in range(part.stop - part.start)]
    return tuple(names) if parts else vector.names


def _bytes(column: Any, where: str) -> list[bytes]:
    """The encoded pictures of an image column, which holds {bytes, path}."""
    out = []
    for step, value in enumerate(column.to_pylist()):
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"{where}: frame {step}: no picture bytes in the parquet file; embed them when saving")
        out.append(data)
    return out
