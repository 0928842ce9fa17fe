"""Outcomes of closed-loop trials: success per task and robot with Wilson intervals, as a table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from worldmodel.errors import ConfigError

CLOSED_LOOP_STREAM = 0x10C0_10C0
"""Second seed word of every trial; splits, the second word of recorded episodes, count from 0."""


@dataclass(frozen=True)
class Trial:
    """One rollout."""

    task: str
    trial: int
    success: bool
    steps: int
    """Control steps until success, or all of them."""
    redrawn: int
    """Start states rejected because they were solved already."""
    max_steps: int
    """Control steps after which it would have failed."""
    robot: str | None = None
    """Where there are several."""
    frames: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)
    """(h, w, 3) uint8 images of the first camera, where recorded."""


@dataclass(frozen=True)
class TaskResult:
    """All trials of one task, by one robot where there are several."""

    task: str
    trials: int
    successes: int
    success: float
    interval: tuple[float, float]
    """95 % Wilson interval of the success rate."""
    mean_steps: float
    redrawn: int
    outcomes: list[bool]
    robot: str | None = None

    @property
    def name(self) -> str:
        """See `row_name`."""
        return row_name(vars(self))


@dataclass(frozen=True)
class ClosedLoopResult:
    """Success per task and robot, with what is needed to run it again."""

    seed: int
    replan: int
    max_steps: int | dict[str, int]
    """Control steps after which a trial has failed, by task where they differ."""
    tasks: list[TaskResult]
    frames: dict[str, list[list[np.ndarray]]] = field(default_factory=dict, repr=False)
    """Recorded rollouts per row of `tasks`, by its name."""

    @property
    def mean_success(self) -> float:
        """Mean of the tasks' success rates."""
        return sum(task.success for task in self.tasks) / len(self.tasks)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the pooled success rate."""
        return wilson_interval(sum(task.successes for task in self.tasks), sum(task.trials for task in self.tasks))

    @property
    def robots(self) -> list[TaskResult]:
        """Every robot over its tasks, where there are several: mean success, and the interval of the pooled rate."""
        names = dict.fromkeys(task.robot for task in self.tasks if task.robot is not None)
        return [_over_tasks([task for task in self.tasks if task.robot == name]) for name in names]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, without the recorded images; `robots` only where there are several."""
        rows = {"tasks": self.tasks, **({"robots": self.robots} if self.robots else {})}
        return {
            "mean_success": self.mean_success,
            "interval": list(self.interval),
            "seed": self.seed,
            "seed_stream": CLOSED_LOOP_STREAM,
            "replan": self.replan,
            "max_steps": self.max_steps,
            **{key: [_plain(row) for row in each] for key, each in rows.items()},
        }

    def write(self, path: str | Path) -> None:
        """Writes `to_json` to a file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> str:
        """A Markdown table of the success rates."""
        lines = ["| task | success | 95 % interval | trials | mean steps |", "| --- | ---: | ---: | ---: | ---: |"]
        for task in (*self.tasks, *self.robots):
            low, high = task.interval
            lines.append(
                f"| {task.name} | {task.success:.0%} | {low:.0%}-{high:.0%} | {task.trials} | {task.mean_steps:.0f} |"
            )
        low, high = self.interval
        trials = sum(task.trials for task in self.tasks)
        return "\n".join([*lines, f"| **mean** | **{self.mean_success:.1%}** | {low:.0%}-{high:.0%} | {trials} | |"])


def row_name(row: Mapping[str, Any]) -> str:
    """What a row of results is of: its task and, where there are several robots, its robot."""
    return f"{row['task']} by {row['robot']}" if row.get("robot") else row["task"]


def _plain(row: TaskResult) -> dict[str, Any]:
    values = {name: value for name, value in vars(row).items() if name != "robot" or value is not None}
    return values | {"interval": list(row.interval)}


def _over_tasks(rows: list[TaskResult]) -> TaskResult:
    trials, successes = sum(row.trials for row in rows), sum(row.successes for row in rows)
    return TaskResult(
        task="all tasks",
        trials=trials,
        successes=successes,
        success=sum(row.success for row in rows) / len(rows),
        interval=wilson_interval(successes, trials),
        mean_steps=sum(row.mean_steps * row.trials for row in rows) / trials,
        redrawn=sum(row.redrawn for row in rows),
        outcomes=[outcome for row in rows for outcome in row.outcomes],
        robot=rows[0].robot,
    )


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a success rate.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Raises:
        ConfigError: no trials, or more successes than trials.
    """
    if trials <= 0 or not 0 <= successes <= trials:
        raise ConfigError(f"wilson_interval: {successes} successes of {trials} trials; expected 0 to trials")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    half = z * np.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def summarise(
    results: list[Trial], tasks: Sequence[str], robots: Sequence[str | None], *, seed: int, replan: int
) -> ClosedLoopResult:
    """Trials grouped by robot and task, in the order asked for."""
    rows: list[TaskResult] = []
    frames: dict[str, list[list[np.ndarray]]] = {}
    for robot, task in product(robots, tasks):
        mine = sorted((r for r in results if (r.robot, r.task) == (robot, task)), key=lambda result: result.trial)
        successes = sum(result.success for result in mine)
        rows.append(
            TaskResult(
                task=task,
                trials=len(mine),
                successes=successes,
                success=successes / len(mine),
                interval=wilson_interval(successes, len(mine)),
                mean_steps=sum(result.steps for result in mine) / len(mine),
                redrawn=sum(result.redrawn for result in mine),
                outcomes=[result.success for result in mine],
                robot=robot,
            )
        )
        if recorded := [result.frames for result in mine if result.frames]:
            frames[rows[-1].name] = recorded
    horizons = {result.task: result.max_steps for result in sorted(results, key=lambda result: result.task)}
    alike = len(set(horizons.values())) == 1
    return ClosedLoopResult(seed, replan, next(iter(horizons.values())) if alike else horizons, rows, frames)
