"""Training objectives of the phases. Every function returns named scalars; the caller weighs and adds them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.conditioning import draw_given, give
from worldmodel.contracts import STREAMS, Batch, Future, Observation, Senses, WorldState
from worldmodel.data.transforms import hide, jittered, modality_dropout, patched, zoom
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.geometry import intrinsics_to_fov
from worldmodel.joint import Memory
from worldmodel.model import DENOISED, WorldModel
from worldmodel.nn import repeat_rows
from worldmodel.policy.realtime import Decided, draw_prefixes
from worldmodel.ranks import mean_over_ranks, world_size
from worldmodel.synthesis.conditions import Given
from worldmodel.synthesis.flow import add_noise, sample_sigma, velocity_target

QUARTERS = 4
"""Ranges of the noise level that losses are logged by."""


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean of value over the elements of a mask that broadcasts from the left; zero if nothing is present.

    Elements count the same on all processes: the mean over processes of what each gets is the mean over all elements.
    """
    weight = mask.reshape(*mask.shape, *([1] * (value.dim() - mask.dim()))).to(value.dtype).expand_as(value)
    return (value * weight).sum() / mean_over_ranks(weight.sum()).clamp(min=1.0 / world_size())


def by_level(name: str, error: Tensor, mask: Tensor, level: Tensor) -> dict[str, Tensor]:
    """Mean of an error over rows of each quarter of the noise level (B,), NaN where there is none; for the log alone.

    Names are `noise/NAME/25` to `noise/NAME/100`, the upper end of the quarter in percent; processes are as in
    `masked_mean`.
    """
    weight = mask.reshape(*mask.shape, *([1] * (error.dim() - mask.dim()))).to(error.dtype).expand_as(error)
    total, count = (x.detach().flatten(1).sum(1) for x in (error * weight, weight))
    quarter = (level * QUARTERS).long().clamp(max=QUARTERS - 1)
    inside = (quarter == torch.arange(QUARTERS, device=level.device)[:, None]).to(total)
    means = (inside * total).sum(1) / mean_over_ranks((inside * count).sum(1))
    return {f"noise/{name}/{100 * (i + 1) // QUARTERS}": mean for i, mean in enumerate(means)}


def tokeniser_loss(model: WorldModel, batch: Batch, kl_weight: float, generator: Draws) -> dict[str, Tensor]:
    """Reconstruction (L1 + squared error) of one view of each clip, its first frame counted as much as the rest."""
    views = batch.future.rgb.shape[2]
    view = torch.tensor(generator.rows) % views
    rows = torch.arange(batch.future.rgb.shape[0])
    clip = torch.cat([batch.observation.rgb[:, -1:], batch.future.rgb], dim=1)[rows, :, view]
    video = clip.transpose(1, 2).float() / 127.5 - 1.0
    sample, regulariser = model.autoencoder.sample(video, generator)
    decoded = model.autoencoder.decode_raw(sample)
    error = (decoded - video).abs() + (decoded - video).square()
    mse = (decoded.detach() - video).square().mean() / 4
    return {
        "loss": 0.5 * (error[:, :, :1].mean() + error[:, :, 1:].mean()) + kl_weight * regulariser,
        "psnr": -10 * mean_over_ranks(mse).log10(),
    }


