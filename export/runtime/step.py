"""The exported policy that reads every picture once."""

from collections.abc import Sequence

import numpy as np

from .manifest import RuntimeContractError
from .policy import ANSWERS, OnnxPolicy


class StepPolicy(OnnxPolicy):
    """An `OnnxPolicy` that keeps what older frames left in the network, and at each call reads the newest alone.

    The first call of an episode reads the history through the graph `policy`, later ones go through `policy_step`,
    which remembers all of the episode; its actions are those of a checkpoint that carries its memory along. A call that
    is not exactly `stride` control steps after the one before reads the history anew, as the first does. What was
    presented counts for as long as it is remembered: a camera that is lost masks its newest frame only.

    Args: as `OnnxPolicy`.

    Raises:
        RuntimeContractError: as `OnnxPolicy`; or the artefact has no `policy_step`, or was built before it.
    """

    def _load(self) -> None:
        super()._load()
        self._first, self._step = self._graph, self._open("policy_step")
        self._caches = [name for name in self._step.shapes if name.startswith("cache_")]
        given = {output.name for output in self._first.session.get_outputs()}
        if lacking := sorted({f"next_{name}" for name in self._caches} - given):
            raise RuntimeContractError(
                f"{self.folder}: `policy` does not give {lacking[0]!r}, which `policy_step` goes on from"
            )

    def reset(self) -> None:
        """Starts an episode: forgets what was observed and remembered and starts the noise again from the seed."""
        super().reset()
        self._cache: dict[str, np.ndarray] = {}

    def load(self, history: Sequence[dict[str, np.ndarray]], instruction: str | None = None) -> None:
        """As that of `OnnxPolicy`; what was remembered is forgotten too."""
        super().load(history, instruction)
        self._cache = {}

    def inputs(self) -> dict[str, np.ndarray]:
        """As that of `OnnxPolicy`, for the graph that answers next."""
        goes_on = bool(self._cache) and self._executed == self.stride
        self._graph = self._step if goes_on else self._first
        return super().inputs() | (self._cache if goes_on else {})

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        names = [*ANSWERS, *(f"next_{name}" for name in self._caches)]
        found = [np.asarray(answer) for answer in self._graph.session.run(names, feed)]
        # What came of an answer that nobody may execute is not remembered.
        sound = np.isfinite(found[0]).all()
        self._cache = dict(zip(self._caches, found[len(ANSWERS) :], strict=True)) if sound else {}
        return found[: len(ANSWERS)]
