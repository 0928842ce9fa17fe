"""Per-embodiment statistics of every numeric field and all instructions, from the train split only, and their hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.plain import read_json
from worldmodel.data.schema import Episode
from worldmodel.data.shard_writer import write_json
from worldmodel.data.shards import ShardReader
from worldmodel.errors import DataError

STATISTICS = "stats.json"
FIELDS = ("proprio", "action", "wrench", "taxels", "points", "camera_translation")
"""Shapes: proprio (P,), action (D,), wrench (S, 6), taxels (C, 1, 1) pooled over sensors and cells, points (3,) pooled
over points, camera_translation (3,) pooled over cameras; `count` is the number of values behind each number, `floor`
the least `std` given out and `floored` the dimensions that were raised to it."""
_MEASURES = ("mean", "std", "min", "max", "q01", "q99", "count")


def compute_statistics(reader: ShardReader) -> dict[str, Any]:
    """Statistics of the train split of `reader`, as `stats.json` holds them.

    Raises:
        DataError: there is no train episode.
    """
    columns: dict[str, dict[str, list[np.ndarray]]] = {}
    instructions = set[str]()
    for i, entry in enumerate(reader.entries):
        if entry.split == "train":
            fields = columns.setdefault(entry.embodiment, {})
            episode = reader.read(i, images=False)
            instructions |= {episode.meta["instruction"]} - {""}
            for name, value in _columns(episode).items():
                fields.setdefault(name, []).append(value)
    if not columns:
        raise DataError(
            f"{reader.root}: no episode of split 'train', so no statistics; splits: {sorted(reader.index['splits'])}"
        )
    embodiments = {
        embodiment: {name: _measure(values, embodiment, name) for name, values in fields.items()}
        for embodiment, fields in columns.items()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "split": "train",
        "instructions": sorted(instructions),
        "embodiments": embodiments,
    }


def _columns(episode: Episode) -> dict[str, np.ndarray]:
    """Fields of one episode as (samples, *shape of the statistic)."""
    columns: dict[str, np.ndarray] = {}
    for name in ("proprio", "action", "wrench"):
        value = getattr(episode, name)
        if value is not None:
            columns[name] = value
    if episode.taxels is not None:
        channels = episode.taxels.shape[2]
        columns["taxels"] = np.moveaxis(episode.taxels, 2, -1).reshape(-1, channels, 1, 1)
    if episode.points is not None:
        columns["points"] = episode.points.reshape(-1, 3)
    if episode.camera_to_base:
        columns["camera_translation"] = np.concatenate([pose[:, :3, 3] for pose in episode.camera_to_base.values()])
    return {name: value for name, value in columns.items() if value.size}


def _measure(values: list[np.ndarray], embodiment: str, name: str) -> dict[str, Any]:
    if len(shapes := {value.shape[1:] for value in values}) > 1:
        raise DataError(
            f"embodiment {embodiment!r}: field {name!r} has several shapes {sorted(shapes)}; episodes of "
            "one embodiment must agree"
        )
    column = np.concatenate(values).astype(np.float64)
    std = column.std(0)
    # A dimension that hardly moves would blow up when divided by its own spread.
    floor = float(f"{max(1e-3, 0.01 * float(std.max())):.9g}")
    low, high = np.quantile(column, (0.01, 0.99), axis=0)
    measures = {
        "mean": column.mean(0),
        "std": np.maximum(std, floor),
        "min": column.min(0),
        "max": column.max(0),
        "q01": low,
        "q99": high,
    }
    # Nine digits carry every float32 and hide the last bits, in which summation order shows.
    digits: dict[str, Any] = {key: _rounded(value) for key, value in measures.items()}
    return {**digits, "count": len(column), "floor": floor, "floored": (std < floor).tolist()}


def _rounded(value: np.ndarray) -> Any:
    return np.vectorize(lambda number: float(f"{number:.9g}"), otypes=[float])(value).tolist()


def statistics_hash(statistics: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of `statistics`; checkpoints carry it."""
    canonical = json.dumps(statistics, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def write_statistics(root: str | Path) -> dict[str, Any]:
    """Compute and write `stats.json` for the dataset in `root`, and return it."""
    statistics = compute_statistics(ShardReader(root, cache_bytes=0))
    write_json(Path(root) / STATISTICS, statistics)
    return statistics


def load_statistics(root: str | Path) -> dict[str, Any]:
    """The statistics beside the shards in `root`.

    Raises:
        DataError: missing, of another schema version, incomplete (older ones have no `floor` or no `instructions`), or
            not finite numbers.
    """
    path = Path(root) / STATISTICS
    again = f"compute it again: python -m worldmodel.data stats {root}"
    statistics = read_json(path, again)
    version = statistics.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}; {again}")
    instructions, embodiments = statistics.get("instructions"), statistics.get("embodiments")
    if not isinstance(instructions, list) or not all(isinstance(one, str) for one in instructions):
        raise DataError(f"{path}: instructions must be a list of texts; {again}")
    if not isinstance(embodiments, dict) or not all(isinstance(fields, dict) for fields in embodiments.values()):
        raise DataError(f"{path}: embodiments must be an object of objects; {again}")
    for embodiment, fields in embodiments.items():
        for name, measures in fields.items():
            if message := _measures_fault(measures):
                raise DataError(f"{path}: {embodiment}.{name}: {message}; {again}")
    return statistics


