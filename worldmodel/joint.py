"""The three stages joined: history read once into a `Memory`, then one step of both transformers after it.

The only file that sees all three stages; `model.py` builds the modes of use on it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.contracts import STREAMS, ClipSpec, Fused, Future, Observation, Senses, WorldState
from worldmodel.encoders.fusion import SENSES, FusionEncoder
from worldmodel.encoders.motion import MotionEncoder
from worldmodel.errors import ConfigError
from worldmodel.guess import Guess, Memory, Past
from worldmodel.nn import repeat_rows
from worldmodel.normalise import DELTA_GAIN, Normaliser
from worldmodel.policy.action_expert import ActionBlock, ActionExpert
from worldmodel.policy.realtime import Decided
from worldmodel.policy.state_policy import measure
from worldmodel.synthesis.autoencoder import VideoAutoencoder
from worldmodel.synthesis.compositor import Compositor
from worldmodel.synthesis.conditions import Given
from worldmodel.synthesis.denoiser import Denoiser
from worldmodel.synthesis.flow import flow_shift
from worldmodel.synthesis.state import StreamState
from worldmodel.synthesis.temporal import Keys, newest

COUPLINGS = ("history_only", "joint")


class Track(NamedTuple):
    """Tokens of the streams or of the actions on their way through the blocks."""

    x: Tensor
    mask: Tensor
    vectors: Tensor
    embedding: Tensor
    rope: tuple[Tensor, Tensor]


class JointTransformer(Guess):
    """Understanding and fusion, video synthesis and action prediction as one network."""

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
        stream_shift: float | str,
        action_shift: float,
        predicts: str,
        motion: MotionEncoder | None = None,
        compositor: Compositor | None = None,
        unread_share: float = 1.0,
    ) -> None:
        super().__init__(predicts=predicts, channels=autoencoder.channels)
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
        if not 0 <= unread_share <= 1:
            raise ConfigError(f"model.unread_share is {unread_share}; expected 0 to 1, all of what is predicted")
        self.spec, self.coupling, self.unread_share = spec, coupling, unread_share
        self.stream_steps, self.action_steps = stream_steps, action_steps
        self.stream_shift, self.action_shift = stream_shift, action_shift
        self.normaliser, self.autoencoder = normaliser, autoencoder
        self.encoder, self.denoiser, self.expert = encoder, denoiser, expert
        self.motion, self.compositor = motion, compositor
        self.grid = (spec.height // autoencoder.spatial, spec.width // autoencoder.spatial)
        cells = (self.grid[0] // denoiser.patch, self.grid[1] // denoiser.patch)
        if (denoiser.rows, denoiser.columns) != cells:
            raise ConfigError(
                f"synthesis.denoiser.latent_size makes {denoiser.rows} × {denoiser.columns} tokens of an image, but "
                f"data.spec of {spec.height} × {spec.width} pixels makes {cells[0]} × {cells[1]}"
            )
        if expert.foresight is not None and expert.foresight.carries:
            self.register_buffer("carried", torch.zeros(len(spec.cameras)))
        self.metadata: dict[str, Any] = {}
        self.shift()  # says at once what is wrong with it

    def shift(self, frames: int | None = None) -> float:
        """The shift of the streams' noise levels, in training and in sampling, for `frames` latent frames (default F)
        at the present size of pictures."""
        frames = self.spec.future if frames is None else frames
        return flow_shift(self.stream_shift, self.denoiser.counts["video"], frames)

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

    def relative(self, value: Tensor, anchor: Tensor) -> Tensor:
        """Anchored streams as amplified differences to now."""
        return (value - anchor) * DELTA_GAIN

    def future_state(self, s: Senses, future: Future, latents: Tensor) -> WorldState:
        """Normalised future streams, the targets of stage 2."""
        return WorldState(
            video=latents,
            camera=self.future_camera(s, future.camera_to_base),
            points=self.future_points(s, future.points),
            force=self.normaliser.compress_wrench(future.wrench, s.embodiment),
        )

    def future_camera(self, s: Senses, camera_to_base: Tensor) -> Tensor:
        """Future poses (B, F, V, 4, 4) -> (B, F, V, 9), normalised."""
        return self.relative(self.normaliser.encode_camera(camera_to_base, s.embodiment), s.camera[:, -1:])

    def future_points(self, s: Senses, points: Tensor) -> Tensor:
        """Future points (B, F, K, 3) in metres -> the same, normalised."""
        return self.relative(self.normaliser.standardise("points", points, s.embodiment), s.points[:, -1:])

    def remember(
        self,
        s: Senses,
        latents: Tensor | None,
        fused: Fused | None = None,
        *,
        streams: Sequence[str] = STREAMS,
        read_only: bool = False,
        past: Memory | Past | None = None,
        fresh: int | None = None,
        decided: Decided | None = None,
    ) -> Memory:
        """Reads the history once. Without `latents` the video stream is left out and costs nothing.

        With `past`, stage 2 reads only the newest `fresh` frames (default: all), after the frames remembered there;
        `latents` may hold those alone. Stage 1 reads the newest frames of the history as ever. `read_only` keeps
        gradients of what follows out of stage 2 (knowledge insulation, Driess et al. 2025, arXiv 2505.23705). The
        chunk of actions will begin with the normalised `decided` ones. Raises `ConfigError` if `past` remembers other
        streams.
        """
        unread = s if fresh is None else s.newest(fresh)
        if latents is not None and fresh is not None:
            latents = latents[:, -fresh:]
        s = s.newest(self.spec.history)
        has = self.denoiser.streams
        streams = tuple(n for n in has if n in streams and (n != "video" or latents is not None))
        senses = SENSES if latents is not None else tuple(n for n in SENSES if n != "rgb")
        if fused is None and (self.encoder.gives != "text" or self.expert.state is not None):
            fused = self.encoder(s, senses)
        if past is not None and past.streams != streams:
            raise ConfigError(f"the memory holds the streams {past.streams}, what follows has {streams}")
        context = self.encoder.context(s, fused)
        now = WorldState(
            video=latents if latents is not None else s.points.new_zeros(()),
            camera=unread.camera,
            points=unread.points,
            force=unread.force.mean(2),
        )
        anchors = {name: getattr(now, name)[:, -1:] for name in STREAMS if name != "video" or latents is not None}
        presence = {"video": s.has_rgb, "camera": s.has_camera, "points": s.has_points, "force": s.has_wrench}
        presence["rays"] = s.has_camera
        # Frames are told the newest of their own block: what was now when that was all there was.
        last = self.denoiser.anchor_frames(unread.camera.shape[1])
        then = anchors if last is None else {name: getattr(now, name)[:, last] for name in anchors}
        camera, points = (self.relative(getattr(now, name), then[name]) for name in ("camera", "points"))
        state = now._replace(camera=camera, points=points)
        # Actions do not teach stage 1 where things are; its own head does.
        seen = None
        if fused is not None and self.expert.state is not None:
            seen = self.encoder.locate(s, fused, images="rgb" in senses).detach()
        action_context, condition, proposal = self.expert.extend(context, s, seen, decided)
        video_context = self.denoiser.read(action_context if self.expert.shares_token else context)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not read_only):
            tokens = self.denoiser.embed(state, then, unread.rays, presence, streams)
            before = None if past is None else past.kept
            kept = self.denoiser.remember(tokens, video_context, before, least=self.spec.history)
        read = self.expert.read(action_context)
        rays = s.rays[:, -1:]
        return Memory(
            kept,
            video_context,
            read,
            condition,
            proposal,
            anchors,
            rays,
            presence,
            s.embodiment,
            streams,
            measured=measure(s, seen) if self.expert.foresight is not None and self.expert.foresight.leads else None,
        )

    def remember_nothing(self, s: Senses, has_rgb: Tensor) -> Memory:
        """The memory before a first frame of video (`has_rgb` (B, V)): no frames, only what stage 1 reads of `s`."""
        fused = None if self.encoder.gives == "text" else self.encoder(s, ("text",))
        context = self.encoder.context(s, fused)
        kept = StreamState([None] * len(self.denoiser.blocks), 0)
        presence = {"video": has_rgb, "rays": torch.zeros_like(has_rgb)}
        read, rays = self.denoiser.read(context), s.rays[:, -1:]
        return Memory(kept, read, context, None, None, {}, rays, presence, s.embodiment, ("video",))

    def velocity(
        self,
        memory: Memory,
        *,
        state: WorldState | None = None,
        levels: Tensor | None = None,
        actions: Tensor | None = None,
        action_level: Tensor | None = None,
        coupling: str | None = None,
        given: Given | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """One step of both transformers after the memory.

        state with noise levels (B, 4) and actions (B n, A, D) with noise level (B n,), or (B n, A) where some actions
        are decided already, may each be absent; n > 1 draws of actions share one memory when there is no state. Under
        `history_only` the streams never see the actions nor the actions the streams; under `joint` they see each other.
        Slots of the future that are `given` are read clean in place of those of the state. Returns the velocities.
        """
        joint = (coupling or self.coupling) == "joint"
        stream = None if state is None or levels is None else self.open_streams(memory, state, levels, given)
        action = None if actions is None or action_level is None else self.open_actions(memory, actions, action_level)
        layers = memory.kept.layers
        for block, action_block, past in zip(self.denoiser.blocks, self.expert.blocks, layers, strict=True):
            assert isinstance(action_block, ActionBlock)
            qkv = None if action is None else action_block.project(action.x, action.vectors, action.rope)
            own = None
            if stream is not None:
                extra = qkv[1:] if joint and qkv is not None and isinstance(past, Keys) else None
                x, mask, vectors, rope = stream.x, stream.mask, stream.vectors, stream.rope
                x, own = block(x, mask, vectors, rope, memory.context, past, extra)
                stream = stream._replace(x=x)
            if action is not None and qkv is not None:
                # As many frames as the history has, whatever more the window keeps for later ones.
                seen = [newest(past, self.spec.history)] if isinstance(past, Keys) else []
                seen += [own] if joint and isinstance(own, Keys) else []
                k, v, present = self.action_keys(qkv, seen)
                a = action_block(action.x, action.vectors, qkv[0], k, v, present, memory.action_context)
                action = action._replace(x=a)
        velocities, action_velocity = {}, None
        if stream is not None and state is not None and levels is not None:
            follows = memory.source is not None
            answers = self.denoiser.decode(stream.x, stream.embedding, memory.streams, follows=follows, given=given)
            leads = self.foresee(memory, actions, action_level)
            moved = None if given is None or "video" not in answers else self.denoiser.lead(stream.x, given)
            leads |= {} if moved is None else {"video": moved}
            velocities = {
                name: self.to_velocity(
                    name,
                    answer,
                    memory,
                    getattr(state, name),
                    levels[:, STREAMS.index(name)],
                    leads.get(name),
                )
                for name, answer in answers.items()
            }
        if action is not None and actions is not None and action_level is not None:
            answer = self.expert.decode(action.x, action.embedding)
            action_velocity = self.to_velocity("actions", answer, memory, actions, action_level)
        return velocities, action_velocity

    def foresee(self, memory: Memory, actions: Tensor | None = None, level: Tensor | None = None) -> dict[str, Tensor]:
        """What foresight expects of the streams that it leads: `points` (B, F, K, 3) as `future_points`, and `camera`
        (B, F, V, 9) as `future_camera`.

        It is asked what follows from the `actions` (B, A, D) that are known, those of noise `level` 0, (B,) or (B, A),
        and from the state policy's proposal in place of others.
        """
        foresight, now, chosen = self.expert.foresight, memory.measured, memory.proposal
        if foresight is None or now is None or chosen is None:
            return {}
        if actions is not None and level is not None:
            chosen = torch.where(level.reshape(level.shape[0], -1, 1) == 0, actions, chosen)
        frames, stride = self.spec.future, self.spec.stride
        points, hand = foresight.follow(now, chosen, memory.embodiment, frames=frames, stride=stride)
        leads = {"points": torch.where(now.tracked.unsqueeze(1), self.relative(points, now.points.unsqueeze(1)), 0.0)}
        if foresight.carries:
            moved = self.relative(hand, now.effector.unsqueeze(1)) * now.has_proprio.unsqueeze(1)
            moved = moved * self.normaliser.ratio("points", "camera_translation", memory.embodiment).unsqueeze(1)
            carried = moved.unsqueeze(2) * self.get_buffer("carried")[:, None]
            leads["camera"] = nn.functional.pad(carried, (0, 6))
        return leads

    def open_streams(self, memory: Memory, state: WorldState, levels: Tensor, given: Given | None) -> Track:
        """Noisy streams and their noise levels (B, 4) as tokens (B, F, N, W), ready for the first block."""
        rays, presence = memory.rays, memory.presence
        if given is not None:
            state = state._replace(**{name: given.fill(name, getattr(state, name)) for name in memory.streams})
            rays = torch.where(given.has_camera[:, None, :, None, None, None], given.rays, rays)
            presence = given.presence(presence)
        tokens = self.denoiser.embed(state, memory.anchors, rays, presence, memory.streams, given, memory.source)
        embedding, vectors = self.denoiser.vectors(levels, tokens.stream, given)
        return Track(tokens.x, tokens.mask, vectors, embedding, self.denoiser.rope(tokens, memory.kept.frames))

    def open_actions(self, memory: Memory, actions: Tensor, level: Tensor) -> Track:
        """Noisy actions and their noise levels (B n,) or (B n, A) as tokens (B n, A, W), ready for the first block."""
        draws = actions.shape[0] // memory.embodiment.shape[0]
        x = self.expert.embed(actions, repeat_rows(memory.embodiment, draws))
        condition = None if memory.condition is None else repeat_rows(memory.condition, draws).unsqueeze(1)
        embedding, vectors = self.expert.time(1000.0 * level.reshape(level.shape[0], -1), condition)
        rope = self.expert.rope(memory.kept.frames - self.spec.history)
        return Track(x, torch.ones_like(x[..., 0], dtype=torch.bool), vectors, embedding, rope)

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
