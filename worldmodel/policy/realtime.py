"""Real-time chunking: a chunk of actions that continues what the robot will have done by the time the chunk is there.

While a policy thinks, the robot goes on with the chunk before. The actions of that time are decided: the next chunk is
denoised with them in place, as clean tokens at noise level 0, and trained with prefixes of random length so that it
knows how to go on from them (Black et al. 2025, training-time action conditioning for real-time chunking, arXiv
2512.05964; inpainting at sampling time alone is arXiv 2506.07339). Demonstrations of one expert teach little of that,
since there the actions follow from the state; `foresight` says what the state will be.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from worldmodel.draws import Draws
from worldmodel.nn import repeat_rows


class Decided(NamedTuple):
    """Actions of a chunk that are decided already."""

    actions: Tensor  # (B, A, D), what stands where nothing is decided does not matter
    where: Tensor  # (B, A) bool, a prefix of each row

    def fill(self, actions: Tensor) -> Tensor:
        """`actions` (B, A, D) with what is decided in place."""
        return torch.where(self.where[..., None], self.actions, actions)

    def after(self, actions: Tensor) -> Tensor:
        """`actions` (B, A, D) that begin when what is decided is done -> the chunk (B, A, D) that begins now."""
        count = self.where.sum(1, keepdim=True)
        place = (torch.arange(actions.shape[1], device=actions.device) - count).clamp(min=0)
        return self.fill(actions.gather(1, place[..., None].expand_as(actions)))

    def repeat(self, count: int) -> "Decided":
        """The same for `count` draws of every row."""
        return Decided(repeat_rows(self.actions, count), repeat_rows(self.where, count))

    def levels(self, level: Tensor) -> Tensor:
        """Noise levels (B,) of the rest -> of every action (B, A), 0 where it is decided."""
        return torch.where(self.where, torch.zeros_like(level)[:, None], level[:, None])

    def still(self, velocity: Tensor) -> Tensor:
        """Velocities (B, A, D) under which what is decided stays as it is."""
        return torch.where(self.where[..., None], torch.zeros_like(velocity), velocity)


def first_actions(actions: Tensor, count: Tensor) -> Decided:
    """The first `count` (B,) actions of each row of `actions` (B, A, D) as decided."""
    return Decided(actions, torch.arange(actions.shape[1], device=actions.device) < count[:, None])


def draw_prefixes(actions: Tensor, rate: float, generator: Draws) -> Decided:
    """Decided prefixes for training: in `rate` of the rows of 1 to half of the actions, as often each, else none."""
    rows, half = actions.shape[0], actions.shape[1] // 2
    count = 1 + generator.randint(half, rows)
    count = count * (generator.rand(rows) < rate)
    return first_actions(actions, count.to(actions.device))
