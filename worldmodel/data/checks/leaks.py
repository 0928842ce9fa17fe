"""Episodes that are there twice, and evaluation data that training would see."""

import hashlib
from collections.abc import Iterator

import numpy as np

from worldmodel.data.checks.finding import Fault, Sample, Summary, Survey
from worldmodel.data.schema import Episode
from worldmodel.data.shards import Entry


def content(episode: Episode) -> str | None:
    """Digest of the action and proprioception streams, whatever the pictures' encoding and the names; None without."""
    streams = [value for value in (episode.action, episode.proprio) if value is not None]
    if not streams:
        return None
    digest = hashlib.sha256()
    for value in streams:
        digest.update(str(value.shape).encode() + np.ascontiguousarray(value, np.float32).tobytes())
    return digest.hexdigest()


def check_comparable(sample: Sample) -> Iterator[Fault]:
    """Says so where an episode has no streams by which a copy could be recognised."""
    if {"action", "proprio"} <= set(sample.episode.meta.get("absent", ())):
        yield sample.fault("action", "copies not looked for: no action and no proprioception", "", "note")


def check_copies(survey: Survey) -> Iterator[Fault]:
    """No two episodes have the same actions and proprioception; across splits that is leakage, an error."""
    for summary, other in _copies(survey):
        entry = summary.entry
        same = f"the same actions and proprioception as {other.key} in {other.shard}"
        if other.split != entry.split:
            message = f"{same}, which is in split {other.split!r}: evaluation data leak into training"
            yield Fault(entry.shard, entry.key, "content", message, "remove one of the two")
        else:
            yield Fault(entry.shard, entry.key, "content", same, "remove one of the two", "warning")


def _copies(survey: Survey) -> Iterator[tuple[Summary, Entry]]:
    first: dict[str, Entry] = {}
    for summary in survey.summaries:
        if summary.content is not None:
            other = first.setdefault(summary.content, summary.entry)
            if other is not summary.entry:
                yield summary, other


def check_ids(survey: Survey) -> Iterator[Fault]:
    """Every episode has an id of its own."""
    first: dict[str, Entry] = {}
    for entry in survey.reader.entries:
        if (other := first.setdefault(entry.episode_id, entry)) is not entry:
            message = f"the same as {other.key} of split {other.split!r} in {other.shard}"
            yield Fault(entry.shard, entry.key, "episode_id", message, "give every episode an id of its own")


def check_initial_states(survey: Survey) -> Iterator[Fault]:
    """No episode starts exactly as one of another split does; whole copies are another check's."""
    copied = {summary.entry.key for summary, _ in _copies(survey)}
    first: dict[str, Entry] = {}
    for entry in (summary.entry for summary in survey.summaries if summary.has_state):
        other = first.setdefault(entry.initial_state, entry)
        if other.split != entry.split and entry.key not in copied:
            message = f"the same as {other.key} of split {other.split!r} in {other.shard}"
            yield Fault(entry.shard, entry.key, "initial_state", message, "draw held-out episodes with other seeds")


def check_heldout_tasks(survey: Survey) -> Iterator[Fault]:
    """No held-out task is in another split."""
    for entry in survey.reader.entries:
        if entry.task in survey.reader.heldout_tasks and entry.split != "heldout_tasks":
            message = f"held-out task {entry.task!r} is in split {entry.split!r}"
            yield Fault(entry.shard, entry.key, "split", message, "move it to split 'heldout_tasks'")
