"""Closed-loop success: a policy drives the simulated arm, many trials in parallel processes.

Start states come from `SeedSequence([seed, CLOSED_LOOP_STREAM, crc32(task), trial, attempt])`, with crc32(robot) as a
sixth word where the simulator has several robots. Generation draws from `SeedSequence([seed, split, task, episode])`,
and the robot, words with a small second one, so no trial can ever start from the random stream of a recorded episode;
and a trial is the same whichever other tasks and robots run and however many workers there are.
"""

import multiprocessing
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from tqdm import tqdm

from worldmodel.contracts import CommandedPolicy, Policy, ReactivePolicy, RealtimePolicy
from worldmodel.data.sources.registry import SOURCES
from worldmodel.errors import ConfigError, ContractError
from worldmodel.schedule import Schedule
from worldmodel.trials import CLOSED_LOOP_STREAM, ClosedLoopResult, Trial, summarise

MAX_REDRAWS = 50


class Scene(Protocol):
    """A simulated task with a robot, `worldmodel.data.sources.metaworld.MetaworldScene` for one."""

    embodiment: str
    hold: np.ndarray
    """(D,) the action that leaves the arm where it is now; a start state that it solves is drawn again."""
    max_steps: int
    """Control steps after which a trial has failed, unless something else is asked for."""

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        """Draws a start state and observes it, names as in `contracts.Policy`."""
        ...

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        """Executes one action for one control step; the observation after it and whether the task is solved."""
        ...


@runtime_checkable
class ScenePolicy(Protocol):
    """A policy that reads the scene itself, as a scripted expert does, and not only what the robot senses."""

    def attach(self, scene: Any) -> None:
        """Called with the scene of each trial after its reset."""
        ...


PolicyFactory = Callable[[str], Policy]
"""Builds the policy that drives an embodiment, by its name, inside a worker. Must be picklable: a frozen dataclass with
`__call__`, or a function."""

SceneFactory = Callable[[str, str | None], Scene]
"""Builds the scene of a task and a robot, None where there is but one, inside a worker. Must be picklable."""


@dataclass(frozen=True)
class SourceScenes:
    """Scene factory for the tasks and robots of a source of demonstrations."""

    pixels: int = 64
    cameras: tuple[str, ...] | None = None
    """None is all that the source has."""
    source: str = "metaworld"

    def __call__(self, task: str, robot: str | None = None) -> Scene:
        """The scene of one task with a robot, by their names in the source; its first robot by default."""
        source = SOURCES[self.source]
        cameras = source.cameras if self.cameras is None else self.cameras
        return source.make_scene(task, robot or source.robots[0], self.pixels, cameras)


