"""One training step of a phase, run on tensors without memory: the model's own forward and backward pass, counted."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from worldmodel import conditioning
from worldmodel.acceleration import CHECKPOINTING, PERIODS
from worldmodel.checkpoint import build_model
from worldmodel.contracts import Batch, ClipSpec, SeeingTextEncoder
from worldmodel.encoders import conditioner
from worldmodel.encoders.pretrained import Pretrained
from worldmodel.errors import ConfigError
from worldmodel.model import WorldModel
from worldmodel.phases import MIXED, Phase
from worldmodel.plan.batch import WORDS, random_batch
from worldmodel.plan.kernels import gpu_kernels
from worldmodel.plan.meter import Call, Meter
from worldmodel.plan.pictures import given_share, moved, remembered
from worldmodel.training import PhaseModule


class Count(NamedTuple):
    """What one forward and backward pass over some rows takes; all of it grows linearly with the layers."""

    forward: float  # FLOPs
    backward: float
    remember: float  # of the forward ones, those of reading the history
    velocity: float  # and those of one denoising pass
    copies: tuple[float, ...]  # bytes of parameters in the type that products take, by each of `CHECKPOINTING`
    kept: tuple[float, ...]  # bytes of activations between both passes
    encoding: tuple[float, ...]  # most of them at a time while pictures are encoded
    passing: tuple[float, ...]  # most of them at a time in the backward pass
    again: tuple[float, ...]  # FLOPs of the forward pass that are done twice

    @property
    def peak(self) -> tuple[float, ...]:
        """Most bytes of activations at a time."""
        return tuple(map(max, self.encoding, self.passing))

    def continued(self, other: "Count", steps: float) -> "Count":
        """This plus `steps` times the difference of the other to it."""

        def line(a: Any, b: Any) -> Any:
            return tuple(map(line, a, b)) if isinstance(a, tuple) else a + steps * (b - a)

        return Count(*map(line, self, other))


def meta_module(config: Mapping[str, Any], phase: Phase, spec: ClipSpec) -> PhaseModule:
    """The module of a phase on the meta device: shapes and types of a run's parameters, none of their memory."""
    return PhaseModule(model=meta_model(config, spec), phase=phase, seed=0)


def meta_model(config: Mapping[str, Any], spec: ClipSpec) -> WorldModel:
    """The model on the meta device."""
    with torch.device("meta"):
        return build_model(
            weightless(config["model"]),
            spec,
            {"instructions": [], "embodiments": {name: {} for name in spec.embodiments}},
        )


def weightless(config: Any) -> Any:
    """A model configuration in which every `path` of a network is replaced by the configuration that lies there."""
    if not isinstance(config, Mapping):
        return [weightless(x) for x in config] if isinstance(config, list) else config
    found = {name: weightless(value) for name, value in config.items()}
    if found.get("path") is not None and "config" in found:
        file = Path(found["path"]) / "config.json"
        if not file.is_file():
            raise ConfigError(f"{file} is missing; a path names a folder with a network as its library saves it")
        read = json.loads(file.read_text())
        found |= {"path": None, "config": {k: v for k, v in read.items() if not k.startswith("_")}}
        found["config"].pop("architectures", None)
    return found


def materialise(module: nn.Module) -> None:
    """Turns parameters and buffers on the meta device into fake ones of a CPU; call it in a `FakeTensorMode`."""
    made: dict[int, Tensor] = {}

    def fake(old: Tensor) -> Tensor:
        if id(old) not in made:
            new = torch.empty(old.shape, dtype=old.dtype)
            made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        return made[id(old)]

    for part in module.modules():
        held: Any
        for held in (part._parameters, part._buffers):
            held.update({name: fake(old) for name, old in held.items() if old is not None})


