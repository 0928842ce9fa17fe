"""Generate a dataset of scripted demonstrations: parallel, resumable, and the same bytes for the same seed."""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.shards import INDEX, ShardReader, read_json, write_index, write_json, write_shard
from worldmodel.data.sources.metaworld_tasks import HELDOUT_TASKS, TASKS, TRAIN_TASKS
from worldmodel.data.statistics import STATISTICS, write_statistics
from worldmodel.errors import ConfigError, DataError

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout_episodes", "heldout_tasks")
EPISODES_PER_SHARD = 25
_PROGRESS = ".progress"
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}


@dataclass(frozen=True)
class Chunk:
    """The episodes of one shard: all of one task and split."""

    shard: str
    split: str
    task: str
    first: int
    count: int
    seed: int
    pixels: int


def generate(
    source: str,
    out: str | Path,
    *,
    benchmark: str = "ml10",
    tasks: list[str] | None = None,
    episodes: int = 50,
    heldout_episodes: int = 8,
    heldout_task_episodes: int = 8,
    seed: int = 0,
    workers: int | None = None,
    pixels: int = 64,
    progress: bool = True,
) -> Path:
    """Generate or finish a dataset in `out` and return its path.

    Splits: `train`, `heldout_episodes` (the same tasks, other object positions) and `heldout_tasks` (tasks that
    training never sees). An interrupted run continues where it stopped; a finished one is left as it is.

    Args:
        source: `metaworld`.
        benchmark: `ml10`, which names the training and the held-out tasks.
        tasks: subset of the benchmark's tasks; None is all of them.
        episodes: per training task, for `train`.
        heldout_episodes: per training task, for `heldout_episodes`.
        heldout_task_episodes: per held-out task, for `heldout_tasks`.
        seed: the bytes written are a function of it and of the arguments above, not of `workers`.
        workers: processes; None is one per core, 1 runs in this process.
        pixels: height and width of the images.

    Raises:
        ConfigError: unknown source, benchmark or task, a count below zero, or `out` holds a run with other parameters.
        DataError: no off-screen rendering on this machine.
    """
    counts = {"train": episodes, "heldout_episodes": heldout_episodes, "heldout_tasks": heldout_task_episodes}
    chosen = _check_arguments(source, benchmark, tasks, counts, pixels)
    root = Path(out)
    parameters = {
        "source": source,
        "benchmark": benchmark,
        "tasks": chosen,
        "episodes": counts,
        "seed": seed,
        "pixels": pixels,
        "schema_version": SCHEMA_VERSION,
    }
    _claim(root, parameters)
    chunks = list(_plan(chosen, counts, seed, pixels))
    pending = [chunk for chunk in chunks if not _finished(root, chunk)]
    if pending:
        log.info("%d of %d shards to do in %s", len(pending), len(chunks), root)
        _run(root, pending, sum(chunk.count for chunk in chunks), workers or os.cpu_count() or 1, progress)
    if pending or not (root / INDEX).exists():
        shards = [read_json(_sidecar(root, chunk), "delete it to repeat its shard")["shard"] for chunk in chunks]
        heldout = [task for task in HELDOUT_TASKS if task in chosen]
        write_index(root, shards, heldout, {"generated": parameters})
        (root / STATISTICS).unlink(missing_ok=True)
    if not (root / STATISTICS).exists() and episodes and any(task in TRAIN_TASKS for task in chosen):
        write_statistics(root)
    ShardReader(root)
    return root


def _check_arguments(
    source: str, benchmark: str, tasks: list[str] | None, counts: dict[str, int], pixels: int
) -> list[str]:
    if source != "metaworld":
        raise ConfigError(f"unknown source {source!r}; known: metaworld")
    if benchmark != "ml10":
        raise ConfigError(f"unknown benchmark {benchmark!r}; known: ml10")
    if unknown := sorted(set(tasks or ()) - set(TASKS)):
        raise ConfigError(f"unknown tasks {unknown}; {benchmark} has {', '.join(TASKS)}")
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ConfigError(f"episode counts must be 0 or more and not all 0, got {counts}")
    if pixels < 16 or pixels % 8:
        raise ConfigError(f"pixels must be a multiple of 8 and at least 16, got {pixels}")
    return [task for task in TASKS if tasks is None or task in tasks]