def _measures_fault(measures: Any) -> str | None:
    """What keeps the statistics of one field from being used."""
    known = measures if isinstance(measures, dict) else {}
    if missing := [measure for measure in (*_MEASURES, "floor", "floored") if measure not in known]:
        return f"missing {missing}"
    try:
        arrays = {measure: np.array(measures[measure], np.float64) for measure in _MEASURES}
    except (TypeError, ValueError, OverflowError) as error:
        return f"not numbers ({error})"
    shapes = {array.shape for measure, array in arrays.items() if measure != "count"}
    if len(shapes) > 1 or arrays["count"].shape or not all(np.isfinite(array).all() for array in arrays.values()):
        return f"must be finite and of one shape, they have {sorted(shapes)}"
    return None if (arrays["std"] > 0).all() and arrays["count"] >= 1 else "std and count must be above 0"


def merge_statistics(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of all of several datasets from those of each; those of one come back unchanged.

    Instructions are those of any. Where datasets share an embodiment, mean, std, min and max are those of the union
    (std after flooring), and q01 and q99 the widest of any dataset, which are bounds.

    Raises:
        DataError: a shared field has several shapes.
    """
    if len(several) == 1:
        return several[0]
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for statistics in several:
        for embodiment, fields in statistics["embodiments"].items():
            known = groups.setdefault(embodiment, {})
            for name, measures in fields.items():
                known.setdefault(name, []).append(measures)
    embodiments = {
        embodiment: {name: _merge(measures, embodiment, name) for name, measures in fields.items()}
        for embodiment, fields in groups.items()
    }
    return {**several[0], "instructions": merge_instructions(several), "embodiments": embodiments}


def merge_instructions(several: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Those of any of several statistics; None if one of them, from an older checkpoint, does not say."""
    lists = [statistics.get("instructions") for statistics in several]
    return None if None in lists else sorted({one for instructions in lists for one in instructions or ()})


def _merge(several: list[dict[str, Any]], embodiment: str, name: str) -> dict[str, Any]:
    if len(several) == 1:
        return several[0]
    stacked = {key: [np.asarray(measures[key], np.float64) for measures in several] for key in _MEASURES}
    if len(shapes := {mean.shape for mean in stacked["mean"]}) > 1:
        raise DataError(
            f"embodiment {embodiment!r}: field {name!r} has the shapes {sorted(shapes)} in different datasets; give "
            "robots with different fields different names"
        )
    arrays = {key: np.stack(values) for key, values in stacked.items()}
    share = (arrays["count"] / arrays["count"].sum()).reshape(-1, *([1] * (arrays["mean"].ndim - 1)))
    mean = (share * arrays["mean"]).sum(0)
    spread = (share * (arrays["std"] ** 2 + (arrays["mean"] - mean) ** 2)).sum(0)
    merged = {
        "mean": mean,
        "std": np.sqrt(spread),
        "min": arrays["min"].min(0),
        "max": arrays["max"].max(0),
        "q01": arrays["q01"].min(0),
        "q99": arrays["q99"].max(0),
    }
    return {**{key: _rounded(value) for key, value in merged.items()}, "count": int(arrays["count"].sum())}


def field_statistics(statistics: dict[str, Any], embodiment: str, name: str) -> dict[str, np.ndarray]:
    """mean, std, min, max, q01, q99 (float32) and count of one field.

    Raises:
        DataError: unknown embodiment or field; the message lists the known ones.
    """
    embodiments = statistics["embodiments"]
    if embodiment not in embodiments:
        raise DataError(f"statistics have no embodiment {embodiment!r}; they have {sorted(embodiments)}")
    if name not in embodiments[embodiment]:
        raise DataError(
            f"statistics of {embodiment!r} have no field {name!r}; they have {sorted(embodiments[embodiment])}"
        )
    return {key: np.asarray(value, np.float32) for key, value in embodiments[embodiment][name].items()}
