"""Phases of a curriculum: what each trains, on what, for how long, and what every step of it draws."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from worldmodel.adapters import Lora
from worldmodel.config import with_tuples
from worldmodel.contracts import MODES, PAIR_KINDS
from worldmodel.data.buckets import Bucket, TokenCounts, batch_sizes, make_bucket
from worldmodel.data.dataset import Needs
from worldmodel.data.transforms import PRESENCE
from worldmodel.distillation import Distillation
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.synthesis.conditions import CONDITIONS

OBJECTIVES = ("tokeniser", "understanding", "motion", "composite", "world", "distill", "edit")
MIXED = ("world", "distill")
"""Objectives whose phases have a mixture of modes."""
INGREDIENTS = (*MODES, "image", "understanding", "proposal")
PARTS = ("autoencoder", "encoder", "motion", "compositor", "denoiser", "expert")
DATA = ("mixture", "on_error")
"""What a phase may say about its data, instead of the `data` of the experiment."""
GRADIENTS = ("truncated", "full")
"""Whether gradients stop where the memory is carried from one clip to the next."""
GIVABLE = tuple(name for name in CONDITIONS if name != "actions")
"""Conditions with a rate in `given`; actions are given by their own modes."""
RATES = ("blank", "reference", "across")
"""What rows of an edit phase have at random (see `editing_losses.edit_loss`)."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """One kind of batch of a world phase: a mode, how often it comes, what the robot does not sense in it.

    Three modes beside the five: `image` trains the video transformer on single pictures with the instruction as their
    caption and nothing before them (see `picture_loss`), `understanding` the heads of stage 1, which would drift apart
    from an encoder that later phases go on training, and `proposal` the state policy alone, which acts on where
    stage 1 sees the points if those are in `drop`. `dropout` replaces the phase's own rates.
    """

    mode: str
    weight: float
    drop: tuple[str, ...] = ()
    rows: int | None = None
    draws: int = 1
    dropout: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if self.mode not in INGREDIENTS:
            raise ConfigError(f"unknown mode {self.mode!r} in a phase's mixture; one of {', '.join(INGREDIENTS)}")
        if self.mode == "understanding" and not {"points", "touch"} <= set(self.dropout or ()):
            raise ConfigError(
                "mode 'understanding' needs a dropout of `points` and `touch`: heads answer for hidden senses"
            )
        if unknown := [sense for sense in self.drop if sense not in PRESENCE]:
            raise ConfigError(f"unknown sense {unknown[0]!r} in a phase's mixture; one of {', '.join(PRESENCE)}")
        if self.mode == "image" and self.drop:
            raise ConfigError("mode 'image' hides all but the picture and its caption; leave `drop` out")
        if "rgb" in self.drop and self.mode not in ("policy", "proposal"):
            raise ConfigError(f"mode {self.mode!r} needs images; `drop: [rgb]` fits the modes policy and proposal")

    @property
    def images(self) -> bool:
        """Whether its batches need pictures."""
        return "rgb" not in self.drop and (self.mode != "proposal" or "points" in self.drop)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of the curriculum: what it trains, on what, for how long.

    `trains` names parts of the model or, with dots, what lies in them (`expert.embed_out`); with `lora`, low-rank
    adapters are trained in them and nothing else. With `chunks` above 1 every row of a world batch is that many
    consecutive clips of one episode, and stage 2 carries its memory from each to the next: a history of many frames at
    the cost of few. `gradients` says whether they flow back through it. `given` has the rate at which each condition of
    synthesis is given in a row - `video`, `camera`, `points`, `embodiment` (1 unless said); `forward_dynamics` gives
    actions - and `absent` that at which cameras and points that are not given are left out instead of predicted;
    guidance needs both. A network without conditions learns without. `decided` is the rate at which a chunk of modes
    `policy` and `proposal` continues actions that are known, for real-time chunking, and `jitter` the noise on what
    these modes measure of the robot (see `transforms.jittered`). `lens` and `patches` change the pictures of an
    `understanding` phase, and `fused_teaches` says what they learn from (see `losses.understanding_loss`). An `edit`
    phase learns from pairs of clips: `pairs` weighs their kinds, `rates` are those of `RATES`. `distillation` says what
    objective `distill` learns from a teacher about the modes of its mixture.

    `weights` are those of the parts of the loss: each stream's, `proposal` and `actions`, the lambda of
    L_video + lambda L_action. With `buckets` each batch has the sizes of one of them, drawn by weight, and
    `batch_size` is that of the clips with most tokens (see `buckets.batch_sizes`); without, all have those of the spec.
    """

    name: str
    objective: str
    trains: tuple[str, ...]
    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    kl_weight: float = 1e-4
    dropout: Mapping[str, float] = field(default_factory=dict)
    mixture: tuple[Ingredient, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    insulate: bool = True
    huber: float | None = None
    lens: float = 1.0
    patches: int = 0
    fused_teaches: bool = True
    chunks: int = 1
    gradients: str = "truncated"
    given: Mapping[str, float] = field(default_factory=dict)
    absent: float = 0.0
    decided: float = 0.0
    jitter: float = 0.0
    pairs: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    distillation: Distillation | None = None
    lora: Lora | None = None
    buckets: tuple[Bucket, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chunks < 1 or (self.chunks > 1 and self.objective != "world"):
            raise ConfigError(
                f"phase {self.name!r}: chunks is {self.chunks}; it is the number of consecutive clips whose memory is "
                "carried on, 1 or more, and more than 1 for objective `world` alone"
            )
        if self.gradients not in GRADIENTS:
            raise ConfigError(f"phase {self.name!r}: gradients {self.gradients!r} is none of {', '.join(GRADIENTS)}")
        if unknown := sorted(set(self.given) - set(GIVABLE)):
            raise ConfigError(f"phase {self.name!r}: given.{unknown[0]} is none of {', '.join(GIVABLE)}")
        if unknown := sorted(set(self.rates) - set(RATES)):
            raise ConfigError(f"phase {self.name!r}: rates.{unknown[0]} is none of {', '.join(RATES)}")
        rates = (*self.given.values(), *self.rates.values(), self.absent, self.decided)
        if wrong := [rate for rate in rates if not 0 <= rate <= 1]:
            raise ConfigError(
                f"phase {self.name!r}: rates, also given, absent and decided, lie in 0 to 1, not {wrong[0]}"
            )
        if unknown := sorted(set(self.pairs) - set(PAIR_KINDS)):
            raise ConfigError(f"phase {self.name!r}: pairs.{unknown[0]} is none of {', '.join(PAIR_KINDS)}")
        if (self.objective == "edit") != any(self.pairs.values()):
            raise ConfigError(f"phase {self.name!r}: weights of pairs belong to objective `edit` and only there")
        if self.jitter < 0:
            raise ConfigError(f"phase {self.name!r}: jitter is a standard deviation, 0 or more, not {self.jitter}")
        if self.lens < 1:
            raise ConfigError(f"phase {self.name!r}: lens is the largest magnification, 1 or more, not {self.lens}")
        if self.patches < 0:
            raise ConfigError(f"phase {self.name!r}: patches is a number of rectangles, 0 or more, not {self.patches}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"phase {self.name!r}: objective {self.objective!r} is none of {', '.join(OBJECTIVES)}")
        if unknown := [part for part in self.trains if part.partition(".")[0] not in PARTS]:
            raise ConfigError(f"phase {self.name!r}: trains {unknown[0]!r}, which is none of {', '.join(PARTS)}")
        if unknown := sorted(set(self.data) - set(DATA)):
            raise ConfigError(f"phase {self.name!r}: data.{unknown[0]} is none of {', '.join(DATA)}")
        if (self.objective in MIXED) != bool(self.mixture):
            raise ConfigError(
                f"phase {self.name!r}: a mixture of modes belongs to objectives `world` and `distill` and only there"
            )
        if self.objective == "distill" and (self.decided or self.jitter):
            raise ConfigError(
                f"phase {self.name!r}: decided and jitter belong to objective `world`; a student is taught whole chunks"
            )
        if (self.objective == "distill") != (self.distillation is not None):
            raise ConfigError(f"phase {self.name!r}: `distillation` belongs to objective `distill` and only there")
        if self.objective == "distill" and (inner := [part for part in self.trains if part not in PARTS]):
            raise ConfigError(f"phase {self.name!r}: trains {inner[0]!r}, but objective `distill` trains whole parts")
        if self.distillation is not None:
            self.check_distillation(self.distillation)
        if self.buckets and self.objective not in MIXED:
            raise ConfigError(f"phase {self.name!r}: buckets belong to objectives `world` and `distill` and only there")
        if self.buckets and not any(bucket.weight for bucket in self.buckets):
            raise ConfigError(f"phase {self.name!r}: no bucket has a weight above 0")
        if self.buckets and any(ingredient.rows is not None for ingredient in self.mixture):
            raise ConfigError(
                f"phase {self.name!r}: buckets say how large batches are, leave `rows` out of the mixture"
            )

    def check_distillation(self, settings: Distillation) -> None:
        """Raises `ConfigError` for a mode that samples nothing and for guidance by what is never given."""
        modes = [ingredient.mode for ingredient in self.mixture]
        if other := [mode for mode in modes if mode not in MODES]:
            raise ConfigError(f"phase {self.name!r}: mode {other[0]!r} samples nothing that could be distilled")
        told = {"text", "embodiment"} | {name for name, rate in self.given.items() if rate}
        told |= {"actions"} if "forward_dynamics" in modes else set()
        if missing := [name for name, scale in settings.guidance.items() if scale != 1 and name not in told]:
            raise ConfigError(
                f"phase {self.name!r}: distillation.guidance.{missing[0]} guides by what the phase never gives; "
                "actions are given in mode `forward_dynamics`, cameras and points at a rate in `given`"
            )

    def generator(self, seed: int, step: int) -> torch.Generator:
        """Source of what is random in a step for all its rows, the same after a resume."""
        return torch.Generator().manual_seed(random.Random(f"{seed} {self.name} {step}").getrandbits(63))

    def draws(self, seed: int, step: int, rows: Sequence[int]) -> Draws:
        """Source of what is random in some rows of a step, the same after a resume and in any process."""
        return Draws(f"{seed} {self.name} {step}", rows)

    def pick(self, seed: int, step: int) -> Ingredient:
        """The ingredient of a step of a mixture: a function of seed and step, known before its data is loaded."""
        if len(self.mixture) == 1:
            return self.mixture[0]
        weights = torch.tensor([i.weight for i in self.mixture])
        return self.mixture[int(torch.multinomial(weights, 1, generator=self.generator(seed, step)))]

    def bucket(self, seed: int, step: int) -> Bucket | None:
        """The bucket of a step, the same on all ranks."""
        if not self.buckets:
            return None
        weights = [bucket.weight for bucket in self.buckets]
        return random.Random(f"{seed} {self.name} {step} bucket").choices(self.buckets, weights)[0]

    def batch_sizes(self, counts: TokenCounts) -> dict[tuple[Bucket, bool], int]:
        """Rows of a batch of each bucket, by whether it is of mode `image`; empty without buckets."""
        if not self.buckets:
            return {}
        kinds = {ingredient.mode == "image" for ingredient in self.mixture}
        chunks = self.chunks if False in kinds else 0
        return batch_sizes(self.batch_size, counts, self.buckets, chunks=chunks, pictures=True in kinds)

    @property
    def foretells(self) -> bool:
        """Whether it has a mode that needs a clip, not only a picture or a state."""
        return any(ingredient.mode in MODES for ingredient in self.mixture)

    @property
    def trains_actions(self) -> bool:
        """Whether it trains the action transformer: its state policy alone needs no clip."""
        return self.foretells and any(word.partition(".")[0] == "expert" for word in self.trains)

    def needs(
        self,
        seed: int,
        step: int,
        *,
        cached: bool = False,
        sizes: Mapping[tuple[Bucket, bool], int] | None = None,
    ) -> Needs:
        """What the batch of a step will use; `cached` says that latents of the history are at hand, `sizes` how large
        the batches of its buckets are."""
        if self.objective not in MIXED:
            whole = self.objective in ("motion", "edit")
            future = whole or self.objective in ("tokeniser", "composite")
            return Needs(history=None if whole else 1, future=future)
        pick, bucket = self.pick(seed, step), self.bucket(seed, step)
        future = pick.mode not in ("policy", "image", "understanding", "proposal")
        newest = cached or pick.mode in ("image", "understanding", "proposal")
        history = 0 if not pick.images else 1 if newest else None
        clips = None if bucket is None or not sizes else sizes[bucket, pick.mode == "image"]
        return Needs(pick.rows, history, future, self.clips(pick), bucket, clips)

    def clips(self, pick: Ingredient) -> int:
        """Consecutive clips in each row of a batch of `pick`; what has no use for a memory takes one."""
        return self.chunks if pick.mode in MODES else 1


def make_phases(config: Mapping[str, Mapping[str, Any]]) -> list[Phase]:
    """Phases in the order of the YAML, whose keys are their names. Raises `ConfigError` for an unknown field."""
    phases = []
    for name, values in config.items():
        try:
            mixture = tuple(Ingredient(**with_tuples(item)) for item in values.get("mixture", []))
            buckets = tuple(make_bucket(item) for item in values.get("buckets", []))
            own = ("mixture", "distillation", "lora", "buckets")
            rest = with_tuples({k: v for k, v in values.items() if k not in own})
            settings, adapters = values.get("distillation"), values.get("lora")
            phases.append(
                Phase(
                    name=name,
                    mixture=mixture,
                    distillation=None if settings is None else Distillation(**with_tuples(settings)),
                    lora=None if adapters is None else Lora(**with_tuples(adapters)),
                    buckets=buckets,
                    **rest,
                )
            )
        except TypeError as error:
            raise ConfigError(f"phase {name!r}: {error}") from error
    return phases
