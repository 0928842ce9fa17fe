"""Golden observations of an artefact: runs a graph on them as a control loop would, and compares its answers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .manifest import RuntimeContractError

FLAGS = 0.02
"""Largest share of flags that may differ: a command that only just meets a limit may be said to or not."""
TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)", "uint8": "tensor(uint8)"}
"""What onnxruntime calls the types of the manifest."""

Feed = dict[str, np.ndarray]


def golden_file(path: str) -> str:
    """The file that holds the golden observations of a path."""
    return "golden.npz" if path == "policy" else f"golden_{path}.npz"


class Golden:
    """Inputs of one path and the answers of the model that it was exported from.

    Args:
        file: see `golden_file`.
        entry: what the manifest says of the path.

    Raises:
        RuntimeContractError: the file is missing, lacks an input or output, or one name is both.
    """

    def __init__(self, file: Path, entry: Mapping[str, Any]) -> None:
        if not file.is_file():
            raise RuntimeContractError(f"{file.name}: missing; export the artefact again")
        with np.load(file, allow_pickle=False) as arrays:
            self._arrays = dict(arrays)
        self.inputs: list[dict[str, Any]] = entry["inputs"]
        reads = {row["name"] for row in self.inputs}
        # `policy` fills a cache without reading one.
        pairs: dict[str, str] = (entry["cache"] or {}).get("next", {})
        self.next = {name: after for name, after in pairs.items() if name in reads}
        self.answers = [row["name"] for row in entry["outputs"] if not row["name"].startswith("next_")]
        lacking = [n for n in (reads - set(self.next)) | set(self.answers) if n not in self._arrays]
        if lacking:
            raise RuntimeContractError(f"{file.name}: has no {sorted(lacking)}; export the artefact again")
        if both := sorted(reads & set(self.answers)):  # as in artefacts of earlier versions
            raise RuntimeContractError(f"{file.name}: {both} are inputs and outputs; export the artefact again")
        self.examples = len(self._arrays["key"])
        """Number of examples; each is one tick, or consecutive ticks where the path has a cache."""
        self.ticks = self._arrays["noise"].shape[1] if self.next else 1
        """Ticks of each example."""

    def feeds(self, example: int) -> list[Feed]:
        """The inputs of each tick of an example, without its cache; batch 1."""
        names = [row["name"] for row in self.inputs if row["name"] not in self.next]
        rows = {name: self._arrays[name][example] for name in names}
        if not self.next:
            return [{name: np.ascontiguousarray(row[None]) for name, row in rows.items()}]
        return [{name: np.ascontiguousarray(row[t : t + 1]) for name, row in rows.items()} for t in range(self.ticks)]

    def expected(self, example: int, tick: int) -> Feed:
        """What the model answered, by name of the output, without the batch dimension."""
        stored = {name: self._arrays[name][example] for name in self.answers}
        return {name: row[tick] for name, row in stored.items()} if self.next else stored

    def empty_cache(self) -> Feed:
        """The cache before the first frame."""
        rows = [row for row in self.inputs if row["name"] in self.next]
        return {row["name"]: np.zeros([1, *row["shape"][1:]], row["dtype"]) for row in rows}

    def run(self, session: onnxruntime.InferenceSession) -> Iterator[tuple[int, int, Feed]]:
        """Runs every example from an empty cache: example, tick, and the answers by name of the output."""
        names = [row.name for row in session.get_outputs()]
        for example in range(self.examples):
            cache = self.empty_cache()
            for tick, feed in enumerate(self.feeds(example)):
                answer: dict[str, Any] = dict(zip(names, session.run(None, {**feed, **cache}), strict=True))
                cache = {name: answer[after] for name, after in self.next.items()}
                yield example, tick, answer

    def compare(self, session: onnxruntime.InferenceSession, units: np.ndarray | None) -> dict[str, Any]:
        """How far a graph is from the model: `max_error` and `mean_difference` by output, the share of flags that
        differ, and whether every number was finite.

        Largest errors are those that the manifest's `parity` states, mean differences those of its `check`: over the
        size of the output where that is above 1, but of actions as they are and over `units` (D,).
        """
        largest: dict[str, float] = {}
        means: dict[str, list[float]] = {}
        wrong = count = 0
        finite = True
        for example, tick, answer in self.run(session):
            for name, right in self.expected(example, tick).items():
                given = answer[name][0]
                if right.dtype == bool:
                    wrong, count = wrong + int((right != given).sum()), count + right.size
                    continue
                finite = finite and bool(np.isfinite(given).all())
                off = np.abs(given.astype(np.float64) - right)
                size = max(1.0, float(np.abs(right).max(initial=0)))
                error = float(off.max(initial=0)) / (1.0 if name == "actions" else size)
                largest[name] = max(largest.get(name, 0.0), error)
                mean = off / (units if name == "actions" and units is not None else size)
                means.setdefault(name, []).append(float(mean.mean()))
        return {
            "max_error": largest,
            "mean_difference": {name: float(np.mean(values)) for name, values in means.items()},
            "flags_that_differ": wrong / max(1, count),
            "finite": finite,
        }


def signature_faults(session: onnxruntime.InferenceSession, entry: dict[str, Any]) -> list[str]:
    """Where the inputs and outputs of a graph are not those that the manifest states of its path."""
    faults = []
    for what, rows, found in (
        ("input", entry["inputs"], session.get_inputs()),
        ("output", entry["outputs"], session.get_outputs()),
    ):
        names = [row.name for row in found]
        if names != [row["name"] for row in rows]:
            faults.append(f"{what}s are {names}, expected {[row['name'] for row in rows]}")
            continue
        for row, given in zip(rows, found, strict=True):
            # Open dimensions have a name or none; a batch may be open.
            fits = len(given.shape) == len(row["shape"]) and all(
                not isinstance(size, int) or size == wanted
                for size, wanted in zip(given.shape[1:], row["shape"][1:], strict=True)
            )
            if not fits or given.type != TYPES[row["dtype"]]:
                faults.append(
                    f"{what} {row['name']!r} is {given.type} {given.shape}, expected {row['dtype']} {row['shape']}"
                )
    return faults
