"""What is in a dataset: counts per task and split for a table, and a bounded sample of its series for a page."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from worldmodel.data.meta import MODALITIES
from worldmodel.data.schema import Episode
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader

SAMPLED_EPISODES = 400
"""Episodes whose series go into the histograms, evenly spread over the dataset: enough for a shape, seconds to read."""
_POSITION = re.compile(r"(end_?effector|eef|ee|tcp|hand)(_pos(ition)?)?_[xyz]$", re.IGNORECASE)


@dataclass
class Row:
    """Totals of one task in one split."""

    split: str
    task: str
    episodes: int = 0
    successes: int = 0
    steps: int = 0
    size: int = 0

    def add(self, entry: Entry) -> None:
        """Count one more episode."""
        self.episodes += 1
        self.successes += bool(entry.success)
        self.steps += entry.length
        self.size += entry.size


def rows(reader: ShardReader) -> list[Row]:
    """Totals per split and task, tasks in alphabetical order, each split ended by a row of task `all`."""
    found: dict[str, dict[str, Row]] = {}
    for entry in reader.entries:
        tasks = found.setdefault(entry.split, {})
        for task in (entry.task, "all"):
            tasks.setdefault(task, Row(entry.split, task)).add(entry)
    return [tasks[name] for tasks in found.values() for name in (*sorted(set(tasks) - {"all"}), "all")]


def table(root: str | Path) -> str:
    """The totals of the dataset in `root` as text.

    Raises:
        DataError: no dataset there.
    """
    reader = ShardReader(root)
    lines = [
        f"{root}: {len(reader)} episodes, {reader.frames} steps, {len(reader.index['shards'])} shards, embodiments "
        f"{', '.join(reader.index['embodiments'])}, schema {reader.index['schema_version']}",
        f"{'split':18}{'task':28}{'episodes':>9}{'success':>9}{'steps':>9}{'MB':>9}",
    ]
    if linked := sum(entry.variant_of is not None for entry in reader.entries):
        lines.insert(1, f"{linked} of the episodes are variants: the motion of another one in another look")
    for row in rows(reader):
        share = row.successes / row.episodes
        lines.append(f"{row.split:18}{row.task:28}{row.episodes:>9}{share:>9.0%}{row.steps:>9}{row.size / 1e6:>9.1f}")
    return "\n".join(lines)


@dataclass
class Series:
    """Values of one embodiment over the sampled episodes."""

    actions: dict[str, list[np.ndarray]] = field(default_factory=dict)  # action name with unit -> (T,) per episode
    forces: dict[str, list[np.ndarray]] = field(default_factory=dict)  # sensor -> (T,) N, magnitude
    absent: dict[str, int] = field(default_factory=dict)  # modality -> sampled episodes that lack it
    rates: set[float] = field(default_factory=set)  # Hz
    episodes: int = 0


def series(reader: ShardReader) -> dict[str, Series]:
    """Actions, forces and absent modalities of evenly spread episodes, by embodiment."""
    found: dict[str, Series] = {}
    stride = max(1, -(-len(reader) // SAMPLED_EPISODES))
    for i in range(0, len(reader), stride):
        episode = reader.read(i, images=False)
        meta = episode.meta
        kept = found.setdefault(meta["embodiment"], Series())
        kept.episodes += 1
        kept.rates.add(float(meta["fps"]))
        for modality in MODALITIES:
            kept.absent[modality] = kept.absent.get(modality, 0) + (modality in meta.get("absent", ()))
        if episode.action is not None:
            units = meta.get("action_units") or [""] * episode.action.shape[1]
            for column, name, unit in zip(episode.action.T, meta["action_names"], units, strict=True):
                kept.actions.setdefault(f"{name} [{unit}]" if unit else name, []).append(column)
        if episode.wrench is not None:
            for s, sensor in enumerate(meta["sensor_names"]):
                force = np.linalg.norm(episode.wrench[:, s, :3].astype(np.float64), axis=-1)
                kept.forces.setdefault(sensor, []).append(force)
    return found


def examples(reader: ShardReader) -> Iterator[tuple[Entry, Episode]]:
    """One episode with pictures per task, in the order of the tasks' names: a successful one of the first split, and
    no variant if there are others."""
    chosen: dict[str, int] = {}

    def rank(entry: Entry) -> tuple[bool, bool]:
        return entry.variant_of is None, entry.success

    for i, entry in enumerate(reader.entries):
        if entry.task not in chosen or rank(entry) > rank(reader.entries[chosen[entry.task]]):
            chosen[entry.task] = i
    for task in sorted(chosen):
        yield reader.entries[chosen[task]], reader.read(chosen[task])


def tracks(episode: Episode) -> dict[str, np.ndarray]:
    """Polylines (T, 3) in metres: the end effector, where proprioception names its position, and the object points."""
    found = {}
    if episode.proprio is not None:
        names = episode.meta["proprio_names"]
        columns = [i for i, name in enumerate(names) if _POSITION.search(name)][:3]
        if len(columns) == 3:
            found["end effector"] = episode.proprio[:, columns]
    if episode.points is not None:
        for k, name in enumerate(episode.meta["point_names"]):
            found[name.replace("_", " ")] = episode.points[:, k]
    return found
