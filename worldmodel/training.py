"""Lightning side of training: one module for every phase."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from worldmodel.adapters import inject
from worldmodel.compositor_loss import composite_loss
from worldmodel.contracts import Batch, Pair, rows_of
from worldmodel.distillation import distillation_loss, make_teacher
from worldmodel.draws import Draws
from worldmodel.editing_losses import edit_loss
from worldmodel.errors import ConfigError
from worldmodel.losses import tokeniser_loss, understanding_loss, world_loss
from worldmodel.model import WorldModel
from worldmodel.motion_loss import motion_loss
from worldmodel.phases import PARTS, Phase
from worldmodel.picture_loss import picture_loss
from worldmodel.proposal_loss import proposal_loss
from worldmodel.ranks import rank
from worldmodel.sharding import shard
from worldmodel.sized import sized
from worldmodel.telemetry import Averages


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
        self.averages = Averages()
        self.gradient_norm = torch.zeros(())
        if pieces < 1:
            raise ConfigError(f"trainer.accumulate is {pieces}; it is the number of pieces of a batch, 1 or more")
        for name in PARTS:
            part = getattr(model, name)
            if part is not None:
                part.requires_grad_(False)
            elif any(word.partition(".")[0] == name for word in phase.trains):
                raise ConfigError(f"phase {phase.name!r}: trains {name!r}, which this model has not (model.{name})")
        for word in phase.trains:
            within(model, word, phase.name).requires_grad_(True)
        for part in model.modules():
            if getattr(part, "frozen", False):
                part.requires_grad_(False)
        if phase.lora is not None:
            inject(model, phase.trains, phase.lora, phase.generator(seed, -1).initial_seed())
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
        """One optimisation step; each part of the loss is kept for the log.

        All pieces of the batch but the last are done here, the last is Lightning's to go back through.
        """
        self.trainer.optimizers[0].zero_grad()
        chunks = self.phase.needs(self.seed, self.global_step).chunks
        rows = len(batch.key) // chunks
        count = min(self.pieces, rows)
        kept: dict[str, Tensor] = {}
        loss = torch.zeros(())
        for number in range(count):
            first, end = number * rows // count, (number + 1) * rows // count
            piece = batch if count == 1 else rows_of(batch, first * chunks, end * chunks)
            losses = self.losses(piece, first=first, of=rows)
            if not losses["loss"].requires_grad:
                raise ConfigError(
                    f"phase {self.phase.name!r}: a batch of {', '.join(losses)} trains nothing of "
                    f"{list(self.phase.trains)}; leave its mode out of the mixture"
                )
            share = (end - first) / rows
            for name, value in losses.items():
                kept[name] = kept.get(name, 0.0) + share * value.detach()
            loss = share * losses["loss"]
            if number + 1 < count:
                with self.alone():
                    self.trainer.strategy.backward(loss, None)
        if any(name.endswith("/actions") for name in kept):
            kept["lambda"] = torch.tensor(float(self.phase.weights.get("actions", 1.0)), device=self.device)
        self.averages.add(kept)
        self.log("loss", kept["loss"], prog_bar=True, logger=False)
        return loss

    def alone(self) -> AbstractContextManager[None]:
        """Keeps replicas from exchanging gradients that are not yet complete."""
        replica = self.trainer.strategy.model
        return replica.no_sync() if isinstance(replica, DistributedDataParallel) else nullcontext()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: Lightning clears gradients after `training_step`, when all pieces but one have left theirs."""

    def losses(self, batch: Batch | Pair, *, first: int = 0, of: int | None = None) -> dict[str, Tensor]:
        """The `loss` of some rows at this step, and its parts; the mean over processes is what all rows would give.

        The rows are those from number `first` on, `of` all that this process has of the batch (default: they are all).
        """
        phase = self.phase
        count = len(batch.key) // phase.needs(self.seed, self.global_step).chunks
        # Numbered over all processes, of which each has as many rows.
        begin = rank() * (count if of is None else of) + first
        draws = phase.draws(self.seed, self.global_step, range(begin, begin + count))
        if phase.lora is not None and phase.lora.dropout:
            # peft's dropout draws from the global generator.
            torch.manual_seed(phase.generator(self.seed, self.global_step).initial_seed() + begin)
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
            return self.understanding_step(batch, phase.dropout, draws)
        if phase.objective == "motion":
            return motion_loss(self.model, batch, phase.dropout, draws)
        if phase.objective == "composite":
            return composite_loss(self.model, batch, phase.given, draws)
        with ExitStack() as stack:
            for model in (self.model, self.teacher) if phase.buckets else ():
                if model is not None:
                    stack.enter_context(sized(model, batch))
            return self.world_step(batch, draws)

    def understanding_step(self, batch: Batch, dropout: Mapping[str, float], generator: Draws) -> dict[str, Tensor]:
        """Loss of the heads of stage 1."""
        how = {name: getattr(self.phase, name) for name in ("lens", "patches", "fused_teaches")}
        return understanding_loss(self.model, batch, dropout, generator, **how)

    def world_step(self, batch: Batch, generator: Draws) -> dict[str, Tensor]:
        """Loss of the ingredient that this step draws."""
        phase = self.phase
        pick = phase.pick(self.seed, self.global_step)
        dropout = phase.dropout if pick.dropout is None else pick.dropout
        proposal = partial(proposal_loss, drop=pick.drop, decided=phase.decided, jitter=phase.jitter)
        alone = {"understanding": self.understanding_step, "proposal": partial(proposal, self.model)}.get(pick.mode)
        if alone is not None:
            losses = alone(batch, dropout, generator)
            return {"loss": losses.pop("loss"), **{f"{pick.mode}/{name}": value for name, value in losses.items()}}
        latents = self.history_latents(batch) if pick.images else None
        if pick.mode == "image":
            assert latents is not None
            how = {"dropout": dropout, "weights": phase.weights, "huber": phase.huber}
            return picture_loss(self.model, batch, latents, generator, **how)
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
        settings |= {"decided": phase.decided, "jitter": phase.jitter}
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

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by the norm of all gradients, and keeps what it was before, which costs nothing here."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm: Any = nn.utils.clip_grad_norm_(parameters, gradient_clip_val or math.inf)
        self.gradient_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded gradients
        self.averages.add({"gradient_norm": self.gradient_norm})


def within(model: nn.Module, word: str, phase: str) -> nn.Module | nn.Parameter:
    """The part of the model with a dotted name. Raises `ConfigError` with the names at the place where it fails."""
    found: Any = model
    for part in word.split("."):
        inner = [*(n for n, _ in found.named_children()), *(n for n, _ in found.named_parameters(recurse=False))]
        if part not in inner:
            raise ConfigError(f"phase {phase!r}: trains {word!r}, but {part!r} is none of {', '.join(inner)}")
        found = getattr(found, part)
        if isinstance(found, nn.Parameter):
            break
    return found
