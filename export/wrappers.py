"""What is exported: paths through the model as modules with a flat tensor signature, which every exporter accepts.

Shapes: see the legend in `worldmodel.contracts`. Every path has `inputs` and `outputs`, which name its tensors in the
order of its signature; no two tensors of a path have the same name.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from export.envelope import LIMITS, Envelope
from export.tensors import (
    F32,
    TensorSpec,
    answer_specs,
    command_specs,
    observation_specs,
    random_tensors,
)
from export.trust import Trust
from worldmodel.contracts import ClipSpec, Future, Observation
from worldmodel.errors import ExportError
from worldmodel.guess import Decision, Past
from worldmodel.nn import apply_rope, rope_table
from worldmodel.policy.realtime import Decided
from worldmodel.streaming import future_of_actions
from worldmodel.synthesis.delta import DeltaState
from worldmodel.synthesis.state import StreamState
from worldmodel.synthesis.temporal import Keys

PATHS = ("policy", "policy_step", "proposal", "understanding", "rollout")
SENSES = len(Observation._fields)
"""Number of inputs that are the observation; they come first in every path."""
COMMANDS = 5
"""Number of inputs after them of a path that answers with actions, see `tensors.command_specs`."""


class ActionModel(Protocol):
    """What export needs of a model that acts; `worldmodel.model.WorldModel` has it."""

    spec: ClipSpec
    metadata: dict[str, Any]
    action_steps: int

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the training data, per embodiment."""
        ...

    @property
    def statistics_hash(self) -> str:
        """sha256 of the statistics."""
        ...

    def decide(self, observation: Observation, noise: Tensor, decided: Decided | None = None) -> Decision:
        """Actions in the robot's units from an observation and standard normal noise, with what tells their worth; they
        continue those that are decided."""
        ...

    def eval(self) -> Any:
        """Switches to inference behaviour."""
        ...


class Path(nn.Module):
    """A module from flat tensors to flat tensors; subclasses say which in `inputs` and `outputs`."""

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.spec: ClipSpec = model.spec

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Valid made-up inputs, for tracing and for timing."""
        return random_tensors(self.inputs, self.spec, batch, seed)


def split(inputs: Sequence[Tensor]) -> tuple[Observation, Tensor, Decided, tuple[Tensor, Tensor]]:
    """Inputs of a path that answers with actions: observation, noise, what is decided, and the commands before."""
    noise, previous, has_previous, decided, where = inputs[SENSES : SENSES + COMMANDS]
    return Observation(*inputs[:SENSES]), noise, Decided(decided, where), (previous, has_previous)


class ActionPath(Path):
    """Observation history to a chunk of actions inside the safety envelope, with its worth.

    Actions keep the padded dimensions; the manifest says how many of them each embodiment has, and the runtime cuts the
    rest off. With `caches` it also gives what `StepPath` goes on from.
    """

    name = "policy"

    def __init__(self, model: Any, envelope: Envelope, trust: Trust, *, caches: bool = False) -> None:
        super().__init__(model)
        self.envelope, self.trust = envelope, trust
        dims = torch.zeros(len(self.spec.embodiments), self.spec.action)
        for row, name in zip(dims, self.spec.embodiments, strict=True):
            row[: len(model.statistics[name].get("action", {"mean": ()})["mean"])] = 1.0
        self.register_buffer("dims", dims, persistent=False)
        self.caches = cache_specs(model) if caches else []
        self.inputs = [*observation_specs(self.spec), *command_specs(self.spec)]
        following = [row._replace(name=f"next_{row.name}") for row in self.caches]
        self.outputs = [*answer_specs(self.spec, len(LIMITS)), *following]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `inputs` -> those of `outputs`."""
        now, noise, decided, before = split(inputs)
        decision = self.model.decide(now, noise, decided)
        answer = self.answer(decision, now, decided, *before)
        return (*answer, *flat_cache(self.model, decision.memory.kept)) if self.caches else answer

    def answer(
        self, decision: Decision, now: Observation, decided: Decided, previous: Tensor, has_previous: Tensor
    ) -> tuple[Tensor, ...]:
        """What the robot is told."""
        actions, limited = self.envelope(decision.actions, previous, has_previous, now)
        confidence, novelty = self.trust(*self.tells(decision, now, decided))
        return actions, limited, confidence, novelty, novelty > 1

    def tells(self, decision: Decision, now: Observation, decided: Decided | None = None) -> tuple[Tensor, ...]:
        """What `Trust` reads: root mean square of the doubt over the robot's own dimensions and the chunk, without
        what was decided (B,), features and instruction (B, W), proprioception (B, P), and the share of
        each sense that is there (B, 7)."""
        own = self.get_buffer("dims")[now.embodiment]
        squares = decision.doubt.square()
        if decided is None:
            doubt = squares.mean(1)
        else:
            left = (~decided.where).unsqueeze(2).float()
            doubt = (squares * left).sum(1) / left.sum(1).clamp(min=1)
        doubt = ((doubt * own).sum(1) / own.sum(1).clamp(min=1)).sqrt()
        senses = (now.has_rgb, now.has_camera, now.has_points, now.has_wrench, now.has_taxels)
        # Of no sensors at all nothing is there.
        shares = [has.float().mean(1) if has.shape[1] else torch.zeros_like(doubt) for has in senses]
        shares += [now.has_proprio.float(), now.has_text.float()]
        proprio = decision.proprio * now.has_proprio.unsqueeze(1)
        return doubt, decision.features, decision.instruction, proprio, torch.stack(shares, 1)