def trial_generator(seed: int, task: str, trial: int, attempt: int, robot: str | None = None) -> np.random.Generator:
    """The random stream of one start state; see the top of this file."""
    words = [seed, CLOSED_LOOP_STREAM, zlib.crc32(task.encode()), trial, attempt]
    words += [] if robot is None else [zlib.crc32(robot.encode())]
    return np.random.default_rng(np.random.SeedSequence(words))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How a trial runs."""

    seed: int = 0
    replan: int = 4
    """Actions of a chunk that are executed before the policy is asked again."""
    max_steps: int | None = None
    """Control steps after which a trial has failed; None is the scene's own number."""
    image_every: int = 4
    """Images are rendered on every that many steps from the start; 0 for a policy that needs none."""
    record: int = 0
    """Trials per task and robot whose images are kept."""
    delay: int = 0
    """Control steps that the policy thinks: its chunk is there that much later than what it answers to. Meanwhile the
    robot goes on with the chunk before; for the first it waits and holds still (see `schedule.Schedule`)."""
    realtime: bool = False
    """Tells the policy what is done meanwhile (`contracts.RealtimePolicy`), so that its chunk continues it."""
    reactive: bool = False
    """Lets every action follow what is measured when it is executed (`contracts.ReactivePolicy`)."""

    def __post_init__(self) -> None:
        if self.replan < 1 or (self.max_steps is not None and self.max_steps < 1):
            raise ConfigError(f"closed loop: replan {self.replan}, max_steps {self.max_steps}; expected at least 1")
        if not 0 <= self.delay <= self.replan:
            raise ConfigError(
                f"closed loop: delay {self.delay}; expected 0 to replan, {self.replan}: a policy that thinks longer is "
                "asked less often"
            )
        if self.image_every and self.replan % self.image_every:
            raise ConfigError(
                f"closed loop: image_every {self.image_every} does not divide replan {self.replan}: "
                "the policy would act without an image of now"
            )

    def __call__(self, scene: Scene, policy: Policy, task: str, trial: int, robot: str | None = None) -> Trial:
        """Runs one trial.

        Raises:
            ContractError: the policy answers a chunk of the wrong shape or non-finite actions; it cannot do what
                `realtime` or `reactive` asks; or every start state drawn was solved already.
        """
        rng, redrawn = self.start(scene, task, trial, robot)
        limit = self.limit(scene)
        frames: list[np.ndarray] = []
        recording = trial < self.record
        policy.reset()
        observation = scene.reset(rng, images=bool(self.image_every) or recording)
        if isinstance(policy, ScenePolicy):
            policy.attach(scene)
        realtime = _as(policy, RealtimePolicy, "realtime") if self.realtime else None
        reactive = _as(policy, ReactivePolicy, "reactive") if self.reactive else None
        schedule, nothing = Schedule(scene.hold, self.delay), scene.hold[None][:0]
        for step in range(limit):
            if recording:
                frames += [value for key, value in observation.items() if key.startswith("rgb.")][:1]
            policy.observe(observation)
            if reactive:
                schedule.follow(step, reactive.propose(nothing))
            if step % self.replan == 0:
                ahead = schedule.ahead(step, self.delay if self.realtime else 0)
                chunk = np.asarray(realtime.act_after(ahead) if realtime else policy.act())
                least = self.replan + self.delay
                if chunk.ndim != 2 or len(chunk) < least or not np.isfinite(chunk).all():
                    raise ContractError(
                        f"{task}, trial {trial}, step {step}: actions {list(chunk.shape)}, all finite: "
                        f"{bool(np.isfinite(chunk).all())}; expected at least {least} finite rows"
                    )
                schedule.add(step, chunk, reactive.propose(ahead) if reactive else None)
            action = schedule.action(step)
            if isinstance(policy, CommandedPolicy):
                policy.commanded(action)
            wanted = bool(self.image_every) and (step + 1) % self.image_every == 0
            wanted |= recording and (step + 1) % self.replan == 0
            observation, success = scene.step(action, images=wanted)
            if success:
                return Trial(task, trial, True, step + 1, redrawn, limit, robot, frames)
        return Trial(task, trial, False, limit, redrawn, limit, robot, frames)

    def limit(self, scene: Scene) -> int:
        """Control steps after which a trial in this scene has failed."""
        return scene.max_steps if self.max_steps is None else self.max_steps

    def start(self, scene: Scene, task: str, trial: int, robot: str | None = None) -> tuple[np.random.Generator, int]:
        """A generator whose start state is not solved yet, and how many were rejected before it."""
        for attempt in range(MAX_REDRAWS):
            scene.reset(trial_generator(self.seed, task, trial, attempt, robot), images=False)
            # Standing still must not solve the task. The scene tells only after a step, so this state is drawn twice.
            _, solved = scene.step(scene.hold, images=False)
            if not solved:
                return trial_generator(self.seed, task, trial, attempt, robot), attempt
        raise ContractError(f"{task}, trial {trial}: all of {MAX_REDRAWS} start states were solved already")


P = TypeVar("P")


def _as(policy: Policy, kind: type[P], setting: str) -> P:
    if not isinstance(policy, kind):
        raise ContractError(f"{setting}: {type(policy).__name__} cannot do that; it is no {kind.__name__}")
    return policy


