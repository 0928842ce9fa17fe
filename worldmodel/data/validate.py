"""Read a whole dataset and list every fault in it, with a fix for each; leakage between splits included."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from worldmodel.data.embodiments import beyond_limits
from worldmodel.data.schema import Episode, decode, faults
from worldmodel.data.shards import INDEX, Entry, ShardReader
from worldmodel.data.statistics import STATISTICS, compute_statistics, load_statistics, statistics_hash
from worldmodel.errors import DataError

_RESTORE = "restore the file from a copy or generate the dataset again"


class Fault(NamedTuple):
    """One thing that is wrong, where, and what to do about it."""

    file: str
    key: str
    field: str
    problem: str
    fix: str

    def __str__(self) -> str:
        place = " ".join(part for part in (self.file, self.key, self.field) if part)
        return f"{place}: {self.problem} [{self.fix}]"


def validate(root: str | Path) -> list[Fault]:
    """Every fault of the dataset in `root`; an empty list if it is sound."""
    try:
        reader = ShardReader(root, cache_bytes=0, check_sizes=False)
    except DataError as error:
        return [Fault(INDEX, "", "", str(error), "generate the dataset again")]
    found = list(_shards(reader))
    for i, entry in enumerate(reader.entries):
        found += _episode(reader, i, entry)
    found += _leaks(reader)
    if not found:
        found += _statistics(reader)
    return found


def _shards(reader: ShardReader) -> Iterator[Fault]:
    for shard in reader.index["shards"]:
        try:
            reader.check_size(shard)
        except DataError as error:
            yield Fault(shard["name"], "", "size", str(error), _RESTORE)
            continue
        with open(reader.path(shard["name"]), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard["sha256"]:
            yield Fault(shard["name"], "", "sha256", f"{digest}, the index says {shard['sha256']}", _RESTORE)


def _episode(reader: ShardReader, i: int, entry: Entry) -> list[Fault]:
    try:
        episode = decode(reader.members(i), f"{entry.shard}: key {entry.key}", check=False)
    except DataError as error:
        message = str(error).removeprefix(f"{entry.shard}: key {entry.key}: ")
        name, _, problem = message.partition(": ")
        return [Fault(entry.shard, entry.key, name if problem else "", problem or message, _RESTORE)]
    found = []
    limits = beyond_limits(entry.embodiment, episode.action)
    for message in [*faults(episode), *_reprojection(episode), *limits]:
        name, _, rest = message.partition(": ")
        problem, _, fix = rest.partition("; ")
        found.append(Fault(entry.shard, entry.key, name, problem, fix or "write the episode again"))
    for name in ("episode_id", "length", "task", "split", "embodiment", "success"):
        if episode.meta[name] != getattr(entry, name):
            found.append(
                Fault(
                    entry.shard,
                    entry.key,
                    f"meta.json {name}",
                    f"{episode.meta[name]!r}, the index says {getattr(entry, name)!r}",
                    "write the index again",
                )
            )
    return found


def _reprojection(episode: Episode) -> Iterator[str]:
    """Points marked visible must lie in front of at least one camera and inside its picture."""
    if episode.points is None or episode.visible is None or not episode.rgb or faults(episode):
        return
    seen = np.zeros(episode.visible.shape, bool)
    for camera, images in episode.rgb.items():
        if camera not in episode.camera_to_base:
            continue
        pose, matrix = episode.camera_to_base[camera], episode.intrinsics[camera]
        in_camera = (episode.points - pose[:, None, :3, 3]) @ pose[:, :3, :3]
        depth = in_camera[..., 2]
        pixels = in_camera / np.maximum(depth, 1e-6)[..., None] @ matrix.transpose(0, 2, 1)
        size = np.array(images.shape[2:0:-1])
        # Half a pixel of slack: the flag was computed before rounding to float32.
        seen |= (depth > 0) & ((pixels[..., :2] >= -0.5) & (pixels[..., :2] <= size + 0.5)).all(-1)
    if (wrong := episode.visible & ~seen).any():
        step, point = (int(n) for n in np.argwhere(wrong)[0])
        yield (
            f"visible: point {episode.meta['point_names'][point]!r} is marked visible at step {step} but projects "
            "into no picture; check camera_to_base (OpenCV axes, base frame) and the flag"
        )


def _leaks(reader: ShardReader) -> Iterator[Fault]:
    for entry in reader.entries:
        if entry.task in reader.heldout_tasks and entry.split != "heldout_tasks":
            yield Fault(
                entry.shard,
                entry.key,
                "split",
                f"held-out task {entry.task!r} is in split {entry.split!r}",
                "move it to split 'heldout_tasks'",
            )
    for name, fix in (
        ("episode_id", "give every episode an id of its own"),
        ("initial_state", "draw held-out episodes with other seeds"),
    ):
        first: dict[str, Entry] = {}
        for entry in reader.entries:
            other = first.setdefault(getattr(entry, name), entry)
            if other is not entry and (name == "episode_id" or other.split != entry.split):
                yield Fault(
                    entry.shard,
                    entry.key,
                    name,
                    f"the same as {other.key} of split {other.split!r} in {other.shard}",
                    fix,
                )


def _statistics(reader: ShardReader) -> list[Fault]:
    if "train" not in reader.index["splits"]:
        return []
    fix = "python -m worldmodel.data stats " + str(reader.root)
    try:
        stored = load_statistics(reader.root)
    except DataError as error:
        return [Fault(STATISTICS, "", "", str(error), fix)]
    if statistics_hash(stored) != statistics_hash(compute_statistics(reader)):
        return [Fault(STATISTICS, "", "", "is not computed from these shards' train split", fix)]
    return []
