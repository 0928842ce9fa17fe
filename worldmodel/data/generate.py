"""Generate a dataset of scripted demonstrations: parallel, resumable, and the same bytes for the same seed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.jobs import Chunk, claim, fill
from worldmodel.data.schema import Episode
from worldmodel.data.sources.metaworld_tasks import HELDOUT_TASKS, TASKS, TRAIN_TASKS
from worldmodel.errors import ConfigError

SPLITS = ("train", "heldout_episodes", "heldout_tasks")
EPISODES_PER_SHARD = 25


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
    ray: str | None = None,
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
        ray: address of a Ray cluster to work on instead; it must see `out`.
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
    claim(root, parameters)
    fill(
        root,
        list(_plan(chosen, counts, seed, pixels)),
        collect_chunk,
        heldout_tasks=lambda entries: [task for task in HELDOUT_TASKS if task in chosen],
        extra={"generated": parameters},
        workers=workers,
        ray=ray,
        progress=progress,
        prepare=_prepare,
    )
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


def _plan(tasks: list[str], counts: dict[str, int], seed: int, pixels: int) -> Iterator[Chunk]:
    """Each shard holds episodes of one task and split."""
    number = 0
    for split in SPLITS:
        members = HELDOUT_TASKS if split == "heldout_tasks" else TRAIN_TASKS
        for task in tasks:
            if task not in members:
                continue
            for first in range(0, counts[split], EPISODES_PER_SHARD):
                count = min(EPISODES_PER_SHARD, counts[split] - first)
                what = {"split": split, "task": task, "first": first, "seed": seed, "pixels": pixels}
                yield Chunk(f"shard-{number:06d}.tar", count, what)
                number += 1


def _prepare() -> None:
    # Choose once here, so that the workers need not probe.
    from worldmodel.data.sources.rendering import select_gl_backend

    select_gl_backend()


def collect_chunk(chunk: Chunk) -> Iterator[tuple[str, Episode]]:
    """The demonstrations of `chunk` with their keys."""
    from worldmodel.data.sources.collect import collect_episode
    from worldmodel.data.sources.metaworld import MetaworldScene

    split, task, first = chunk.what["split"], chunk.what["task"], chunk.what["first"]
    scene = MetaworldScene(task, pixels=chunk.what["pixels"])
    try:
        for number in range(first, first + chunk.count):
            place = [chunk.what["seed"], SPLITS.index(split), list(TASKS).index(task), number]
            episode = collect_episode(scene, np.random.default_rng(np.random.SeedSequence(place)))
            key = f"metaworld-{task}-{split}-{number:06d}"
            episode.meta |= {"episode_id": key, "split": split}
            yield key, episode
    finally:
        scene.close()
