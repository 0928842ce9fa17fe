"""Lightning side of training: one module for every phase, moving averages, and the callbacks of a run."""

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from worldmodel.contracts import MODES, Batch
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.dataset import Needs
from worldmodel.data.transforms import PRESENCE
from worldmodel.errors import ConfigError
from worldmodel.losses import proposal_loss, tokeniser_loss, understanding_loss, world_loss
from worldmodel.model import WorldModel
from worldmodel.motion_loss import motion_loss

OBJECTIVES = ("tokeniser", "understanding", "motion", "world")
INGREDIENTS = (*MODES, "understanding", "proposal")
PARTS = ("autoencoder", "encoder", "motion", "denoiser", "expert")
DATA = ("mixture", "on_error")
"""What a phase may say about its data, instead of the `data` of the experiment."""
GRADIENTS = ("truncated", "full")
"""Whether gradients stop where the memory is carried from one clip to the next."""


@dataclass(frozen=True, kw_only=True)
class Ingredient:
    """One kind of batch of a world phase: a mode, how often it comes, what the robot does not sense in it.

    Two modes beside the five: `understanding` trains the heads of stage 1, which would drift apart from an encoder that
    later phases go on training, and `proposal` the state policy alone. `dropout` replaces the phase's own rates.
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
        if "rgb" in self.drop and self.mode != "policy":
            raise ConfigError(f"mode {self.mode!r} needs images; `drop: [rgb]` fits the policy mode alone")

    @property
    def images(self) -> bool:
        """Whether its batches need pictures."""
        return self.mode != "proposal" and "rgb" not in self.drop


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of the curriculum: what it trains, on what, for how long.

    With `chunks` above 1 every row of a world batch is that many consecutive clips of one episode, and stage 2 carries
    its memory from each to the next: a history of many frames at the cost of few. `gradients` says whether they flow
    back through it.
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
    chunks: int = 1
    gradients: str = "truncated"
    data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chunks < 1 or (self.chunks > 1 and self.objective != "world"):
            raise ConfigError(
                f"phase {self.name!r}: chunks is {self.chunks}; it is the number of consecutive clips whose memory is "
                "carried on, 1 or more, and more than 1 for objective `world` alone"
            )
        if self.gradients not in GRADIENTS:
            raise ConfigError(f"phase {self.name!r}: gradients {self.gradients!r} is none of {', '.join(GRADIENTS)}")
        if self.lens < 1:
            raise ConfigError(f"phase {self.name!r}: lens is the largest magnification, 1 or more, not {self.lens}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"phase {self.name!r}: objective {self.objective!r} is none of {', '.join(OBJECTIVES)}")
        if unknown := [part for part in self.trains if part not in PARTS]:
            raise ConfigError(f"phase {self.name!r}: trains {unknown[0]!r}, which is none of {', '.join(PARTS)}")
        if unknown := sorted(set(self.data) - set(DATA)):
            raise ConfigError(f"phase {self.name!r}: data.{unknown[0]} is none of {', '.join(DATA)}")
        if (self.objective == "world") != bool(self.mixture):
            raise ConfigError(f"phase {self.name!r}: a mixture of modes belongs to objective `world` and only there")

    def generator(self, seed: int, step: int) -> torch.Generator:
        """Source of everything random in a step, the same after a resume."""
        return torch.Generator().manual_seed(random.Random(f"{seed} {self.name} {step}").getrandbits(63))

    def pick(self, seed: int, step: int) -> Ingredient:
        """The ingredient of a step of a world phase: a function of seed and step, known before its data is loaded."""
        weights = torch.tensor([i.weight for i in self.mixture])
        return self.mixture[int(torch.multinomial(weights, 1, generator=self.generator(seed, step)))]

    def needs(self, seed: int, step: int) -> Needs:
        """What the batch of a step will use."""
        if self.objective != "world":
            return Needs(future=self.objective in ("tokeniser", "motion"))
        pick = self.pick(seed, step)
        future = pick.mode not in ("policy", "understanding", "proposal")
        return Needs(rows=pick.rows, images=pick.images, future=future, chunks=self.clips(pick))

    def clips(self, pick: Ingredient) -> int:
        """Consecutive clips in each row of a batch of `pick`; what has no use for a memory takes one."""
        return self.chunks if pick.mode in MODES else 1


class PhaseModule(L.LightningModule):
    """Trains the parts of the model that a phase names. Every random choice follows from (seed, step)."""

    def __init__(self, *, model: WorldModel, phase: Phase, seed: int, latents: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.phase, self.seed = model, phase, seed
        self.latents = latents
        for name in PARTS:
            part = getattr(model, name)
            if part is not None:
                part.requires_grad_(name in phase.trains)
            elif name in phase.trains:
                raise ConfigError(f"phase {phase.name!r}: trains {name!r}, which this model has not (model.{name})")
        for part in model.modules():
            if getattr(part, "frozen", False):
                part.requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One optimisation step; logs each part of the loss."""
        phase = self.phase
        generator = phase.generator(self.seed, self.global_step)
        if phase.objective == "tokeniser":
            losses = tokeniser_loss(self.model, batch, phase.kl_weight, generator)
        elif phase.objective == "understanding":
            losses = understanding_loss(self.model, batch, phase.dropout, generator, lens=phase.lens)
        elif phase.objective == "motion":
            losses = motion_loss(self.model, batch, phase.dropout, generator)
        else:
            losses = self.world_step(batch, generator)
        if not bool(torch.isfinite(losses["loss"])):
            raise FloatingPointError(
                f"phase {phase.name!r}, step {self.global_step}: the loss is not finite; batch keys {batch.key[:8]}"
            )
        self.log_dict({f"{phase.name}/{k}": v.detach() for k, v in losses.items()})
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False)
        return losses["loss"]

    def world_step(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Loss of the ingredient that this step draws."""
        phase = self.phase
        pick = phase.pick(self.seed, self.global_step)
        dropout = phase.dropout if pick.dropout is None else pick.dropout
        understanding = partial(understanding_loss, lens=phase.lens)
        alone = {"understanding": understanding, "proposal": proposal_loss}.get(pick.mode)
        if alone is not None:
            losses = alone(self.model, batch, dropout, generator)
            return {"loss": losses.pop("loss"), **{f"{pick.mode}/{name}": value for name, value in losses.items()}}
        return world_loss(
            self.model,
            batch,
            self.history_latents(batch) if pick.images else None,
            generator,
            mode=pick.mode,
            drop=pick.drop,
            dropout=dropout,
            draws=pick.draws,
            weights=phase.weights,
            insulate=phase.insulate,
            huber=phase.huber,
            chunks=phase.clips(pick),
            truncate=phase.gradients == "truncated",
        )

    def history_latents(self, batch: Batch) -> Tensor:
        """Latents of the observed frames, from the cache if this phase has one."""
        if self.latents is not None:
            return self.latents[batch.frame.cpu()].to(self.device)
        with torch.no_grad():
            return self.model.history_latents(batch.observation)

    def configure_optimizers(self) -> Any:
        """AdamW, linear warm-up, cosine decay to a twentieth."""
        phase = self.phase
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            parameters, lr=phase.learning_rate, weight_decay=phase.weight_decay, betas=(0.9, 0.95), foreach=True
        )

        def factor(step: int) -> float:
            progress = min(step / max(phase.steps, 1), 1.0)
            return min((step + 1) / max(phase.warmup, 1), 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class MovingAverage(L.Callback):
    """Exponential moving average of the trained weights; saved with the checkpoint, put into the model at the end."""

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the weights unless a checkpoint brought an average."""
        if not self.shadow:
            self.shadow = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follows the weights; early steps average over fewer of them."""
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        live = [p.detach() for n, p in pl_module.named_parameters() if n in self.shadow]
        for average, parameter in zip(self.shadow.values(), live, strict=True):
            average.lerp_(parameter, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into the module's parameters."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name in self.shadow:
                    parameter.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """The average, for the checkpoint."""
        return {"shadow": dict(self.shadow)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues the average of a checkpoint."""
        self.shadow = {name: value.clone() for name, value in state_dict["shadow"].items()}


class Throughput(L.Callback):
    """Logs samples per second and the share of time spent waiting for data, over the last steps."""

    def __init__(self, *, every: int = 20) -> None:
        self.every = every
        self.samples, self.waited, self.since = 0, 0.0, time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts counting."""
        self.samples, self.waited, self.since = 0, self.total_wait(trainer), time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs every few steps."""
        self.samples += len(batch.key)
        if trainer.global_step % self.every:
            return
        now, waited = time.perf_counter(), self.total_wait(trainer)
        span = now - self.since
        pl_module.log_dict({"samples_per_s": self.samples / span, "data_wait": (waited - self.waited) / span})
        self.samples, self.waited, self.since = 0, waited, now

    def total_wait(self, trainer: L.Trainer) -> float:
        """Seconds that training has waited for batches so far."""
        data: Any = getattr(trainer, "datamodule", None)
        return data.waited if isinstance(data, ClipDataModule) else 0.0


class SaveProgress(L.Callback):
    """Saves `last.ckpt` every few steps and on SIGTERM, by rename, so that a killed save never leaves half a file."""

    def __init__(self, *, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning itself raises `SIGTERMException` right after this hook when the signal came."""
        if trainer.received_sigterm or trainer.global_step % self.every == 0:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Writes the checkpoint."""
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(self.path)
