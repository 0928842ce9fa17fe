"""Changes to a batch of observations: hiding senses or parts of pictures, and what another lens would see."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.contracts import Observation, Senses
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError

PRESENCE = {
    "rgb": ("has_rgb",),
    "camera": ("has_camera",),
    "points": ("has_points",),
    "touch": ("has_wrench", "has_taxels"),
    "proprio": ("has_proprio",),
    "text": ("has_text",),
}
"""Sense -> the presence masks of `Observation` that it owns."""

VIEW = "view"
"""What `modality_dropout` knows beside them."""


def presence_masks(sense: str) -> tuple[str, ...]:
    """Masks of a sense. Raises `ConfigError` for an unknown name."""
    if sense not in PRESENCE:
        raise ConfigError(f"unknown sense {sense!r}; one of {', '.join(PRESENCE)}")
    return PRESENCE[sense]


def hide(observation: Observation, senses: Sequence[str], rows: Tensor | None = None) -> Observation:
    """Marks senses as absent, in all rows or where `rows` (B,) is True."""
    changed = {}
    for name in (mask for sense in senses for mask in presence_masks(sense)):
        mask: Tensor = getattr(observation, name)
        drop = torch.ones(mask.shape[0], dtype=torch.bool, device=mask.device) if rows is None else rows
        changed[name] = mask & ~drop.reshape(-1, *([1] * (mask.dim() - 1)))
    return observation._replace(**changed)


def modality_dropout(
    observation: Observation, rates: Mapping[str, float], generator: Draws
) -> tuple[Observation, dict[str, Tensor]]:
    """Hides each sense of each row with its own probability. Also returns which rows lost which sense, (B,) each.

    `view` stands for the picture of one of the cameras, any of them.
    """
    dropped = {}
    for sense, rate in rates.items():
        rows = generator.rand(observation.text.shape[0]).to(observation.text.device) < rate
        if sense == VIEW:
            there = observation.has_rgb
            chosen = generator.randint(there.shape[1], there.shape[0]).to(there.device)
            lost = torch.arange(there.shape[1], device=there.device) == chosen[:, None]
            observation = observation._replace(has_rgb=there & ~(lost & rows[:, None]))
        else:
            observation = hide(observation, [sense], rows)
        dropped[sense] = rows
    return observation, dropped


def zoom(observation: Observation, most: float, generator: Draws) -> Observation:
    """Newest images of half the rows as another focal length would show them, with intrinsics to match.

    Each view is magnified about its principal point by a factor between 1 / `most` and `most`; beyond it the edge
    repeats. Poses stay true, so a few hundred recorded lenses stand for all between. `most` 1 changes nothing.
    """
    if most == 1:
        return observation
    b, _, v, c, h, w = observation.rgb.shape
    factor = most ** (2 * generator.rand(b, v) - 1)
    factor = torch.where(generator.rand(b, 1) < 0.5, factor, 1.0).to(observation.intrinsics)
    lens = observation.intrinsics[:, -1]
    size = torch.tensor([w, h]).to(lens)
    centre = 2 * lens[..., :2, 2] / size - 1
    shrink = (1 / factor)[..., None]
    affine = torch.cat([torch.diag_embed(shrink.expand(b, v, 2)), (centre * (1 - shrink))[..., None]], -1)
    grid = F.affine_grid(affine.flatten(0, 1), [b * v, c, h, w], align_corners=False)
    images = observation.rgb[:, -1].flatten(0, 1).float()
    seen = F.grid_sample(images, grid, padding_mode="border", align_corners=False).round().to(torch.uint8)
    gain = torch.ones_like(lens)
    gain[..., 0, 0] = gain[..., 1, 1] = factor
    return observation._replace(
        rgb=torch.cat([observation.rgb[:, :-1], seen.unflatten(0, (b, 1, v))], 1),
        intrinsics=torch.cat([observation.intrinsics[:, :-1], (lens * gain).unsqueeze(1)], 1),
    )


def patched(rgb: Tensor, count: int, generator: Draws) -> Tensor:
    """Images (B, V, 3, h, w) of half the rows with `count` rectangles of each covered by another part of the same.

    Random erasing (Zhong et al. 2020) that fills with what pictures look like: what an image says as a whole, such as
    where it was taken from, must then be read in more than one place. 0 changes nothing.
    """
    if count == 0:
        return rgb
    b, v, _, h, w = rgb.shape
    images = rgb.flatten(0, 1).movedim(1, -1)
    size, row = torch.tensor([h, w]), torch.arange(b * v)[:, None, None]
    y = (torch.arange(h) + generator.randint(h, b, v, 1)) % h
    x = (torch.arange(w) + generator.randint(w, b, v, 1)) % w
    filling = images[row, y.flatten(0, 1)[:, :, None], x.flatten(0, 1)[:, None]].movedim(-1, 1).unflatten(0, (b, v))
    half = (1 / 16 + generator.rand(b, v, count, 2) * 7 / 16) * size / 2
    middle = generator.rand(b, v, count, 2) * size
    tall, wide = (
        (torch.arange(side) + 0.5 - middle[..., i : i + 1]).abs() < half[..., i : i + 1]
        for i, side in enumerate((h, w))
    )
    covered = (tall[..., :, None] & wide[..., None, :]).any(2) & (generator.rand(b, 1, 1, 1) < 0.5)
    return torch.where(covered.unsqueeze(2).to(rgb.device), filling, rgb)


def jittered(s: Senses, spread: float, effector: Sequence[int], generator: Draws) -> Senses:
    """Newest proprioception with normal noise of standard deviation `spread`, in that of the data.

    Where the end effector is (numbers `effector`) stays exact. Demonstrations of one expert never show another speed or
    grip than its own, and a policy that trusts those to the last digit fails where it meets them: behind a delay, say.
    """
    if spread == 0:
        return s
    noise = spread * generator.randn(*s.proprio[:, -1].shape).to(s.proprio)
    noise[:, list(effector)] = 0.0
    return s._replace(proprio=torch.cat([s.proprio[:, :-1], (s.proprio[:, -1] + noise).unsqueeze(1)], 1))
