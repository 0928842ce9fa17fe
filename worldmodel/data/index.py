"""What `index.json` must hold, checked once when a dataset is opened so that nobody need ask again.

It stands beside the shards: schema version, what generated them, tasks, splits, held-out tasks, and per shard its name,
size, sha256 and one entry per sample with the byte range in the tar.
"""

import re
from collections.abc import Mapping
from typing import Any

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.meta import LONGEST
from worldmodel.errors import DataError

INDEX = "index.json"
_BYTES = (1 << 63) - 1
_TEXTS = ("key", "episode_id", "task", "split", "embodiment", "initial_state")
_NUMBERS = {"offset": (0, _BYTES), "size": (1, _BYTES), "crc32": (0, (1 << 32) - 1), "length": (1, LONGEST)}
_ENTRY = {*_TEXTS, *_NUMBERS, "success"}
_VARIANT = {"variant_of", "variant"}
"""Only entries of variants have these."""
_FILE = re.compile(r"[^/\\\0]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_index(index: Mapping[str, Any], where: str) -> None:
    """Raise `DataError` for the first field of an index that is missing or not what readers rely on."""
    version = index.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{where}: schema_version {version!r}, this version reads {SCHEMA_VERSION}; generate or convert the data "
            "again"
        )
    for name in ("embodiments", "tasks", "heldout_tasks"):
        values = index.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise DataError(f"{where}: {name} must be a list of names; write the index again")
    if not isinstance(index.get("splits"), dict) or not isinstance(index.get("shards"), list):
        raise DataError(f"{where}: splits must be an object and shards a list; write the index again")
    names: set[str] = set()
    for shard in index["shards"]:
        _check_shard(shard, where)
        if shard["name"] in names:
            raise DataError(f"{where}: shard {shard['name']!r} is listed twice; write the index again")
        names.add(shard["name"])


def _check_shard(shard: Any, where: str) -> None:
    if not isinstance(shard, dict) or not isinstance(shard.get("entries"), list):
        raise DataError(f"{where}: every shard must be an object with a list of entries; write the index again")
    name, digest = shard.get("name"), shard.get("sha256")
    if not isinstance(name, str) or not _FILE.fullmatch(name) or name in (".", "..") or len(name.encode()) > 200:
        raise DataError(f"{where}: shard name {name!r} must be a plain file name")
    # The digest becomes a file name where shards are fetched.
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise DataError(f"{where}: shard {name}: sha256 {digest!r} must be 64 hexadecimal digits")
    if not _whole(shard.get("bytes"), 0, _BYTES):
        raise DataError(f"{where}: shard {name}: bytes {shard.get('bytes')!r} must be a whole number of 0 or more")
    for number, entry in enumerate(shard["entries"]):
        if fault := _entry_fault(entry):
            raise DataError(f"{where}: shard {name}: entry {number}: {fault}; write the index again")


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or entry.keys() not in (_ENTRY, _ENTRY | _VARIANT):
        has = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        return f"must have the fields {sorted(_ENTRY)}, and a variant {sorted(_VARIANT)} too, it has {has}"
    if "variant" in entry and not (_whole(entry["variant"], 1, LONGEST) and isinstance(entry["variant_of"], str)):
        return f"variant {entry['variant']!r} of {entry['variant_of']!r} must be a number from 1 and an episode_id"
    for name in _TEXTS:
        if not isinstance(entry[name], str):
            return f"{name} {entry[name]!r} must be text"
    for name, (low, high) in _NUMBERS.items():
        if not _whole(entry[name], low, high):
            return f"{name} {entry[name]!r} must be a whole number from {low} to {high}"
    if not entry["key"] or {".", "/"} & set(entry["key"]):
        return f"key {entry['key']!r} must hold no dot and no slash"
    # Every step of every kind of stream takes more than a byte.
    if entry["length"] > entry["size"]:
        return f"length {entry['length']}, but {entry['size']} bytes are all that is stored of it"
    return None if isinstance(entry["success"], bool) else f"success {entry['success']!r} must be true or false"


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high
