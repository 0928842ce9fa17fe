"""Rectified flow (Liu et al. 2022, arXiv 2209.03003): pure functions of the noise level sigma, 0 = clean, 1 = noise."""

import torch
from torch import Tensor


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


def sample_sigma(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Training noise levels (count,): logit-normal, shifted."""
    return shift_sigma(torch.randn(count, generator=generator).sigmoid(), shift)


def precondition(sigma: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (skip, out) of the best linear guess of the velocity and of what a network has to add to it.

    For clean data of root mean square `scale` the guess from z alone is skip z, and out F with a unit network F covers
    the rest: the reasoning of Karras et al. 2022 (arXiv 2206.00364, appendix B.6) carried over to rectified flow. The
    network never spends capacity on passing its own noise through. Shapes broadcast.
    """
    variance = sigma**2 + ((1 - sigma) * scale) ** 2
    return (sigma - (1 - sigma) * scale**2) / variance, scale / variance.sqrt()
