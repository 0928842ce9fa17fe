"""Which action of which chunk is executed when."""

from collections import deque
from typing import NamedTuple

import numpy as np


class Planned(NamedTuple):
    """A chunk of actions, and when it begins."""

    begun: int
    actions: np.ndarray  # (A, D)
    proposed: np.ndarray | None  # (A, D) the proposal that it corrects


class Schedule:
    """Executes chunks that arrive `delay` steps after what they answer to; holds where there is none.

    An action can follow what is measured when it is executed: the newest proposal takes the place of the one that its
    chunk corrected, while the correction stays. A correction that is added to a chunk at every control step is that of
    Sendai et al. 2025 (arXiv 2509.23224), who train a network for it.
    """

    def __init__(self, hold: np.ndarray, delay: int) -> None:
        self.hold, self.delay = hold, delay
        self.chunks: deque[Planned] = deque(maxlen=2)
        self.proposal: np.ndarray | None = None
        self.made = 0

    def add(self, step: int, chunk: np.ndarray, proposed: np.ndarray | None = None) -> None:
        """Takes the chunk that answers to what was observed at `step`."""
        self.chunks.append(Planned(step, chunk, proposed))

    def follow(self, step: int, proposal: np.ndarray | None) -> None:
        """Takes the proposal (A, D) made at `step`, whose rows are followed until there is another; None is none."""
        if proposal is not None:
            self.proposal, self.made = proposal, step

    def action(self, step: int) -> np.ndarray:
        """The action of a step: its row in the newest chunk that is there by then, following the newest proposal."""
        there = [chunk for chunk in self.chunks if chunk.begun + self.delay <= step]
        if not there or step - there[-1].begun >= len(there[-1].actions):
            return self.hold
        newest, row, later = there[-1], step - there[-1].begun, step - self.made
        outdated = self.made < newest.begun  # the chunk knows better
        if self.proposal is None or newest.proposed is None or outdated or later >= len(self.proposal):
            return newest.actions[row]
        return newest.actions[row] + self.proposal[later] - newest.proposed[row]

    def ahead(self, step: int, count: int) -> np.ndarray:
        """What will be done from `step` on, (count, D), whatever the next chunk says, as far as is known now."""
        return np.stack([self.action(step + i) for i in range(count)]) if count else self.hold[None][:0]
