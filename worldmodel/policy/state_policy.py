"""What the measured state alone suggests: a small policy that the action transformer corrects."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from worldmodel.contracts import Senses


class StatePolicy(nn.Module):
    """Proprioception, tracked points and instruction of this moment -> features and a proposed chunk of actions.

    The base of a residual policy (Silver et al. 2018, arXiv 1812.06298): without pictures or history it trains on a
    hundred times more samples a second than the transformer, which then learns only what the state does not settle.
    Absent senses are zero and flagged; where no point is tracked, `seen` says where stage 1 believes the points to be.
    """

    def __init__(
        self, *, proprio: int, points: int, instruction: int, embodiments: int, hidden: int, chunk: int, action: int
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.embodiment = nn.Embedding(embodiments, instruction)
        sizes = (proprio + 1 + 7 * points + instruction, hidden, hidden)
        layers = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(hidden, chunk * action)

    def forward(self, senses: Senses, instruction: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Senses, instruction (B, W), estimated points (B, K, 3) -> features (B, hidden), actions (B, A, D)."""
        here = senses.has_proprio.unsqueeze(-1).to(senses.proprio.dtype)
        known = senses.has_points.unsqueeze(-1)
        points = torch.where(known, senses.points[:, -1], 0.0)
        answered = known
        if seen is not None:
            tracked = known.any(1, keepdim=True)
            points = torch.where(tracked, points, seen)
            answered = known | ~tracked
        relative = torch.where(answered, points - senses.effector[:, -1:], 0.0) * here.unsqueeze(-1)
        flags = known.to(points.dtype)
        parts = [senses.proprio[:, -1] * here, here, points.flatten(1), relative.flatten(1), flags.flatten(1)]
        features = self.layers(torch.cat([*parts, instruction + self.embodiment(senses.embodiment)], -1))
        return features, self.out(features).unflatten(-1, (self.chunk, -1))
