"""Edits of recorded clips: an element replaced in the same motion, or the scene seen from another place.

Both follow a `Source`: the clip as the new one's cameras would see it, with holes where it does not tell. What a hole
hides reaches the network by no other way either: not as history, not as what stage 1 looks at, not as a guess.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from worldmodel.contracts import STREAMS, Future, Observation, WorldState
from worldmodel.errors import ConfigError
from worldmodel.geometry import interpolate_poses, seen_from
from worldmodel.joint import JointTransformer, Memory
from worldmodel.synthesis.autoencoder import carry_residual
from worldmodel.synthesis.sampler import integrate, sampling_sigmas
from worldmodel.synthesis.source import Source, SourceEncoder, cell_shares

GREY = 128
"""Value of pixels that no one tells anything of."""


class Edit(NamedTuple):
    """A clip made ready to be drawn anew."""

    memory: Memory  # of its history, with the source
    first: Tensor  # (B, V, C, h', w') latents of the newest picture of the source: where the decoder starts
    pictures: Tensor  # (B, 1 + F R, V, 3, h, w) the source in [-1, 1], the newest picture first
    carry: bool  # whether the answer keeps details of the source that the tokeniser blurs


class Reference(NamedTuple):
    """Pictures of how the new element looks."""

    rgb: Tensor  # (B, 3, h, w) uint8
    has: Tensor  # (B,) bool


def source_encoder(model: JointTransformer) -> SourceEncoder:
    """The part that reads a source. Raises `ConfigError` for a model without one."""
    if model.denoiser.source is None:
        raise ConfigError(
            "this model edits nothing: synthesis.denoiser.source is null; see experiment=kairos_tiny_edit"
        )
    return model.denoiser.source


class Asked(NamedTuple):
    """What is asked for: the instruction, and tokens of the reference picture."""

    text: Tensor  # (B, W) zero where absent
    picture: Tensor  # (B, W) zero where absent
    tokens: Tensor | None  # (B, N, W)
    has: Tensor | None  # (B,) bool


def read_request(model: JointTransformer, observation: Observation, reference: Reference | None) -> Asked:
    """Stage 1 reads the instruction of an observation and a reference picture."""
    text = model.encoder.instruction(model.normaliser(observation, model.grid))
    if reference is None:
        return Asked(text, torch.zeros_like(text), None, None)
    tokens = model.encoder.image(reference.rgb[:, None].float() / 127.5 - 1.0)[:, 0] + source_encoder(model).reference
    return Asked(text, tokens.mean(1) * reference.has[:, None], tokens, reference.has)


def replace_element(
    model: JointTransformer, observation: Observation, future: Future, mask: Tensor, request: Asked, *, blank: Tensor
) -> Edit:
    """Makes a clip ready for another element under `mask` (B, H + F R, V, h, w), as `request` asks.

    The instruction of the observation is the one that was read for the request. The element begins as a coat of the
    colour that the request suggests, in history and future alike. In rows with `blank` (B,) the coat is flat and
    nothing under the mask is told; in others it has the shades of the old element. Tracks and touch are told in both:
    the motion stays. Raises `ConfigError` for a model that edits nothing.
    """
    colour = source_encoder(model).colour(request.text, request.picture).detach()
    shown = mask & observation.has_rgb[:, None, :, None, None]
    holes = shown & blank.reshape(-1, 1, 1, 1, 1)
    rgb = painted(torch.cat([observation.rgb, future.rgb], 1), shown, colour, blank)
    history = observation.rgb.shape[1]
    return _ready(
        model,
        observation._replace(rgb=rgb[:, :history]),
        rgb[:, history - 1 :].float() / 127.5 - 1.0,
        shown[:, history:],
        holes[:, history:],
        request,
        carry=False,
    )


def painted(rgb: Tensor, mask: Tensor, colour: Tensor, flat: Tensor) -> Tensor:
    """Pictures (B, T, V, 3, h, w) uint8 with a coat of colour (B, 3) in [0, 1] on mask (B, T, V, h, w).

    Where `flat` (B,) is False it is as much lighter or darker from place to place as what it covers.
    """
    light = rgb.float().mean(3) / 255
    mean = (light * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
    shade = torch.where(flat.reshape(-1, 1, 1, 1, 1), 1.0, light / mean.clamp(min=0.01).reshape(-1, 1, 1, 1, 1))
    coat = (shade.unsqueeze(3) * colour[:, None, None, :, None, None]).clamp(0, 1) * 255
    return torch.where(mask.unsqueeze(3), coat.round().to(torch.uint8), rgb)


def look_from(
    model: JointTransformer,
    observation: Observation,
    future: Future,
    intrinsics: Tensor,
    path: Tensor,
    *,
    views: Tensor | None = None,
) -> Edit:
    """Makes a clip ready to be seen by cameras on another path.

    Args:
        model: with a `SourceEncoder`.
        observation: of the recorded clip.
        future: of the recorded clip.
        intrinsics: (B, V, 3, 3) of the new cameras.
        path: (B, 1 + F, V, 4, 4) camera-to-base of the new cameras, now and at the end of each latent frame.
        views: (B, V) recorded view that each new one is made from, its own if None. Other recorded views are hidden.

    Raises:
        ConfigError: a model that edits nothing.
    """
    spec, plane = model.spec, source_encoder(model).plane
    b, v = path.shape[0], len(spec.cameras)
    chosen = torch.arange(v, device=path.device).expand(b, v) if views is None else views
    has_rgb = observation.has_rgb & functional.one_hot(chosen, v).any(1)
    hidden = ~has_rgb[:, None, :, None, None, None]
    observation = observation._replace(rgb=observation.rgb.masked_fill(hidden, GREY), has_rgb=has_rgb)
    future = future._replace(rgb=future.rgb.masked_fill(hidden, GREY))
    pictures, seen = through_plane(observation, future, intrinsics, path, chosen, stride=spec.stride, plane=plane)
    request = read_request(model, observation, None)
    edit = _ready(model, observation, pictures, torch.ones_like(seen[:, 1:]), ~seen[:, 1:], request, carry=True)
    everything = torch.ones_like(has_rgb)
    rays = model.normaliser.rays(intrinsics[:, None].expand(-1, spec.future, -1, -1, -1), path[:, 1:], model.grid)
    presence = edit.memory.presence | {"video": everything, "rays": everything}
    return edit._replace(memory=edit.memory._replace(presence=presence, rays=rays))


def through_plane(
    observation: Observation,
    future: Future,
    intrinsics: Tensor,
    path: Tensor,
    views: Tensor,
    *,
    stride: int,
    plane: float,
) -> tuple[Tensor, Tensor]:
    """What new cameras would see if all lay in one plane; arguments as in `look_from`.

    Returns pictures (B, 1 + F R, V, 3, h, w) in [-1, 1], now and later, and (B, 1 + F R, V, h, w) bool where they tell
    something. What was recorded by a camera at an unknown place is left as it is.
    """
    pictures = _of_views(torch.cat([observation.rgb[:, -1:], future.rgb], 1).float() / 127.5 - 1.0, views)
    old = torch.cat([observation.camera_to_base[:, -1:], future.camera_to_base], 1)
    shape = pictures.shape[:3]

    def rows(x: Tensor) -> Tensor:
        return x.expand(-1, shape[1], *x.shape[2:]).flatten(0, 2)

    moved, seen = seen_from(
        pictures.flatten(0, 2),
        rows(_of_views(observation.intrinsics[:, -1:], views)),
        rows(_of_views(_every_step(old, stride), views)),
        rows(intrinsics.unsqueeze(1)),
        rows(_every_step(path, stride)),
        plane=plane,
    )
    known, there = (
        has.gather(1, views)[:, None, :, None, None] for has in (observation.has_camera, observation.has_rgb)
    )
    return torch.where(known.unsqueeze(3), moved.unflatten(0, shape), pictures), (
        seen.unflatten(0, shape) | ~known
    ) & there


def _of_views(x: Tensor, views: Tensor) -> Tensor:
    """Of x (B, T, V, ...) the view that each of `views` (B, V) names."""
    index = views.reshape(*views.shape[:1], 1, -1, *([1] * (x.dim() - 3)))
    return x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))


def _every_step(poses: Tensor, stride: int) -> Tensor:
    """Poses (B, 1 + F, V, 4, 4) at the ends of latent frames -> (B, 1 + F R, V, 4, 4)."""
    return torch.cat([poses[:, :1], interpolate_poses(poses, stride)], 1)


def _ready(
    model: JointTransformer,
    observation: Observation,
    pictures: Tensor,
    mask: Tensor,
    holes: Tensor,
    request: Asked,
    *,
    carry: bool,
) -> Edit:
    """Reads the newest picture of the history and joins what is followed and what is asked for.

    Masks are (B, F R, V, h, w). What came before the newest picture is in the clip that is followed, so it is not read.
    """
    spatial = model.autoencoder.spatial
    s = model.normaliser(observation, model.grid)
    with torch.no_grad():
        now = model.history_latents(observation.newest(1))
        first = model.autoencoder.encode_frames(pictures[:, 0].flatten(0, 1)).unflatten(0, pictures[:, 0].shape[:2])
        video = latents_after(model, pictures[:, 0], pictures[:, 1:])
    memory = model.remember(s, now, streams=("video",), fresh=1)
    context = memory.context
    if request.tokens is not None and request.has is not None:
        read = model.denoiser.read(context._replace(tokens=request.tokens)).tokens
        there = request.has[:, None].expand(request.tokens.shape[:2])
        context = context._replace(
            tokens=torch.cat([context.tokens, read], 1), mask=torch.cat([context.mask, there], 1)
        )
    source = Source(
        video=video,
        mask=cell_shares(mask, model.spec.stride, spatial),
        holes=cell_shares(holes, model.spec.stride, spatial),
        text=request.text,
        picture=request.picture,
    )
    memory = memory._replace(context=context, source=source, anchors=memory.anchors | {"video": first.unsqueeze(1)})
    return Edit(memory, first, pictures, carry)


def latents_after(model: JointTransformer, first: Tensor, pictures: Tensor) -> Tensor:
    """Temporal latents (B, F, V, C, h', w') of pictures (B, F R, V, 3, h, w) after those of `first`, all in [-1, 1]."""
    later = pictures.transpose(1, 2).flatten(0, 1)
    return model.autoencoder.encode_future(first.flatten(0, 1), later).unflatten(0, first.shape[:2]).transpose(1, 2)


def draw(model: JointTransformer, edit: Edit, *, generator: torch.Generator, steps: int | None = None) -> Tensor:
    """Samples the new clip: (B, F R, V, 3, h, w) in [0, 1]."""
    like = edit.memory.source.video if edit.memory.source is not None else edit.first
    level = torch.ones_like(like[:, 0, 0, 0, 0, 0])

    def step(now: dict[str, Tensor], sigma: float) -> dict[str, Tensor]:
        return {"video": video_velocity(model, edit.memory, now["video"], sigma * level)}

    noise = {"video": torch.randn(like.shape, generator=generator).to(like)}
    levels = sampling_sigmas(steps or model.stream_steps, model.shift())
    answer = integrate(step, noise, levels)["video"]
    first = edit.first.flatten(0, 1)
    frames, rebuilt = (
        model.autoencoder.decode(first, video.transpose(1, 2).flatten(0, 1))[:, 1:] for video in (answer, like)
    )
    if edit.carry:
        frames = carry_residual(frames, rebuilt, edit.pictures[:, 1:].transpose(1, 2).flatten(0, 1))
    return (frames.unflatten(0, edit.first.shape[:2]).transpose(1, 2) * 0.5 + 0.5).clamp(0, 1)


def video_velocity(model: JointTransformer, memory: Memory, video: Tensor, level: Tensor) -> Tensor:
    """Velocity of noisy latents at noise levels (B,), after a memory that holds no other stream."""
    state = WorldState(*(video for _ in STREAMS))
    return model.velocity(memory, state=state, levels=level[:, None].expand(-1, len(STREAMS)))[0]["video"]


def composite(frames: Tensor, future: Future, mask: Tensor) -> Tensor:
    """New frames inside mask (B, F R, V, h, w), outside it the recorded pixels, (B, F R, V, 3, h, w) in [0, 1]."""
    return torch.where(mask.unsqueeze(3), frames, future.rgb.float() / 255)


def reference_pictures(rgb: Tensor, mask: Tensor) -> Reference:
    """What pictures (B, 3, h, w) uint8 show under mask (B, h, w), cut out and enlarged to fill the picture."""
    b, _, h, w = rgb.shape
    edges = []
    for axis, size in ((1, w), (2, h)):
        line = mask.any(axis).float()
        first, last = line.argmax(1), size - 1 - line.flip(1).argmax(1)
        edges.append((first / size * 2 - 1, (last + 1) / size * 2 - 1))
    affine = rgb.new_zeros((b, 2, 3), dtype=torch.float32)
    for i, (low, high) in enumerate(edges):
        affine[:, i, i], affine[:, i, 2] = (high - low) / 2, (high + low) / 2
    grid = functional.affine_grid(affine, [b, 3, h, w], align_corners=False)
    alone = torch.where(mask[:, None], rgb.float(), GREY)
    cut = functional.grid_sample(alone, grid, mode="nearest", padding_mode="border", align_corners=False)
    return Reference(cut.round().to(torch.uint8), mask.flatten(1).any(1))