def understanding_loss(
    model: WorldModel,
    batch: Batch,
    dropout: Mapping[str, float],
    generator: Draws,
    *,
    lens: float = 1.0,
    patches: int = 0,
    fused_teaches: bool = True,
) -> dict[str, Tensor]:
    """Heads of stage 1. Those that read all senses answer only for rows whose own was hidden, so that none can copy.

    Where nothing but a head of points trains that reads no other's tokens, nothing else is computed.

    `lens` is how far images are zoomed (see `transforms.zoom`); `patches` of those that the camera is read from are
    covered (see `transforms.patched`). Without `fused_teaches` the camera alone teaches the image encoder, and not what
    is read of the fused tokens: from the force on one task's object images learn what misleads about the camera on
    another.
    """
    truth = zoom(batch.observation, lens, generator)
    observation, dropped = modality_dropout(truth, dropout, generator)
    s = model.normaliser(observation, model.grid)
    # The mean is the answer for points that a task lacks, so that a reader of the answer need not know which. Rows of
    # which nobody tracked any point say nothing of where they are.
    where = torch.where(truth.has_points[..., None], s.points[:, -1], 0.0)
    tracked = truth.has_points.any(1, keepdim=True).expand_as(truth.has_points)
    if model.encoder.locates_alone and only_trains(model.encoder, "points_head"):
        error = F.smooth_l1_loss(model.encoder.locate(s), where, reduction="none", beta=0.1)
        error = masked_mean(error, tracked)
        return {"loss": error, "points": error}
    images = model.encoder.image_tokens(patched(s.rgb, patches, generator))
    losses = camera_losses(model, images, truth, s)
    fused = model.encoder(s, image_tokens=images if fused_teaches else images.detach())
    points = F.smooth_l1_loss(model.encoder.locate(s, fused), where, reduction="none", beta=0.1)
    force = F.smooth_l1_loss(model.encoder.force_head(fused), s.force.mean(2)[:, -1], reduction="none", beta=0.5)
    asked = torch.ones_like(dropped["points"]) if model.encoder.locates_alone else dropped["points"]
    losses["points"] = masked_mean(points, tracked & asked[:, None])
    losses["force"] = masked_mean(force, truth.has_wrench & dropped["touch"][:, None])
    total = losses["camera"] + losses["fov"] + losses["points"] + 0.3 * losses["force"]
    return {"loss": total, **losses}


def only_trains(module: nn.Module, part: str) -> bool:
    """Whether all else in a module is frozen."""
    return not any(p.requires_grad for name, p in module.named_parameters() if not name.startswith(f"{part}."))


def camera_losses(model: WorldModel, images: Tensor, truth: Observation, s: Senses) -> dict[str, Tensor]:
    """Pose and field of view from one image."""
    pose, fov = model.encoder.camera_head(images)
    known = truth.has_camera & truth.has_rgb
    error = F.smooth_l1_loss(pose, s.camera[:, -1], reduction="none", beta=0.1)
    true_fov = intrinsics_to_fov(truth.intrinsics[:, -1], truth.rgb.shape[-2])
    weight = torch.ones(9, device=pose.device).index_fill(0, torch.arange(3, 9, device=pose.device), 3.0)
    return {
        "camera": masked_mean(error * weight, known),
        "fov": 5.0 * masked_mean((fov - true_fov).abs(), known),
    }


def proposal_error(model: WorldModel, proposal: Tensor, batch: Batch, decided: Decided | None = None) -> Tensor:
    """Mean absolute error of proposed actions: its minimum is the median, which takes sides where a mean would not."""
    actions = model.normaliser.standardise("action", batch.future.actions, batch.observation.embodiment)
    asked = action_mask(batch.future)
    asked = asked if decided is None else asked & ~decided.where[..., None]
    return masked_mean((proposal - actions).abs(), asked)


def action_mask(future: Future) -> Tensor:
    """Which actions count (B, A, D): those of the embodiment, before the end of the episode."""
    return future.action_valid[..., None] & future.action_dims[:, None]


def distance(error: Tensor, huber: float | None) -> Tensor:
    """Squared error or, with a knee, the pseudo-Huber distance sqrt(e^2 + c^2) - c (Song & Dhariwal 2023, arXiv
    2310.14189): medians in place of means, so what most likely stays as it is stays exactly."""
    return error.square() if huber is None else (error.square() + huber**2).sqrt() - huber


