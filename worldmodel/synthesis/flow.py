"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): pure functions of the noise level sigma, 0 = clean, 1 = noise."""

from torch import Tensor

from worldmodel.draws import Draws

SMALLEST = 1e-3
"""Noise level below which a value counts as clean, so that nothing is divided by zero."""


def expand_as(sigma: Tensor, x: Tensor) -> Tensor:
    """sigma (B,) -> (B, 1, ...) with the rank of x."""
    return sigma.reshape(-1, *([1] * (x.dim() - 1)))


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """z = (1 - sigma) clean + sigma noise, sigma (B,)."""
    s = expand_as(sigma, clean)
    return (1 - s) * clean + s * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """dz / dsigma = noise - clean."""
    return noise - clean


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Moves noise levels towards noise: s sigma / (1 + (s - 1) sigma) (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigma(count: int, shift: float, generator: Draws) -> Tensor:
    """Training noise levels (count,): logit-normal, shifted."""
    return shift_sigma(generator.randn(count).sigmoid(), shift)


def clean_to_velocity(clean: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """Velocity at z that points at a predicted clean value: (z - z_0) / sigma, sigma (B,).

    Networks that answer z_0 need no capacity for passing noise through, and where the condition settles the answer
    (a still camera, a decided action) their samples carry no noise (Li & He 2025, arXiv 2511.13720).
    """
    return (noisy - clean) / expand_as(sigma, noisy).clamp(min=SMALLEST)
