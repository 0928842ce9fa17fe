"""Lightning side of training: one module for every phase, moving averages, and saving."""

import math
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from worldmodel.adapters import inject
from worldmodel.compositor_loss import composite_loss
from worldmodel.contracts import Batch, Pair
from worldmodel.distillation import distillation_loss, make_teacher
from worldmodel.editing_losses import edit_loss
from worldmodel.errors import ConfigError
from worldmodel.losses import proposal_loss, tokeniser_loss, understanding_loss, world_loss
from worldmodel.model import WorldModel
from worldmodel.motion_loss import motion_loss
from worldmodel.phases import PARTS, Phase
from worldmodel.picture_loss import picture_loss
from worldmodel.sized import sized
from worldmodel.telemetry import Averages


class PhaseModule(L.LightningModule):
    """Trains the parts of the model that a phase names. Every random choice follows from (seed, step)."""

    def __init__(self, *, model: WorldModel, phase: Phase, seed: int, latents: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.phase, self.seed = model, phase, seed
        self.latents = latents
        self.averages = Averages()
        self.gradient_norm = torch.zeros(())
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

    def training_step(self, batch: Batch | Pair, batch_idx: int) -> Tensor:
        """One optimisation step; each part of the loss is kept for the log."""
        losses = self.losses(batch)
        if not losses["loss"].requires_grad:
            raise ConfigError(
                f"phase {self.phase.name!r}: a batch of {', '.join(losses)} trains nothing of "
                f"{list(self.phase.trains)}; leave its mode out of the mixture"
            )
        kept = {name: value.detach() for name, value in losses.items()}
        if any(name.endswith("/actions") for name in losses):
            kept["lambda"] = torch.tensor(float(self.phase.weights.get("actions", 1.0)), device=self.device)
        self.averages.add(kept)
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False)
        return losses["loss"]

    def losses(self, batch: Batch | Pair) -> dict[str, Tensor]:
        """The `loss` of a batch at this step, and its parts."""
        phase = self.phase
        generator = phase.generator(self.seed, self.global_step)
        if phase.lora is not None and phase.lora.dropout:
            torch.manual_seed(generator.initial_seed())  # peft's dropout draws from the global generator
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
        if phase.objective == "composite":
            return composite_loss(self.model, batch, phase.given, generator)
        with ExitStack() as stack:
            for model in (self.model, self.teacher) if phase.buckets else ():
                if model is not None:
                    stack.enter_context(sized(model, batch))
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
        settings["decided"] = phase.decided
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
        decay = self.rate(trainer.global_step)
        live = [p.detach() for n, p in pl_module.named_parameters() if n in self.shadow]
        for average, parameter in zip(self.shadow.values(), live, strict=True):
            average.lerp_(parameter, 1 - decay)

    def rate(self, step: int) -> float:
        """The decay after a number of steps."""
        return min(self.decay, (1 + step) / (10 + step))

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
        trainer.strategy.barrier()  # a rank that ends sooner may have the launcher end the others
