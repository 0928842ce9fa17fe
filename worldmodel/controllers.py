"""What drives the arm in the closed loop besides an exported artefact: a checkpoint as it is, and the scripted expert.

Both come as a picklable factory for `closed_loop.run_closed_loop` and the policy that it builds in the worker.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from worldmodel.contracts import Observation, Policy
from worldmodel.data.live import observation_from_history
from worldmodel.data.transforms import hide
from worldmodel.errors import ContractError
from worldmodel.joint import Memory
from worldmodel.model import WorldModel
from worldmodel.policy.realtime import Decided, first_actions
from worldmodel.streaming import read


class EagerPolicy:
    """A `WorldModel` behind `contracts.Policy`.

    Args:
        model: in inference mode.
        mask: senses to hide although they are observed, of `transforms.PRESENCE`.
        seed: of the noise that the flow starts from; every `reset` starts the same noise again.
        action_dims: real action dimensions of the robot; the padding after them is cut off.
        proprio_dims: real dimensions of its state; None is all of the spec's.
        embodiment: name of the robot; the first of the spec by default.
        stateful: keeps the memory of stage 2 from one `act` to the next and reads only the frames that are new, so
            that actions know all of the episode and not only its newest frames.
    """

    def __init__(
        self,
        model: WorldModel,
        *,
        mask: Sequence[str] = (),
        seed: int = 0,
        action_dims: int | None = None,
        proprio_dims: int | None = None,
        embodiment: str | None = None,
        stateful: bool = False,
    ) -> None:
        self.model, self.mask, self.seed, self.stateful = model, tuple(mask), seed, stateful
        self.embodiment = model.spec.embodiments[0] if embodiment is None else embodiment
        self.action_dims = action_dims or len(model.statistics[self.embodiment]["action"]["mean"])
        self.proprio_dims = proprio_dims
        self.reset()

    def reset(self) -> None:
        """Starts an episode: forgets what was observed and starts the noise again."""
        self._history: deque[dict[str, Any]] = deque(maxlen=self.model.spec.history * self.model.spec.stride)
        self._instruction: dict[str, Any] = {}
        self._random = np.random.default_rng(self.seed)
        self._memory: Memory | None = None
        self._unread = 0

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes one control step; an instruction stays until another one comes."""
        if "instruction" in observation:
            self._instruction = {"instruction": observation["instruction"]}
        self._history.append({**observation, **self._instruction})
        self._unread += 1

    def act(self) -> np.ndarray:
        """Actions (A, D) in the robot's units.

        Raises:
            ContractError: nothing observed yet, or a field of the wrong shape; or, with a memory, the steps since the
                last call are no whole history frames, or more than the history has.
        """
        return self.act_after(np.zeros((0, self.action_dims), np.float32))

    def act_after(self, decided: np.ndarray) -> np.ndarray:
        """Actions (A, D) that begin with the `decided` (d, D); a model trained with a rate `decided` continues them.

        Raises:
            ContractError: as `act`; or there are more decided actions than the chunk has.
        """
        known, observation = self._known(decided), self._observation()
        shape = (1, self.model.spec.chunk, self.model.spec.action)
        noise = torch.from_numpy(self._random.standard_normal(shape, dtype=np.float32))
        with torch.inference_mode():
            if self.stateful:
                self._memory = read(self.model, observation, self._memory, self._fresh(), known)
                actions = self.model.act_from(self._memory, noise, known)
            else:
                actions = self.model.act(observation, noise, known)
        self._unread = 0
        return actions[0, :, : self.action_dims].numpy()

    def propose(self, decided: np.ndarray) -> np.ndarray | None:
        """The proposal (A, D) that `act_after` corrects; None without proprioception now, or points or pictures.

        Raises:
            ContractError: as `act_after`.
            ConfigError: the model has no state policy.
        """
        known, now = self._known(decided), self._observation()
        tracked = bool(now.has_points.any())
        if not (now.has_proprio.all() and (tracked or now.has_rgb.any())):
            return None
        with torch.inference_mode():
            return self.model.propose(now, known, images=not tracked)[0, :, : self.action_dims].numpy()

    def _observation(self) -> Observation:
        """What the model is shown."""
        history, spec = list(self._history), self.model.spec
        observation = observation_from_history(history, spec, embodiment=self.embodiment, proprio=self.proprio_dims)
        return hide(observation, self.mask)

    def _known(self, decided: np.ndarray) -> Decided | None:
        """Decided actions (d, D) as the model takes them."""
        spec = self.model.spec
        if len(decided) > spec.chunk:
            raise ContractError(f"act_after: {len(decided)} decided actions, the chunk has {spec.chunk}")
        if not len(decided):
            return None
        padded = torch.zeros(1, spec.chunk, spec.action)
        padded[0, : len(decided), : decided.shape[1]] = torch.from_numpy(np.asarray(decided, np.float32))
        return first_actions(padded, torch.tensor([len(decided)]))

    def _fresh(self) -> int | None:
        """History frames that the memory has not read yet; None is all of them."""
        if self._memory is None:
            return None
        history, stride = self.model.spec.history, self.model.spec.stride
        frames, rest = divmod(self._unread, stride)
        if rest or not 1 <= frames <= history:
            raise ContractError(
                f"act: {self._unread} control steps since the last call; a policy that keeps its memory acts every "
                f"{stride} steps or a multiple, at most {history * stride}"
            )
        return frames


@dataclass(frozen=True)
class CheckpointFactory:
    """Builds the eager policy of a run folder, with its own number of flow steps or with another.

    It drives robots too that were not trained on, see `checkpoint.add_robots`.
    """

    folder: Path
    mask: tuple[str, ...] = ()
    seed: int = 0
    stateful: bool = False
    action_steps: int | None = None

    def __call__(self, robot: str | None = None) -> Policy:
        """The policy with the weights in `folder` for a robot, its first by default."""
        from worldmodel.checkpoint import load_model

        model = load_model(self.folder, () if robot is None else (robot,))
        model.action_steps = self.action_steps or model.action_steps
        state = model.statistics[robot or model.spec.embodiments[0]].get("proprio")
        return EagerPolicy(
            model,
            mask=self.mask,
            seed=self.seed,
            proprio_dims=len(state["mean"]) if state else None,
            embodiment=robot,
            stateful=self.stateful,
        )


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

    scripted: ClassVar[bool] = True
    """It has no weights."""

    def __call__(self, robot: str | None = None) -> Policy:
        """The policy, of any task and robot."""
        return ExpertPolicy()
