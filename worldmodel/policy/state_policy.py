"""What the measured state alone suggests: a small policy that the action transformer corrects."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.contracts import Senses
from worldmodel.nn import FeedForward


class Measured(NamedTuple):
    """The low-dimensional state of one moment; what is absent is zero and flagged."""

    proprio: Tensor  # (B, P) standardised
    effector: Tensor  # (B, 3) end effector, in the units of `points`
    points: Tensor  # (B, K, 3) standardised
    has_proprio: Tensor  # (B, 1) bool
    tracked: Tensor  # (B, K, 1) bool, points that the robot itself tracks
    answered: Tensor  # (B, K, 1) bool, these, or all where none is tracked and stage 1 says where they are

    def features(self) -> Tensor:
        """All of it in one vector (B, P + 1 + 7 K)."""
        here = self.has_proprio.to(self.points.dtype)
        relative = torch.where(self.answered, self.points - self.effector.unsqueeze(1), 0.0) * here.unsqueeze(-1)
        flags = self.tracked.to(self.points.dtype)
        return torch.cat([self.proprio, here, self.points.flatten(1), relative.flatten(1), flags.flatten(1)], -1)

    @staticmethod
    def size(proprio: int, points: int) -> int:
        """Length of `features`."""
        return proprio + 1 + 7 * points


def measure(senses: Senses, seen: Tensor | None = None) -> Measured:
    """What is measured now; where no point is tracked, `seen` (B, K, 3) says where stage 1 believes them to be."""
    tracked = senses.has_points.unsqueeze(-1)
    points, answered = torch.where(tracked, senses.points[:, -1], 0.0), tracked
    if seen is not None:
        any_tracked = tracked.any(1, keepdim=True)
        points, answered = torch.where(any_tracked, points, seen), tracked | ~any_tracked
    here = senses.has_proprio.unsqueeze(-1)
    proprio = senses.proprio[:, -1] * here
    return Measured(proprio, senses.effector[:, -1], points, here, tracked, answered)


class ResidualLayers(nn.Module):
    """Pre-norm residual blocks over one vector, (B, size) -> (B, hidden).

    Three plain layers of 512 left a quarter more error on the same demonstrations (benchmarks/RESULTS.md). The form is
    the ResNet of Gorishniy et al. 2021 (arXiv 2106.11959), with layer norm.
    """

    def __init__(self, size: int, *, hidden: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Linear(size, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                OrderedDict(norm=nn.LayerNorm(hidden), feed_forward=FeedForward(width=hidden, hidden=2 * hidden))
            )
            for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """-> (B, hidden)."""
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class StatePolicy(nn.Module):
    """Proprioception, points and instruction of one moment -> features and a proposed chunk of actions.

    The base of a residual policy (Silver et al. 2018, arXiv 1812.06298): without pictures or history it trains on a
    hundred times more samples a second than the transformer, which then learns only what the state does not settle.
    """

    def __init__(
        self,
        *,
        proprio: int,
        points: int,
        instruction: int,
        embodiments: int,
        hidden: int,
        blocks: int,
        chunk: int,
        action: int,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.embodiment = nn.Embedding(embodiments, instruction)
        self.layers = ResidualLayers(Measured.size(proprio, points) + instruction, hidden=hidden, blocks=blocks)
        self.out = nn.Linear(hidden, chunk * action)

    def forward(self, now: Measured, instruction: Tensor, embodiment: Tensor) -> tuple[Tensor, Tensor]:
        """State, instruction (B, W), embodiment (B,) -> features (B, hidden), actions (B, A, D)."""
        features = self.layers(torch.cat([now.features(), instruction + self.embodiment(embodiment)], -1))
        return features, self.out(features).unflatten(-1, (self.chunk, -1))
