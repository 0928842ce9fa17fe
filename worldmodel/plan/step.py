"""One training step of a phase, run on tensors without memory: the model's own forward and backward pass, counted."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from worldmodel import conditioning, distillation
from worldmodel.acceleration import accelerated
from worldmodel.checkpoint import build_model
from worldmodel.contracts import Batch, ClipSpec, SeeingTextEncoder
from worldmodel.encoders import conditioner
from worldmodel.encoders.pretrained import Pretrained
from worldmodel.errors import ConfigError
from worldmodel.losses import draw_flags
from worldmodel.phases import MIXED, PARTS, Phase
from worldmodel.plan.batch import WORDS, random_batch
from worldmodel.plan.kernels import gpu_kernels
from worldmodel.plan.ledger import Ledger
from worldmodel.synthesis.sampler import sampling_sigmas
from worldmodel.training import PhaseModule

DRAWS = 4096
"""Rows that are drawn to learn how many of them are given a camera path or tracks."""


class Count(NamedTuple):
    """What one forward and backward pass over some rows takes."""

    flops: dict[tuple[str, str], float]  # (part, "forward", "backward" or "again" by checkpointing) -> FLOPs
    kept: dict[str, float]  # kind -> bytes between both passes
    peak: dict[str, float]  # most bytes at a time: activations, with copies, with gradients too
    calls: float  # forward passes of each video block

    def combine(self, other: "Count", function: Callable[[float, float], float]) -> "Count":
        """Both number by number."""
        pairs = zip(self[:3], other[:3], strict=True)
        tables = [{k: function(a.get(k, 0), b.get(k, 0)) for k in {**a, **b}} for a, b in pairs]
        return Count(*tables, function(self.calls, other.calls))


def meta_module(config: Mapping[str, Any], phase: Phase, spec: ClipSpec) -> PhaseModule:
    """The module of a phase on the meta device: shapes and types of a run's parameters, none of their memory."""
    with torch.device("meta"):
        model = build_model(weightless(config["model"]), spec, {"embodiments": {name: {} for name in spec.embodiments}})
        return PhaseModule(model=model, phase=phase, seed=0)


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
        for held in (part._parameters, part._buffers):
            held.update({name: fake(old) for name, old in held.items() if old is not None})


def count_step(
    module: PhaseModule,
    *,
    rows: int,
    half: bool = True,
    checkpointing: str = "none",
    backward: bool = True,
    loss: Callable[[PhaseModule, Batch], Tensor] | None = None,
    known: dict[Any, Any] | None = None,
) -> Count:
    """Counts a step of a module from `meta_module`, whose phase has at most one ingredient; `rows` clips.

    `half` is bfloat16 autocast as on a GPU. `loss` is the phase's own unless another is given. What the frozen
    autoencoder and image encoder do in every step is counted; a frozen language model keeps what it answered.
    `known` remembers what encoding pictures took, for other counts of the same autoencoder. Raises `ConfigError` for
    what cannot be counted.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    phase, spec = module.phase, module.model.spec
    if phase.objective == "edit":
        raise ConfigError(f"phase {phase.name!r}: what an edit costs depends on the data, so it cannot be counted")
    models = [module.model, *([] if module.teacher is None else [module.teacher])]
    share, calls = given_share(module), [0]
    blocks = module.model.denoiser.blocks
    gradients = nullcontext() if backward else torch.no_grad()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        materialise(module)
        batch = random_batch(spec, rows * clips(phase), masks=phase.objective == "motion")
        ledger = Ledger(module, parts(module))
        ledger.hold([x for x in batch if x is not None])
        for block in blocks:
            handle = block.register_forward_pre_hook(lambda *_: calls.append(1))
            stack.callback(handle.remove)
        stack.enter_context(texts(models))
        stack.enter_context(patch.object(distillation, "sampling_sigmas", sigmas))
        stack.enter_context(patch.object(conditioning, "moved_pictures", moved(share)))
        if known is not None and "autoencoder" not in phase.trains:
            encode = remembered(module.model.autoencoder.encode_raw, ledger, known)
            stack.enter_context(patch.object(module.model.autoencoder, "encode_raw", encode))
        stack.enter_context(gpu_kernels(models, ledger))
        stack.enter_context(accelerated(module.model, compiled=False, checkpointing=checkpointing))
        stack.enter_context(ledger)
        with gradients, torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = (loss or default_loss)(module, batch)
        ledger.between()
        if backward:
            torch.autograd.backward(value)  # as a method it would leave the mode of `gpu_kernels`
    return Count(dict(ledger.flops), ledger.kept, ledger.peak, sum(calls) / len(blocks))


def default_loss(module: PhaseModule, batch: Batch) -> Tensor:
    """The loss that the phase trains by."""
    return module.losses(batch, torch.Generator().manual_seed(1))["loss"]


def sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels as numbers: they are no part of the count."""
    with _disable_current_modes():
        return sampling_sigmas(steps, shift)


