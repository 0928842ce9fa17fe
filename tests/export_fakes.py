"""A model with the interface of `WorldModel` that is small, cheap and sensitive to every input."""

from typing import Any

import torch
from torch import Tensor, nn

from export.manifest import RobotNames
from export.wrappers import random_inputs
from worldmodel.contracts import ClipSpec, Observation

SPEC = ClipSpec(height=8, width=8, points=3, proprio=5, action=6, text=32, taxels=(2, 2, 2))
ROBOTS = {"sawyer": RobotNames(action_names=("x", "y", "z", "grip"), proprio_names=tuple("abcde"))}


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """(B, n, ...) with zeros where the mask (B, n) is False, flattened to (B, m)."""
    return torch.where(mask.reshape(*mask.shape, *[1] * (values.dim() - mask.dim())), values, 0.0).flatten(1)


class FakeModel(nn.Module):
    """One linear map of all unmasked inputs and the noise, iterated twice like a flow."""

    def __init__(self, spec: ClipSpec = SPEC) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spec = spec
        statistics = {"proprio": {"mean": [0.0] * spec.proprio}, "action": {"mean": [0.0] * 4}}
        self.statistics: dict[str, Any] = {"sawyer": statistics}
        self.statistics_hash = "0" * 64
        self.action_steps = 2
        self.metadata: dict[str, Any] = {"schema_version": 1, "training": {"tasks": ["reach-v3"]}}
        width = self._features(Observation(*random_inputs(spec, 1)[:-1])).shape[1]
        actions = spec.chunk * spec.action
        self.read = nn.Linear(width, actions)
        self.velocity = nn.Linear(actions, actions)

    def act(self, observation: Observation, noise: Tensor) -> Tensor:
        """(B, A, D)."""
        context = torch.tanh(self.read(self._features(observation)))
        actions = noise.flatten(1)
        for _ in range(2):
            actions = actions - 0.5 * torch.tanh(self.velocity(actions) + context)
        return actions.unflatten(1, (self.spec.chunk, self.spec.action))

    def _features(self, o: Observation) -> Tensor:
        views = o.rgb.float().transpose(1, 2) / 255
        poses = torch.cat([o.intrinsics.flatten(3) / 10, o.camera_to_base.flatten(3)], -1).transpose(1, 2)
        points = (o.points * o.visible.unsqueeze(-1)).transpose(1, 2)
        parts = [
            masked(views, o.has_rgb),
            masked(poses, o.has_camera),
            masked(points, o.has_points),
            masked(o.wrench.permute(0, 3, 1, 2, 4), o.has_wrench),
            masked(o.taxels.transpose(1, 2), o.has_taxels),
            masked(o.proprio.unsqueeze(1), o.has_proprio.unsqueeze(1)),
            masked(o.text.float().unsqueeze(1) / 256, o.has_text.unsqueeze(1)),
            o.embodiment.float().unsqueeze(1) + 1,
        ]
        return torch.cat(parts, dim=1)


def fake_observations(count: int = 2, spec: ClipSpec = SPEC) -> list[tuple[str, Observation]]:
    """Made-up observations of batch 1, each with a key."""
    return [(f"episode{i}@{i}", Observation(*random_inputs(spec, 1, seed=i)[:-1])) for i in range(count)]
