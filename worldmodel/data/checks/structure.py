"""Structure: files, checksums, members, names, lengths and types, as far as each can be read on its own."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from worldmodel.data.checks.finding import RESTORE, Fault, Sample
from worldmodel.data.embodiments import beyond_limits
from worldmodel.data.faults import faults
from worldmodel.data.frames import camera_and_step
from worldmodel.data.plain import loads
from worldmodel.data.schema import Episode, decode
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader
from worldmodel.errors import DataError

_MODALITY = {
    "camera.npz": "camera",
    "objects.npz": "objects",
    "tactile.npz": "tactile",
    "proprio.npy": "proprio",
    "action.npy": "action",
}
_FLOATS = ("points", "wrench", "taxels", "proprio", "action")


def check_file(reader: ShardReader, shard: dict[str, Any]) -> Iterator[Fault]:
    """The shard is there, as long as the index says, and its sha256 is the index's."""
    name = str(shard["name"])
    try:
        reader.check_size(shard)
        with open(reader.path(name), "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except DataError as error:
        yield Fault(name, "", "size", str(error), RESTORE)
    except OSError as error:
        yield Fault(name, "", "size", f"cannot be read ({error})", RESTORE)
    else:
        if digest != shard["sha256"]:
            yield Fault(name, "", "sha256", f"{digest}, the index says {shard['sha256']}", RESTORE)


def read_sample(reader: ShardReader, i: int) -> tuple[Sample | None, list[Fault]]:
    """Episode `i` as far as it can be decoded, and a fault for each member that cannot be.

    Returns None where not even the metadata can be read. A member that fails is left out and the rest is decoded
    without it, so that one damaged picture does not hide a damaged sensor.
    """
    entry = reader.entries[i]
    where = f"{entry.shard}: key {entry.key}"
    found: list[Fault] = []
    try:
        members = reader.members(i)
    except DataError as error:
        return None, [Fault(entry.shard, entry.key, "", _local(error, where), RESTORE)]
    readable = dict(members)
    while True:
        try:
            episode = decode(readable, where, check=False)
            episode.meta = loads(members["meta.json"])  # as stored, not as edited below
            return Sample(entry, members, episode), found
        except DataError as error:
            name, _, rest = _local(error, where).partition(": ")
            message, _, fix = rest.partition("; ")
            found.append(Fault(entry.shard, entry.key, name, message or name, fix or RESTORE))
            if name == "meta.json" or not _leave_out(readable, name):
                return None, found


def _local(error: DataError, where: str) -> str:
    return str(error).removeprefix(f"{where}: ")


def _leave_out(members: dict[str, bytes], name: str) -> bool:
    """Takes what member `name` belongs to out of `members`; False if nothing is left to take out."""
    if name == "times.npz":
        return members.pop(name, None) is not None
    meta = loads(members["meta.json"])
    if name.startswith("mask."):
        del meta["elements"]
    elif name.startswith("rgb."):
        camera = next((c for c in meta["cameras"] if name.startswith(f"rgb.{c}.")), None)
        if camera is None:
            return False
        meta["cameras"] = [c for c in meta["cameras"] if c != camera]
        if not meta["cameras"]:
            meta["absent"] = [*meta.get("absent", ()), "rgb"]
    elif name in _MODALITY:
        meta["absent"] = [*meta.get("absent", ()), _MODALITY[name]]
    else:
        return False
    members["meta.json"] = json.dumps(meta).encode()
    return True


def check_fields(sample: Sample) -> Iterator[Fault]:
    """Types, lengths, shapes, finite values, rotations and intrinsics, as every reader demands them."""
    for message in faults(sample.episode):
        name, _, rest = message.partition(": ")
        problem, _, fix = rest.partition("; ")
        yield sample.fault(name, problem, fix or "write the episode again")


def check_limits(sample: Sample) -> Iterator[Fault]:
    """Actions lie within the limits that the embodiment registry gives."""
    for message in beyond_limits(sample.entry.embodiment, sample.episode.action):
        name, _, rest = message.partition(": ")
        problem, _, fix = rest.partition("; ")
        yield sample.fault(name, problem, fix, "warning")


def check_index_agrees(sample: Sample) -> Iterator[Fault]:
    """The metadata say the same as the index."""
    for name in ("episode_id", "length", "task", "split", "embodiment", "success"):
        if (value := sample.episode.meta[name]) != (indexed := getattr(sample.entry, name)):
            yield sample.fault(f"meta.json {name}", f"{value!r}, the index says {indexed!r}", "write the index again")
    for name, default in (("variant_of", None), ("variant", 0)):
        if (value := sample.episode.meta.get(name, default)) != (indexed := getattr(sample.entry, name)):
            yield sample.fault(f"meta.json {name}", f"{value!r}, the index says {indexed!r}", "write the index again")


def check_types(sample: Sample) -> Iterator[Fault]:
    """Series are float32 and flags are bool, as the schema says."""
    episode = sample.episode
    wanted = {name: np.float32 for name in _FLOATS} | {"visible": np.bool_}
    for name, kind in wanted.items():
        value = getattr(episode, name)
        if value is not None and value.dtype != kind:
            fix = f"store it as {np.dtype(kind)}"
            yield sample.fault(name, f"type {value.dtype}, the schema says {np.dtype(kind)}", fix, "warning")


def check_members(sample: Sample) -> Iterator[Fault]:
    """No members that readers would pass over: absent modalities, unknown names, pictures past the end."""
    meta = sample.episode.meta
    absent, length = set(meta.get("absent", ())), meta["length"]
    masks = {name: None for name in sample.members if name.startswith("mask.")}
    named = "elements" in meta
    if masks and not named:
        message = f"{len(masks)} masks are stored from here on, but meta.json has no `elements` that say what they show"
        yield sample.fault(next(iter(masks)), message, "name them in meta.json, or remove the masks", "warning")
    for name in sample.members:
        if name in ("meta.json", "times.npz") or (name in masks and not named):
            continue
        modality = name[: name.find(".")] if name.startswith(("rgb.", "mask.")) else _MODALITY.get(name)
        if modality is None:
            yield sample.fault(name, "unknown member, which readers pass over", "remove it or rename it", "warning")
        elif modality in absent:
            message = f"is stored, but meta.json names {modality!r} absent, so readers pass over it"
            yield sample.fault(name, message, "take it out of `absent`, or remove the member", "warning")
        elif modality in ("rgb", "mask") and not _is_read(name, meta["cameras"], length):
            message = f"belongs to no camera of {meta['cameras']} within {length} steps, so readers pass over it"
            yield sample.fault(name, message, "name its camera in meta.json, or remove it", "warning")


def _is_read(name: str, cameras: list[str], length: int) -> bool:
    camera, step = camera_and_step(name) or ("", 0)
    return camera in cameras and (step or 0) < length


def check_cameras(sample: Sample) -> Iterator[Fault]:
    """Every camera with intrinsics has poses, and every camera with pictures has both unless poses are absent."""
    episode = sample.episode
    for camera in sorted(set(episode.intrinsics) - set(episode.camera_to_base)):
        yield sample.fault(f"camera_to_base.{camera}", "is missing", f"store {camera}.camera_to_base in camera.npz")
    if episode.camera_to_base:
        for camera in sorted(set(episode.rgb) - set(episode.camera_to_base) - set(episode.intrinsics)):
            message = "has pictures but no pose, while other cameras have one"
            yield sample.fault(f"camera_to_base.{camera}", message, "store its calibration in camera.npz", "warning")


def without(episode: Episode, broken: set[str]) -> Episode:
    """`episode` without the fields named in `broken`, so that later checks meet only sound arrays."""
    kept = Episode(meta=episode.meta)
    for name in ("rgb", "intrinsics", "camera_to_base", "times", "masks"):
        setattr(kept, name, {k: v for k, v in getattr(episode, name).items() if f"{name}.{k}" not in broken})
    for name in ("points", "visible", "wrench", "taxels", "proprio", "action"):
        if name not in broken:
            setattr(kept, name, getattr(episode, name))
    return kept


def paired(episode: Episode) -> Episode:
    """`episode` without poses that lost their intrinsics and points that lost their flags, and the other way round."""
    lone = set(episode.intrinsics) ^ set(episode.camera_to_base)
    broken = {f"{name}.{camera}" for name in ("intrinsics", "camera_to_base") for camera in lone}
    return without(
        episode, broken | ({"points", "visible"} if episode.points is None or episode.visible is None else set())
    )


def check_totals(reader: ShardReader, entries: list[Entry]) -> Iterator[Fault]:
    """The index's own totals fit its entries, keys are unique, and no shard lies beside them unlisted."""
    index, fix = reader.index, "write the index again"
    counts: dict[str, dict[str, int]] = {}
    for entry in entries:
        split = counts.setdefault(entry.split, {"episodes": 0, "steps": 0, "successes": 0})
        for name, value in (("episodes", 1), ("steps", entry.length), ("successes", bool(entry.success))):
            split[name] += value
    if index.get("splits") != counts:
        yield Fault("index.json", "", "splits", f"{index.get('splits')}, its entries make {counts}", fix)
    for name, values in (("tasks", {e.task for e in entries}), ("embodiments", {e.embodiment for e in entries})):
        if index.get(name) != sorted(values):
            yield Fault("index.json", "", name, f"{index.get(name)}, its entries have {sorted(values)}", fix)
    first: dict[str, Entry] = {}
    for entry in entries:
        if (other := first.setdefault(entry.key, entry)) is not entry:
            yield Fault(entry.shard, entry.key, "key", f"is used in {other.shard} too", "give every sample its own key")
    listed = {shard["name"] for shard in index["shards"]}
    for path in sorted(reader.root.glob("*.tar")):
        if path.name not in listed:
            message = "is no part of the dataset: the index does not list it"
            yield Fault(path.name, "", "", message, "write the index again, or remove the file", "warning")
