"""Rows of a chunk that follow what is measured while they are executed."""

from collections.abc import Sequence

import numpy as np

from .policy import OnnxPolicy


class Reflex:
    """Puts the newest proposal of a policy in the place of the one that its chunk corrected; the correction stays.

    Evaluations do the same (`worldmodel.schedule`); a robot has nothing but this folder. A correction of every row by
    what is measured now is that of Sendai et al. 2025 (arXiv 2509.23224), who train a network for it.

    Args:
        policy: whose artefact has the path `proposal`; looks happen in a fork of it.
    """

    def __init__(self, policy: OnnxPolicy) -> None:
        self._policy = policy.fork()
        self._nothing = np.zeros((0, len(policy.action_names)), np.float32)
        self.forget()

    def forget(self) -> None:
        """Starts an episode."""
        self._draft: np.ndarray | None = None
        self._corrected: np.ndarray | None = None
        self._proposal: np.ndarray | None = None
        self._step = -1

    def draft(self, proposal: np.ndarray | None) -> None:
        """Takes what a chunk corrects that is not executed yet."""
        self._draft = proposal

    def take(self) -> None:
        """The chunk of the last draft is executed from now on."""
        self._corrected = self._draft

    def look(self, history: Sequence[dict[str, np.ndarray]], instruction: str | None) -> np.ndarray | None:
        """What is proposed from control steps up to now; see `OnnxPolicy.propose`."""
        self._policy.load(history, instruction)
        return self._policy.propose(self._nothing)

    def follow(self, proposal: np.ndarray | None, step: int) -> None:
        """Rows follow the proposal of this step from now on, unless it is None."""
        if proposal is not None:
            self._proposal, self._step = proposal, step

    def __call__(self, row: int, step: int, out: np.ndarray) -> None:
        """Changes `out`, row `row` of the chunk, executed at `step`; not by a proposal older than the chunk."""
        if self._proposal is None or self._corrected is None:
            return
        if 0 <= (later := step - self._step) < len(self._proposal) and later <= row:
            out += self._proposal[later]
            out -= self._corrected[row]