def count_step(
    module: PhaseModule,
    *,
    rows: int,
    half: bool = True,
    gpu: bool = True,
    backward: bool = True,
    loss: Callable[[PhaseModule, Batch], Tensor] | None = None,
    known: dict[Any, Any] | None = None,
) -> Count:
    """Counts a step over `rows` clips of a module on the meta device: no teacher, at most one ingredient and bucket.

    `half` is bfloat16 autocast. With `gpu` attention and the delta rule are the fused kernels of a GPU, else what runs
    on a CPU. `loss` is the phase's own unless another is given. `known` remembers what encoding and moving pictures
    took, for other counts of the same model. Raises `ConfigError` for what cannot be counted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    phase, model = module.phase, module.model
    if phase.objective == "edit":
        raise ConfigError(f"phase {phase.name!r}: what an edit costs depends on the data, so it cannot be counted")
    clips = phase.clips(phase.mixture[0]) if phase.objective in MIXED else 1
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        materialise(module)
        spec, needs = model.spec, phase.needs(module.seed, 0)
        for b in phase.buckets:
            spec = dataclasses.replace(spec, height=b.height, width=b.width, future=b.future)
        # Where nothing reads pictures they are all there, which costs nothing.
        shown = {"history": needs.history or None, "frames": None if needs.future else 0}
        batch = random_batch(spec, rows * clips, masks=phase.objective == "motion", **shown)
        there = [*module.buffers(), *(x for part in batch if isinstance(part, tuple) for x in part)]
        meter = Meter([x for x in there if isinstance(x, Tensor)], module.parameters())
        stack.enter_context(sentences(model, meter))
        known = {} if known is None else known
        if share := given_share(phase):
            stack.enter_context(patch.object(conditioning, "moved_pictures", moved(meter, share, known)))
        if "autoencoder" not in phase.trains:
            coder = model.autoencoder
            encode = remembered(coder.encode_raw, coder.temporal, meter, known)
            stack.enter_context(patch.object(model.autoencoder, "encode_raw", encode))
        if gpu:
            stack.enter_context(gpu_kernels(model, meter))
        watch(model, meter, stack)
        with meter:
            with (
                torch.set_grad_enabled(backward),
                torch.autocast("cpu", torch.bfloat16, enabled=half),
                saved_tensors_hooks(meter.save, lambda x: x),
            ):
                value = (loss or own_loss)(module, batch)
            counted, ways = summed(meter), [checkpointed(meter, how) for how in CHECKPOINTING]
            meter.forward = False
            if value.requires_grad:
                value.backward()
    extra = meter.peak - ways[0].kept  # what is there at the turn or in the backward pass beside what is kept
    found = [(c.copies, c.kept, c.encoding, max(c.running, c.held + extra), c.again) for c in ways]
    return Count(*counted, *zip(*found, strict=True))


class Checkpointed(NamedTuple):
    """What a step takes with some blocks computed again, in bytes but for FLOPs `again`."""

    copies: int
    kept: int
    encoding: int  # most while pictures are encoded
    running: int  # most while a block is computed again
    held: int  # most when a block's backward pass begins
    again: float


def summed(meter: Meter) -> tuple[float, float, float, float]:
    """FLOPs forward and backward, and forward of both stages."""
    ways = [sum(f for (_, way), f in meter.flops.items() if way == each) for each in ("forward", "backward")]
    return ways[0], ways[1], meter.flops["remember", "forward"], meter.flops["velocity", "forward"]


def checkpointed(meter: Meter, how: str) -> Checkpointed:
    """What checkpointing makes of a forward pass; call it before the backward pass.

    A block that is computed again leaves what it takes, and of what it returns what others save; while its turn lasts,
    all that it makes is there. What was kept inside blocks after it is gone by then.
    """
    every = PERIODS[how]
    again = [c for c in meter.calls if every and c.trained and c.block % every == 0]
    sizes = {c.made: meter.inside(c) for c in meter.calls}
    taken = {n: size for c in again for n, size in c.taken.items() if n not in meter.alive}
    others = meter.saved.union(*(c.taken if c in again else c.saved for c in meter.calls))
    left = {n: size for c in again for n, size in c.given.items() if n in meter.alive and n not in others}
    kept = meter.activations - sum(sizes[c.made] for c in again) - sum(left.values()) + sum(taken.values())
    encoding = max((now - sum(sizes[c.made] for c in again if c.made.stop <= n) for n, now in meter.surges), default=0)
    now, held, running = kept, kept, 0
    for call in reversed(meter.calls):
        if call in again:
            running, held = max(running, now + call.most), max(held, now + sizes[call.made] + sum(call.given.values()))
        else:
            now -= sizes[call.made]
    copies = meter.copies - sum(meter.inside(c, copies=True) for c in again)
    return Checkpointed(copies, kept, encoding, running, held, sum(c.flops for c in again))


def watch(model: WorldModel, meter: Meter, stack: ExitStack) -> None:
    """Tells the meter what runs: reading the history, a denoising pass, a block of the video transformer."""

    def staged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            before, meter.stage = meter.stage, name
            try:
                return function(*args, **settings)
            finally:
                meter.stage = before

        return run

    def numbered(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            first, flops, taken, now = meter.made, summed(meter)[0], meter.numbered(args), meter.activations
            (peak, meter.peak), (saved, meter.saved) = (meter.peak, now), (meter.saved, set())
            out = function(*args)
            own, meter.saved = meter.saved, saved
            most, meter.peak = meter.peak - now, max(meter.peak, peak)
            took, grad = summed(meter)[0] - flops, torch.is_grad_enabled()
            made, given = range(first, meter.made), meter.numbered(out)
            meter.calls.append(Call(number, made, taken, given, own, most, took, grad))
            return out

        return run

    for name in ("remember", "velocity"):
        stack.enter_context(patch.object(model, name, staged(name, getattr(model, name))))
    for number, block in enumerate(model.denoiser.blocks):
        stack.enter_context(patch.object(block, "forward", numbered(number, block.forward)))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        # Gradients are counted by arithmetic: sharded, they leave as soon as they are there.
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def own_loss(module: PhaseModule, batch: Batch) -> Tensor:
    """The loss that the phase trains by."""
    return module.losses(batch)["loss"]


@contextmanager
def sentences(model: WorldModel, meter: Meter) -> Iterator[None]:
    """Every row says the same. Frozen language models have read it; frozen ones that see take 2 FLOPs a parameter and
    token, nothing that is kept, and no more than their weights."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(conditioner, "sentence", lambda row: WORDS))
        stack.enter_context(patch.object(torch, "unique", lambda x, **_: (x[:1], x.new_zeros(len(x)))))
        text: Any = model.encoder.text
        seeing, pretrained = isinstance(text, SeeingTextEncoder), isinstance(text, Pretrained)
        if seeing:
            if not text.frozen:
                raise ConfigError("encoders.text: a vision-language model that is tuned cannot be counted")

            def see(words: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor) -> tuple[Tensor, Tensor]:
                count = len(text.views) * text.grid[0] * text.grid[1] // text.merge**2 + len(WORDS)
                meter.add(2 * count * len(rgb) * sum(p.numel() for p in text.net.parameters()), 0)
                width = text.net.config.get_text_config().hidden_size
                return rgb.new_zeros(len(rgb), count, width), torch.ones(len(rgb), count, dtype=torch.bool)

            stack.enter_context(patch.object(text, "see", see))
        elif pretrained and text.frozen:
            text.encode(WORDS, torch.device("cpu"))
        yield
