"""Generate a dataset of scripted demonstrations: parallel, resumable, and the same bytes for the same seed."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.jobs import Chunk, claim, fill, stored_as
from worldmodel.data.schema import JPEG, Episode
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.looks import EVERYTHING, VARY
from worldmodel.data.sources.registry import SOURCES
from worldmodel.data.sources.scene import Dressable, Source
from worldmodel.errors import ConfigError

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout_episodes", "heldout_tasks", "heldout_robots")
EPISODES_PER_SHARD = 25
WEAK = 0.8
"""Share of solved demonstrations of a task by a robot below which generation says so."""


def generate(
    source: str,
    out: str | Path,
    *,
    benchmark: str | None = None,
    tasks: list[str] | None = None,
    robots: list[str] | None = None,
    heldout_tasks: list[str] | None = None,
    heldout_robots: list[str] | None = None,
    episodes: int = 50,
    heldout_episodes: int = 8,
    heldout_task_episodes: int = 8,
    seed: int = 0,
    workers: int | None = None,
    ray: str | None = None,
    pixels: int = 64,
    pictures: str = JPEG,
    variants: int = 0,
    vary: Sequence[Sequence[str]] = (),
    masks: bool = False,
    progress: bool = True,
) -> Path:
    """Generate or finish a dataset in `out` and return its path.

    Splits: `train`, `heldout_episodes` (the same tasks, other object positions), `heldout_tasks` (tasks that training
    never sees) and, if asked for, `heldout_robots` (the training tasks with robots that training never sees). An
    interrupted run continues where it stopped; a finished one is left as it is. Where there are several robots, every
    count holds for each of them. Where an expert failed often, a warning says how often.

    Args:
        source: a name of `SOURCES`.
        benchmark: the source's list of tasks, which names the training and the held-out ones; None is its first.
        tasks: subset of the benchmark's tasks; None is all of them.
        robots: embodiments of the source; None is all of them.
        heldout_tasks: those of `tasks` that training never sees; None are the benchmark's.
        heldout_robots: those of `robots` that training never sees; they have `heldout_episodes` each.
        episodes: per training task, for `train`.
        heldout_episodes: per training task, for `heldout_episodes`.
        heldout_task_episodes: per held-out task, for `heldout_tasks`.
        seed: the bytes written are a function of it and of the arguments above, not of `workers`.
        workers: processes; None is one per core, 1 runs in this process.
        ray: address of a Ray cluster to work on instead; it must see `out`.
        pixels: height and width of the images.
        pictures: how they are stored, one of `schema.PICTURES`.
        variants: how often each demonstration is shown again in another look: other colours, textures, lights and
            camera placement, the same motion. They follow their original in its shard and have masks.
        vary: what changes in the first variant, in the second and so on, each a list of names of `looks.VARY`; further
            variants begin with the first again. Empty is everything but `element` in all of them. Without `variants`
            there is one for each item.
        masks: store what every pixel shows (see `schema`) without variants too.

    Raises:
        ConfigError: unknown source, benchmark, task or robot, a count below zero, variants or masks of a source that
            has none, or `out` holds a run with other parameters.
        DataError: no off-screen rendering on this machine, or the simulator is not installed.
    """
    counts = {"train": episodes, "heldout_episodes": heldout_episodes, "heldout_tasks": heldout_task_episodes}
    plan = make_plan(
        source,
        benchmark=benchmark,
        tasks=tasks,
        robots=robots,
        heldout_tasks=heldout_tasks,
        heldout_robots=heldout_robots,
        counts=counts,
        seed=seed,
        pixels=pixels,
        variants=variants,
        vary=vary,
        masks=masks,
    )
    root = Path(out)
    parameters = {
        "source": source,
        "benchmark": plan.benchmark,
        "tasks": plan.tasks,
        "episodes": counts,
        "seed": seed,
        "pixels": pixels,
        "schema_version": SCHEMA_VERSION,
        **plan.extras,
    }
    parameters |= stored_as(pictures)
    if heldout_tasks is not None:
        parameters |= {"heldout_tasks": plan.heldout_tasks}
    if len(plan.source.robots) > 1:
        parameters |= {"robots": plan.robots, "heldout_robots": plan.heldout_robots}
    claim(root, parameters)
    fill(
        root,
        list(plan.chunks()),
        partial(collect_chunk, source),
        heldout_tasks=lambda entries: plan.heldout_tasks,
        extra={"generated": parameters},
        workers=workers,
        ray=ray,
        progress=progress,
        pictures=pictures,
        prepare=plan.source.prepare,
    )
    for warning in weak_experts(ShardReader(root).entries):
        log.warning(warning)
    return root


def weak_experts(entries: Iterable[Entry]) -> list[str]:
    """One sentence for each task and robot of which less than `WEAK` of the demonstrations were solved."""
    made, solved = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for entry in entries:
        if entry.variant_of is None:
            made[pair := (entry.task, entry.embodiment)] += 1
            solved[pair] += entry.success
    return [
        f"{task}, {robot}: {solved[task, robot] or 'none'} of {number} demonstrations solved the task; training leaves "
        "the others out"
        for (task, robot), number in made.items()
        if solved[task, robot] < WEAK * number
    ]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What goes into which shard: each holds episodes of one split, task and robot."""

    source: Source
    benchmark: str
    tasks: list[str]
    robots: list[str]
    heldout_tasks: list[str]
    heldout_robots: list[str]
    counts: dict[str, int]
    seed: int
    pixels: int
    variants: int = 0
    vary: tuple[tuple[str, ...], ...] = ()
    masks: bool = False

    @property
    def extras(self) -> dict[str, Any]:
        """What is asked for beyond the demonstrations; nothing of it, where they alone are."""
        vary = [list(names) for names in self.vary]
        named = {"variants": self.variants, "vary": vary, "masks": self.masks or self.variants > 0}
        return {name: value for name, value in named.items() if value}

    def chunks(self) -> Iterator[Chunk]:
        """All shards of the dataset."""
        number = 0
        for split in SPLITS:
            episodes = self.counts["heldout_episodes" if split == "heldout_robots" else split]
            for task in self.tasks:
                for robot in self.robots:
                    if (task in self.heldout_tasks) != (split == "heldout_tasks"):
                        continue
                    if (robot in self.heldout_robots) != (split == "heldout_robots"):
                        continue
                    most = max(1, EPISODES_PER_SHARD // (1 + self.variants))
                    for first in range(0, episodes, most):
                        count = min(most, episodes - first) * (1 + self.variants)
                        what = {"split": split, "task": task, "first": first, "seed": self.seed, "pixels": self.pixels}
                        what |= self.extras
                        if len(self.source.robots) > 1:
                            what["robot"] = robot
                        yield Chunk(f"shard-{number:06d}.tar", count, what)
                        number += 1


def make_plan(
    name: str,
    *,
    benchmark: str | None,
    tasks: list[str] | None,
    robots: list[str] | None,
    heldout_tasks: list[str] | None = None,
    heldout_robots: list[str] | None,
    counts: dict[str, int],
    seed: int,
    pixels: int,
    variants: int = 0,
    vary: Sequence[Sequence[str]] = (),
    masks: bool = False,
) -> Plan:
    """The shards of a dataset; arguments and errors as in `generate`."""
    if name not in SOURCES:
        raise ConfigError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    source = SOURCES[name]
    benchmark = next(iter(source.benchmarks)) if benchmark is None else benchmark
    if benchmark not in source.benchmarks:
        raise ConfigError(f"unknown benchmark {benchmark!r}; {name} has {', '.join(source.benchmarks)}")
    listed = source.benchmarks[benchmark]
    if unknown := sorted(set([*(tasks or ()), *(heldout_tasks or ())]) - set(listed.tasks)):
        elsewhere = [other for other, has in source.benchmarks.items() if set(unknown) <= set(has.tasks)]
        hint = f"; benchmark {' or '.join(elsewhere)} has them" if elsewhere else ""
        raise ConfigError(f"unknown tasks {unknown}{hint}; {benchmark} has {', '.join(listed.tasks)}")
    if unknown := sorted(set([*(robots or ()), *(heldout_robots or ())]) - set(source.robots)):
        raise ConfigError(f"unknown robots {unknown}; {name} has {', '.join(source.robots)}")
    if min(counts.values()) < 0 or not any(counts.values()):
        raise ConfigError(f"episode counts must be 0 or more and not all 0, got {counts}")
    if pixels < 16 or pixels % 8:
        raise ConfigError(f"pixels must be a multiple of 8 and at least 16, got {pixels}")
    if not source.dressable and (variants or vary or masks):
        able = ", ".join(other.name for other in SOURCES.values() if other.dressable)
        raise ConfigError(
            f"variants, vary and masks: {name} shows its scenes in one look and without masks; {able} can"
        )
    if variants < 0:
        raise ConfigError(f"variants must be 0 or more, got {variants}")
    for names in vary:
        if unknown := sorted(set(names) - set(VARY)):
            raise ConfigError(f"vary: unknown {unknown}; known: {', '.join(VARY)}")
        if not names or {"element", "objects"} <= set(names):
            raise ConfigError(f"vary: {list(names)} must name something, and not both `element` and `objects`")
    chosen = _in_order(source.robots, robots)
    held = _in_order(source.robots, heldout_robots or [])
    if astray := [robot for robot in held if robot not in chosen]:
        raise ConfigError(f"held-out robots {astray} are not among the robots {chosen}; name them there too")
    asked = _in_order(listed.tasks, tasks)
    if astray := [task for task in heldout_tasks or () if task not in asked]:
        raise ConfigError(f"held-out tasks {astray} are not among the tasks {asked}; name them there too")
    return Plan(
        source=source,
        benchmark=benchmark,
        tasks=asked,
        robots=chosen,
        heldout_tasks=_in_order(asked, list(listed.heldout_tasks) if heldout_tasks is None else heldout_tasks),
        heldout_robots=held,
        counts=counts,
        seed=seed,
        pixels=pixels,
        variants=variants or len(vary),
        vary=tuple(tuple(name for name in VARY if name in names) for names in vary),
        masks=masks,
    )


def _in_order(known: Sequence[str], asked: list[str] | None) -> list[str]:
    return [name for name in known if asked is None or name in asked]


def collect_chunk(name: str, chunk: Chunk) -> Iterator[tuple[str, Episode]]:
    """The demonstrations of `chunk` from the source `name` with their keys, each followed by its variants."""
    from worldmodel.data.sources.collect import collect_episode
    from worldmodel.data.sources.variants import collect_family

    source = SOURCES[name]
    split, task, first = chunk.what["split"], chunk.what["task"], chunk.what["first"]
    robot = chunk.what.get("robot")
    place = [chunk.what["seed"], SPLITS.index(split), source.tasks.index(task)]
    words = [] if robot is None else [source.robots.index(robot)]
    scene = source.make_scene(task, robot or source.robots[0], chunk.what["pixels"], source.cameras)
    variants, vary = chunk.what.get("variants", 0), chunk.what.get("vary", [EVERYTHING])
    try:
        for number in range(first, first + chunk.count // (1 + variants)):
            seed = [*place, number, *words]
            rng = np.random.default_rng(np.random.SeedSequence(seed))
            key = "-".join([name, task, *([] if robot is None else [robot]), split, f"{number:06d}"])
            meta = {"episode_id": key, "split": split}
            if not chunk.what.get("masks"):
                episode = collect_episode(scene, rng)
                episode.meta |= meta
                yield key, episode
                continue
            seeds = [np.random.SeedSequence(seed, spawn_key=(v,)) for v in range(1, variants + 1)]
            looks = [(np.random.default_rng(each), vary[v % len(vary)]) for v, each in enumerate(seeds)]
            for episode in collect_family(cast(Dressable, scene), rng, looks, meta):
                yield episode.meta["episode_id"], episode
    finally:
        scene.close()