def clips(phase: Phase) -> int:
    """Consecutive clips in a row of the phase's batches."""
    return phase.clips(phase.mixture[0]) if phase.objective in MIXED else 1


def parts(module: PhaseModule) -> dict[str, nn.Module]:
    """The parts of the model, and the teacher as one."""
    found = {name: getattr(module.model, name) for name in PARTS if getattr(module.model, name) is not None}
    return found if module.teacher is None else {**found, "teacher": module.teacher}


def given_share(module: PhaseModule) -> float:
    """Share of a batch's pictures that are moved along a given camera path or tracks, drawn as training draws it."""
    phase, model = module.phase, module.model
    if phase.objective not in MIXED or model.denoiser.conditions is None or not phase.given:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    mode = phase.mixture[0].mode
    if mode in ("understanding", "proposal"):
        return 0.0
    flags, _ = draw_flags(model, mode, DRAWS, generator, phase.given, phase.absent, torch.device("cpu"))
    spec = model.spec
    cameras = flags.get("camera", torch.zeros(DRAWS, len(spec.cameras), dtype=torch.bool))
    points = flags.get("points", torch.zeros(DRAWS, spec.points, dtype=torch.bool))
    cameras, points = (x if x.dim() == 2 else x[:, None] for x in (cameras, points))
    return float((cameras | points.any(1, keepdim=True)).float().mean())


def remembered(encode: Callable[[Tensor], Tensor], ledger: Ledger, known: dict[Any, Any]) -> Callable[[Tensor], Tensor]:
    """Encodes pictures of each shape once, and afterwards counts what it took."""

    def run(video: Tensor) -> Tensor:
        key = (video.shape, torch.is_autocast_enabled("cpu"))
        if key not in known:
            flops, peak = sum(ledger.flops.values()), ledger.peak
            ledger.sweep()
            before, ledger.peak = ledger.live["activations"], dict.fromkeys(peak, 0)
            with torch.no_grad():
                out = encode(video)
            surge = ledger.peak["activations"] - before
            known[key] = (out.shape, out.dtype, sum(ledger.flops.values()) - flops, surge)
            ledger.peak = {name: max(most, ledger.peak[name]) for name, most in peak.items()}
            return out
        shape, dtype, flops, surge = known[key]
        ledger.add(flops, "autoencoder")
        ledger.surge(surge)
        return video.new_empty(shape, dtype=dtype)

    return run


def moved(share: float) -> Callable[..., Tensor]:
    """Stands for `conditioning.moved_pictures`, whose rows depend on what is drawn: as many as are drawn on average."""

    @torch.no_grad()
    def pictures(model: Any, o: Any, poses: Tensor, *_: Any) -> Tensor:
        b, frames, v = poses.shape[:3]
        count = round(share * b * v) * frames
        if count:
            picture = o.rgb[:1, -1, :1].flatten(0, 2).float() / 127.5 - 1.0
            model.autoencoder.encode_frames(picture.expand(2 * count, -1, -1, -1).contiguous())
        return poses.new_zeros(b, frames, v, model.autoencoder.channels, *model.grid)

    return pictures


@contextmanager
def texts(models: list[Any]) -> Iterator[None]:
    """Every row says the same; frozen language models have read it, and frozen ones that see are counted by size."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(conditioner, "sentence", lambda row: WORDS))
        stack.enter_context(patch.object(torch, "unique", lambda x, **_: (x[:1], x.new_zeros(len(x)))))
        for model in models:
            text = model.encoder.text
            if not isinstance(text, Pretrained):
                continue
            if isinstance(text, SeeingTextEncoder):
                if not text.frozen:
                    raise ConfigError("encoders.text: a vision-language model that is tuned cannot be counted")
                stack.enter_context(patch.object(text, "see", looked(text)))
            elif text.frozen:
                text.encode(WORDS, torch.device("cpu"))
        yield


def looked(text: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Stands for `VisionLanguageConditioner.see`: states of the images' merged patches and of the words."""

    def see(words: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor) -> tuple[Tensor, Tensor]:
        width = text.net.config.get_text_config().hidden_size
        count = len(text.views) * text.grid[0] * text.grid[1] // text.merge**2 + len(WORDS)
        return rgb.new_zeros(len(rgb), count, width), torch.ones(len(rgb), count, dtype=torch.bool)

    return see
