"""Writes shards, which are deterministic WebDataset tar files, and the index beside them, each whole or not at all."""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.embodiments import metadata_faults
from worldmodel.data.index import INDEX
from worldmodel.data.schema import JPEG, Episode, encode
from worldmodel.errors import DataError


def write_shard(path: Path, samples: Iterable[tuple[str, Episode]], *, pictures: str = JPEG) -> dict[str, Any]:
    """Write `samples` (key, episode) to `path`, whole or not at all, and return the shard's record for the index.

    The bytes depend on the samples only: times, owners and order are fixed. One episode at a time is in memory.
    `pictures` is one of `schema.PICTURES`.

    Raises:
        DataError: a key holds a dot, a slash or is used twice, or the metadata contradict the embodiment registry.
    """
    from webdataset.writer import TarWriter

    temporary = _temporary(path)
    entries: list[dict[str, Any]] = []
    keys: set[str] = set()
    # A time that is no whole number takes a header of its own, a kilobyte for every member.
    options: dict[str, Any] = {"encoder": False, "mtime": 0, "user": "worldmodel", "group": "worldmodel"}
    with open(temporary, "wb") as file, TarWriter(file, **options) as writer:
        for key, episode in samples:
            if "." in key or "/" in key or key in keys:
                raise DataError(f"{path.name}: key {key!r} must be unique and hold no dot and no slash")
            for message in metadata_faults(episode.meta):
                raise DataError(f"{path.name}: key {key}: {message}")
            keys.add(key)
            offset = writer.tarstream.offset
            writer.write({"__key__": key, **encode(episode, pictures=pictures)})
            meta = episode.meta
            names = ("episode_id", "length", "task", "split", "embodiment", "success")
            entries.append(
                {"key": key, "offset": offset, "size": writer.tarstream.offset - offset}
                | {name: meta[name] for name in names}
                | {"initial_state": initial_state(episode)}
                | ({name: meta[name] for name in ("variant_of", "variant")} if meta.get("variant") else {})
            )
    with open(temporary, "rb") as file:
        for entry in entries:
            file.seek(entry["offset"])
            entry["crc32"] = zlib.crc32(file.read(entry["size"]))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.seek(0, os.SEEK_END)
    os.replace(temporary, path)
    return {"name": path.name, "samples": len(entries), "bytes": size, "sha256": digest, "entries": entries}


def initial_state(episode: Episode) -> str:
    """Digest of the task and the first step's points and proprioception, rounded to a micrometre."""
    digest = hashlib.sha256(str(episode.meta["task"]).encode())
    for value in (episode.points, episode.proprio):
        if value is not None:
            digest.update(np.round(value[0].astype(np.float64), 6).tobytes())
    return digest.hexdigest()[:16]


def write_index(root: Path, shards: list[dict[str, Any]], heldout_tasks: list[str], extra: dict[str, Any]) -> None:
    """Write `index.json` for finished shards; `extra` says how the data came about."""
    entries = [entry for shard in shards for entry in shard["entries"]]
    splits: dict[str, dict[str, int]] = {}
    for entry in entries:
        counts = splits.setdefault(entry["split"], {"episodes": 0, "steps": 0, "successes": 0})
        counts["episodes"] += 1
        counts["steps"] += entry["length"]
        counts["successes"] += bool(entry["success"])
    index = {
        "schema_version": SCHEMA_VERSION,
        "embodiments": sorted({entry["embodiment"] for entry in entries}),
        "tasks": sorted({entry["task"] for entry in entries}),
        "heldout_tasks": sorted(heldout_tasks),
        "splits": splits,
        **extra,
        "shards": shards,
    }
    write_json(root / INDEX, index)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all."""
    temporary = _temporary(path)
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def canonical(value: Any) -> str:
    """`value` as JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def remove_temporary(root: Path) -> None:
    """Remove what killed writers left in `root`."""
    for path in root.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name that no other process writes to: two that make the same file must not mix their bytes."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    # A link of that name, in a folder that others made, would lead the bytes out of it.
    temporary.unlink(missing_ok=True)
    return temporary
