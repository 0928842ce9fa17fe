"""Few demonstrations of many: the same ones for the same seed, and the fewer always among the more."""

import hashlib
from collections.abc import Sequence

from worldmodel.data.sections import Entry
from worldmodel.errors import ConfigError, DataError


def few_demonstrations(entries: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """All entries but for those of split `train`, of which `count` successful motions per embodiment and task are left.

    Which, follows from the seed and their ids alone: neither from what else the dataset holds nor from `count`, so that
    those of 5 are among those of 10. Variants of a motion stay with it.

    Raises:
        ConfigError: `count` is below 1.
        DataError: an embodiment has fewer successful motions of a task.
    """
    if count < 1:
        raise ConfigError(f"data.episodes is {count}; it is a number of demonstrations per task, 1 or more, or null")
    groups: dict[tuple[str, str], set[str]] = {}
    for entry in entries:
        if entry.split == "train":
            motions = groups.setdefault((entry.embodiment, entry.task), set())
            if entry.success and entry.variant_of is None:
                motions.add(entry.episode_id)
    short = {f"{task} by {robot}": len(motions) for (robot, task), motions in groups.items() if len(motions) < count}
    if short:
        raise DataError(f"data.episodes: {count} demonstrations per task are asked for, fewer are there: {short}")

    def place(motion: str) -> str:
        return hashlib.sha256(f"{seed} {motion}".encode()).hexdigest()

    chosen = {motion for motions in groups.values() for motion in sorted(motions, key=place)[:count]}
    return [entry for entry in entries if entry.split != "train" or (entry.variant_of or entry.episode_id) in chosen]
