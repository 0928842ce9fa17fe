"""Lightning side of training: one module for every phase, moving averages, and the callbacks of a run."""

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from worldmodel.contracts import Batch, Pair
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.distillation import distillation_loss, make_teacher
from worldmodel.editing_losses import edit_loss
from worldmodel.errors import ConfigError
from worldmodel.losses import proposal_loss, tokeniser_loss, understanding_loss, world_loss
from worldmodel.model import WorldModel
from worldmodel.motion_loss import motion_loss
from worldmodel.phases import PARTS, Phase


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
        # Part of the module, so that it moves with it and a resumed phase finds it in its checkpoint.
        settings = phase.distillation
        self.teacher = None if settings is None else make_teacher(model, phase.trains, settings.teacher)

    def training_step(self, batch: Batch | Pair, batch_idx: int) -> Tensor:
        """One optimisation step; logs each part of the loss."""
        phase = self.phase
        losses = self.losses(batch, phase.generator(self.seed, self.global_step))
        if not bool(torch.isfinite(losses["loss"])):
            raise FloatingPointError(
                f"phase {phase.name!r}, step {self.global_step}: the loss is not finite; batch keys {batch.key[:8]}"
            )
        self.log_dict({f"{phase.name}/{k}": v.detach() for k, v in losses.items()})
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False)
        return losses["loss"]

    def losses(self, batch: Batch | Pair, generator: torch.Generator) -> dict[str, Tensor]:
        """The phase's loss and its parts."""
        phase = self.phase
        if isinstance(batch, Pair):
            return edit_loss(
                self.model,
                batch,
                generator,
                rates=phase.rates,
                dropout=phase.dropout,
                weights=phase.weights,
                huber=phase.huber,
            )
        if phase.objective == "tokeniser":
            return tokeniser_loss(self.model, batch, phase.kl_weight, generator)
        if phase.objective == "understanding":
            return understanding_loss(self.model, batch, phase.dropout, generator, lens=phase.lens)
        if phase.objective == "motion":
            return motion_loss(self.model, batch, phase.dropout, generator)
        return self.world_step(batch, generator)

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
        latents = self.history_latents(batch) if pick.images else None
        settings: dict[str, Any] = {
            "mode": pick.mode,
            "drop": pick.drop,
            "dropout": dropout,
            "draws": pick.draws,
            "weights": phase.weights,
            "insulate": phase.insulate,
            "huber": phase.huber,
            "given": phase.given,
            "absent": phase.absent,
        }
        if self.teacher is not None and phase.distillation is not None:
            how = phase.distillation
            return distillation_loss(self.model, self.teacher, batch, latents, generator, settings=how, **settings)
        chunks, truncate = phase.clips(pick), phase.gradients == "truncated"
        return world_loss(self.model, batch, latents, generator, chunks=chunks, truncate=truncate, **settings)

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
