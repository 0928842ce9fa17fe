"""Lightning side of training: one module for every phase, and how fast a run is."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from worldmodel.contracts import Batch, Pair, rows_of
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.distillation import distillation_loss, make_teacher
from worldmodel.draws import Draws
from worldmodel.editing_losses import edit_loss
from worldmodel.errors import ConfigError
from worldmodel.losses import proposal_loss, tokeniser_loss, understanding_loss, world_loss
from worldmodel.model import WorldModel
from worldmodel.motion_loss import motion_loss
from worldmodel.phases import PARTS, Phase
from worldmodel.ranks import mean_over_ranks, rank
from worldmodel.sharding import shard


class PhaseModule(L.LightningModule):
    """Trains the parts of the model that a phase names. Every random choice follows from (seed, step, row).

    Each batch is computed in `pieces`, one after the other, whose gradients are added up: less memory, more time. With
    a `mesh` the module shards itself over it, its blocks gathered in `dtype`.
    """

    def __init__(
        self,
        *,
        model: WorldModel,
        phase: Phase,
        seed: int,
        latents: Tensor | None = None,
        pieces: int = 1,
        mesh: DeviceMesh | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model, self.phase, self.seed = model, phase, seed
        self.latents, self.pieces = latents, pieces
        self.mesh, self.gathered = mesh, dtype
        if pieces < 1:
            raise ConfigError(f"trainer.accumulate is {pieces}; it is the number of pieces of a batch, 1 or more")
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

    def configure_model(self) -> None:
        """Shards the module over its mesh, if it has one. Raises `ConfigError` for an objective that cannot be."""
        if self.mesh is None:
            return
        if self.phase.objective == "edit":
            raise ConfigError(
                f"phase {self.phase.name!r}: its kinds of pairs use other blocks on each process, which sharded "
                "weights do not allow; train it with trainer.strategy=ddp"
            )
        models = [self.model] if self.teacher is None else [self.model, self.teacher]
        shard(self, models, self.mesh, self.gathered, entry="losses")

    def training_step(self, batch: Batch | Pair, batch_idx: int) -> Tensor:
        """One optimisation step; logs each part of the loss, as it is over all processes.

        All pieces but the last are done here, the last is Lightning's to go back through.
        """
        phase = self.phase
        self.trainer.optimizers[0].zero_grad()
        chunks = phase.needs(self.seed, self.global_step).chunks
        rows = len(batch.key) // chunks
        count = min(self.pieces, rows)
        logged: dict[str, Tensor] = {}
        loss = torch.zeros(())
        for number in range(count):
            first, end = number * rows // count, (number + 1) * rows // count
            piece = batch if count == 1 else rows_of(batch, first * chunks, end * chunks)
            # Numbered over all processes, of which each has as many rows.
            draws = phase.draws(self.seed, self.global_step, range(rank() * rows + first, rank() * rows + end))
            losses = self.losses(piece, draws)
            share = (end - first) / rows
            for name, value in losses.items():
                logged[name] = logged.get(name, 0.0) + share * value.detach()
            loss = share * losses["loss"]
            if number + 1 < count:
                with self.alone():
                    self.trainer.strategy.backward(loss, None)
        names = list(logged)
        logged = dict(zip(names, mean_over_ranks(torch.stack([logged[n] for n in names])).unbind(), strict=True))
        if not bool(torch.isfinite(logged["loss"])):
            raise FloatingPointError(
                f"phase {phase.name!r}, step {self.global_step}: the loss is not finite; batch keys {batch.key[:8]}"
            )
        self.log_dict({f"{phase.name}/{k}": v for k, v in logged.items()})
        self.log("loss", logged["loss"], prog_bar=True, logger=False)
        return loss

    def alone(self) -> AbstractContextManager[None]:
        """Keeps replicas from exchanging gradients that are not yet complete."""
        replica = self.trainer.strategy.model
        return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing: Lightning clears gradients after `training_step`, when all pieces but one have left theirs."""

    def losses(self, batch: Batch | Pair, draws: Draws) -> dict[str, Tensor]:
        """The loss of some rows and its parts; the mean over processes is what all rows would give together."""
        phase = self.phase
        if isinstance(batch, Pair):
            return edit_loss(
                self.model,
                batch,
                draws,
                rates=phase.rates,
                dropout=phase.dropout,
                weights=phase.weights,
                huber=phase.huber,
            )
        if phase.objective == "tokeniser":
            return tokeniser_loss(self.model, batch, phase.kl_weight, draws)
        if phase.objective == "understanding":
            return understanding_loss(self.model, batch, phase.dropout, draws, lens=phase.lens)
        if phase.objective == "motion":
            return motion_loss(self.model, batch, phase.dropout, draws)
        return self.world_step(batch, draws)

    def world_step(self, batch: Batch, generator: Draws) -> dict[str, Tensor]:
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
