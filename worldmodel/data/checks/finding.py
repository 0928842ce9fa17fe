"""What a check sees and what it says: an episode or what a survey keeps of all episodes, and faults."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from worldmodel.data.schema import Episode
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader

Severity = Literal["error", "warning", "note"]
"""An error breaks or falsifies training, a warning is for a person to judge, a note says what was not checked."""

RESTORE = "restore the file from a copy or generate the dataset again"


class Fault(NamedTuple):
    """One thing that is wrong, where, and what to do about it."""

    file: str
    key: str
    field: str
    message: str
    fix: str
    severity: Severity = "error"

    def __str__(self) -> str:
        place = " ".join(part for part in (self.file, self.key, self.field) if part)
        return f"{self.severity}: {place}: {self.message} [{self.fix}]"


@dataclass(frozen=True)
class Sample:
    """One stored episode; fields that a structural check found broken are empty in it, so other checks skip them."""

    entry: Entry
    members: dict[str, bytes]
    episode: Episode

    def fault(self, field: str, message: str, fix: str, severity: Severity = "error") -> Fault:
        """A fault of this episode."""
        return Fault(self.entry.shard, self.entry.key, field, message, fix, severity)


class Channels(NamedTuple):
    """What a survey keeps of one sensor stream of one episode; arrays are (C,), over all steps and cells."""

    names: list[str]
    low: np.ndarray
    high: np.ndarray
    still: np.ndarray  # bool: every cell has one value in all steps
    silent: np.ndarray  # share of steps in which every cell is exactly zero
    run_low: np.ndarray  # longest run of steps in which some cell sits exactly at `low`
    run_high: np.ndarray


class Jumps(NamedTuple):
    """What a survey keeps of one episode's actions."""

    names: tuple[str, ...]
    values: np.ndarray  # (n, D) some of the actions
    changes: np.ndarray  # (n, D) some of the absolute differences between neighbouring steps
    largest: np.ndarray  # (D,) the largest difference
    step: np.ndarray  # (D,) the step that it leads to


class Grip(NamedTuple):
    """How one gripper's measured state follows its command in one episode."""

    command: str
    measured: str
    agreement: float  # correlation at the best lag; +1: the state rises with the command
    expected: int  # sign that the metadata state, 0 where they are silent


class Projection(NamedTuple):
    """Counts of object points over the steps of one episode."""

    visible: int
    visible_inside: int
    inside: int
    points: int


@dataclass
class Summary:
    """What a survey keeps of one episode for the checks that compare episodes."""

    entry: Entry
    fps: float = 0.0
    content: str | None = None  # digest of the action and proprioception streams, None without both
    has_state: bool = False  # points or proprioception, of which the index's initial_state is a digest
    channels: dict[str, Channels] = field(default_factory=dict)
    jumps: Jumps | None = None
    grips: list[Grip] = field(default_factory=list)
    projection: Projection | None = None


@dataclass(frozen=True)
class Survey:
    """The whole dataset: its index and a summary per episode that could be read."""

    reader: ShardReader
    summaries: list[Summary]
