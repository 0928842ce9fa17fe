"""Read a whole dataset over many processes and list every fault in it, with severity and fix."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from worldmodel.data.checks import gripper, images, leaks, masks, signals, structure, timing
from worldmodel.data.checks.finding import Fault, Projection, Sample, Severity, Summary, Survey
from worldmodel.data.cluster import check_shared, scatter
from worldmodel.data.faults import RATE
from worldmodel.data.index import INDEX
from worldmodel.data.remote import is_url
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import STATISTICS, compute_statistics, load_statistics, statistics_hash
from worldmodel.errors import ConfigError, DataError

FIELD_CHECKS: tuple[Callable[[Sample], Iterator[Fault]], ...] = (
    structure.check_cameras,
    structure.check_fields,
)
"""Checks whose faults hide the field from the checks that follow."""
EPISODE_CHECKS: tuple[Callable[[Sample], Iterator[Fault]], ...] = (
    structure.check_index_agrees,
    structure.check_limits,
    structure.check_types,
    structure.check_members,
    timing.check_clocks,
    timing.check_sync,
    timing.check_video_rate,
    images.check_black,
    images.check_constant,
    images.check_frozen,
    images.check_reprojection,
    masks.check_blank,
    masks.check_points,
    gripper.check_names,
    leaks.check_comparable,
)
DATASET_CHECKS: tuple[Callable[[Survey], Iterator[Fault]], ...] = (
    timing.check_one_rate,
    signals.check_jumps,
    signals.check_dead,
    signals.check_stuck,
    signals.check_clipped,
    gripper.check_sign,
    leaks.check_copies,
    leaks.check_ids,
    leaks.check_variants,
    leaks.check_initial_states,
    leaks.check_heldout_tasks,
)


@dataclass(frozen=True)
class Report:
    """What a validation found: faults in the order of the shards, what could not be checked, and what was measured."""

    root: str | Path
    episodes: int
    faults: list[Fault]
    notes: list[tuple[Fault, int]]  # a note, as its first episode has it, and the number of episodes with it
    projection: Projection

    def count(self, severity: Severity) -> int:
        """Number of faults of `severity`."""
        return sum(fault.severity == severity for fault in self.faults)

    @property
    def status(self) -> int:
        """0 clean, 1 warnings only, 2 errors."""
        return 2 if self.count("error") else 1 if self.faults else 0

    def plain(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return {
            "directory": str(self.root),
            "status": ("clean", "warnings", "errors")[self.status],
            "episodes": self.episodes,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "faults": [fault._asdict() for fault in self.faults],
            "not_checked": [{**note._asdict(), "episodes": number} for note, number in self.notes],
            "points": self.projection._asdict(),
        }


def validate(root: str | Path, *, workers: int = 1, progress: bool = False) -> list[Fault]:
    """Every error and warning of the dataset in `root`; an empty list if it is sound."""
    return examine(root, workers=workers, progress=progress).faults


def examine(root: str | Path, *, workers: int = 1, progress: bool = False, ray: str | None = None) -> Report:
    """Read every shard of the dataset in `root` and run all checks.

    Args:
        root: folder with `index.json` and shards.
        workers: processes; 1 runs in this one. The report does not depend on it.
        ray: address of a Ray cluster to read on (see `cluster.scatter`) instead; it must see `root`.
        progress: show a bar of episodes.

    Raises:
        ConfigError: no such folder or cluster, or fewer than one worker.
    """
    if not is_url(root) and not Path(root).is_dir():
        raise ConfigError(f"{root}: no such folder; give the folder that holds {INDEX}")
    if workers < 1:
        raise ConfigError(f"workers must be 1 or more, got {workers}")
    nothing = Projection(0, 0, 0, 0)
    try:
        reader = ShardReader(root, cache_bytes=0, check_sizes=False)
    except DataError as error:
        return Report(root, 0, [Fault(INDEX, "", "", str(error), "generate the dataset again")], [], nothing)
    results = _all_shards(reader, workers, progress, ray)
    survey = Survey(reader, [summary for result in results for summary in result.summaries])
    found = [fault for result in results for fault in result.faults]
    found += _run(structure.check_totals, INDEX, reader, reader.entries)
    for check in DATASET_CHECKS:
        found += _run(check, INDEX, survey)
    if not any(fault.severity == "error" for fault in found):
        found += _run(_statistics, STATISTICS, reader)
    else:
        found.append(Fault(STATISTICS, "", "", "not compared with the shards, which have errors", "", "note"))
    notes: dict[tuple[str, str], tuple[Fault, int]] = {}
    for fault in found:
        if fault.severity == "note":
            note, number = notes.get((fault.field, fault.message), (fault, 0))
            notes[fault.field, fault.message] = (note, number + 1)
    counts = [summary.projection for summary in survey.summaries if summary.projection is not None]
    return Report(
        root,
        len(reader),
        [fault for fault in found if fault.severity != "note"],
        list(notes.values()),
        Projection(*(sum(column) for column in zip(*counts, strict=True))) if counts else nothing,
    )


class ShardResult(NamedTuple):
    """What the examination of one shard came to."""

    faults: list[Fault]
    summaries: list[Summary]


@contextmanager
def _reporting(found: list[Fault], what: str, file: str, key: str = "") -> Iterator[None]:
    """Make a fault of whatever is raised inside: data can be wrong in ways that no check foresees."""
    try:
        yield
    except Exception as error:
        message = f"{what} failed: {type(error).__name__}: {error}"
        found.append(Fault(file, key, "", message, "restore or drop what was examined; if it looks right, report this"))


def _run(check: Callable[..., Iterator[Fault]], file: str, *arguments: Any, key: str = "") -> list[Fault]:
    """The faults that `check` finds; that it fails is one too, and the other checks go on."""
    found: list[Fault] = []
    with _reporting(found, check.__name__.strip("_").replace("_", " "), file, key):
        found.extend(check(*arguments))
    return found


def examine_shard(reader: ShardReader, number: int) -> ShardResult:
    """All faults within shard `number`, and a summary of each of its episodes that could be decoded."""
    shard = reader.index["shards"][number]
    faults = _run(structure.check_file, shard["name"], reader, shard)
    first = sum(len(other["entries"]) for other in reader.index["shards"][:number])
    summaries = []
    for i in range(first, first + len(shard["entries"])):
        entry = reader.entries[i]
        with _reporting(faults, "examination", entry.shard, entry.key):
            sample, found = structure.read_sample(reader, i)
            faults += found
            if sample is not None and (summary := _examine(sample, faults)) is not None:
                summaries.append(summary)
    return ShardResult(faults, summaries)


def _examine(sample: Sample, faults: list[Fault]) -> Summary | None:
    """Add the faults of one episode to `faults`; its summary if its fields can be trusted so far."""
    entry = sample.entry
    for check in FIELD_CHECKS:
        found = _run(check, entry.shard, sample, key=entry.key)
        sample = replace(sample, episode=structure.without(sample.episode, {fault.field for fault in found}))
        faults += found
        if any(fault.field in ("", RATE) for fault in found):
            return None
    sample = replace(sample, episode=structure.paired(sample.episode))
    for check in EPISODE_CHECKS:
        faults += _run(check, entry.shard, sample, key=entry.key)
    episode = sample.episode
    return Summary(
        entry=entry,
        fps=float(episode.meta["fps"]),
        content=leaks.content(episode),
        has_state=not {"objects", "proprio"} <= set(episode.meta.get("absent", ())),
        channels=signals.channels(episode),
        jumps=signals.jumps(episode),
        grips=gripper.grips(episode),
        projection=images.projection(episode),
    )


def _all_shards(reader: ShardReader, workers: int, progress: bool, ray: str | None) -> list[ShardResult]:
    """The results of all shards in their order. A process that dies costs one shard, which is an error."""
    from tqdm import tqdm

    shards, done = reader.index["shards"], dict[int, ShardResult]()
    with tqdm(total=len(reader), unit="episode", desc="validate", disable=not progress) as bar:
        for number, result in _finished(reader, workers, ray):
            if result is None:
                name = shards[number]["name"]
                message = "the process that read this shard died, so nothing is known about it"
                fix = "look for the kernel's out-of-memory message; run again with --workers 1"
                result = ShardResult([Fault(name, "", "", message, fix)], [])
            done[number] = result
            bar.update(len(shards[number]["entries"]))
    return [done[number] for number in range(len(shards))]


def _finished(reader: ShardReader, workers: int, ray: str | None) -> Iterator[tuple[int, ShardResult | None]]:
    """Every shard's number and result as they come; None where its process died."""
    shards = range(len(reader.index["shards"]))
    if ray is not None:
        root = reader.root if is_url(reader.root) else Path(reader.root).resolve()
        yield from scatter(partial(_work_anywhere, root), shards, address=ray)
    elif min(workers, len(shards)) <= 1:
        for number in shards:
            yield number, examine_shard(reader, number)
    else:
        left = set(shards)
        for chosen, count in ((list(shards), workers), *(([number], 1) for number in shards)):
            # One death takes the whole pool along: each shard that is left gets a process of its own.
            chosen = [number for number in chosen if number in left]
            if not chosen:
                continue
            with _pool(count, reader.root) as pool:
                futures = {pool.submit(_work, number): number for number in chosen}
                for future in as_completed(futures):
                    with suppress(BrokenProcessPool):
                        result = future.result()
                        left.discard(futures[future])
                        yield futures[future], result
        for number in sorted(left):
            yield number, None


def _work_anywhere(root: str | Path, number: int) -> ShardResult:
    if isinstance(root, Path):
        check_shared(root)
    return examine_shard(ShardReader(root, cache_bytes=0, check_sizes=False), number)


def _pool(workers: int, root: str | Path) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(root,))


_reader: ShardReader | None = None


def _start_worker(root: str | Path) -> None:
    global _reader
    _reader = ShardReader(root, cache_bytes=0, check_sizes=False)


def _work(number: int) -> ShardResult:
    assert _reader is not None
    return examine_shard(_reader, number)


def _statistics(reader: ShardReader) -> Iterator[Fault]:
    """`stats.json` is what the train split of these shards gives."""
    if "train" not in reader.index["splits"]:
        return
    fix = f"python -m worldmodel.data stats {reader.root}"
    try:
        stored = load_statistics(reader.root)
        if statistics_hash(stored) != statistics_hash(compute_statistics(reader)):
            yield Fault(STATISTICS, "", "", "is not computed from these shards' train split", fix)
    except DataError as error:
        yield Fault(STATISTICS, "", "", str(error), fix)
