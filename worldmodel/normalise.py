"""Between physical units and the network's own: everything that depends on the statistics of the training data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.contracts import ClipSpec, Observation, Senses
from worldmodel.data.align import text_ids
from worldmodel.errors import ConfigError
from worldmodel.geometry import make_se3, matrix_to_rotation_6d, pluecker_rays, rotation_6d_to_matrix

FORCE_KNEE = 0.3
"""Forces are linear below this many standard deviations and logarithmic above: contacts are rare and heavy-tailed."""
DELTA_GAIN = 4.0
"""Futures of anchored streams move by a fraction of the data's spread; this brings them to about unit size."""


def padded(values: Any, size: int, fill: float) -> Tensor:
    """A list of statistics as a float vector of `size`, padded with `fill` for the dimensions an embodiment lacks."""
    out = torch.full((size,), fill)
    flat = torch.as_tensor(values, dtype=torch.float32).flatten()
    out[: len(flat)] = flat
    return out


def moment_of(statistics: Mapping[str, Any], name: str, moment: str) -> Any:
    """One measure of a field of an embodiment, empty if it lacks that sense (a human has no action)."""
    return statistics[name][moment] if name in statistics else []


class Normaliser(nn.Module):
    """Standardises per embodiment. Its buffers travel with checkpoints and inside exported graphs.

    With `known_text_only`, an instruction that is none of `instructions`, those of the training data, counts as absent:
    to a text encoder that learned its language from them a new one says nothing, and what it makes of it misleads.
    """

    def __init__(
        self,
        *,
        spec: ClipSpec,
        statistics: Mapping[str, Any],
        effector: tuple[int, int, int],
        known_text_only: bool = False,
        instructions: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        missing = [name for name in spec.embodiments if name not in statistics]
        if missing:
            raise ConfigError(f"no statistics for embodiment {missing[0]!r}; the data has {sorted(statistics)}")
        self.effector = list(effector)
        self.size = (spec.height, spec.width)
        sensors = len(spec.sensors)
        sizes = {"proprio": spec.proprio, "action": spec.action, "points": 3, "camera_translation": 3}
        for name, size in (*sizes.items(), ("wrench", sensors * 6)):
            for moment, fill in (("mean", 0.0), ("std", 1.0)):
                rows = [padded(moment_of(statistics[e], name, moment), size, fill) for e in spec.embodiments]
                self.register_buffer(f"{name}_{moment}", torch.stack(rows))
        taxels = [padded(moment_of(statistics[e], "taxels", "std"), spec.taxels[0], 1.0) for e in spec.embodiments]
        self.register_buffer("taxels_std", torch.stack(taxels))
        if known_text_only and instructions is None:
            raise ConfigError(
                "model.normaliser.known_text_only: the statistics do not say which instructions the data have; compute "
                "them again: python -m worldmodel.data stats ROOT"
            )
        # Its first row is no text, so that there may be no other.
        sentences = (text_ids(one, spec.text) for one in instructions or ())
        known = torch.from_numpy(np.stack([np.full(spec.text, -1), *sentences])) if known_text_only else None
        self.known_text: Tensor | None
        self.register_buffer("known_text", known, persistent=False)

    def moments(self, name: str, embodiment: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std of `name` for each row, shaped (B, 1, ..., size) to broadcast with `like`."""
        shape = [embodiment.shape[0]] + [1] * (like.dim() - 2) + [-1]
        mean, std = (self.get_buffer(f"{name}_{moment}")[embodiment].reshape(shape) for moment in ("mean", "std"))
        return mean, std

    def standardise(self, name: str, x: Tensor, embodiment: Tensor) -> Tensor:
        """(x - mean) / std over the last dimension."""
        mean, std = self.moments(name, embodiment, x)
        return (x - mean) / std

    def restore(self, name: str, x: Tensor, embodiment: Tensor) -> Tensor:
        """Inverse of `standardise`."""
        mean, std = self.moments(name, embodiment, x)
        return x * std + mean

    def ratio(self, name: str, other: str, embodiment: Tensor) -> Tensor:
        """Factor (B, size) on differences in the units of `name` that makes them those of `other`."""
        return self.get_buffer(f"{name}_std")[embodiment] / self.get_buffer(f"{other}_std")[embodiment]

    def compress_wrench(self, wrench: Tensor, embodiment: Tensor) -> Tensor:
        """Wrench (B, ..., S, 6) in N and N·m -> asinh of the standardised value over its knee."""
        flat = self.standardise("wrench", wrench.flatten(-2), embodiment)
        return torch.asinh(flat / FORCE_KNEE).unflatten(-1, (-1, 6))

    def restore_wrench(self, force: Tensor, embodiment: Tensor) -> Tensor:
        """Inverse of `compress_wrench`."""
        flat = torch.sinh(force.clamp(-8, 8).flatten(-2)) * FORCE_KNEE
        return self.restore("wrench", flat, embodiment).unflatten(-1, (-1, 6))

    def encode_camera(self, camera_to_base: Tensor, embodiment: Tensor) -> Tensor:
        """Poses (B, ..., 4, 4) -> (B, ..., 9) standardised translation and 6D rotation."""
        translation = self.standardise("camera_translation", camera_to_base[..., :3, 3], embodiment)
        return torch.cat([translation, matrix_to_rotation_6d(camera_to_base[..., :3, :3])], dim=-1)

    def decode_camera(self, camera: Tensor, embodiment: Tensor) -> Tensor:
        """Inverse of `encode_camera`; the rotation is made orthonormal."""
        translation = self.restore("camera_translation", camera[..., :3], embodiment)
        return make_se3(rotation_6d_to_matrix(camera[..., 3:]), translation)

    def rays(self, intrinsics: Tensor, camera_to_base: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pluecker rays (B, T, V, 6, rows, columns) through the cells of a grid over images of each camera."""
        return pluecker_rays(intrinsics, camera_to_base, *self.size, *grid).movedim(-1, -3)

    def knows(self, text: Tensor) -> Tensor:
        """Which rows of text (B, L) are instructions of the training data; all, unless only these are to be read."""
        if self.known_text is None:
            return torch.ones_like(text[:, 0], dtype=torch.bool)
        return (text.unsqueeze(1) == self.known_text).all(-1).any(-1)

    def forward(self, o: Observation, grid: tuple[int, int]) -> Senses:
        """Observation in physical units -> what the stages read; `grid` is the size of a latent frame."""
        e, known = o.embodiment, self.knows(o.text)
        taxel_scale = self.get_buffer("taxels_std")[e][:, None, None, :, None, None]
        effector = self.standardise("points", o.proprio[..., self.effector], e)
        return Senses(
            rgb=o.rgb[:, -1].float() / 127.5 - 1.0,
            rays=self.rays(o.intrinsics, o.camera_to_base, grid),
            camera=self.encode_camera(o.camera_to_base, e),
            points=self.standardise("points", o.points, e),
            visible=o.visible,
            force=self.compress_wrench(o.wrench, e),
            taxels=torch.asinh(o.taxels / (FORCE_KNEE * taxel_scale)),
            proprio=self.standardise("proprio", o.proprio, e),
            effector=effector,
            text=o.text,
            embodiment=e,
            has_rgb=o.has_rgb,
            has_camera=o.has_camera,
            has_points=o.has_points,
            has_wrench=o.has_wrench,
            has_taxels=o.has_taxels,
            has_proprio=o.has_proprio,
            has_text=o.has_text & known,
            new_text=o.has_text & ~known,
        )
