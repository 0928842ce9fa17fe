"""Chunks that overlap, averaged."""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldmodel.contracts import CommandedPolicy, Policy
from worldmodel.errors import ConfigError


class EnsemblePolicy:
    """A policy whose every action is the mean of what its chunks so far said of that control step.

    Temporal ensembling (Zhao et al. 2023, arXiv 2304.13705, algorithm 2): the chunk answered `age` control steps ago
    has the weight exp(-`decay` `age`). A negative `decay` trusts older chunks more, as that paper does; infinity takes
    the newest alone. The first chunk begins `delay` control steps after its question, as the loop executes it (see
    `schedule.Schedule`).

    Raises:
        ConfigError: `decay` is not a number, or below -10; or `act` is asked again before the first chunk has begun.
    """

    def __init__(self, policy: Policy, decay: float, delay: int = 0) -> None:
        if not decay >= -10:
            raise ConfigError(f"ensemble: decay {decay}; expected a number from -10 (the oldest chunk) to infinity")
        self.policy, self.decay, self.delay = policy, decay, delay
        self.reset()

    def reset(self) -> None:
        """Starts an episode."""
        self.policy.reset()
        self._now = 0
        self._chunks: deque[tuple[int, np.ndarray]] = deque()

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes one control step."""
        self.policy.observe(observation)
        self._now += 1

    def commanded(self, action: np.ndarray) -> None:
        """Hands on what is executed."""
        if isinstance(self.policy, CommandedPolicy):
            self.policy.commanded(action)

    def act(self) -> np.ndarray:
        """Actions (A, D) in the robot's units."""
        if self._chunks and self._now < self._chunks[-1][0]:
            raise ConfigError(f"ensemble: asked again before {self.delay} control steps, those of the delay, are over")
        late = 0 if self._chunks else self.delay
        self._chunks.append((self._now, np.asarray(self.policy.act())))
        length = len(self._chunks[-1][1])
        while self._now - self._chunks[0][0] >= len(self._chunks[0][1]):
            self._chunks.popleft()
        total, weights = np.zeros_like(self._chunks[-1][1], np.float64), np.zeros((length, 1))
        for begun, chunk in self._chunks:
            age = self._now - begun
            rest = chunk[age:][:length]
            weight = math.exp(-self.decay * age) if age else 1.0
            total[: len(rest)] += weight * rest
            weights[: len(rest)] += weight
        # Nothing was before the first, which begins when it is there.
        self._chunks[-1] = (self._now + late, self._chunks[-1][1])
        return (total / weights).astype(np.float32)


def averaged(
    make: Callable[[str], Policy], decay: float | None, *, realtime: bool, reactive: bool, delay: int
) -> Callable[[str], Policy]:
    """The factory of a policy, around it `EnsembleFactory` unless `decay` is None.

    Raises ConfigError for a policy that is told what is decided, whose chunks continue that while their mean would not,
    and for one whose chunks follow what is measured.
    """
    if decay is None:
        return make
    if realtime or reactive:
        other, what = ("realtime", "continue what is decided") if realtime else ("reactive", "follow what is measured")
        raise ConfigError(f"ensemble {decay:g}: chunks that {what} are not averaged; leave out `ensemble` or `{other}`")
    return EnsembleFactory(make, decay, delay)


@dataclass(frozen=True)
class EnsembleFactory:
    """Builds `EnsemblePolicy` around what another factory builds, in a worker of the closed loop."""

    make: Callable[[str], Policy]
    decay: float
    delay: int = 0

    def __call__(self, robot: str) -> EnsemblePolicy:
        """The policy for a robot."""
        return EnsemblePolicy(self.make(robot), self.decay, self.delay)
