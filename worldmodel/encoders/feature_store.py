"""Features of frozen networks in files, found by what the network was given.

A folder `<part>-<backbone>-<dataset>` holds `features.json` (what made them and of which data) and a safetensors file
per shard: `keys` (n,) int64, `ends` (n,) int64 and `tokens` (sum of M, D), of which entry i has the rows from
`ends[i - 1]` to `ends[i]`. Files are mapped into memory, not read.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.plain import read_json
from worldmodel.data.shard_writer import write_json
from worldmodel.errors import ConfigError, DataError

DESCRIPTION = "features.json"


def key_of(*parts: bytes) -> int:
    """A number for what a network is given: 64 bits of BLAKE2b over its parts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little", signed=True)


def pixels_of(rgb: Tensor) -> list[bytes]:
    """The bytes of pictures (N, 3, h, w) in [-1, 1], which were uint8 before they were scaled."""
    whole = ((rgb + 1.0) * 127.5).round().to(torch.uint8).cpu()
    return [str(tuple(picture.shape)).encode() + picture.numpy().tobytes() for picture in whole]


class FeatureStore:
    """The features of one network for some datasets."""

    def __init__(self, folders: Iterable[Path]) -> None:
        keys, self._ends, self._tokens = [], [], []
        for folder in folders:
            for shard in description(folder)["shards"]:
                held = read_part(folder, shard)
                keys.append(held["keys"].numpy())
                self._ends.append(held["ends"].tolist())
                self._tokens.append(held["tokens"])
        whole = np.concatenate(keys)
        order = np.argsort(whole, kind="stable")
        self._keys = whole[order]
        self._part = np.repeat(np.arange(len(keys)), [len(part) for part in keys])[order]
        self._row = np.concatenate([np.arange(len(part)) for part in keys])[order]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, key: int) -> Tensor | None:
        """Features (M, D) of a key in the type they were computed in, None if they are not here. Do not write to it."""
        place = int(np.searchsorted(self._keys, key))
        if place == len(self._keys) or self._keys[place] != key:
            return None
        part, row = int(self._part[place]), int(self._row[place])
        ends = self._ends[part]
        return self._tokens[part][ends[row - 1] if row else 0 : ends[row]]


def part_path(folder: Path, shard: str) -> Path:
    """Where the features of a shard lie."""
    return folder / f"{Path(shard).stem}.safetensors"


def write_part(folder: Path, shard: str, features: Mapping[int, Tensor]) -> None:
    """Writes the features of a shard, whole or not at all; a shard without any has none of any width."""
    tokens = list(features.values())
    held = {
        "keys": torch.tensor(list(features), dtype=torch.int64),
        "ends": torch.tensor([len(rows) for rows in tokens], dtype=torch.int64).cumsum(0),
        "tokens": torch.cat(tokens) if tokens else torch.zeros(0, 0),
    }
    path = part_path(folder, shard)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file(held, part)
    part.replace(path)


def read_part(folder: Path, shard: str) -> dict[str, Tensor]:
    """The tensors of a shard. Raises `DataError` if its file is damaged."""
    path = part_path(folder, shard)
    try:
        held = load_file(path)
        ends = held["ends"]
        sound = len(held["keys"]) == len(ends) and (int(ends[-1]) if len(ends) else 0) == len(held["tokens"])
    except Exception as error:  # safetensors has errors of its own kind for each way to be damaged
        raise DataError(f"{path}: no file of features: {error}; delete it and make the features again") from error
    if not sound:
        raise DataError(f"{path}: keys, ends and tokens do not fit; delete it and make the features again")
    return held


def folder_of(root: Path, part: str, backbone: str, dataset: str) -> Path:
    """Where the features of a network (its `digest`) for a dataset (sha256 of its index) lie below `root`."""
    return root / f"{part}-{backbone}-{dataset[:16]}"


def describe(
    folder: Path, *, part: str, backbone: Mapping[str, Any], dataset: str, name: str, shards: Sequence[str]
) -> None:
    """Writes `features.json`: what the features are of and which shards there will be."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {"part": part, "backbone": dict(backbone), "dataset": dataset, "dataset_root": name, "shards": list(shards)}
    write_json(folder / DESCRIPTION, {"schema_version": SCHEMA_VERSION, **held})


def description(folder: Path) -> dict[str, Any]:
    """What `describe` wrote. Raises `DataError` if it is damaged or of another schema version."""
    path = folder / DESCRIPTION
    content = read_json(path, "`python -m worldmodel.features` writes it")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema_version is {content.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
        )
    if lacking := {"part", "backbone", "dataset", "dataset_root", "shards"} - set(content):
        raise DataError(f"{path}: lacks {min(lacking)}; `python -m worldmodel.features` writes it")
    return content


def open_store(root: Path, part: str, kind: str, backbone: str, datasets: Mapping[str, str]) -> FeatureStore:
    """The store of a network for datasets (root -> sha256 of the index).

    Raises `ConfigError` if they are not there or unfinished, and says of what network and data those are that are.
    """
    folders = []
    for name, dataset in datasets.items():
        folder = folder_of(root, part, backbone, dataset)
        if not (folder / DESCRIPTION).is_file():
            held = [description(path.parent) for path in sorted(root.glob(f"*/{DESCRIPTION}"))]
            there = "; ".join(
                f"{d['backbone']['kind']} {d['backbone']['digest']} on {d['dataset_root']} {d['dataset'][:16]}"
                for d in held
                if d["part"] == part
            )
            raise ConfigError(
                f"data.features: {root} has no features of encoders.{part} ({kind} {backbone}) for {name} "
                f"({dataset[:16]}), {f'only of {there}' if there else 'and none of any other'}; `python -m "
                "worldmodel.features` with the settings of this run makes them"
            )
        shards = description(folder)["shards"]
        missing = [shard for shard in shards if not part_path(folder, shard).is_file()]
        if missing:
            raise ConfigError(
                f"data.features: {folder} is unfinished, {len(missing)} of {len(shards)} shards lack; "
                "the same `python -m worldmodel.features` goes on"
            )
        folders.append(folder)
    return FeatureStore(folders)
