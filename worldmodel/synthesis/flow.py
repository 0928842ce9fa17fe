"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): pure functions of the noise level sigma, 0 = clean, 1 = noise."""

import math

from torch import Tensor

from worldmodel.draws import Draws
from worldmodel.errors import ConfigError

SMALLEST = 1e-3
"""Noise level below which a value counts as clean, so that nothing is divided by zero."""
SHAPE = "shape"
"""The shift that follows from the shape of what is denoised."""
SHIFTS = ((256, 0.5), (8192, 0.9))
"""Tokens of a frame -> logarithm of the shift of a single one."""


def expand_as(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (B,), or (B, A) with a level per token -> (B, 1, ...) or (B, A, 1, ...) with the rank of x."""
    return sigma.reshape(*sigma.shape, *([1] * (x.dim() - sigma.dim())))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z = (1 - sigma) clean + sigma noise, sigma (B,) or (B, A)."""
    s = expand_as(sigma, clean)
    return (1 - s) * clean + s * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """dz / dsigma = noise - clean."""
    return noise - clean


def flow_shift(shift: float | str, tokens: int, frames: int) -> float:
    """The shift of noise levels for latent frames of `tokens` video tokens each: a number as it is, or `shape`.

    `shape` is s = exp(m L + b) sqrt(F) for L tokens and F frames, the exponent linear in L from 0.5 at 256 to 0.9 at
    8192 and beyond: larger and longer clips are more redundant, so it takes more noise to hide them (the published
    form of Kairos 3, arXiv 2606.16533; for pictures Esser et al. 2024, arXiv 2403.03206, section 5.3.2). Raises
    `ConfigError` for any other word and for a shift that is not above 0.
    """
    if shift == SHAPE:
        (first, low), (last, high) = SHIFTS
        return math.exp(low + (high - low) * (tokens - first) / (last - first)) * math.sqrt(frames)
    if isinstance(shift, str) or not shift > 0:
        raise ConfigError(f"shift of noise levels: {shift!r} is neither a number above 0 nor {SHAPE!r}")
    return float(shift)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Moves noise levels towards noise: s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigma(count: int, shift: float, generator: Draws) -> Tensor:
    """Training noise levels (count,): logit-normal, shifted."""
    return shift_sigma(generator.randn(count).sigmoid(), shift)


def clean_to_velocity(clean: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """Velocity at z that points at a predicted clean value: (z - z_0) / sigma, sigma (B,) or (B, A).

    Networks that answer z_0 need no capacity for passing noise through, and where the condition settles the answer
    (a still camera, a decided action) their samples carry no noise (Li & He 2025, arXiv 2511.13720).
    """
    return (noisy - clean) / expand_as(sigma, noisy).clamp(min=SMALLEST)
