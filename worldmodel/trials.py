"""Outcomes of closed-loop trials: success per task with Wilson intervals, as a table and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    frames: list[np.ndarray] = field(default_factory=list, repr=False, compare=False)
    """(h, w, 3) uint8 images of the first camera, where recorded."""


@dataclass(frozen=True)
class TaskResult:
    """All trials of one task."""

    task: str
    trials: int
    successes: int
    success: float
    interval: tuple[float, float]
    """95 % Wilson interval of the success rate."""
    mean_steps: float
    redrawn: int
    outcomes: list[bool]


@dataclass(frozen=True)
class ClosedLoopResult:
    """Success per task, with what is needed to run it again."""

    seed: int
    replan: int
    max_steps: int
    tasks: list[TaskResult]
    frames: dict[str, list[list[np.ndarray]]] = field(default_factory=dict, repr=False)
    """Recorded rollouts per task."""

    @property
    def mean_success(self) -> float:
        """Mean of the tasks' success rates."""
        return sum(task.success for task in self.tasks) / len(self.tasks)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the pooled success rate."""
        return wilson_interval(sum(task.successes for task in self.tasks), sum(task.trials for task in self.tasks))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, without the recorded images."""
        return {
            "mean_success": self.mean_success,
            "interval": list(self.interval),
            "seed": self.seed,
            "seed_stream": CLOSED_LOOP_STREAM,
            "replan": self.replan,
            "max_steps": self.max_steps,
            "tasks": [{**vars(task), "interval": list(task.interval)} for task in self.tasks],
        }

    def write(self, path: str | Path) -> None:
        """Writes `to_json` to a file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def table(self) -> str:
        """A Markdown table of the success rates."""
        lines = ["| task | success | 95 % interval | trials | mean steps |", "| --- | ---: | ---: | ---: | ---: |"]
        for task in self.tasks:
            low, high = task.interval
            lines.append(
                f"| {task.task} | {task.success:.0%} | {low:.0%}-{high:.0%} | {task.trials} | {task.mean_steps:.0f} |"
            )
        low, high = self.interval
        trials = sum(task.trials for task in self.tasks)
        return "\n".join([*lines, f"| **mean** | **{self.mean_success:.1%}** | {low:.0%}-{high:.0%} | {trials} | |"])


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
    results: list[Trial], tasks: Sequence[str], *, seed: int, replan: int, max_steps: int
) -> ClosedLoopResult:
    """Trials grouped by task, in the order asked for."""
    rows: list[TaskResult] = []
    frames: dict[str, list[list[np.ndarray]]] = {}
    for task in tasks:
        mine = sorted((result for result in results if result.task == task), key=lambda result: result.trial)
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
            )
        )
        if recorded := [result.frames for result in mine if result.frames]:
            frames[task] = recorded
    return ClosedLoopResult(seed, replan, max_steps, rows, frames)
