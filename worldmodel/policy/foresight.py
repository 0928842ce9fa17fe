"""What the state will be when actions that are decided are done."""

import torch
from torch import Tensor, nn

from worldmodel.policy.realtime import Decided
from worldmodel.policy.state_policy import Measured, ResidualLayers

FURTHEST = 5.0
"""Standard deviations of the data within which an action or a state is believed."""


class Foresight(nn.Module):
    """State and action of one control step -> the state of the next, applied once for every decided action.

    While a policy thinks, the robot goes on with what is decided, so that the state which its answer meets is another
    one than it saw. Acting on that state instead, foreseen by a learned model, undoes the delay (Walsh et al. 2009,
    Learning and planning in environments with delayed feedback; Firoiu et al. 2018, arXiv 1810.07286). It looks half
    a chunk ahead; what is decided after that is taken not to move anything. Actions and proprioception far outside the
    data are taken for its edge: a policy that answers to what it made itself foresee must not run away with it.
    """

    def __init__(
        self,
        *,
        proprio: int,
        points: int,
        action: int,
        instruction: int,
        embodiments: int,
        hidden: int,
        blocks: int,
        chunk: int,
    ) -> None:
        super().__init__()
        self.reach = chunk // 2
        self.embodiment = nn.Embedding(embodiments, instruction)
        self.layers = ResidualLayers(
            Measured.size(proprio, points) + action + instruction, hidden=hidden, blocks=blocks
        )
        self.out = nn.Linear(hidden, proprio + 3 + 3 * points)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.sizes = (proprio, 3, 3 * points)

    def forward(self, now: Measured, action: Tensor, instruction: Tensor, embodiment: Tensor) -> Measured:
        """State, normalised action (B, D), instruction (B, W), embodiment (B,) -> the state one control step later."""
        action = action.clamp(-FURTHEST, FURTHEST)
        known = torch.cat([now.features(), action, instruction + self.embodiment(embodiment)], -1)
        proprio, effector, points = self.out(self.layers(known)).split(self.sizes, -1)
        moved = points.unflatten(-1, (-1, 3))
        return now._replace(
            proprio=(now.proprio + proprio * now.has_proprio).clamp(-FURTHEST, FURTHEST),
            effector=now.effector + effector * now.has_proprio,
            points=now.points + torch.where(now.answered, moved, 0.0),
        )

    def after(self, now: Measured, decided: Decided, instruction: Tensor, embodiment: Tensor) -> Measured:
        """The state when what is `decided` in each row is done. Only its own error teaches foresight."""
        for step in range(min(self.reach, decided.actions.shape[1])):
            later = self(now, decided.actions[:, step], instruction, embodiment)
            done = decided.where[:, step, None]
            now = now._replace(
                proprio=torch.where(done, later.proprio, now.proprio),
                effector=torch.where(done, later.effector, now.effector),
                points=torch.where(done[..., None], later.points, now.points),
            )
        return now._replace(proprio=now.proprio.detach(), effector=now.effector.detach(), points=now.points.detach())
