"""The objective of an `edit` phase: variants of recorded clips, learned from the recording and what is asked for."""

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.contracts import PAIR_KINDS, Batch, Future, Observation, Pair
from worldmodel.data.transforms import modality_dropout
from worldmodel.draws import Draws
from worldmodel.editing import (
    Edit,
    Reference,
    latents_after,
    look_from,
    read_request,
    reference_pictures,
    replace_element,
    source_encoder,
    video_velocity,
)
from worldmodel.joint import JointTransformer
from worldmodel.losses import distance
from worldmodel.ranks import mean_over_ranks
from worldmodel.synthesis.flow import add_noise, sample_sigma, velocity_target

OUTSIDE = 0.1
"""Weight of latent cells in which nothing changes; they are the recording's own whatever is answered."""


def edit_loss(
    model: JointTransformer,
    pair: Pair,
    generator: Draws,
    *,
    rates: Mapping[str, float],
    dropout: Mapping[str, float],
    weights: Mapping[str, float],
    huber: float | None,
) -> dict[str, Tensor]:
    """Flow matching of the variant's video after the recording; every row counts the same, whatever its mask.

    Beside it the mean colour of the new element is told from the request. `weights` are of `video` and `colour`; a
    weight of 0 for `video` leaves it out, and views with it, which makes steps many times cheaper.

    `rates`: of elements, `blank` hides the old one, `reference` shows the new one and then half of the time leaves the
    words out; of views, `across` shows one recorded view alone and asks for all of them.
    """
    zero = torch.zeros((), device=pair.mask.device)
    sums, counts = {"colour": zero}, {"colour": zero}
    videos, colours = weights.get("video", 1.0), weights.get("colour", 1.0)
    for number, kind in enumerate(PAIR_KINDS):
        rows = torch.nonzero(pair.kind == number)[:, 0]
        sums[kind], counts[kind] = zero, zero + len(rows)
        if not len(rows) or (not videos and kind == "view"):
            continue
        part, own = pick_rows(pair, rows), generator.pick(rows.tolist())
        observation, _ = modality_dropout(part.source.observation, dropout, own)
        part = part._replace(source=part.source._replace(observation=observation))
        if kind == "element":
            observation, reference, blank = draw_request(part, rates, own)
            request = read_request(model, observation, reference)
            colour = source_encoder(model).colour(request.text, request.picture)
            error, seen = colour_error(colour, part)
            sums["colour"], counts["colour"] = (error * seen).sum(), seen.sum().to(zero)
            if not videos:
                continue
            edit = replace_element(model, observation, part.source.future, part.mask, request, blank=blank)
        else:
            edit = draw_view(model, part, rates, own)
        sums[kind] = video_error(model, edit, part, own, huber).sum()
    # Kinds are dealt to processes as they come, so all are counted before any is divided.
    number = dict(zip(counts, mean_over_ranks(torch.stack(list(counts.values()))), strict=True))
    losses = {name: sums[name] / number[name] for name in sums if number[name] and (videos or name == "colour")}
    total = zero + videos * sum(sums[kind] for kind in PAIR_KINDS)
    if "colour" in losses:
        total = total + colours * losses["colour"] * number["element"]
    return {"loss": total / len(pair.kind), **losses}


def pick_rows(pair: Pair, rows: Tensor) -> Pair:
    """Some rows of a batch of pairs; without masks of elements."""

    def batch(x: Batch) -> Batch:
        observation = Observation(*(value[rows] for value in x.observation))
        future = Future(*(value[rows] for value in x.future))
        return Batch(observation, future, x.frame[rows], [x.key[int(i)] for i in rows])

    return Pair(batch(pair.source), batch(pair.target), pair.mask[rows], pair.text[rows], pair.kind[rows])


def draw_request(pair: Pair, rates: Mapping[str, float], generator: Draws) -> tuple[Observation, Reference, Tensor]:
    """The recording asked for its variant in words, in a picture or in both, and in which rows (B,) it is blanked."""
    b, device = len(pair.kind), pair.mask.device

    def happens(rate: float) -> Tensor:
        return (generator.rand(b) < rate).to(device)

    reference = target_reference(pair, generator)
    reference = reference._replace(has=reference.has & happens(rates.get("reference", 0.0)))
    has_text = ~(reference.has & happens(0.5))
    observation = pair.source.observation._replace(text=pair.text, has_text=has_text)
    return observation, reference, happens(rates.get("blank", 1.0))


def colour_error(colour: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Distance (B,) of colours (B, 3) that requests suggest from those of the variants under their masks, and in which
    rows (B,) the masks show anything now."""
    rgb = torch.cat([pair.target.observation.rgb, pair.target.future.rgb], 1).float() / 255
    inside = pair.mask.unsqueeze(3)
    count = inside.sum((1, 2, 4, 5))
    true = (rgb * inside).sum((1, 2, 4, 5)) / count.clamp(min=1)
    return (colour - true).abs().mean(-1), count[:, 0] > 0


def target_reference(pair: Pair, generator: Draws) -> Reference:
    """The new element as a view shows it now, mirrored half of the time; the more it is seen of, the more often."""
    now, b = pair.source.observation.rgb.shape[1] - 1, len(pair.kind)
    area = pair.mask[:, now].flatten(2).float().mean(2).cpu()
    view, rows = generator.categorical(area + 1e-6), torch.arange(b)
    found = reference_pictures(pair.target.observation.rgb[rows, now, view], pair.mask[rows, now, view])
    mirrored = (generator.rand(b, 1, 1, 1) < 0.5).to(found.has.device)
    return found._replace(rgb=torch.where(mirrored, found.rgb.flip(-1), found.rgb))


def draw_view(model: JointTransformer, pair: Pair, rates: Mapping[str, float], generator: Draws) -> Edit:
    """The recording, asked for what the cameras of its variant see."""
    target, (b, v) = pair.target, pair.source.observation.has_rgb.shape
    one = generator.randint(v, b, 1).expand(b, v)
    across = generator.rand(b, 1) < rates.get("across", 0.0)
    views = torch.where(across, one, torch.arange(v).expand(b, v)).to(pair.mask.device)
    path = torch.cat([target.observation.camera_to_base[:, -1:], target.future.camera_to_base], 1)
    lens = target.observation.intrinsics[:, -1]
    return look_from(model, pair.source.observation, pair.source.future, lens, path, views=views)


def video_error(model: JointTransformer, edit: Edit, pair: Pair, generator: Draws, huber: float | None) -> Tensor:
    """Distance between answer and variant in each row (B,), mostly where something changes."""
    source = edit.memory.source
    assert source is not None
    with torch.no_grad():
        clean = latents_after(model, edit.pictures[:, 0], pair.target.future.rgb.float() / 127.5 - 1.0)
    level = sample_sigma(len(pair.kind), model.shift(), generator).to(clean)
    noise = generator.randn(*clean.shape).to(clean)
    velocity = video_velocity(model, edit.memory, add_noise(clean, noise, level), level)
    error = velocity - velocity_target(clean, noise)
    error = distance(model.loss_weight("video", level, error) * error, huber)
    changes = (source.mask > 0).any(3, keepdim=True).to(error)
    there = edit.memory.presence["video"][:, None] & pair.target.future.valid[..., None]
    weight = (OUTSIDE + (1 - OUTSIDE) * changes) * there[..., None, None, None]
    return (error * weight).flatten(1).sum(1) / (weight.flatten(1).sum(1) * error.shape[3]).clamp(min=1e-6)
