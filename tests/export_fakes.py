"""A model with the interface of `WorldModel` that is small, cheap and sensitive to every input."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from export.envelope import Envelope
from export.manifest import RobotNames
from export.tensors import observation_specs, random_tensors
from export.trust import Trust, no_trust
from export.wrappers import ActionPath
from worldmodel.contracts import Batch, ClipSpec, Future, Observation
from worldmodel.guess import Decision
from worldmodel.policy.realtime import Decided
from worldmodel.streaming import future_of_actions

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
        width = self._features(made_up(spec)).shape[1]
        actions = spec.chunk * spec.action
        self.read = nn.Linear(width, actions)
        self.velocity = nn.Linear(actions, actions)
        self.small = nn.Linear(spec.proprio + 3 * spec.points, actions)
        self.encoder, self.expert = SimpleNamespace(frames=0), SimpleNamespace(state=self.small)

    def act(self, observation: Observation, noise: Tensor, decided: Decided | None = None) -> Tensor:
        """(B, A, D)."""
        keep = decided or Decided(noise, torch.zeros(noise.shape[:2], dtype=torch.bool))
        context = torch.tanh(self.read(self._features(observation)))
        actions = keep.fill(noise)
        for _ in range(2):
            step = torch.tanh(self.velocity(actions.flatten(1)) + context).unflatten(1, actions.shape[1:])
            actions = actions - 0.5 * keep.still(step)
        return actions

    def propose(self, observation: Observation, decided: Decided | None = None, *, images: bool = True) -> Tensor:
        """(B, A, D) from the newest proprioception and points; what is decided comes first."""
        o = observation
        points = masked(o.points[:, -1], o.has_points)
        state = torch.cat([masked(o.proprio[:, -1:], o.has_proprio.unsqueeze(1)), points], 1)
        proposal = torch.tanh(self.small(state)).unflatten(1, (self.spec.chunk, self.spec.action))
        return proposal if decided is None else decided.after(proposal)

    def decide(self, observation: Observation, noise: Tensor, decided: Decided | None = None) -> Decision:
        """The same actions with what tells their worth."""
        actions = self.act(observation, noise, decided)
        features = torch.tanh(self.read(self._features(observation)))[:, :8]
        memory: Any = None
        words = observation.text[:, :8].float() / 256 * observation.has_text.unsqueeze(1)
        return Decision(actions, actions - noise, features, words, observation.proprio[:, -1], memory)

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


def made_up(spec: ClipSpec = SPEC, batch: int = 1, seed: int = 0) -> Observation:
    """A made-up observation."""
    return Observation(*random_tensors(observation_specs(spec), spec, batch, seed))


def fake_moments(count: int = 2, spec: ClipSpec = SPEC) -> list[tuple[str, list[Observation]]]:
    """Made-up moments of two ticks of batch 1, each with a key."""
    return [(f"episode{i}@{i}", [made_up(spec, 1, 7 * i + k) for k in (1, 0)]) for i in range(count)]


def fake_clips(count: int = 12, spec: ClipSpec = SPEC) -> dict[str, list[Batch]]:
    """Made-up clips with actions, by split."""
    splits: dict[str, list[Batch]] = {}
    for number, split in enumerate(("train", "heldout_episodes", "heldout_tasks")):
        splits[split] = []
        for seed in range(4):
            generator = torch.Generator().manual_seed(100 * number + seed)
            now = made_up(spec, count // 4, 100 * number + seed)
            actions = torch.randn((count // 4, spec.chunk, spec.action), generator=generator)
            future: Future = future_of_actions(now, actions)
            splits[split].append(Batch(now, future, torch.zeros(0), [f"{split}{seed}"] * (count // 4)))
    return splits


def action_path(model: nn.Module) -> ActionPath:
    """The policy path of a fake model, with limits of nothing and calibrated to nothing."""
    spec: ClipSpec = model.spec  # pyright: ignore[reportAssignmentType]
    made = ActionPath(model, Envelope(spec, model.statistics, {}), Trust(no_trust(8, spec.proprio)))  # pyright: ignore
    return made.eval()
