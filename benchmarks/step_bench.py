"""One training step of a composed experiment on random weights and batches: what `step.py` times."""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One way to run the same step."""

    attention: str
    delta: str
    blocks: str
    checkpointing: str
    batch: int


def compose(overrides: list[str]) -> dict[str, Any]:
    """The resolved configuration of an experiment."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from worldmodel.config import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
        config: Any = OmegaConf.to_container(hydra_compose("train", [*overrides, "data.root=none"]), resolve=True)
    return config


class Bench:
    """One model on the device, its phase, and random batches for it."""

    def __init__(self, config: dict[str, Any], given: argparse.Namespace) -> None:
        import torch

        from worldmodel.checkpoint import build_model, make_spec
        from worldmodel.phases import Ingredient, make_phases
        from worldmodel.training import PhaseModule

        self.given, self.device, self.config = given, torch.device(given.device), config
        self.spec = make_spec(config["data"]["spec"])
        phases = [p for p in make_phases(config["phases"]) if p.objective == "world" and given.phase in (None, p.name)]
        if not phases:
            sys.exit(f"no phase of objective world is named {given.phase!r}")
        mixture = (Ingredient(mode=given.mode, weight=1.0),)
        self.phase = dataclasses.replace(phases[-1], learning_rate=0.0, mixture=mixture, dropout={})
        torch.manual_seed(0)
        with self.device:
            self.model = build_model(
                config["model"],
                self.spec,
                {"instructions": [], "embodiments": {name: {} for name in self.spec.embodiments}},
            )
            for layer in [*self.model.denoiser.embed_out.values(), self.model.expert.embed_out]:
                torch.nn.init.normal_(layer.weight, std=0.02)  # zero at first, which would hide all differences
        self.module = PhaseModule(model=self.model, phase=self.phase, seed=0).to(self.device)
        self.frames = self.spec.history + self.spec.future
        self.tokens = self.frames * sum(self.model.denoiser.counts[name] for name in self.model.denoiser.streams)
        self.tokens += self.spec.chunk

    def sizes(self) -> dict[str, Any]:
        """Parameters by part, layers and the trained ones."""
        count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
        parts = {name: count(part.parameters()) for name, part in self.model.named_children()}
        trained = count(p for p in self.model.parameters() if p.requires_grad)
        return {**parts, "trained": trained, "layers": len(self.model.denoiser.blocks)}

    def autocast(self) -> Any:
        """The precision of training: bfloat16 where the device has it in hardware."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def batch(self, size: int) -> tuple[Any, Any]:
        """A random batch on the device with the latents of its history and future, which are drawn in the step."""
        import torch

        from worldmodel.plan.batch import random_batch

        batch = random_batch(self.spec, size, frames=1)
        move = lambda values: type(values)(*(x.to(self.device) for x in values))  # noqa: E731
        shape = (size, self.frames, len(self.spec.cameras), self.model.autoencoder.channels, *self.model.grid)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        return batch._replace(observation=move(batch.observation), future=move(batch.future)), latents

    def loss(self, batch: Any, latents: Any) -> Any:
        """Loss of the phase's step; the same noise every time."""
        from worldmodel.draws import Draws

        h = self.spec.history
        # An instance attribute hides the method: pictures are not encoded.
        vars(self.model)["future_latents"] = lambda observation, future: latents[:, h:]
        self.module.latents = latents[:, :h].flatten(0, 1)
        try:
            with self.autocast():
                return self.module.world_step(batch, Draws(1, range(len(batch.key))))["loss"]
        finally:
            del vars(self.model)["future_latents"]

    def flops(self) -> float:
        """FLOPs that the model needs for one sample (see `worldmodel.flops`)."""
        import torch

        from worldmodel.flops import measure_cost

        batch = self.batch(1)

        def loss() -> None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.given.forward):
                self.loss(*batch)

        return measure_cost(self.module, self.model, loss).flops

    def measure(self, row: Row, profile: Path | None) -> dict[str, Any]:
        """Median seconds of a step, peak bytes, loss."""
        import torch

        from worldmodel.acceleration import accelerated
        from worldmodel.averaging import MovingAverage
        from worldmodel.flops import timed
        from worldmodel.synthesis.delta import FORMS, GatedDelta
        from worldmodel.synthesis.temporal import WindowAttention

        for block in self.model.denoiser.blocks:
            if isinstance(block.mix, GatedDelta):
                block.mix.rule = FORMS[row.delta]
            else:
                assert isinstance(block.mix, WindowAttention)
                block.mix.attention = row.attention
        batch, latents = self.batch(row.batch)
        average, optimiser = MovingAverage(decay=self.phase.ema), None
        if not self.given.forward:
            average.on_fit_start(None, self.module)  # pyright: ignore[reportArgumentType]
            optimiser = self.module.configure_optimizers()["optimizer"]
        trained = [p for p in self.model.parameters() if p.requires_grad]

        def step() -> float:
            with torch.set_grad_enabled(optimiser is not None):
                loss = self.loss(batch, latents)
            if optimiser is not None:
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, self.phase.clip)
                optimiser.step()
                optimiser.zero_grad()
                count: Any = SimpleNamespace(global_step=1)
                average.on_train_batch_end(count, self.module, None, None, 0)
            return float(loss.detach())

        try:
            with accelerated(self.model, compiled=row.blocks == "compiled", checkpointing=row.checkpointing):
                started = time.perf_counter()
                loss = step()
                first = time.perf_counter() - started
                for _ in range(self.given.warmup - 1):
                    step()
                with peak_memory(self.device) as bytes_:
                    seconds = [timed(step) for _ in range(self.given.steps)]
                if profile:
                    with profile.open("a") as file:
                        file.write(f"{row}\n{kernels(step)}\n")
        finally:
            self.model.zero_grad()
        spread = [min(seconds), max(seconds)]
        found = {"seconds": statistics.median(seconds), "spread": spread, "first": first, "loss": loss}
        return found | {"peak": bytes_[0]}

    def tokeniser(self) -> float:
        """Seconds to encode the pictures of one sample, history and future, as training does."""
        import torch

        from worldmodel.flops import timed

        batch, _ = self.batch(1)
        future = batch.future._replace(rgb=batch.future.rgb.expand(-1, self.spec.window, -1, -1, -1, -1))

        def encode() -> None:
            with torch.no_grad(), self.autocast():
                self.model.history_latents(batch.observation)
                float(self.model.future_latents(batch.observation, future).mean())

        encode()
        return statistics.median(timed(encode) for _ in range(3))


@contextlib.contextmanager
def peak_memory(device: Any) -> Iterator[list[int]]:
    """The most bytes of the device's allocator inside the block; 0 on a CPU, which has none."""
    import torch

    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)


def kernels(step: Callable[[], Any]) -> str:
    """What each kernel took in one step, the longest first."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as found:
        step()
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return found.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
