"""Held-out observations and the robots' names, read from the shards that a checkpoint is exported with."""

from pathlib import Path

import numpy as np

from export.manifest import RobotNames
from worldmodel.contracts import ClipSpec, Observation
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.embodiments import load_embodiments
from worldmodel.data.shards import ShardReader
from worldmodel.errors import DataError

SPLITS = ("heldout_episodes", "heldout_tasks")


def held_out_observations(reader: ShardReader, spec: ClipSpec, count: int) -> list[tuple[str, Observation]]:
    """`count` observations of batch 1 from each held-out split the data have, spread evenly over it.

    Raises:
        DataError: the data have no held-out split, or do not fit the spec.
    """
    found: list[tuple[str, Observation]] = []
    for split in SPLITS:
        if split not in reader.index["splits"]:
            continue
        clips = ClipDataset(reader, spec, split=split, only_success=False, future=False)
        for index in np.unique(np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int)):
            batch = collate([clips[int(index)]])
            found.append((f"{split} {batch.key[0]}", batch.observation))
    if not found:
        raise DataError(f"{reader.root}: no held-out split to prove parity on; expected {' or '.join(SPLITS)}")
    return found


def robot_names(reader: ShardReader, spec: ClipSpec) -> dict[str, RobotNames]:
    """Names and units of every embodiment of the spec, from one episode of each.

    A robot without an episode, which only the checkpoint knows that this one was fine-tuned from, has those of the
    registry.

    Raises:
        DataError: an embodiment has neither episode nor entry.
    """
    robots: dict[str, RobotNames] = {}
    for embodiment in spec.embodiments:
        numbers = [i for i, entry in enumerate(reader.entries) if entry.embodiment == embodiment]
        if not numbers:
            robots[embodiment] = _registered(embodiment, reader)
            continue
        meta = reader.read(numbers[0], images=False).meta
        robots[embodiment] = RobotNames(
            action_names=tuple(meta["action_names"]),
            proprio_names=tuple(meta["proprio_names"]),
            action_units=tuple(meta.get("action_units", ())),
            proprio_units=tuple(meta.get("proprio_units", ())),
            sensor_frames=dict(meta.get("sensor_frames", {})),
        )
    return robots


def _registered(embodiment: str, reader: ShardReader) -> RobotNames:
    """Names and units by the registry of robots."""
    entry = load_embodiments().get(embodiment)
    if entry is None:
        known = reader.index["embodiments"]
        raise DataError(
            f"{Path(reader.root)}: no episode of embodiment {embodiment!r}; there are {known}, and configs/embodiments "
            "has no entry for it that could say what its numbers mean"
        )
    action, proprio = entry.action, entry.proprio
    return RobotNames(
        action_names=action.names if action else (),
        proprio_names=proprio.names if proprio else (),
        action_units=action.units if action else (),
        proprio_units=proprio.units if proprio else (),
        sensor_frames={},
    )
