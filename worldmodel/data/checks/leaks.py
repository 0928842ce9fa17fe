"""Episodes that are there twice, variants and their originals, and evaluation data that training would see."""

import hashlib
from collections.abc import Iterator

import numpy as np

from worldmodel.data.checks.finding import Fault, Sample, Summary, Survey
from worldmodel.data.schema import Episode
from worldmodel.data.sections import Entry


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
    """Episodes with the content of an earlier one; variants of one motion have it by design."""
    first: dict[str, Entry] = {}
    for summary in survey.summaries:
        if summary.content is not None:
            other = first.setdefault(summary.content, summary.entry)
            if other is not summary.entry and not _linked(other, summary.entry):
                yield summary, other


def _linked(a: Entry, b: Entry) -> bool:
    """Whether one is a variant of the other, or both are of a third; an id that is used twice links nothing."""
    motions = {entry.episode_id if entry.variant_of is None else entry.variant_of for entry in (a, b)}
    return len(motions) == 1 and (a.variant_of, b.variant_of) != (None, None)


def check_variants(survey: Survey) -> Iterator[Fault]:
    """Every variant has an original, in its own split, with the same actions and proprioception, and its own number."""
    originals = {entry.episode_id: entry for entry in survey.reader.entries if entry.variant_of is None}
    contents = {summary.entry.episode_id: summary.content for summary in survey.summaries}
    numbers: dict[tuple[str, int], Entry] = {}
    for entry in survey.reader.entries:
        if entry.variant_of is None:
            continue
        if (original := originals.get(entry.variant_of)) is None:
            message = f"{entry.variant_of!r} is no episode of this dataset that is itself no variant"
            yield Fault(entry.shard, entry.key, "variant_of", message, "add the original, or remove the variant")
            continue
        place = f"its original {original.key} in {original.shard}"
        if entry.split != original.split:
            message = f"split {entry.split!r}, {place} is in {original.split!r}: evaluation data leak into training"
            yield Fault(entry.shard, entry.key, "variant_of", message, "move the variant to the split of its original")
        if (other := numbers.setdefault((entry.variant_of, entry.variant), entry)) is not entry:
            message = f"variant {entry.variant} of {original.key} is {other.key} in {other.shard} too"
            yield Fault(entry.shard, entry.key, "variant", message, "number the variants from 1", "warning")
        ids = (entry.episode_id, original.episode_id)
        if all(name in contents for name in ids) and contents[ids[0]] != contents[ids[1]]:
            message = f"other actions or proprioception than {place}; a variant shows the same motion"
            yield Fault(entry.shard, entry.key, "content", message, "generate the variant again, or drop its link")


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
        if other.split != entry.split and entry.key not in copied and not _linked(other, entry):
            message = f"the same as {other.key} of split {other.split!r} in {other.shard}"
            yield Fault(entry.shard, entry.key, "initial_state", message, "draw held-out episodes with other seeds")


def check_heldout_tasks(survey: Survey) -> Iterator[Fault]:
    """No held-out task is in another split."""
    for entry in survey.reader.entries:
        if entry.task in survey.reader.heldout_tasks and entry.split != "heldout_tasks":
            message = f"held-out task {entry.task!r} is in split {entry.split!r}"
            yield Fault(entry.shard, entry.key, "split", message, "move it to split 'heldout_tasks'")