def world_loss(
    model: WorldModel,
    batch: Batch,
    latents: Tensor | None,
    generator: Draws,
    *,
    chunks: int = 1,
    truncate: bool = True,
    **settings: Any,
) -> dict[str, Tensor]:
    """`clip_loss`, of rows that may be `chunks` consecutive clips of each episode; `settings` are its own.

    The memory is carried from each clip to the next, and gradients with it unless `truncate` cuts them there. The loss
    is the mean over clips, each by the share of its future that lies inside the episode. Raises `ConfigError` if frames
    between two clips would be missed.
    """
    spec = model.spec
    if chunks > 1 and spec.history < spec.future:
        raise ConfigError(
            f"chunks: data.spec.history is {spec.history} and data.spec.future {spec.future}; a memory that is carried "
            "on needs every frame between two clips, so the history must be at least as long as the future"
        )
    past, found, shares = None, [], []
    for number, part in enumerate(consecutive(batch, chunks)):
        own = None if latents is None else latents[number::chunks]
        losses, memory = clip_loss(model, part, own, generator, past=past, **settings)
        found.append(losses)
        shares.append(part.future.valid.float().mean())
        past = memory._replace(kept=memory.kept.detached()) if truncate else memory
    if chunks == 1:
        return found[0]
    share = mean_over_ranks(torch.stack(shares))
    share = share / share.sum().clamp(min=1e-6)
    return {name: (torch.stack([losses[name] for losses in found]) * share).sum() for name in found[0]}


def consecutive(batch: Batch, chunks: int) -> list[Batch]:
    """Rows that are `chunks` consecutive clips of each episode as a batch of first clips, one of second clips, ..."""
    return [
        Batch(
            Observation(*(x[number::chunks] for x in batch.observation)),
            Future(*(x[number::chunks] for x in batch.future)),
            batch.frame[number::chunks],
            batch.key[number::chunks],
        )
        for number in range(chunks)
    ]