def _claim(root: Path, parameters: dict[str, Any]) -> None:
    """Bind the folder to `parameters`, or refuse if it belongs to others."""
    path = root / _PROGRESS / "parameters.json"
    if path.exists():
        before = read_json(path, "delete the folder to start again")
        if differing := sorted(name for name in parameters if before.get(name) != parameters[name]):
            shown = "; ".join(f"{name}: {before.get(name)!r} there, {parameters[name]!r} asked" for name in differing)
            raise ConfigError(
                f"{root} holds a dataset generated with other parameters ({shown}); use those, choose "
                "another folder, or delete this one"
            )
        return
    if root.exists() and any(root.iterdir()):
        raise ConfigError(f"{root} is not empty and was not made by this command; choose another folder")
    path.parent.mkdir(parents=True)
    write_json(path, parameters)


def _plan(tasks: list[str], counts: dict[str, int], seed: int, pixels: int) -> Iterator[Chunk]:
    number = 0
    for split in SPLITS:
        members = HELDOUT_TASKS if split == "heldout_tasks" else TRAIN_TASKS
        for task in tasks:
            if task not in members:
                continue
            for first in range(0, counts[split], EPISODES_PER_SHARD):
                count = min(EPISODES_PER_SHARD, counts[split] - first)
                yield Chunk(f"shard-{number:06d}.tar", split, task, first, count, seed, pixels)
                number += 1


def _sidecar(root: Path, chunk: Chunk) -> Path:
    return root / _PROGRESS / f"{chunk.shard}.json"


def _finished(root: Path, chunk: Chunk) -> bool:
    sidecar = _sidecar(root, chunk)
    if not sidecar.exists() or not (root / chunk.shard).is_file():
        return False
    record = read_json(sidecar, "delete it to repeat its shard")
    return record["chunk"] == asdict(chunk) and (root / chunk.shard).stat().st_size == record["shard"]["bytes"]


def _run(root: Path, chunks: list[Chunk], total: int, workers: int, progress: bool) -> None:
    from tqdm import tqdm

    done = total - sum(chunk.count for chunk in chunks)
    with tqdm(total=total, initial=done, unit="episode", desc="demonstrations", disable=not progress) as bar:
        if min(workers, len(chunks)) == 1:
            for chunk in chunks:
                make_chunk(root, chunk, lambda: bar.update(1))
            return
        # Choose once here, so that the workers need not probe.
        from worldmodel.data.sources.rendering import select_gl_backend

        select_gl_backend()
        context = multiprocessing.get_context("spawn")
        ticks = context.Queue()
        saved = {name: os.environ.get(name) for name in _THREADS}
        os.environ.update(_THREADS)  # before the children start: their libraries read it when they load
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(ticks,))
        try:
            waiting: set[Future[None]] = {pool.submit(_work, root, chunk) for chunk in chunks}
            while waiting:
                finished, waiting = wait(waiting, timeout=0.3, return_when=FIRST_COMPLETED)
                bar.update(_drain(ticks))
                for future in finished:
                    future.result()
            bar.update(_drain(ticks))
        finally:
            pool.shutdown(cancel_futures=True)
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _drain(ticks: Any) -> int:
    count = 0
    while True:
        try:
            ticks.get_nowait()
        except Empty:
            return count
        count += 1


_ticks: Any = None


def _start_worker(ticks: Any) -> None:
    global _ticks
    _ticks = ticks


def _work(root: Path, chunk: Chunk) -> None:
    make_chunk(root, chunk, lambda: _ticks.put(1))


def make_chunk(root: Path, chunk: Chunk, tick: Any) -> None:
    """Collect the episodes of `chunk`, write its shard and then its sidecar; `tick()` is called per episode."""
    from worldmodel.data.sources.collect import collect_episode
    from worldmodel.data.sources.metaworld import MetaworldScene

    scene = MetaworldScene(chunk.task, pixels=chunk.pixels)
    try:
        samples = []
        for number in range(chunk.first, chunk.first + chunk.count):
            place = [chunk.seed, SPLITS.index(chunk.split), list(TASKS).index(chunk.task), number]
            episode = collect_episode(scene, np.random.default_rng(np.random.SeedSequence(place)))
            key = f"metaworld-{chunk.task}-{chunk.split}-{number:06d}"
            episode.meta |= {"episode_id": key, "split": chunk.split}
            samples.append((key, episode))
            tick()
    finally:
        scene.close()
    try:
        record = write_shard(root / chunk.shard, samples)
        write_json(_sidecar(root, chunk), {"chunk": asdict(chunk), "shard": record})
    except OSError as error:
        raise DataError(f"{root / chunk.shard}: cannot be written ({error})") from error
