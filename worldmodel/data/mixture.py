"""Several datasets as one stream: weights over datasets and, inside each, over embodiments and tasks.

A mixture is a list of sources, in YAML:

    - {root: data/metaworld, weight: 0.6}
    - {root: data/robosuite, weight: 0.4, embodiments: {panda: 2, ur5e: 1}, tasks: {lift: 1, stack: 3}}

Weights are relative: of a source among the sources, of an embodiment inside its source, of a task among those that the
embodiment has. What is not weighted comes in proportion to its clips. A list of names instead of weights takes only
these, in proportion; weight 0 leaves out. A single dataset is a mixture of one.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from worldmodel.contracts import ClipSpec
from worldmodel.data.cache import ByteCache
from worldmodel.data.clip import Clip, deliver
from worldmodel.data.dataset import ClipDataset, Request
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError

PERIOD = 10_000
"""Clips after which the realised mix equals the asked one: shares are rounded to this many parts."""

Weights = Mapping[str, float] | Sequence[str] | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset, its weight among the sources, and which embodiments and tasks of it are taken, how often."""

    root: str
    weight: float = 1.0
    embodiments: Weights = None
    tasks: Weights = None
    camera_map: Mapping[str, str | None] | None = None

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ConfigError(f"mixture: {self.root}: weight {self.weight} must be 0 or more")
        for kind in ("embodiments", "tasks"):
            weights = getattr(self, kind)
            if isinstance(weights, str):
                raise ConfigError(f"mixture: {self.root}: {kind} must be weights by name or a list, got {weights!r}")
            values = list(weights.values()) if isinstance(weights, Mapping) else [1]
            if weights is not None and (not all(value >= 0 for value in values) or not any(values) or not weights):
                raise ConfigError(f"mixture: {self.root}: {kind} must have weights of 0 or more, not all 0: {weights}")


def make_sources(mixture: Sequence[Mapping[str, Any] | Source]) -> tuple[Source, ...]:
    """Sources from the plain values of a configuration; those of weight 0 are left out.

    Raises:
        ConfigError: an unknown field, a wrong weight, or no source with weight.
    """
    known = {f.name for f in fields(Source)}
    sources = []
    for values in mixture:
        if isinstance(values, Mapping):
            if unknown := sorted(set(values) - known):
                raise ConfigError(f"mixture: unknown field {unknown[0]!r} of a source; it has {sorted(known)}")
            if "root" not in values:
                raise ConfigError(f"mixture: a source has no root: {dict(values)}")
            values = Source(**values)
        sources.append(values)
    if not (taken := tuple(source for source in sources if source.weight > 0)):
        raise ConfigError(f"mixture: no source with a weight above 0 among {[source.root for source in sources]}")
    return taken


class Mixture(Dataset[Clip]):
    """The clips of all parts of a mixture, one part after another; a part is what has a weight of its own.

    Frames are counted on over the datasets in the order in which the sources name them first.

    Args:
        sources: what is mixed.
        readers: the open dataset of every root.
        spec: names and sizes of the clips.
        options: further arguments of every `ClipDataset`.

    Raises:
        DataError: a source has no such embodiment or task, or its data do not fit `spec`.
        ConfigError: the data have an embodiment that `spec` lacks.
    """

    def __init__(
        self, sources: Sequence[Source], readers: Mapping[str, ShardReader], spec: ClipSpec, **options: Any
    ) -> None:
        self.parts: list[ClipDataset] = []
        self.names: list[str] = []
        weights: list[float] = []
        self._roots: list[str] = []
        roots = list(dict.fromkeys(source.root for source in sources))
        first = dict(zip(roots, np.cumsum([0] + [readers[root].frames for root in roots]).tolist(), strict=False))
        for source in sources:
            shared = ByteCache(1 << 28)
            for name, weight, filters in _split(source, readers[source.root]):
                camera_map = options.get("camera_map") if source.camera_map is None else source.camera_map
                own = {**options, **filters, "camera_map": camera_map, "cache": shared}
                own["first_frame"] = first[source.root]
                self.parts.append(ClipDataset(readers[source.root], spec, split="train", **own))
                self.names.append(name if name not in self.names else f"{name}#{len(self.names)}")
                weights.append(weight * source.weight)
                self._roots.append(source.root)
        self.sizes = [len(part) for part in self.parts]
        self.shares = apportion(weights)
        """Clips of each part among every `PERIOD`."""
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int | Request) -> Clip:
        request = index if isinstance(index, Request) else Request(index)
        part = self.part(request.clip)
        clip = self.parts[part][Request(request.clip - self._ends[part] + self.sizes[part], *request[1:])]
        if clip.skip is not None:
            # Datasets of a mixture may use the same keys.
            clip = clip._replace(skip=clip.skip._replace(key=f"{self._roots[part]}: {clip.skip.key}"))
        return clip

    def part(self, index: int) -> int:
        """Number of the part that clip `index` belongs to."""
        return bisect.bisect_right(self._ends, index)

    deliver = staticmethod(deliver)
    """Makes a batch of items, in the process that loads them."""

    def asked(self) -> dict[str, float]:
        """Share of every part by name."""
        return {name: share / PERIOD for name, share in zip(self.names, self.shares, strict=True)}


def apportion(weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `PERIOD`, at least 1 each (largest remainders)."""
    if len(weights) > PERIOD:
        raise ConfigError(f"mixture: {len(weights)} parts, at most {PERIOD} can have weights")
    exact = np.array(weights, np.float64) / np.sum(weights) * PERIOD
    shares = np.maximum(np.floor(exact).astype(np.int64), 1)
    for _ in range(abs(missing := PERIOD - int(shares.sum()))):
        gap = exact - shares
        if missing < 0:
            gap[shares == 1] = np.inf
        shares[int(np.argmax(gap) if missing > 0 else np.argmin(gap))] += np.sign(missing)
    return shares.tolist()


def _split(source: Source, reader: ShardReader) -> list[tuple[str, float, dict[str, Any]]]:
    """Name, share of the source and filters of every part of a source."""
    entries = [entry for entry in reader.entries if entry.split == "train"]
    label = PurePosixPath(source.root.rstrip("/")).name
    kinds = {"embodiments": "embodiment", "tasks": "task"}
    for kind, field in kinds.items():
        present = {getattr(entry, field) for entry in entries}
        if unknown := sorted(set(getattr(source, kind) or ()) - present):
            raise ConfigError(f"mixture: {source.root} has no {kind} {unknown} to train on; it has {sorted(present)}")

    def choices(kind: str, present: set[str]) -> list[tuple[str, float, dict[str, Any]]]:
        weights = getattr(source, kind)
        if not isinstance(weights, Mapping):
            return [("", 1.0, {} if weights is None else {kind: list(weights)})]
        chosen = {name: weight for name, weight in weights.items() if weight > 0 and name in present}
        return [(f"/{name}", weight / sum(chosen.values()), {kind: [name]}) for name, weight in chosen.items()]

    parts = []
    for embodiment, share, filters in choices("embodiments", {entry.embodiment for entry in entries}):
        allowed = filters.get("embodiments")
        tasks = {entry.task for entry in entries if allowed is None or entry.embodiment in allowed}
        found = choices("tasks", tasks)
        if not found:
            raise ConfigError(
                f"mixture: {source.root}: {embodiment[1:]!r} has no weighted task; it has {sorted(tasks)}"
            )
        parts += [(label + embodiment + task, share * part, filters | more) for task, part, more in found]
    return parts
