"""Counts of whole phases: every kind of batch that a phase draws, at full depth."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from worldmodel.contracts import ClipSpec
from worldmodel.phases import MIXED, Phase
from worldmodel.plan.step import Count, count_step, meta_module


class Kind(NamedTuple):
    """One kind of batch of a phase."""

    mode: str
    share: float  # of the steps
    rows: int  # clips on each GPU
    count: Count


class Counter:
    """Counts steps of a resolved training configuration; `half`: bfloat16 autocast.

    A deep network is counted with one and with two repeats of its pattern of layers, and a teacher with one and two
    sampling steps: all grows linearly from there. What is counted once is remembered.
    """

    def __init__(self, config: Mapping[str, Any], spec: ClipSpec, *, half: bool) -> None:
        self.config, self.spec, self.half = config, spec, half
        self.known: dict[str, Count] = {}
        self.pictures: dict[Any, Any] = {}

    def kinds(self, phase: Phase, *, batch: int | None = None, checkpointing: str = "none") -> list[Kind]:
        """All kinds of batches of a phase; `batch` replaces its batch size."""
        rows = batch or phase.batch_size
        if phase.objective not in MIXED:
            return [Kind(phase.objective, 1.0, rows, self.count(phase, rows, checkpointing))]
        total = sum(item.weight for item in phase.mixture)
        found = []
        for item in phase.mixture:
            own, alone = min(item.rows or rows, rows), dataclasses.replace(phase, mixture=(item,))
            found.append(Kind(item.mode, item.weight / total, own, self.count(alone, own, checkpointing)))
        return found

    def count(self, phase: Phase, rows: int, checkpointing: str) -> Count:
        """One forward and backward pass of a phase with at most one ingredient over `rows` clips."""
        # What changes nothing about the shapes of a step.
        mixture = tuple(dataclasses.replace(item, weight=1.0, rows=None) for item in phase.mixture)
        same = {"name": "", "steps": 1, "batch_size": 1, "learning_rate": 0.0, "warmup": 1, "weight_decay": 0.0}
        like = dataclasses.replace(phase, mixture=mixture, weights={}, data={}, ema=0.0, **same)
        key = f"{like} {rows} {checkpointing}"
        if key not in self.known:
            self.known[key] = self.taught(phase, rows, checkpointing)
        return self.known[key]

    def taught(self, phase: Phase, rows: int, checkpointing: str) -> Count:
        """Of a phase that may have a teacher."""
        settings = phase.distillation
        if settings is None:
            return self.deep(phase, rows, checkpointing)

        def count(steps: int) -> Count:
            short = dataclasses.replace(settings, teacher_steps=steps, student_steps=(1,), teacher=None)
            return self.deep(dataclasses.replace(phase, distillation=short), rows, checkpointing)

        return linear(count, settings.teacher_steps)

    def deep(self, phase: Phase, rows: int, checkpointing: str) -> Count:
        """Of a network of all its layers."""
        denoiser = self.config["model"]["denoiser"]
        pattern = len(denoiser["pattern"])

        def count(repeats: int) -> Count:
            config: Any = copy.deepcopy(dict(self.config))
            config["model"]["denoiser"]["repeats"] = repeats
            config["model"]["expert"]["layers"] = config["model"]["expert"]["layers"] * repeats // denoiser["repeats"]
            module = meta_module(config, phase, self.spec)
            how = {"half": self.half, "checkpointing": checkpointing, "known": self.pictures}
            return count_step(module, rows=rows, **how)

        # Every second block is checkpointed, so an odd pattern has no period of its own length.
        return count(denoiser["repeats"]) if pattern % 2 else linear(count, denoiser["repeats"])


def linear(count: Callable[[int], Count], number: int) -> Count:
    """`count(number)`, from 1 and 2 where `number` is more than 2."""
    if number <= 2:
        return count(number)
    one, two = count(1), count(2)
    return one.combine(two, lambda a, b: a + (number - 1) * (b - a))
