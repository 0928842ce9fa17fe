"""The world model: the only file that joins the three stages.

History is read once into a `Memory`; every mode then denoises some streams, the actions, or both after it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.contracts import (
    MODES,
    STREAMS,
    ClipSpec,
    Fused,
    Future,
    Observation,
    Prediction,
    Senses,
    Understanding,
    WorldState,
)
from worldmodel.encoders.fusion import SENSES, FusionEncoder
from worldmodel.errors import ConfigError
from worldmodel.nn import repeat_rows
from worldmodel.normalise import DELTA_GAIN, Normaliser
from worldmodel.policy.action_expert import ActionBlock, ActionExpert
from worldmodel.synthesis.autoencoder import VideoAutoencoder, carry_residual
from worldmodel.synthesis.denoiser import Denoiser
from worldmodel.synthesis.flow import expand_as, precondition
from worldmodel.synthesis.sampler import integrate, sampling_sigmas
from worldmodel.synthesis.temporal import DeltaState, Keys

COUPLINGS = ("history_only", "joint")
DENOISED = {
    "policy": (False, True),
    "forward_dynamics": (True, False),
    "inverse_dynamics": (False, True),
    "video_prediction": (True, False),
    "joint": (True, True),
}
"""Mode -> whether it denoises the streams and the actions. Dynamics modes are given the other as clean input."""


class Memory(NamedTuple):
    """The clean history after one pass: all that any denoising step needs."""

    kept: list[Keys | DeltaState]
    context: Fused
    action_context: Fused
    condition: Tensor  # (B, W) of the action transformer
    anchors: dict[str, Tensor]
    rays: Tensor
    presence: dict[str, Tensor]
    embodiment: Tensor
    streams: tuple[str, ...]


class Track(NamedTuple):
    """Tokens of the streams or of the actions on their way through the blocks."""

    x: Tensor
    mask: Tensor
    vectors: Tensor
    embedding: Tensor
    rope: tuple[Tensor, Tensor]


class WorldModel(nn.Module):
    """Understanding and fusion -> video synthesis -> action prediction, in five modes."""

    def __init__(
        self,
        *,
        spec: ClipSpec,
        normaliser: Normaliser,
        autoencoder: VideoAutoencoder,
        encoder: FusionEncoder,
        denoiser: Denoiser,
        expert: ActionExpert,
        coupling: str,
        stream_steps: int,
        action_steps: int,
        stream_shift: float,
        action_shift: float,
        preconditioned: bool,
    ) -> None:
        super().__init__()
        if coupling not in COUPLINGS:
            raise ConfigError(f"unknown coupling {coupling!r}; one of {', '.join(COUPLINGS)}")
        if spec.stride != autoencoder.temporal:
            raise ConfigError(
                f"data.spec.stride is {spec.stride}, but the autoencoder packs {autoencoder.temporal} steps into a "
                "latent frame; they must be equal"
            )
        if len(denoiser.blocks) != len(expert.blocks):
            raise ConfigError(
                f"the action transformer has {len(expert.blocks)} layers and the video transformer "
                f"{len(denoiser.blocks)}; they run layer by layer and must have the same number"
            )
        self.spec, self.coupling = spec, coupling
        self.stream_steps, self.action_steps = stream_steps, action_steps
        self.stream_shift, self.action_shift = stream_shift, action_shift
        self.preconditioned = preconditioned
        self.register_buffer("stream_scale", torch.ones(len(STREAMS)))
        self.normaliser, self.autoencoder = normaliser, autoencoder
        self.encoder, self.denoiser, self.expert = encoder, denoiser, expert
        self.grid = (spec.height // autoencoder.spatial, spec.width // autoencoder.spatial)
        self.metadata: dict[str, Any] = {}

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the training data, per embodiment."""
        return self.metadata["statistics"]["embodiments"]

    @property
    def statistics_hash(self) -> str:
        """sha256 of the statistics."""
        return self.metadata["statistics_hash"]

    def history_latents(self, observation: Observation) -> Tensor:
        """Single-frame latents of every observed image (B, H, V, C, h', w')."""
        rgb = observation.rgb.flatten(0, 2).float() / 127.5 - 1.0
        return self.autoencoder.encode_frames(rgb).unflatten(0, observation.rgb.shape[:3])

    def future_latents(self, observation: Observation, future: Future) -> Tensor:
        """Temporal latents of the future frames (B, F, V, C, h', w')."""
        b, t, v = future.rgb.shape[:3]
        last = observation.rgb[:, -1].flatten(0, 1).float() / 127.5 - 1.0
        frames = future.rgb.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1.0
        latents = self.autoencoder.encode_future(last, frames)
        return latents.unflatten(0, (b, v)).transpose(1, 2)

    @torch.no_grad()
    def fit_scale(self, observation: Observation, future: Future) -> None:
        """Sets the root mean square of every normalised future stream from sample clips, for preconditioning."""
        s = self.normaliser(observation, self.grid)
        state = self.future_state(s, future, self.future_latents(observation, future))
        scales = [value[future.valid].square().mean().sqrt() for value in state]
        self.get_buffer("stream_scale").copy_(torch.stack(scales).clamp(min=0.02))

    def relative(self, value: Tensor, anchor: Tensor) -> Tensor:
        """Anchored streams as amplified differences to now."""
        return (value - anchor) * DELTA_GAIN

    def future_state(self, s: Senses, future: Future, latents: Tensor) -> WorldState:
        """Normalised future streams, the targets of stage 2."""
        e = s.embodiment
        return WorldState(
            video=latents,
            camera=self.relative(self.normaliser.encode_camera(future.camera_to_base, e), s.camera[:, -1:]),
            points=self.relative(self.normaliser.standardise("points", future.points, e), s.points[:, -1:]),
            force=self.normaliser.compress_wrench(future.wrench, e),
        )

    def remember(
        self,
        s: Senses,
        latents: Tensor | None,
        fused: Fused | None = None,
        *,
        streams: Sequence[str] = STREAMS,
        read_only: bool = False,
    ) -> Memory:
        """Reads the history once. Without `latents` the video stream is left out and costs nothing.

        `read_only` keeps gradients of what follows out of stage 2 (knowledge insulation, Driess et al. 2025,
        arXiv 2505.23705).
        """
        streams = tuple(n for n in STREAMS if n in streams and (n != "video" or latents is not None))
        senses = SENSES if "video" in streams else tuple(n for n in SENSES if n != "rgb")
        context = self.encoder(s, senses) if fused is None else fused
        force = s.force.mean(2)
        anchors = {"camera": s.camera[:, -1:], "points": s.points[:, -1:], "force": force[:, -1:]}
        presence = {"video": s.has_rgb, "camera": s.has_camera, "points": s.has_points, "force": s.has_wrench}
        if latents is not None:
            anchors["video"] = latents[:, -1:]
        state = WorldState(
            video=latents if latents is not None else s.points.new_zeros(()),
            camera=self.relative(s.camera, anchors["camera"]),
            points=self.relative(s.points, anchors["points"]),
            force=force,
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not read_only):
            tokens = self.denoiser.embed(state, anchors, s.rays, presence, streams)
            kept = self.denoiser.remember(tokens, context)
        action_context, condition = self.expert.extend(context, s)
        return Memory(
            kept,
            context,
            action_context,
            condition,
            anchors,
            s.rays[:, -1:],
            presence,
            s.embodiment,
            streams,
        )

    def velocity(
        self,
        memory: Memory,
        *,
        state: WorldState | None = None,
        levels: Tensor | None = None,
        actions: Tensor | None = None,
        action_level: Tensor | None = None,
        coupling: str | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """One step of both transformers after the memory.

        state with noise levels (B, 4) and actions (B n, A, D) with noise level (B n,) may each be absent; n > 1 draws
        of actions share one memory when there is no state. Under `history_only` the streams never see the actions nor
        the actions the streams; under `joint` they see each other. Returns the velocities.
        """
        joint = (coupling or self.coupling) == "joint"
        stream = None if state is None or levels is None else self.open_streams(memory, state, levels)
        action = None if actions is None or action_level is None else self.open_actions(memory, actions, action_level)
        for block, action_block, past in zip(self.denoiser.blocks, self.expert.blocks, memory.kept, strict=True):
            assert isinstance(action_block, ActionBlock)
            qkv = None if action is None else action_block.project(action.x, action.vectors, action.rope)
            own = None
            if stream is not None:
                extra = qkv[1:] if joint and qkv is not None and isinstance(past, Keys) else None
                x, mask, vectors, rope = stream.x, stream.mask, stream.vectors, stream.rope
                x, own = block(x, mask, vectors, rope, memory.context, past, extra)
                stream = stream._replace(x=x)
            if action is not None and qkv is not None:
                seen = [keys for keys in (past, own if joint else None) if isinstance(keys, Keys)]
                k, v, present = self.action_keys(qkv, seen)
                a = action_block(action.x, action.vectors, qkv[0], k, v, present, memory.action_context)
                action = action._replace(x=a)
        velocities, action_velocity = {}, None
        if stream is not None and state is not None and levels is not None:
            velocities = self.denoiser.decode(stream.x, stream.embedding, memory.streams)
            for i, name in enumerate(STREAMS):
                if name in velocities:
                    scale = self.get_buffer("stream_scale")[i]
                    velocities[name] = self.to_velocity(velocities[name], getattr(state, name), levels[:, i], scale)
        if action is not None and actions is not None and action_level is not None:
            answer = self.expert.decode(action.x, action.embedding)
            action_velocity = self.to_velocity(answer, actions, action_level, torch.ones_like(action_level[0]))
        return velocities, action_velocity

    def to_velocity(self, answer: Tensor, noisy: Tensor, level: Tensor, scale: Tensor) -> Tensor:
        """Network output -> velocity; the same unless the model is preconditioned."""
        if not self.preconditioned:
            return answer
        skip, out = precondition(expand_as(level, noisy), scale)
        return skip * noisy + out * answer

    def open_streams(self, memory: Memory, state: WorldState, levels: Tensor) -> Track:
        """Noisy streams and their noise levels (B, 4) as tokens (B, F, N, W), ready for the first block."""
        tokens = self.denoiser.embed(state, memory.anchors, memory.rays, memory.presence, memory.streams)
        embedding, vectors = self.denoiser.vectors(levels, tokens.stream)
        return Track(tokens.x, tokens.mask, vectors, embedding, self.denoiser.rope(tokens, self.spec.history))

    def open_actions(self, memory: Memory, actions: Tensor, level: Tensor) -> Track:
        """Noisy actions and their noise levels (B n,) as tokens (B n, A, W), ready for the first block."""
        draws = actions.shape[0] // memory.embodiment.shape[0]
        x = self.expert.embed(actions, repeat_rows(memory.embodiment, draws))
        condition = repeat_rows(memory.condition, draws)
        embedding, vectors = self.expert.time(1000.0 * level.unsqueeze(-1), condition.unsqueeze(1))
        return Track(x, torch.ones_like(x[..., 0], dtype=torch.bool), vectors, embedding, self.expert.rope())

    def action_keys(self, qkv: tuple[Tensor, Tensor, Tensor], seen: list[Keys]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values (B n, M, E, d) and presence (B n, M) that actions look at: all actions, then what they see."""
        _, k, v = qkv
        keys, values, present = [k], [v], [torch.ones_like(k[..., 0, 0], dtype=torch.bool)]
        for other in seen:
            draws = k.shape[0] // other.k.shape[0]
            keys.append(repeat_rows(other.k.flatten(1, 2), draws))
            values.append(repeat_rows(other.v.flatten(1, 2), draws))
            present.append(repeat_rows(other.mask.flatten(1, 2), draws))
        return torch.cat(keys, 1), torch.cat(values, 1), torch.cat(present, 1)

    def denoise_actions(self, memory: Memory, noise: Tensor) -> Tensor:
        """Normalised actions (B, A, D) from noise and the memory alone, flow steps unrolled."""

        def step(actions: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
            level = noise.new_full((noise.shape[0],), sigma)
            _, velocity = self.velocity(memory, actions=actions["actions"], action_level=level)
            assert velocity is not None
            return {"actions": velocity}

        return integrate(step, {"actions": noise}, sampling_sigmas(self.action_steps, self.action_shift))["actions"]

    def act(self, observation: Observation, noise: Tensor) -> Tensor:
        """Policy mode: observation and noise (B, A, D) -> actions (B, A, D) in the embodiment's units."""
        senses = self.normaliser(observation, self.grid)
        memory = self.remember(senses, self.history_latents(observation))
        actions = self.denoise_actions(memory, noise)
        return self.normaliser.restore("action", actions, observation.embodiment)

    def understand(self, observation: Observation) -> Understanding:
        """Reads the heads of stage 1. Mask the senses in `observation` that the answer must not be copied from."""
        s = self.normaliser(observation, self.grid)
        images = self.encoder.image_tokens(s.rgb)
        pose, fov = self.encoder.camera_head(images)
        fused = self.encoder(s, image_tokens=images)
        return Understanding(
            camera_to_base=self.normaliser.decode_camera(pose, s.embodiment),
            fov=fov,
            points=self.normaliser.restore("points", self.encoder.points_head(fused), s.embodiment),
            wrench=self.normaliser.restore_wrench(self.encoder.force_head(fused), s.embodiment),
        )

    def predict(
        self,
        observation: Observation,
        future: Future | None,
        mode: str,
        *,
        generator: torch.Generator,
        steps: int | None = None,
        coupling: str | None = None,
    ) -> Prediction:
        """Runs one of the five modes. `future` gives what the dynamics modes condition on; other modes ignore it.

        Raises `ConfigError` for an unknown mode, for a dynamics mode without `future`, and for a dynamics mode under
        `history_only`, where streams and actions cannot see each other.
        """
        if mode not in MODES:
            raise ConfigError(f"unknown mode {mode!r}; one of {', '.join(MODES)}")
        coupling = coupling or self.coupling
        given = mode in ("forward_dynamics", "inverse_dynamics")
        if given and (future is None or coupling != "joint"):
            raise ConfigError(f"mode {mode!r} needs a future to condition on and coupling=joint (it is {coupling!r})")
        do_streams, do_actions = DENOISED[mode]
        s = self.normaliser(observation, self.grid)
        b, spec = s.text.shape[0], self.spec
        latents = self.history_latents(observation)
        memory = self.remember(s, latents)
        shapes = {
            "video": (b, spec.future, *latents.shape[2:]),
            "camera": (b, spec.future, *s.camera.shape[2:]),
            "points": (b, spec.future, *s.points.shape[2:]),
            "force": (b, spec.future, len(spec.sensors), 6),
        }
        free: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        action_shape = (b, spec.chunk, spec.action)
        if do_actions:
            free["actions"] = torch.randn(action_shape, generator=generator).to(s.points)
        if do_streams:
            free |= {n: torch.randn(shape, generator=generator).to(s.points) for n, shape in shapes.items()}
        if mode == "forward_dynamics" and future is not None:
            fixed["actions"] = self.normaliser.standardise("action", future.actions, s.embodiment)
        if mode == "inverse_dynamics" and future is not None:
            clean = self.future_state(s, future, self.future_latents(observation, future))
            fixed |= clean._asdict()

        def step(now: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
            values = {**fixed, **now}
            has_streams, has_actions = "video" in values, "actions" in values
            level = s.points.new_full((b,), sigma)
            stream_level = level if do_streams else torch.zeros_like(level)
            streams, action = self.velocity(
                memory,
                state=WorldState(*(values[n] for n in STREAMS)) if has_streams else None,
                levels=stream_level[:, None].expand(-1, len(STREAMS)) if has_streams else None,
                actions=values.get("actions"),
                action_level=(level if do_actions else torch.zeros_like(level)) if has_actions else None,
                coupling=coupling,
            )
            return streams if action is None else {**streams, "actions": action}

        count = steps or (self.stream_steps if do_streams else self.action_steps)
        done = integrate(step, free, sampling_sigmas(count, self.stream_shift if do_streams else self.action_shift))
        return self.physical(observation, s, latents, {**fixed, **done})

    def decode_video(self, o: Observation, history: Tensor, future: Tensor) -> Tensor:
        """Future latents (B, F, V, C, h', w') -> frames (B, F*R, V, 3, h, w) in [0, 1]."""
        b, v = future.shape[0], future.shape[2]
        decoded = self.autoencoder.decode(history[:, -1].flatten(0, 1), future.transpose(1, 2).flatten(0, 1))
        last = o.rgb[:, -1].flatten(0, 1).float() / 127.5 - 1.0
        frames = carry_residual(decoded, last).unflatten(0, (b, v)).transpose(1, 2)
        return (frames * 0.5 + 0.5).clamp(0, 1)

    def reconstruct(self, rgb: Tensor) -> Tensor:
        """Tokeniser round trip of whole clips: rgb (B, 1 + F*R, V, 3, h, w) uint8 -> the same in [0, 1]."""
        b, _, v = rgb.shape[:3]
        video = rgb.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1.0
        first = self.autoencoder.encode_frames(video[:, 0])
        decoded = self.autoencoder.decode(first, self.autoencoder.encode_future(video[:, 0], video[:, 1:]))
        return (decoded.unflatten(0, (b, v)).transpose(1, 2) * 0.5 + 0.5).clamp(0, 1)

    def physical(self, o: Observation, s: Senses, latents: Tensor, values: dict[str, Tensor]) -> Prediction:
        """Normalised streams and actions -> physical units; what a mode does not predict is held as it was."""
        e, f = s.embodiment, self.spec.future
        hold = {
            "camera": s.camera[:, -1:].expand(-1, f, -1, -1),
            "points": s.points[:, -1:].expand(-1, f, -1, -1),
            "force": s.force.mean(2)[:, -1:].expand(-1, f, -1, -1),
        }
        for name in ("camera", "points"):
            if name in values:
                hold[name] = hold[name] + values[name] / DELTA_GAIN
        if "force" in values:
            hold["force"] = values["force"]
        if "video" in values:
            rgb = self.decode_video(o, latents, values["video"])
        else:
            rgb = (o.rgb[:, -1:].float() / 255.0).expand(-1, f * self.spec.stride, -1, -1, -1, -1)
        actions = values.get("actions", s.points.new_zeros(e.shape[0], self.spec.chunk, self.spec.action))
        return Prediction(
            rgb=rgb,
            camera_to_base=self.normaliser.decode_camera(hold["camera"], e),
            points=self.normaliser.restore("points", hold["points"], e),
            wrench=self.normaliser.restore_wrench(hold["force"], e),
            actions=self.normaliser.restore("action", actions, e),
        )
