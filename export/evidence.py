"""What a model answers for recorded clips, and the calibration that follows from it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.envelope import Envelope
from export.trust import Calibration, Samples, Trust, calibrate, no_trust
from export.wrappers import ActionPath
from worldmodel.contracts import Batch, Observation
from worldmodel.errors import ExportError

VARIANTS: dict[str, tuple[str, ...]] = {
    "all senses": (),
    "images and proprioception": ("has_camera", "has_points", "has_wrench", "has_taxels"),
    "no images": ("has_rgb",),
    "no touch": ("has_wrench", "has_taxels"),
    "no proprioception": ("has_proprio",),
    "no instruction": ("has_text",),
}
"""Presence masks that are cleared, by name of the variant."""


def hidden(observation: Observation, cleared: Sequence[str]) -> Observation:
    """The observation without the senses whose masks are named."""
    return observation._replace(**{name: torch.zeros_like(getattr(observation, name)) for name in cleared})


def collect(model: Any, batches: Sequence[Batch], *, seed: int = 0) -> Samples:
    """Runs the model on recorded clips, batch after batch with other senses hidden (see `VARIANTS`)."""
    path = ActionPath(model, Envelope(model.spec, model.statistics), Trust(no_trust(1, 1)))
    generator, parts = torch.Generator().manual_seed(seed), []
    for number, batch in enumerate(batches):
        pattern = number % len(VARIANTS)
        now = hidden(batch.observation, list(VARIANTS.values())[pattern])
        rows = len(batch.key)
        noise = torch.randn((rows, model.spec.chunk, model.spec.action), generator=generator)
        with torch.no_grad():
            decision = model.decide(now, noise)
            error = action_error(model, path.envelope.in_range(decision.actions, now.embodiment), batch)
            told = path.tells(decision, now)
        columns = (*told, torch.full((rows,), pattern), error)
        parts.append([column.numpy() for column in columns])
    names = ("doubt", "features", "instruction", "proprio", "presence", "pattern", "error")
    return Samples(**{n: np.concatenate(rows) for n, rows in zip(names, zip(*parts, strict=True), strict=True)})


def action_error(model: Any, actions: Tensor, batch: Batch) -> Tensor:
    """Mean absolute error (B,) in standard deviations of the actions; NaN where no action was recorded."""
    spread = torch.ones(len(model.spec.embodiments), model.spec.action)
    for row, name in zip(spread, model.spec.embodiments, strict=True):
        std = torch.tensor(model.statistics[name].get("action", {}).get("std", ()))
        row[: len(std)] = std
    valid = batch.future.action_valid.unsqueeze(-1) & batch.future.action_dims.unsqueeze(1)
    off = (actions - batch.future.actions).abs() / spread[batch.observation.embodiment].unsqueeze(1)
    return (off * valid).sum((1, 2)) / valid.sum((1, 2))


def fit_trust(
    model: Any, recorded: Mapping[str, Sequence[Batch]], *, good_error: float | None, quantile: float
) -> Calibration:
    """Calibrates confidence and novelty on recorded clips by split, of which `train` and `heldout_episodes` are needed.

    Raises:
        ExportError: a split is missing, or see `trust.calibrate`.
    """
    for split in ("train", "heldout_episodes"):
        if not recorded.get(split):
            raise ExportError(f"confidence: no clips of the split {split!r} to calibrate on")
    samples = {split: collect(model, batches) for split, batches in recorded.items()}
    known, held_out = samples.pop("train"), samples.pop("heldout_episodes")
    return calibrate(known, held_out, samples, good_error=good_error, quantile=quantile)
