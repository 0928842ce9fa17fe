"""From noise to clean streams: the noise levels of a sampling run and Euler integration along them."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from worldmodel.synthesis.flow import shift_sigma


def sampling_sigmas(steps: int, shift: float) -> list[float]:
    """steps + 1 levels from 1 to 0, evenly spaced before the shift, so that no step is wasted near 0."""
    levels = shift_sigma(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift)
    return levels.tolist()


def integrate(
    velocity: Callable[[dict[str, Tensor], float], dict[str, Tensor]], noise: dict[str, Tensor], sigmas: list[float]
) -> dict[str, Tensor]:
    """Euler integration of several streams at once from noise to clean. `velocity(streams, sigma)` -> velocities."""
    state = noise
    for now, then in pairwise(sigmas):
        v = velocity(state, now)
        state = {name: value + (then - now) * v[name] for name, value in state.items()}
    return state
