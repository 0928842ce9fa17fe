"""Changes to a batch of observations: hiding senses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from worldmodel.contracts import Observation
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
    observation: Observation, rates: Mapping[str, float], generator: torch.Generator
) -> tuple[Observation, dict[str, Tensor]]:
    """Hides each sense of each row with its own probability. Also returns which rows lost which sense, (B,) each."""
    dropped = {}
    for sense, rate in rates.items():
        rows = torch.rand(observation.text.shape[0], generator=generator).to(observation.text.device) < rate
        observation = hide(observation, [sense], rows)
        dropped[sense] = rows
    return observation, dropped
