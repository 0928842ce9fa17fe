"""What the state will be when actions that are decided are done."""

import torch
from torch import Tensor, nn

from worldmodel.errors import ConfigError
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

    Demonstrations of one expert do not tell what an action does from what the expert would have done: who knows task
    and goal foresees success, whatever the action (causal confusion, de Haan et al. 2019, arXiv 1905.11979). So the
    instruction is not read. The robot's own change is foreseen from its own state and action alone; where things are
    only slows or speeds it (a grasp stops the fingers, a door the hand). And every point moves in proportion to the end
    effector, so that what moves by itself is foreseen to stay.

    With `leads`, stage 2 says how points will move as a correction of what is foreseen here, and with `carries` too how
    cameras on the hand do.
    """

    def __init__(
        self,
        *,
        proprio: int,
        points: int,
        action: int,
        embodiments: int,
        hidden: int,
        blocks: int,
        chunk: int,
        leads: bool = False,
        carries: bool = False,
    ) -> None:
        super().__init__()
        if carries and not leads:
            raise ConfigError("policy.expert.foresight: carries is part of leads; set leads: true as well")
        self.leads, self.carries = leads, carries
        self.reach = chunk // 2
        self.embodiment = nn.Embedding(embodiments, hidden)
        self.robot = Change(proprio + 3 + action + hidden, proprio + 3, hidden=hidden, blocks=blocks)
        self.sizes, self.answers = (proprio, 3), (proprio + 3, 3 * points)
        known = Measured.size(proprio, points) + action + proprio + 3
        self.contact = Change(known, sum(self.answers), hidden=hidden, blocks=blocks)

    def forward(self, now: Measured, action: Tensor, embodiment: Tensor) -> Measured:
        """State, normalised action (B, D), embodiment (B,) -> the state one control step later."""
        action = action.clamp(-FURTHEST, FURTHEST)
        own = torch.cat([now.proprio, now.effector * now.has_proprio, action, self.embodiment(embodiment)], -1)
        free = self.robot(own) * now.has_proprio
        # What is in the way tells how it changes the motion, and not what the motion would be without it.
        contact = self.contact(torch.cat([now.features(), action, free.detach()], -1))
        gain, shares = contact.split(self.answers, -1)
        proprio, effector = (free * 2 * gain.sigmoid()).split(self.sizes, -1)
        moved = shares.unflatten(-1, (-1, 3)) * effector.detach().unsqueeze(1)
        return now._replace(
            proprio=(now.proprio + proprio).clamp(-FURTHEST, FURTHEST),
            effector=now.effector + effector,
            points=now.points + torch.where(now.answered, moved, 0.0),
        )

    def after(self, now: Measured, decided: Decided, embodiment: Tensor) -> Measured:
        """The state when what is `decided` in each row is done. Only its own error teaches foresight."""
        for step in range(min(self.reach, decided.actions.shape[1])):
            later = self(now, decided.actions[:, step], embodiment)
            done = decided.where[:, step, None]
            now = now._replace(
                proprio=torch.where(done, later.proprio, now.proprio),
                effector=torch.where(done, later.effector, now.effector),
                points=torch.where(done[..., None], later.points, now.points),
            )
        return now._replace(proprio=now.proprio.detach(), effector=now.effector.detach(), points=now.points.detach())

    def follow(
        self, now: Measured, actions: Tensor, embodiment: Tensor, *, frames: int, stride: int
    ) -> tuple[Tensor, Tensor]:
        """Points (B, frames, K, 3) and end effector (B, frames, 3) after every `stride` normalised actions (B, A, D).

        After the last action nothing moves. Beyond half a chunk, too: what it says there is not acted on. Only its own
        error teaches foresight.
        """
        found = []
        for step in range(frames * stride):
            if step < actions.shape[1]:
                now = self(now, actions[:, step], embodiment)
            if (step + 1) % stride == 0:
                found.append((now.points, now.effector))
        points, effector = (torch.stack(values, 1).detach() for values in zip(*found, strict=True))
        return points, effector


class Change(nn.Module):
    """Residual layers whose answer is nothing at first, (B, size) -> (B, out)."""

    def __init__(self, size: int, out: int, *, hidden: int, blocks: int) -> None:
        super().__init__()
        self.layers = ResidualLayers(size, hidden=hidden, blocks=blocks)
        self.out = nn.Linear(hidden, out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """-> (B, out)."""
        return self.out(self.layers(x))
