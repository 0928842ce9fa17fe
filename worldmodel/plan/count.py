"""Counts of whole phases: every kind of batch that a phase draws, at full depth, with its teacher."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from worldmodel.contracts import ClipSpec
from worldmodel.data.buckets import Bucket, TokenCounts
from worldmodel.model import WorldModel
from worldmodel.phases import MIXED, Ingredient, Phase
from worldmodel.plan.step import Count, count_step, meta_model
from worldmodel.sized import token_counts
from worldmodel.training import PhaseModule


class Clip(NamedTuple):
    """One clip of a kind of batch, or one picture of each camera."""

    tokens: int  # in both transformers, none where neither runs
    frames: int  # recorded control steps that it goes on
    read: int  # pictures
    pixels: int  # of each


class Kind(NamedTuple):
    """One kind of batch of a phase."""

    mode: str
    share: float  # of the steps
    rows: int  # clips on each GPU
    step: Count
    teacher: float  # FLOPs of the teacher
    passes: float  # of the teacher through all blocks
    clip: Clip


class Counter:
    """Counts steps of a resolved training configuration; `half`: bfloat16 autocast.

    A deep network is counted with one and with two repeats of its pattern of layers: all grows linearly from there.
    """

    def __init__(self, config: Mapping[str, Any], spec: ClipSpec, *, half: bool) -> None:
        self.config, self.spec, self.half = config, spec, half
        self.known: dict[str, Count] = {}
        self.models: dict[int, WorldModel] = {}
        self.pictures: dict[Any, Any] = {}

    def kinds(self, phase: Phase, *, batch: int | None = None) -> list[Kind]:
        """All kinds of batches of a phase, of each ingredient in each bucket; `batch` replaces its batch size."""
        phase = dataclasses.replace(phase, batch_size=batch or phase.batch_size)
        rows, whole = phase.batch_size, Bucket(height=self.spec.height, width=self.spec.width, future=self.spec.future)
        if phase.objective not in MIXED:
            return [Kind(phase.objective, 1.0, rows, self.count(phase, rows), 0.0, 0.0, self.clip(None, whole))]
        buckets = [bucket for bucket in phase.buckets or (whole,) if bucket.weight]
        total = sum(item.weight for item in phase.mixture) * sum(bucket.weight for bucket in buckets)
        sizes = phase.batch_sizes(self.tokens())
        return [
            self.kind(
                dataclasses.replace(phase, buckets=(bucket,) if phase.buckets else ()),
                item,
                bucket,
                sizes.get((bucket, item.mode == "image"), min(item.rows or rows, rows)),
                item.weight * bucket.weight / total,
            )
            for item in phase.mixture
            for bucket in buckets
            if item.weight
        ]

    def clip(self, item: Ingredient | None, bucket: Bucket) -> Clip:
        """What a clip of an ingredient in a bucket has of tokens and pictures."""
        spec, pixels, views = self.spec, bucket.height * bucket.width, len(self.spec.cameras)
        steps = bucket.future * spec.stride
        if item is None:
            return Clip(0, steps, (spec.history + steps) * views, pixels)
        # Any size has tokens, be it none that buckets may have.
        counts = dataclasses.replace(self.tokens(), multiple=1)
        if item.mode == "image":
            return Clip(counts.picture(bucket), 1, views, pixels)
        return Clip(counts.clip(bucket) + spec.chunk, steps, (spec.history + steps) * views, pixels)

    def tokens(self) -> TokenCounts:
        """What a clip has of them, whatever its size."""
        return token_counts(self.model(1))

    def kind(self, phase: Phase, item: Ingredient, bucket: Bucket, rows: int, share: float) -> Kind:
        """Batches of one ingredient; a student's step is that of the same ingredient without a teacher.

        The teacher reads the history once, and without the instruction once more if that guides; it then denoises
        `teacher_steps` times, once more in each for every condition that guides.
        """
        alone = dataclasses.replace(phase, objective="world", distillation=None, mixture=(item,))
        count, settings, clip = self.count(alone, rows), phase.distillation, self.clip(item, bucket)
        if settings is None:
            return Kind(item.mode, share, rows, count, 0.0, 0.0, clip)
        told = {"text", "embodiment", *phase.given} if item.mode != "policy" else set()
        told |= {"actions"} if item.mode == "forward_dynamics" else set()
        guides = [name for name, scale in settings.guidance.items() if scale != 1 and name in told]
        reads, passes = 1 + ("text" in guides), settings.teacher_steps * (1 + len(guides))
        flops = reads * count.remember + passes * count.velocity
        return Kind(item.mode, share, rows, count, flops, reads + passes, clip)

    def count(self, phase: Phase, rows: int) -> Count:
        """One forward and backward pass of a phase with at most one ingredient and bucket over `rows` clips."""
        given = {name: rate for name, rate in phase.given.items() if rate}
        # An upright picture costs what it does lying.
        sides = [sorted((bucket.height, bucket.width)) for bucket in phase.buckets]
        buckets = tuple(
            Bucket(height=low, width=high, future=bucket.future)
            for (low, high), bucket in zip(sides, phase.buckets, strict=True)
        )
        phase = dataclasses.replace(phase, given=given, buckets=buckets)
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
        module = PhaseModule(model=copy.deepcopy(self.model(repeats)), phase=phase, seed=0)
        return count_step(module, rows=rows, half=self.half, known=self.pictures)

    def model(self, repeats: int) -> WorldModel:
        """The model with so many repeats of its pattern of layers, on the meta device; copy it before it is changed."""
        if repeats not in self.models:
            config: Any = copy.deepcopy(dict(self.config))
            denoiser, expert = config["model"]["denoiser"], config["model"]["expert"]
            expert["layers"] = expert["layers"] * repeats // denoiser["repeats"]
            denoiser["repeats"] = repeats
            self.models[repeats] = meta_model(config, self.spec)
        return self.models[repeats]