def clip_loss(
    model: WorldModel,
    batch: Batch,
    latents: Tensor | None,
    generator: Draws,
    *,
    past: Memory | None = None,
    mode: str,
    drop: tuple[str, ...],
    dropout: Mapping[str, float],
    draws: int,
    weights: Mapping[str, float],
    insulate: bool,
    huber: float | None,
    given: Mapping[str, float],
    absent: float,
    decided: float = 0.0,
    jitter: float = 0.0,
) -> tuple[dict[str, Tensor], Memory]:
    """Flow matching of whatever `mode` denoises; `latents` are those of the history, None where images are dropped.

    `draws` noise draws of the action chunk share one pass over the history (policy mode only). `weights` names the
    streams, `actions` (the lambda of the total loss) and, in policy mode, `proposal`; `huber` is the knee of the
    streams' `distance`. Actions take the squared error: where their correction starts from nothing, any other is flat.
    `given` has the rate at which each condition is given, `absent` that at which cameras and points that are not given
    are left out (see `draw_given`), and in policy mode `decided` the rate at which a chunk continues known actions (see
    `realtime.draw_prefixes`) and `jitter` the noise on what is measured (see `transforms.jittered`); what is not
    predicted has no loss. After `past`, the memory of the clip before, only the
    frames that it foretold are read. Also returns the memory.
    """
    observation, _ = modality_dropout(hide(batch.observation, drop), dropout, generator)
    future = batch.future
    s = model.normaliser(observation, model.grid)
    policy = mode == "policy"
    prefix: Decided | None = None
    if policy:
        s = jittered(s, jitter, model.normaliser.effector, generator)
        if decided:
            actions = model.normaliser.standardise("action", future.actions, s.embodiment)
            prefix = draw_prefixes(actions, decided, generator)
    fresh = None if past is None else model.spec.future
    memory = model.remember(s, latents, read_only=insulate and policy, past=past, fresh=fresh, decided=prefix)
    do_streams, do_actions = DENOISED[mode]
    b = s.text.shape[0]
    draws = draws if policy else 1
    arguments: dict[str, Any] = {}
    known: Given | None = None
    noise_of: dict[str, Tensor] = {}
    level_of: dict[str, Tensor] = {}
    clean_of: dict[str, Tensor] = {}
    if not policy:
        with torch.no_grad():
            target = model.future_state(s, future, model.future_latents(observation, future))
        flags, lacks = draw_flags(model, mode, b, generator, given, absent, s.text.device)
        if model.denoiser.conditions is not None:
            known = give(model, observation, s, future, flags, lacks=lacks, latents=target.video)
            arguments["given"] = known
        levels = torch.zeros(b, len(STREAMS))
        if do_streams:
            levels = torch.stack([sample_sigma(b, model.shift(), generator) for _ in STREAMS], 1)
        levels = levels.to(s.points)
        noisy = []
        for i, name in enumerate(STREAMS):
            clean_of[name] = clean = getattr(target, name)
            noise_of[name] = noise = generator.randn(*clean.shape).to(clean)
            level_of[name] = levels[:, i]
            noisy.append(add_noise(clean, noise, levels[:, i]))
        arguments |= {"state": WorldState(*noisy), "levels": levels}
    if mode != "video_prediction":
        actions = repeat_rows(model.normaliser.standardise("action", future.actions, s.embodiment), draws)
        level = torch.zeros(b * draws)
        if do_actions:
            level = sample_sigma(b * draws, model.action_shift, generator)
        if prefix is not None:
            level = prefix.repeat(draws).levels(level.to(actions))
        level_of["actions"] = level = level.to(actions)
        clean_of["actions"] = actions
        noise_of["actions"] = noise = generator.randn(*actions.shape).to(actions)
        arguments |= {"actions": add_noise(actions, noise, level), "action_level": level}
    streams, action_velocity = model.velocity(memory, **arguments)
    losses: dict[str, Tensor] = {}
    levelled: dict[str, Tensor] = {}
    if do_streams:
        for name, velocity in streams.items():
            error = velocity - velocity_target(clean_of[name], noise_of[name])
            error = distance(model.loss_weight(name, level_of[name], error) * error, huber)
            asked = asked_slots(memory, known, future, name)
            losses[name] = masked_mean(error, asked)
            levelled |= by_level(name, error, asked, level_of[name])
    if do_actions and action_velocity is not None:
        error = action_velocity - velocity_target(clean_of["actions"], noise_of["actions"])
        error = (model.loss_weight("actions", level_of["actions"], error) * error).square()
        asked = repeat_rows(action_mask(future), draws)
        asked = asked if prefix is None else asked & ~prefix.repeat(draws).where[..., None]
        losses["actions"] = masked_mean(error, asked)
        levelled |= by_level("actions", error, asked, level_of["actions"].reshape(len(error), -1).amax(1))
    if policy and memory.proposal is not None:
        losses["proposal"] = proposal_error(model, memory.proposal, batch, prefix)
    total = torch.stack([weights.get(name, 1.0) * value for name, value in losses.items()]).sum()
    return {"loss": total, **{f"{mode}/{name}": value for name, value in losses.items()}, **levelled}, memory


def draw_flags(
    model: WorldModel,
    mode: str,
    rows: int,
    generator: Draws,
    given: Mapping[str, float],
    absent: float,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is given in each row of a batch that trains `mode`, and what is left out; nothing a model does not read."""
    if model.denoiser.conditions is None:
        return {}, {}
    streams = DENOISED[mode][0]
    flags, lacks = draw_given(given if streams else {}, absent if streams else 0.0, model.spec, rows, generator)
    if mode == "forward_dynamics":
        flags["actions"] = torch.ones(rows, dtype=torch.bool)
    flags, lacks = ({name: flag.to(device) for name, flag in part.items()} for part in (flags, lacks))
    return flags, lacks


def asked_slots(memory: Memory, known: Given | None, future: Future, name: str) -> Tensor:
    """Which slots of a stream count (B, F, n): there, not given, and before the end of the episode."""
    asked = memory.presence[name]
    if known is not None:
        slots = known.clean(name)
        asked = asked & known.presence(memory.presence)[name] & (True if slots is None else ~slots)
    return asked[:, None] & future.valid[..., None]
