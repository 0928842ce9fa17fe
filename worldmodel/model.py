"""The world model: five modes of prediction, and the read-outs of stage 1, on the joined stages."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from worldmodel.conditioning import Flags, GuidedFlow, cautious, check_guidance, give
from worldmodel.contracts import (
    MODES,
    STREAMS,
    Future,
    Observation,
    Prediction,
    Senses,
    Separation,
    Understanding,
)
from worldmodel.editing import Reference, composite, draw, look_from, read_request, replace_element
from worldmodel.errors import ConfigError
from worldmodel.geometry import pluecker_rays
from worldmodel.guess import Decision, Memory, Past
from worldmodel.joint import JointTransformer
from worldmodel.normalise import DELTA_GAIN
from worldmodel.policy.realtime import Decided
from worldmodel.synthesis.autoencoder import carry_residual
from worldmodel.synthesis.conditions import CONDITIONS, Given
from worldmodel.synthesis.sampler import integrate, sampling_sigmas

DENOISED = {
    "policy": (False, True),
    "forward_dynamics": (True, False),
    "inverse_dynamics": (False, True),
    "video_prediction": (True, False),
    "joint": (True, True),
}
"""Mode -> whether it denoises the streams and the actions. Dynamics modes are given the other as clean input."""


class WorldModel(JointTransformer):
    """Understanding and fusion -> video synthesis -> action prediction, in five modes."""

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the training data, per embodiment."""
        return self.metadata["statistics"]["embodiments"]

    @property
    def statistics_hash(self) -> str:
        """sha256 of the statistics."""
        return self.metadata["statistics_hash"]

    @property
    def givable(self) -> tuple[str, ...]:
        """Which conditions synthesis can be given."""
        return CONDITIONS if self.denoiser.conditions is not None else ("actions",)

    def denoise_actions(self, memory: Memory, noise: Tensor, decided: Decided | None = None) -> Tensor:
        """Normalised actions (B, A, D) from noise and the memory alone, flow steps unrolled.

        What is `decided` already stays as it is, and the rest continues it.
        """
        return self.draft_actions(memory, noise, decided)[0]

    def draft_actions(self, memory: Memory, noise: Tensor, decided: Decided | None = None) -> tuple[Tensor, Tensor]:
        """What `denoise_actions` answers, and what the first flow step alone would have: how far they differ tells
        how sure the answer is."""
        start = noise if decided is None else decided.fill(noise)
        drafts: list[Tensor] = []

        def step(actions: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
            level = noise.new_full((noise.shape[0],), sigma)
            if decided is not None:
                level = decided.levels(level)
            _, velocity = self.velocity(memory, actions=actions["actions"], action_level=level)
            assert velocity is not None
            velocity = velocity if decided is None else decided.still(velocity)
            drafts.append(actions["actions"] - sigma * velocity)
            return {"actions": velocity}

        levels = sampling_sigmas(self.action_steps, self.action_shift)
        return integrate(step, {"actions": start}, levels)["actions"], drafts[0]

    def act(self, observation: Observation, noise: Tensor, decided: Decided | None = None) -> Tensor:
        """Policy mode: observation and noise (B, A, D) -> actions (B, A, D) in the embodiment's units.

        `decided` has actions in those units that will be executed whatever the answer is: the chunk continues them
        (real-time chunking, see `policy.realtime`).
        """
        senses, known = self.normaliser(observation, self.grid), self.own_units(decided, observation.embodiment)
        return self.act_from(self.remember(senses, self.history_latents(observation), decided=known), noise, decided)

    def act_from(self, memory: Memory, noise: Tensor, decided: Decided | None = None) -> Tensor:
        """The same from what was read already, with the same actions `decided`."""
        actions = self.denoise_actions(memory, noise, self.own_units(decided, memory.embodiment))
        return self.normaliser.restore("action", actions, memory.embodiment)

    def propose(self, observation: Observation, decided: Decided | None = None, *, images: bool = True) -> Tensor:
        """Actions (B, A, D) in the embodiment's units that the state policy proposes and `act` corrects.

        Only the newest frame is read. `images` says whether pictures are looked at, which is of use where no point is
        tracked. Raises `ConfigError` for a model without a state policy.
        """
        s, known = self.normaliser(observation, self.grid), self.own_units(decided, observation.embodiment)
        seen = self.encoder.locate(s, images=images)
        _, proposal = self.expert.propose(self.encoder.instruction(s), s, seen, known)
        return self.normaliser.restore("action", proposal, s.embodiment)

    def own_units(self, decided: Decided | None, embodiment: Tensor) -> Decided | None:
        """Decided actions in the robot's units -> normalised."""
        if decided is None:
            return None
        return decided._replace(actions=self.normaliser.standardise("action", decided.actions, embodiment))

    def decide(
        self,
        observation: Observation,
        noise: Tensor,
        decided: Decided | None = None,
        *,
        past: Past | Memory | None = None,
        fresh: int | None = None,
    ) -> Decision:
        """As `act`, with what tells how far to trust the answer; `past` and `fresh` as in `remember`.

        A network of a single flow step is asked a second time, from the opposite noise.
        """
        senses = self.normaliser(observation, self.grid)
        latents = self.history_latents(observation if fresh is None else observation.newest(fresh))
        decided = self.own_units(decided, observation.embodiment)
        memory = self.remember(senses, latents, past=past, fresh=fresh, decided=decided)
        actions, draft = self.draft_actions(memory, noise, decided)
        if self.action_steps == 1:
            draft = self.denoise_actions(memory, -noise, decided)
        answer = self.normaliser.restore("action", actions, observation.embodiment)
        context = memory.action_context
        features = self.expert.mean(context)
        return Decision(answer, actions - draft, features, context.instruction, senses.proprio[:, -1], memory)

    def understand(self, observation: Observation) -> Understanding:
        """Reads the heads of stage 1. Mask the senses in `observation` that the answer must not be copied from."""
        s = self.normaliser(observation, self.grid)
        images = self.encoder.image_tokens(s.rgb)
        pose, fov = self.encoder.camera_head(images)
        fused = self.encoder(s, image_tokens=images)
        return Understanding(
            camera_to_base=self.normaliser.decode_camera(pose, s.embodiment),
            fov=fov,
            points=self.normaliser.restore("points", self.encoder.locate(s, fused), s.embodiment),
            wrench=self.normaliser.restore_wrench(self.encoder.force_head(fused), s.embodiment),
        )

    def separate(self, observation: Observation, future: Future | None = None) -> Separation:
        """Says what moves in the history, or in it and the frames at the ends of `future`'s latent frames.

        Raises `ConfigError` if the model has no head for it.
        """
        if self.motion is None:
            raise ConfigError("this model does not separate what moves: train one with experiment=kairos_tiny_scene")
        rgb, poses, lens = observation.rgb, observation.camera_to_base, observation.intrinsics
        if future is not None:
            stride = self.spec.stride
            rgb = torch.cat([rgb, future.rgb[:, stride - 1 :: stride]], 1)
            poses = torch.cat([poses, future.camera_to_base], 1)
            lens = torch.cat([lens, lens[:, -1:].expand(-1, self.spec.future, -1, -1, -1)], 1)
        size = (self.spec.height, self.spec.width)
        rays = pluecker_rays(lens, poses, *size, *self.motion.grid).movedim(-1, -3)
        known = observation.has_camera & observation.has_rgb
        masks, moves, tracks = self.motion(rgb.float() / 127.5 - 1.0, rays, observation.has_rgb, known)
        return Separation(masks, moves, self.normaliser.restore("points", tracks, observation.embodiment))

    def predict(
        self,
        observation: Observation,
        future: Future | None,
        mode: str,
        *,
        generator: torch.Generator | None,
        steps: int | None = None,
        coupling: str | None = None,
        memory: Memory | None = None,
        given: Flags | None = None,
        guidance: Mapping[str, float] | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> Prediction:
        """Runs one of the five modes. `future` gives what the dynamics modes condition on; other modes ignore it.

        `generator` draws the noise to start from, unless `noise` gives it, by stream and for `actions`.
        `memory` is what was read up to and with this observation; without it the observation's own history is read.
        `given` says what else of `future` is given where streams are predicted: views (`video`), the path of the
        `camera`, tracks of `points`, for all rows, per row or per slot. `guidance` has a scale for `camera`, `points`,
        `actions`, `embodiment` or `text`: above 1 the answer follows it more than the data did. Each scale but 1 costs
        another pass of the transformers. Streams of a task whose instruction is new and not read are `cautious`.

        Raises `ConfigError` for an unknown mode, for a dynamics mode without `future`, for a dynamics mode under
        `history_only`, where streams and actions cannot see each other, and for conditions that do not fit.
        """
        if mode not in MODES:
            raise ConfigError(f"unknown mode {mode!r}; one of {', '.join(MODES)}")
        coupling = coupling or self.coupling
        informed = mode in ("forward_dynamics", "inverse_dynamics")
        if informed and (future is None or coupling != "joint"):
            raise ConfigError(f"mode {mode!r} needs a future to condition on and coupling=joint (it is {coupling!r})")
        do_streams, do_actions = DENOISED[mode]
        s = self.normaliser(observation, self.grid)
        b, spec = s.text.shape[0], self.spec
        latents = self.history_latents(observation)
        flags = dict(given or {})
        if flags and not do_streams:
            raise ConfigError(f"given: mode {mode!r} predicts no streams that {next(iter(flags))!r} could lead")
        if mode == "forward_dynamics":
            flags["actions"] = True
        scales = {name: scale for name, scale in (guidance or {}).items() if scale != 1}
        always = ["text"] if self.denoiser.conditions is None else ["embodiment", "text"]
        check_guidance(scales, [*(n for n in flags if flags[n] is not False), *always])
        if "text" in scales and memory is not None:
            raise ConfigError("guidance: the instruction of a memory that was carried on cannot be taken out of it")
        memories: dict[str | None, Memory] = {None: self.remember(s, latents) if memory is None else memory}
        if "text" in scales:
            memories["text"] = self.remember(s._replace(has_text=torch.zeros_like(s.has_text)), latents)
        clean = None
        if future is not None and (mode == "inverse_dynamics" or "video" in flags):
            clean = self.future_latents(observation, future)
        conditions: dict[str | None, Given | None] = {
            name: give(self, observation, s, future, flags | ({} if name in (None, "text") else {name: False}),
                       lacks={} if name is None else {name: True}, latents=clean)
            for name in (None, *scales)
        }  # fmt: skip
        shapes = {
            "video": (b, spec.future, *latents.shape[2:]),
            "camera": (b, spec.future, *s.camera.shape[2:]),
            "points": (b, spec.future, *s.points.shape[2:]),
            "force": (b, spec.future, len(spec.sensors), 6),
        }
        free: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        action_shape = (b, spec.chunk, spec.action)
        if noise is None:
            order = [*(("actions",) if do_actions else ()), *(shapes if do_streams else ())]
            noise = {n: torch.randn((shapes | {"actions": action_shape})[n], generator=generator) for n in order}
        drawn = {n: start.to(s.points) for n, start in noise.items()}
        if do_actions:
            free["actions"] = drawn["actions"]
        if do_streams:
            free |= {n: drawn[n] for n in self.denoiser.streams}
        if mode == "forward_dynamics" and future is not None:
            fixed["actions"] = self.normaliser.standardise("action", future.actions, s.embodiment)
        if mode == "inverse_dynamics" and future is not None and clean is not None:
            fixed |= self.future_state(s, future, clean)._asdict()

        flow = GuidedFlow(self, memories, conditions, fixed, scales, coupling)
        count = steps or (self.stream_steps if do_streams else self.action_steps)
        done = integrate(flow, free, sampling_sigmas(count, self.shift() if do_streams else self.action_shift))
        all_given = conditions[None]
        done = cautious(done, s, self.unread_share, all_given, informed=informed)
        if do_streams and all_given is not None:
            done = {name: all_given.fill(name, value) if name in STREAMS else value for name, value in done.items()}
        film = None if all_given is None else all_given.film
        return self.physical(observation, s, latents, {**fixed, **done}, film)

    def edit(
        self,
        observation: Observation,
        future: Future,
        mask: Tensor,
        *,
        generator: torch.Generator,
        text: Tensor | None = None,
        reference: Tensor | None = None,
        blank: bool = True,
        steps: int | None = None,
        raw: bool = False,
    ) -> Tensor:
        """A recorded clip with another element under `mask` (B, H + F*R, V, h, w): (B, F*R, V, 3, h, w) in [0, 1].

        What it shall look like is said by an instruction `text` (B, L), a picture `reference` (B, 3, h, w) uint8 that
        it fills, or both. With `blank` nothing of the old element is told, without it its shades stay. Outside the mask
        the pixels are those of the clip; `raw` leaves them as they were drawn. Raises `ConfigError` for a model that
        edits nothing, and if nothing is asked for.
        """
        if text is None and reference is None:
            raise ConfigError("an edit needs an instruction or a reference picture")
        has = torch.full_like(observation.has_text, text is not None)
        asked = observation._replace(text=observation.text if text is None else text, has_text=has)
        shown = None if reference is None else Reference(reference, torch.ones_like(has))
        request = read_request(self, asked, shown)
        edit = replace_element(self, asked, future, mask, request, blank=torch.full_like(has, blank))
        frames = draw(self, edit, generator=generator, steps=steps)
        return frames if raw else composite(frames, future, mask[:, -frames.shape[1] :])

    def view(
        self,
        observation: Observation,
        future: Future,
        intrinsics: Tensor,
        path: Tensor,
        *,
        generator: torch.Generator,
        views: Tensor | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """A recorded clip from other places: (B, F*R, V, 3, h, w) in [0, 1]; arguments as in `editing.look_from`."""
        edit = look_from(self, observation, future, intrinsics, path, views=views)
        return draw(self, edit, generator=generator, steps=steps)

    def decode_video(self, o: Observation, history: Tensor, future: Tensor, film: Tensor | None = None) -> Tensor:
        """Future latents (B, F, V, C, h', w') -> frames (B, F*R, V, 3, h, w) in [0, 1].

        What the tokeniser blurs is kept as in the newest picture or, where that was moved, in the `film` of it.
        """
        b, v = future.shape[0], future.shape[2]
        first, last = history[:, -1].flatten(0, 1), o.rgb[:, -1].flatten(0, 1).float().unsqueeze(1) / 127.5 - 1.0
        decoded = self.autoencoder.decode(first, future.transpose(1, 2).flatten(0, 1))
        decoded, rebuilt = decoded[:, 1:], decoded[:, :1].expand_as(decoded[:, 1:])
        kept = last.expand_as(decoded)
        if film is not None:
            moved = film.transpose(1, 2).flatten(0, 1)
            led = (moved != last).flatten(1).any(1)
            if led.any():
                latents = self.autoencoder.encode_future(last[led, 0], moved[led])
                rebuilt, kept = rebuilt.clone(), moved
                rebuilt[led] = self.autoencoder.decode(first[led], latents)[:, 1:]
        frames = carry_residual(decoded, rebuilt, kept).unflatten(0, (b, v)).transpose(1, 2)
        return (frames * 0.5 + 0.5).clamp(0, 1)

    def reconstruct(self, rgb: Tensor) -> Tensor:
        """Tokeniser round trip of whole clips: rgb (B, 1 + F*R, V, 3, h, w) uint8 -> the same in [0, 1]."""
        b, _, v = rgb.shape[:3]
        video = rgb.transpose(1, 2).flatten(0, 1).float() / 127.5 - 1.0
        first = self.autoencoder.encode_frames(video[:, 0])
        decoded = self.autoencoder.decode(first, self.autoencoder.encode_future(video[:, 0], video[:, 1:]))
        return (decoded.unflatten(0, (b, v)).transpose(1, 2) * 0.5 + 0.5).clamp(0, 1)

    def physical(
        self, o: Observation, s: Senses, latents: Tensor, values: dict[str, Tensor], film: Tensor | None = None
    ) -> Prediction:
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
            rgb = self.decode_video(o, latents, values["video"], film)
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