def run_closed_loop(
    make_policy: PolicyFactory,
    tasks: Sequence[str],
    *,
    robots: Sequence[str | None] = (None,),
    trials: int = 20,
    seed: int = 0,
    replan: int = 4,
    max_steps: int | None = None,
    image_every: int = 4,
    record: int = 0,
    workers: int | None = None,
    make_scene: SceneFactory | None = None,
    delay: int = 0,
    realtime: bool = False,
    reactive: bool = False,
    progress: bool = True,
) -> ClosedLoopResult:
    """Runs `trials` rollouts of every task with every robot, in parallel processes.

    Args:
        make_policy: builds the policy in each worker; must be picklable.
        tasks: names of the tasks.
        robots: names of the robots, None alone for a simulator that has but one (see `Source.told_apart`).
        trials: rollouts per task and robot.
        seed: of the start states.
        replan: control steps between two calls of the policy.
        max_steps: see `Rollout.max_steps`.
        image_every: see `Rollout.image_every`.
        record: trials per task and robot whose images come back in `frames`.
        workers: processes, one per core by default; 0 runs everything in this process.
        make_scene: builds the scene of a task and robot; Meta-World at 64 pixels by default.
        delay: see `Rollout.delay`.
        realtime: see `Rollout.realtime`.
        reactive: see `Rollout.reactive`.
        progress: shows a bar.

    Raises:
        ConfigError: no tasks, robots or trials, or settings that do not fit together.
        ContractError: see `Rollout`.
    """
    if not tasks or not robots or trials < 1:
        counts = f"{len(tasks)} tasks, {len(robots)} robots, {trials} trials"
        raise ConfigError(f"closed loop: {counts}; expected at least one of each")
    rollout = Rollout(
        seed=seed,
        replan=replan,
        max_steps=max_steps,
        image_every=image_every,
        record=record,
        delay=delay,
        realtime=realtime,
        reactive=reactive,
    )
    factory = make_scene or SourceScenes()
    # Robots one after the other, since a policy is built anew for each.
    jobs = [(task, trial, robot) for robot, task, trial in product(robots, tasks, range(trials))]
    workers = min(len(jobs), (os.cpu_count() or 1) if workers is None else workers)
    results: list[Trial] = []
    with tqdm(total=len(jobs), desc="closed loop", unit="trial", disable=not progress) as bar:
        for result in _run(jobs, rollout, make_policy, factory, workers):
            results.append(result)
            bar.update()
            bar.set_postfix(success=f"{sum(r.success for r in results) / len(results):.0%}")
    return summarise(results, tasks, robots, seed=seed, replan=replan)


def _run(
    jobs: list[tuple[str, int, str | None]],
    rollout: Rollout,
    make_policy: PolicyFactory,
    make_scene: SceneFactory,
    workers: int,
) -> Iterator[Trial]:
    """Trials in the order they finish."""
    if workers == 0:
        worker = _Worker(rollout, make_policy, make_scene)
        yield from (worker(*job) for job in jobs)
        return
    # Spawned, since GL contexts and the threads of torch do not survive a fork.
    context = multiprocessing.get_context("spawn")
    arguments = (rollout, make_policy, make_scene)
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=arguments) as pool:
        futures = [pool.submit(_run_in_worker, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """The scene that it last ran in, and the policy of the robot there."""

    def __init__(self, rollout: Rollout, make_policy: PolicyFactory, make_scene: SceneFactory) -> None:
        self.rollout, self.make_policy, self.make_scene = rollout, make_policy, make_scene
        self.place: tuple[str, str | None] | None = None
        self.scene: Scene | None = None
        self.driven: str | None = None
        self.policy: Policy | None = None

    def __call__(self, task: str, trial: int, robot: str | None) -> Trial:
        """Runs one trial; the scene is built anew only when task or robot change, the policy when the robot does."""
        if self.scene is None or self.place != (task, robot):
            self.scene, self.place = None, (task, robot)
            self.scene = self.make_scene(task, robot)
        if self.policy is None or self.driven != self.scene.embodiment:
            self.policy, self.driven = None, self.scene.embodiment
            self.policy = self.make_policy(self.driven)
        return self.rollout(self.scene, self.policy, task, trial, robot)


_worker: _Worker | None = None


def _start_worker(rollout: Rollout, make_policy: PolicyFactory, make_scene: SceneFactory) -> None:
    """Prepares a worker process; each works on one thread, so that workers do not fight over cores."""
    import torch

    global _worker
    torch.set_num_threads(1)
    _worker = _Worker(rollout, make_policy, make_scene)


def _run_in_worker(task: str, trial: int, robot: str | None) -> Trial:
    """Runs one trial in a worker process."""
    assert _worker is not None
    return _worker(task, trial, robot)
