"""Write our shards as a LeRobot v3.0 dataset, with the map and the metadata that import it again without loss."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.formats.lerobot_features import lerobot_features, lerobot_mapping, lerobot_values
from worldmodel.data.formats.lerobot_files import (
    CHUNK_FILES,
    DATA_BYTES,
    DATA_PATH,
    VIDEO_BYTES,
    VIDEO_PATH,
    Moments,
    TableFiles,
    VideoFiles,
    column,
    png_column,
    task_table,
)
from worldmodel.data.formats.lerobot_meta import INFO, OWN, OWN_COLUMN, arrow
from worldmodel.data.formats.mapping import SPLITS, Mapping, Split
from worldmodel.data.schema import Episode
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_STEPS_FOR_IMAGE_STATISTICS = 16
_SCALARS = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def export_lerobot(
    root: str | Path, out: str | Path, *, embodiment: str | None = None, lossless: bool = False, progress: bool = True
) -> Path:
    """Write the dataset in `root` to the new folder `out` as LeRobot v3.0 and return `out`.

    Args:
        root: folder with shards and index.json.
        out: folder that does not exist or is empty.
        embodiment: which one to export; a LeRobot dataset holds one robot.
        lossless: pictures as PNG in the parquet files rather than as H.264.
        progress: show a bar.

    Raises:
        ConfigError: `out` is not empty, or the data hold several embodiments and none was named.
        DataError: the episodes do not have the same cameras, sensors, widths and rate.
    """
    from tqdm import tqdm

    reader, out = ShardReader(root, cache_bytes=0), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{out} is not an empty folder; choose another one, or delete it if it is an unfinished export"
        )
    known = reader.index["embodiments"]
    if embodiment is None and len(known) > 1:
        raise ConfigError(f"{reader.root} holds the embodiments {known}; a LeRobot dataset holds one: name it")
    chosen = [i for i, entry in enumerate(reader.entries) if embodiment in (None, entry.embodiment)]
    if not chosen:
        raise ConfigError(f"{reader.root} has no episode of {embodiment!r}; it has {known}")
    # A split is a range of episode numbers.
    order = {split: number for number, split in enumerate(SPLITS)}
    chosen.sort(key=lambda i: (order.get(reader.entries[i].split, len(order)), reader.entries[i].split))
    names = [list(reader.read(i, images=False).meta.get("point_names", ())) for i in chosen]
    shared = names[0] if all(own == names[0] for own in names) else [f"point_{k}" for k in range(max(map(len, names)))]
    writer = _Writer(out, lossless, {entry.episode_id: entry.key for entry in reader.entries}, shared)
    for i in tqdm(chosen, unit="episode", desc=out.name, disable=not progress):
        writer.add(reader.read(i), reader.entries[i])
    writer.finish(reader.heldout_tasks)
    if writer.masked:
        log.warning("%s: masks of %d episodes are left out: LeRobot has no place for them", out, writer.masked)
    return out


class _Writer:
    """What has been written so far."""

    def __init__(self, out: Path, lossless: bool, keys: dict[str, str], point_names: list[str]) -> None:
        self.out, self.lossless, self.keys, self.point_names = out, lossless, keys, point_names
        self.masked = 0
        """Episodes that lost their masks."""
        self.features: dict[str, dict[str, Any]] = {}
        self.mapping: Mapping | None = None
        self.fps = 0.0
        self.tables, self.videos = TableFiles(out), dict[str, VideoFiles]()
        self.moments: dict[str, Moments] = {}
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.splits: dict[str, list[int]] = {}
        self.frames = 0

    def add(self, episode: Episode, entry: Entry) -> None:
        """Append one episode."""
        where, meta, t = f"{entry.shard}: key {entry.key}", episode.meta, episode.length
        values = lerobot_values(episode, where, len(self.point_names))
        pictures = {f"observation.images.{camera}": images for camera, images in episode.rgb.items()}
        features = lerobot_features(values, pictures, episode, self.lossless)
        if self.mapping is None:
            self.features, self.mapping, self.fps = features, lerobot_mapping(episode, self.point_names), meta["fps"]
        if features != self.features or meta["fps"] != self.fps:
            differing = sorted(
                name for name in features.keys() | self.features.keys() if features.get(name) != self.features.get(name)
            )
            raise DataError(
                f"{where}: {', '.join(differing) or 'fps'}: not as in the first episode; all episodes of a LeRobot "
                "dataset have the same cameras, sensors, names, widths and rate"
            )
        number = len(self.rows)
        sentence = meta["instruction"] or meta["task"]
        self.masked += bool(episode.masks)
        steps = np.arange(t)
        scalars = {
            "timestamp": (steps / self.fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(t, number),
            "index": self.frames + steps,
            "task_index": np.full(t, self.tasks.setdefault(sentence, len(self.tasks))),
        }
        for name, value in (values | scalars).items():
            self.moments.setdefault(name, Moments()).add(value.reshape(t, -1))
        columns = {name: column(value) for name, value in (values | scalars).items()}
        places: dict[str, Any] = {}
        for key, images in pictures.items():
            sample = images[np.linspace(0, t - 1, min(t, _STEPS_FOR_IMAGE_STATISTICS)).round().astype(int)]
            self.moments.setdefault(key, Moments()).add(sample.reshape(-1, 3) / 255)
            if self.lossless:
                columns[key] = png_column(images)
                continue
            place = self.videos.setdefault(key, VideoFiles(self.out, key, self.fps)).add(images)
            places |= {f"videos/{key}/{name}": value for name, value in place.items()}
        chunk, file = self.tables.add(columns)
        self.rows.append(
            {
                "episode_index": number,
                "tasks": [sentence],
                "length": t,
                "dataset_from_index": self.frames,
                "dataset_to_index": self.frames + t,
                "data/chunk_index": chunk,
                "data/file_index": file,
                **places,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                OWN_COLUMN: json.dumps(self._kept(meta, entry.key), ensure_ascii=False, sort_keys=True),
            }
        )
        self.splits.setdefault(meta["split"], []).append(number)
        self.frames += t

    def finish(self, heldout_tasks: tuple[str, ...]) -> None:
        """Close the files and write the metadata; info.json comes last, so that an unfinished export is no dataset."""
        pa, pq = arrow()
        assert self.mapping is not None
        for files in (self.tables, *self.videos.values()):
            files.close()
        path = self.out / "meta/episodes/chunk-000/file-000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.rows), path)
        pq.write_table(task_table(self.tasks), self.out / "meta/tasks.parquet")
        stats = {
            name: moments.summary((3, 1, 1) if name.startswith("observation.images.") else self._shape(name))
            for name, moments in self.moments.items()
        }
        _write(self.out / "meta/stats.json", stats)
        self.mapping.split = Split(source={name: name for name in self.splits}, heldout_tasks=list(heldout_tasks))
        _write(self.out / OWN, {"schema_version": SCHEMA_VERSION, "mapping": self.mapping.as_dict()})
        numbers = {"dtype": "int64", "shape": [1], "names": None}
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.mapping.embodiment,
            "total_episodes": len(self.rows),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_BYTES >> 20,
            "video_files_size_in_mb": VIDEO_BYTES >> 20,
            "fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "splits": {name: f"{chosen[0]}:{chosen[-1] + 1}" for name, chosen in self.splits.items()},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.videos else None,
            "features": self.features
            | {name: numbers | ({"dtype": "float32"} if name == "timestamp" else {}) for name in _SCALARS},
        }
        _write(self.out / INFO, info)

    def _kept(self, meta: dict[str, Any], key: str) -> dict[str, Any]:
        """What an import takes up again: no names of masks, and keys as ids, also of a variant's original."""
        kept = {name: value for name, value in meta.items() if name != "elements"} | {"episode_id": key}
        if "variant_of" in kept:
            kept["variant_of"] = self.keys.get(kept["variant_of"], kept["variant_of"])
        return kept

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.features[name]["shape"]) if name in self.features else (1,)


def _write(path: Path, value: Any) -> None:
    """JSON in the given order: cameras and sensors keep theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
