"""Recorded clips that an export is measured on, and the robots' names, read from the shards it is given."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from export.manifest import RobotNames
from worldmodel.contracts import Batch, ClipSpec, Observation
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.embodiments import load_embodiments
from worldmodel.data.shards import ShardReader
from worldmodel.errors import DataError

SPLITS = ("heldout_episodes", "heldout_tasks")
ROWS = 16
"""Clips of one batch when samples are collected."""


class Moment(NamedTuple):
    """Consecutive control ticks of one held-out episode, a history frame apart."""

    key: str
    ticks: list[Observation]  # of batch 1 each


def held_out_moments(reader: ShardReader, spec: ClipSpec, count: int, ticks: int) -> list[Moment]:
    """`count` moments from each held-out split the data have, spread evenly over it.

    Every second one starts with its episode, where the history repeats the first frame. A moment has fewer ticks where
    its episode ends.

    Raises:
        DataError: the data have no held-out split, or do not fit the spec.
    """
    found: list[Moment] = []
    for split in SPLITS:
        if split not in reader.index["splits"]:
            continue
        clips = ClipDataset(reader, spec, split=split, only_success=False, future=False)
        for number, start in enumerate(spread(len(clips), count)):
            first = clips[start]
            if number % 2 == 0:
                start -= first.step
            rows = range(start, min(len(clips), start + ticks * spec.stride), spec.stride)
            batches = [collate([clips[i]]) for i in rows]
            same = [b.observation for b in batches if b.key[0].rsplit("@", 1)[0] == first.episode]
            found.append(Moment(f"{split} {batches[0].key[0]}", same))
    if not found:
        raise DataError(f"{reader.root}: no held-out split to prove parity on; expected {' or '.join(SPLITS)}")
    return found


def recorded_clips(reader: ShardReader, spec: ClipSpec, count: int) -> dict[str, list[Batch]]:
    """By split: `count` clips of each held-out one and twice as many of `train`, spread evenly, with the actions that
    the demonstrator chose."""
    batches = {}
    for split in ("train", *SPLITS):
        if split not in reader.index["splits"]:
            continue
        clips = ClipDataset(reader, spec, split=split, future=False)
        chosen = spread(len(clips), 2 * count if split == "train" else count)
        batches[split] = [collate([clips[i] for i in part]) for part in chunks(chosen)]
    return batches


def spread(total: int, count: int) -> list[int]:
    """At most `count` whole numbers below `total`, evenly spaced."""
    return (
        [int(i) for i in np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))] if total else []
    )


def chunks(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """Pieces of `ROWS` rows. Neighbours, which are much alike, come to different pieces and so to different senses."""
    pieces = max(1, -(-len(rows) // ROWS))
    yield from (rows[i::pieces] for i in range(pieces) if rows[i::pieces])


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
