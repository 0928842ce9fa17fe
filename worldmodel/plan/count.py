"""Counts of whole phases: every kind of batch that a phase draws, at full depth, with its teacher."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from worldmodel.contracts import ClipSpec
from worldmodel.phases import MIXED, Ingredient, Phase
from worldmodel.plan.step import Count, count_step, meta_module


class Kind(NamedTuple):
    """One kind of batch of a phase."""

    mode: str
    share: float  # of the steps
    rows: int  # clips on each GPU
    step: Count
    teacher: float  # FLOPs of the teacher
    passes: float  # of the teacher through all blocks


class Counter:
    """Counts steps of a resolved training configuration; `half`: bfloat16 autocast.

    A deep network is counted with one and with two repeats of its pattern of layers: all grows linearly from there.
    """

    def __init__(self, config: Mapping[str, Any], spec: ClipSpec, *, half: bool) -> None:
        self.config, self.spec, self.half = config, spec, half
        self.known: dict[str, Count] = {}
        self.pictures: dict[Any, Any] = {}

    def kinds(self, phase: Phase, *, batch: int | None = None) -> list[Kind]:
        """All kinds of batches of a phase; `batch` replaces its batch size."""
        rows = batch or phase.batch_size
        if phase.objective not in MIXED:
            return [Kind(phase.objective, 1.0, rows, self.count(phase, rows), 0.0, 0.0)]
        total = sum(item.weight for item in phase.mixture)
        return [self.kind(phase, item, min(item.rows or rows, rows), item.weight / total) for item in phase.mixture]

    def kind(self, phase: Phase, item: Ingredient, rows: int, share: float) -> Kind:
        """Batches of one ingredient; a student's step is that of the same ingredient without a teacher.

        The teacher reads the history once, and without the instruction once more if that guides; it then denoises
        `teacher_steps` times, once more in each for every condition that guides.
        """
        alone = dataclasses.replace(phase, objective="world", distillation=None, mixture=(item,))
        count, settings = self.count(alone, rows), phase.distillation
        if settings is None:
            return Kind(item.mode, share, rows, count, 0.0, 0.0)
        told = {"text", "embodiment", *phase.given} if item.mode != "policy" else set()
        told |= {"actions"} if item.mode == "forward_dynamics" else set()
        guides = [name for name, scale in settings.guidance.items() if scale != 1 and name in told]
        reads, passes = 1 + ("text" in guides), settings.teacher_steps * (1 + len(guides))
        return Kind(item.mode, share, rows, count, reads * count.remember + passes * count.velocity, reads + passes)

    def count(self, phase: Phase, rows: int) -> Count:
        """One forward and backward pass of a phase with at most one ingredient over `rows` clips."""
        # What changes nothing about the shapes of a step.
        mixture = tuple(dataclasses.replace(item, weight=1.0, rows=None) for item in phase.mixture)
        same = {"name": "", "steps": 1, "batch_size": 1, "learning_rate": 0.0, "warmup": 1, "weight_decay": 0.0}
        key = f"{dataclasses.replace(phase, mixture=mixture, weights={}, data={}, ema=0.0, **same)} {rows}"
        if key not in self.known:
            denoiser = self.config["model"]["denoiser"]
            repeats = denoiser["repeats"]
            # Every second block is checkpointed, so a pattern of odd length has no period of its own.
            if repeats <= 2 or len(denoiser["pattern"]) % 2:
                self.known[key] = self.repeated(phase, rows, repeats)
            else:
                one, two = (self.repeated(phase, rows, n) for n in (1, 2))
                self.known[key] = one.continued(two, repeats - 1)
        return self.known[key]

    def repeated(self, phase: Phase, rows: int, repeats: int) -> Count:
        """The same of a network with so many repeats of its pattern of layers."""
        config: Any = copy.deepcopy(dict(self.config))
        denoiser, expert = config["model"]["denoiser"], config["model"]["expert"]
        expert["layers"] = expert["layers"] * repeats // denoiser["repeats"]
        denoiser["repeats"] = repeats
        module = meta_module(config, phase, self.spec)
        return count_step(module, rows=rows, half=self.half, known=self.pictures)
