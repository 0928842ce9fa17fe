"""What drives the arm in the closed loop besides an exported artefact: a checkpoint as it is, and the scripted expert.

Both come as a picklable factory for `closed_loop.run_closed_loop` and the policy that it builds in the worker.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldmodel.contracts import Policy
from worldmodel.data.live import observation_from_history
from worldmodel.data.transforms import hide
from worldmodel.errors import ContractError
from worldmodel.model import WorldModel


class EagerPolicy:
    """A `WorldModel` behind `contracts.Policy`.

    Args:
        model: in inference mode.
        mask: senses to hide although they are observed, of `transforms.PRESENCE`.
        seed: of the noise that the flow starts from; every `reset` starts the same noise again.
        action_dims: real action dimensions of the robot; the padding after them is cut off.
        embodiment: name of the robot; the first of the spec by default.
    """

    def __init__(
        self,
        model: WorldModel,
        *,
        mask: Sequence[str] = (),
        seed: int = 0,
        action_dims: int | None = None,
        embodiment: str | None = None,
    ) -> None:
        self.model, self.mask, self.seed = model, tuple(mask), seed
        self.embodiment = model.spec.embodiments[0] if embodiment is None else embodiment
        self.action_dims = action_dims or len(model.statistics[self.embodiment]["action"]["mean"])
        self.reset()

    def reset(self) -> None:
        """Starts an episode: forgets what was observed and starts the noise again."""
        self._history: deque[dict[str, Any]] = deque(maxlen=self.model.spec.history * self.model.spec.stride)
        self._instruction: dict[str, Any] = {}
        self._random = np.random.default_rng(self.seed)

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes one control step; an instruction stays until another one comes."""
        if "instruction" in observation:
            self._instruction = {"instruction": observation["instruction"]}
        self._history.append({**observation, **self._instruction})

    def act(self) -> np.ndarray:
        """Actions (A, D) in the robot's units.

        Raises:
            ContractError: nothing observed yet, or a field of the wrong shape.
        """
        spec = self.model.spec
        observation = observation_from_history(list(self._history), spec, embodiment=self.embodiment)
        noise = self._random.standard_normal((1, spec.chunk, spec.action), dtype=np.float32)
        with torch.inference_mode():
            actions = self.model.act(hide(observation, self.mask), torch.from_numpy(noise))
        return actions[0, :, : self.action_dims].numpy()


@dataclass(frozen=True)
class CheckpointFactory:
    """Builds the eager policy of a run folder."""

    folder: Path
    mask: tuple[str, ...] = ()
    seed: int = 0

    def __call__(self) -> Policy:
        """The policy with the weights in `folder`."""
        from worldmodel.checkpoint import load_model

        return EagerPolicy(load_model(self.folder), mask=self.mask, seed=self.seed)


class ExpertPolicy:
    """The scene's scripted expert, which reads the simulator's state: how well the task can be done. Replans always."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the scene."""
        self._expert: Any = None

    def attach(self, scene: Any) -> None:
        """Takes the expert of the scene that is about to run."""
        self._expert = scene.expert()

    def observe(self, observation: dict[str, Any]) -> None:
        """Nothing: the expert looks at the simulator."""

    def act(self) -> np.ndarray:
        """One action (1, D).

        Raises:
            ContractError: no scene yet.
        """
        if self._expert is None:
            raise ContractError("expert: no scene attached yet")
        return self._expert.act()[None]


@dataclass(frozen=True)
class ExpertFactory:
    """Builds `ExpertPolicy`; run it with `replan=1, image_every=0`."""

    def __call__(self) -> Policy:
        """The policy, of any task."""
        return ExpertPolicy()
