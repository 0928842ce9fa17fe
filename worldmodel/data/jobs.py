"""Fill a dataset folder shard by shard over processes: a run that is killed at any point continues and repeats nothing.

A folder belongs to one set of parameters. Each shard is written by rename, and only then its record beside it in
`.progress`; a shard without a matching record is made again, with the same bytes. Index and statistics come last.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from queue import Empty
from typing import Any

from worldmodel.data.cluster import check_shared, scatter
from worldmodel.data.index import INDEX
from worldmodel.data.plain import read_json
from worldmodel.data.schema import JPEG, PICTURES, Episode
from worldmodel.data.shard_writer import canonical, remove_temporary, write_index, write_json, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import STATISTICS, write_statistics
from worldmodel.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_PROGRESS = ".progress"
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}


@dataclass(frozen=True)
class Chunk:
    """One shard to write: `what` says in plain JSON values what goes into it."""

    shard: str
    count: int  # episodes
    what: dict[str, Any]


Make = Callable[[Chunk], Iterable[tuple[str, Episode]]]
"""Yields (key, episode) of a chunk; picklable, and a function of the chunk only."""


def claim(root: Path, parameters: dict[str, Any]) -> None:
    """Bind the folder `root` to `parameters`.

    Raises:
        ConfigError: it holds something else, or was made with other parameters.
    """
    path = root / _PROGRESS / "parameters.json"
    if path.exists():
        before = read_json(path, "delete the folder to start again")
        names = sorted(before.keys() | parameters.keys())
        if differing := [name for name in names if canonical(before.get(name)) != canonical(parameters.get(name))]:
            shown = "; ".join(
                f"{name}: {before.get(name)!r} there, {parameters.get(name)!r} asked" for name in differing
            )
            raise ConfigError(
                f"{root} holds a dataset made with other parameters ({shown}); use those, choose "
                "another folder, or delete this one"
            )
        return
    # A run killed before its first write leaves an empty .progress.
    if root.exists() and any(child.name != _PROGRESS for child in root.iterdir()):
        raise ConfigError(f"{root} is not empty and was not made by this command; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, parameters)


def stored_as(pictures: str) -> dict[str, str]:
    """What `claim` keeps of the way in which pictures are stored; nothing for JPEG, which older folders hold.

    Raises:
        ConfigError: unknown way.
    """
    if pictures not in PICTURES:
        raise ConfigError(f"pictures {pictures!r} is none of {', '.join(PICTURES)}")
    return {} if pictures == JPEG else {"pictures": pictures}


def fill(
    root: Path,
    chunks: Sequence[Chunk],
    make: Make,
    *,
    heldout_tasks: Callable[[list[dict[str, Any]]], list[str]],
    extra: dict[str, Any],
    workers: int | None,
    progress: bool,
    prepare: Callable[[], object] | None = None,
    ray: str | None = None,
    pictures: str = JPEG,
) -> None:
    """Write the shards of `chunks` that are not finished, then index and statistics; a finished folder is left alone.

    Args:
        root: folder, claimed before.
        chunks: all shards of the dataset.
        make: yields the episodes of one chunk, in a worker process.
        heldout_tasks: the held-out tasks, from the index entries.
        extra: goes into the index.
        workers: processes; None is one per core, 1 works in this process.
        progress: show a bar.
        prepare: called once before several workers start.
        ray: address of a Ray cluster to work on (see `cluster.scatter`) instead of processes here; it must see `root`.
        pictures: how they are stored, one of `schema.PICTURES`.

    Raises:
        DataError: an episode cannot be made, a shard cannot be written, or a worker process was killed.
        ConfigError: no such cluster.
    """
    pending = [chunk for chunk in chunks if not _finished(root, chunk)]
    write = partial(_write, root.resolve(), make, pictures)
    if pending:
        log.info("%d of %d shards to do in %s", len(pending), len(chunks), root)
        with _bar(root, chunks, pending, progress) as bar:
            if ray is not None:
                _run_on_cluster(root, pending, write, ray, workers, bar)
            else:
                _run(root, pending, write, workers or os.cpu_count() or 1, bar, prepare)
    if pending or not (root / INDEX).exists():
        shards = [read_json(_sidecar(root, chunk), "delete it to repeat its shard")["shard"] for chunk in chunks]
        entries = [entry for shard in shards for entry in shard["entries"]]
        (root / STATISTICS).unlink(missing_ok=True)
        write_index(root, shards, heldout_tasks(entries), extra)
        remove_temporary(root)
    reader = ShardReader(root)
    if not (root / STATISTICS).exists() and "train" in reader.index["splits"]:
        write_statistics(root)


def _sidecar(root: Path, chunk: Chunk) -> Path:
    return root / _PROGRESS / f"{chunk.shard}.json"


def _finished(root: Path, chunk: Chunk) -> bool:
    sidecar = _sidecar(root, chunk)
    if not sidecar.exists() or not (root / chunk.shard).is_file():
        return False
    record = read_json(sidecar, "delete it to repeat its shard")
    same = canonical(record.get("chunk")) == canonical(asdict(chunk))
    return same and (root / chunk.shard).stat().st_size == record["shard"]["bytes"]


Write = Callable[[Chunk, Callable[[], object]], None]
"""Writes one shard and calls back after every episode."""


def _write(root: Path, make: Make, pictures: str, chunk: Chunk, tick: Callable[[], object]) -> None:
    """Write the shard of `chunk`, then its sidecar."""

    def ticking() -> Iterator[tuple[str, Episode]]:
        for sample in make(chunk):
            yield sample
            tick()

    try:
        record = write_shard(root / chunk.shard, ticking(), pictures=pictures)
        write_json(_sidecar(root, chunk), {"chunk": asdict(chunk), "shard": record})
    except OSError as error:
        raise DataError(f"{root / chunk.shard}: cannot be written ({error})") from error


def _bar(root: Path, chunks: Sequence[Chunk], pending: Sequence[Chunk], progress: bool) -> Any:
    from tqdm import tqdm

    total, left = (sum(chunk.count for chunk in part) for part in (chunks, pending))
    return tqdm(total=total, initial=total - left, unit="episode", desc=root.name, disable=not progress)


def _run_on_cluster(
    root: Path, chunks: Sequence[Chunk], write: Write, address: str, limit: int | None, bar: Any
) -> None:
    task = partial(_work_anywhere, root.resolve(), write)
    for number, done in scatter(task, chunks, address=address, limit=limit, environment=_THREADS):
        if done is None:
            raise _killed(root)
        bar.update(chunks[number].count)


def _work_anywhere(root: Path, write: Write, chunk: Chunk) -> bool:
    check_shared(root / _PROGRESS)
    write(chunk, lambda: None)
    return True


def _killed(root: Path) -> DataError:
    return DataError(
        f"{root}: a worker process was killed (out of memory?); finished shards are kept: run the same command "
        "again, with fewer workers if memory is short"
    )


def _run(
    root: Path,
    chunks: Sequence[Chunk],
    write: Write,
    workers: int,
    bar: Any,
    prepare: Callable[[], object] | None,
) -> None:
    if min(workers, len(chunks)) == 1:
        for chunk in chunks:
            write(chunk, lambda: bar.update(1))
        return
    if prepare is not None:
        prepare()
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    saved = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(_THREADS)  # before the children start: their libraries read it when they load
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(ticks,))
    try:
        waiting: set[Future[None]] = {pool.submit(_work, write, chunk) for chunk in chunks}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.3, return_when=FIRST_COMPLETED)
            if count := _drain(ticks):
                bar.update(count)
            for future in finished:
                future.result()
        bar.update(_drain(ticks))
    except BrokenProcessPool as error:
        raise _killed(root) from error
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
    # Without this, workers of a killed parent live on and write beside the run that takes over.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(write: Write, chunk: Chunk) -> None:
    write(chunk, partial(_ticks.put, 1))