class StepPath(ActionPath):
    """The newest frame and a cache to a chunk of actions and the next cache: the history is never read again.

    Exact: what older frames left in the cache is what they leave in the memory of the model (`worldmodel.streaming`).
    Positions are relative, so the newest frame always stands at the same one and cached keys are turned one frame back
    at each step; nothing grows with time. An empty cache is all zeros. Stage 1 reads frames of the senses other than
    pictures that `policy` reads too: as many as its tokens need, and one before them for differences.
    """

    name = "policy_step"

    def __init__(self, model: Any, envelope: Envelope, trust: Trust) -> None:
        super().__init__(model, envelope, trust, caches=True)
        self.frames = min(self.spec.history, model.encoder.frames + 1)
        observed = observation_specs(self.spec, self.frames, images=1)
        self.inputs = [*observed, *command_specs(self.spec), *self.caches]
        cos, sin = rope_table(torch.tensor([[-1, 0, 0]]), model.denoiser.head_dim)
        self.register_buffer("back_cos", cos, persistent=False)
        self.register_buffer("back_sin", sin, persistent=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `inputs` -> those of `outputs`."""
        now, noise, decided, before = split(inputs)
        layers, left = [], list(inputs[SENSES + COMMANDS :])
        for block in self.model.denoiser.blocks:
            if block.kind == "gated":
                layers.append(DeltaState(left.pop(0), left.pop(0)))
            else:
                k, v, mask = (left.pop(0) for _ in range(3))
                table = (self.get_buffer("back_cos"), self.get_buffer("back_sin"))
                layers.append(Keys(apply_rope(k, table), v, mask))
        past = Past(StreamState(layers, self.spec.history - 1), self.model.denoiser.streams)
        decision = self.model.decide(now, noise, decided, past=past, fresh=1)
        answer = self.answer(decision, now, decided, *before)
        return (*answer, *flat_cache(self.model, decision.memory.kept))

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        """Made-up inputs with an empty cache."""
        made = random_tensors(self.inputs[: -len(self.caches)], self.spec, batch, seed)
        return (*made, *self.empty(batch))

    def empty(self, batch: int) -> tuple[Tensor, ...]:
        """The cache before the first frame."""
        return tuple(torch.zeros((batch, *row.shape), dtype=row.dtype) for row in self.caches)


class UnderstandingPath(Path):
    """Newest frame to what stage 1 reads out of it: cameras, objects, contact. Mask what must not be copied."""

    name = "understanding"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        spec = self.spec
        v, k, s = len(spec.cameras), spec.points, len(spec.sensors)
        self.inputs = observation_specs(spec, min(spec.history, model.encoder.frames + 1), images=1)
        self.outputs = [
            TensorSpec(
                "estimated_camera_to_base", (v, 4, 4), F32, "m", "base", "of each view, from its newest image alone"
            ),
            TensorSpec("estimated_fov", (v,), F32, "rad", "", "vertical field of view of each view"),
            TensorSpec("estimated_points", (k, 3), F32, "m", "base", "where the objects are"),
            TensorSpec(
                "estimated_wrench", (s, 6), F32, "N, N·m", "sensor", "contact: [fx fy fz tx ty tz] of each sensor"
            ),
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `inputs` -> those of `outputs`."""
        return tuple(self.model.understand(Observation(*inputs)))


class RolloutPath(Path):
    """Observation history and actions to the future of all streams, one chunk: what would happen if."""

    name = "rollout"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.coupling != "joint":
            raise ExportError(
                f"rollout: needs streams that see actions, coupling=joint; this model has {model.coupling}"
            )
        spec = self.spec
        f, v, k, s = spec.future, len(spec.cameras), spec.points, len(spec.sensors)
        shapes = {"video": (f, v, model.autoencoder.channels, *model.grid), "camera": (f, v, 9)}
        shapes |= {"points": (f, k, 3), "force": (f, s, 6)}
        self.streams = tuple(model.denoiser.streams)
        self.inputs = [
            *observation_specs(spec),
            TensorSpec("actions", (spec.chunk, spec.action), F32, "robot's own", "", "what is executed from now on"),
            *(TensorSpec(f"noise_{n}", shapes[n], F32, "", "", f"standard normal start of {n}") for n in self.streams),
        ]
        self.outputs = [
            TensorSpec(
                "predicted_rgb", (f * spec.stride, v, 3, spec.height, spec.width), F32, "0..1", "image", "step by step"
            ),
            TensorSpec("predicted_camera_to_base", (f, v, 4, 4), F32, "m", "base", "every `stride` steps"),
            TensorSpec("predicted_points", (f, k, 3), F32, "m", "base", "every `stride` steps"),
            TensorSpec("predicted_wrench", (f, s, 6), F32, "N, N·m", "sensor", "mean over `stride` steps"),
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `inputs` -> those of `outputs`."""
        now, actions = Observation(*inputs[:SENSES]), inputs[SENSES]
        noise = dict(zip(self.streams, inputs[SENSES + 1 :], strict=True))
        future: Future = future_of_actions(now, actions)
        answer = self.model.predict(now, future, "forward_dynamics", generator=None, noise=noise)
        return answer.rgb, answer.camera_to_base, answer.points, answer.wrench


def cache_specs(model: Any) -> list[TensorSpec]:
    """What the layers of stage 2 keep, in a fixed number of frames; where there were fewer, the first are absent."""
    spec: ClipSpec = model.spec
    tokens = sum(model.denoiser.counts[name] for name in model.denoiser.streams)
    rows = []
    for i, block in enumerate(model.denoiser.blocks):
        mix = block.mix
        if block.kind == "gated":
            keys, _, values = mix.sizes
            state = (mix.heads, mix.head_dim, values // mix.heads)
            rows.append(TensorSpec(f"cache_{i}_state", state, F32, "", "", "recurrent state of a gated delta layer"))
            tail = (mix.kernel - 1, sum(mix.sizes))
            rows.append(TensorSpec(f"cache_{i}_tail", tail, F32, "", "", "newest inputs of its convolution"))
        else:
            frames = (max(block.reach, spec.history), tokens)
            shape = (*frames, mix.heads, model.denoiser.head_dim)
            rows.append(TensorSpec(f"cache_{i}_k", shape, F32, "", "", "keys of its newest frames"))
            rows.append(TensorSpec(f"cache_{i}_v", shape, F32, "", "", "their values"))
            rows.append(TensorSpec(f"cache_{i}_mask", frames, torch.bool, "", "", "which of them are there"))
    return rows


def flat_cache(model: Any, kept: StreamState) -> list[Tensor]:
    """A memory as the tensors of `cache_specs`; missing frames come first and are absent."""
    tensors: list[Tensor] = []
    for block, layer in zip(model.denoiser.blocks, kept.layers, strict=True):
        if isinstance(layer, DeltaState):
            tensors += layer
            continue
        assert layer is not None, "a memory that was read has keys or a state in every layer"
        missing = max(block.reach, model.spec.history) - layer.k.shape[1]
        for x in layer:
            tensors.append(torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), x], 1) if missing else x)
    return tensors
