"""Which action of which chunk is executed when."""

from collections import deque
from typing import NamedTuple

import numpy as np

RULES = 2
"""Counts changes of what is executed when. In 1 a robot that waited for its first chunk began it in the middle."""


class Planned(NamedTuple):
    """A chunk of actions."""

    begun: int  # step of its first row
    there: int  # step from which it is executed
    actions: np.ndarray  # (A, D)
    proposed: np.ndarray | None  # (A, D) the proposal that it corrects


class Schedule:
    """Executes chunks that arrive `delay` steps after what they answer to; holds where there is none.

    While a robot waits for its first chunk it stands still and nothing is decided, so that one begins when it is there,
    with its first action: it answers to a world that is still the same. Each later one is for the steps from its
    question on.

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
        there = step + self.delay
        self.chunks.append(Planned(step if self.chunks else there, there, chunk, proposed))

    def follow(self, step: int, proposal: np.ndarray | None) -> None:
        """Takes the proposal (A, D) made at `step`, whose rows are followed until there is another; None is none."""
        if proposal is not None:
            self.proposal, self.made = proposal, step

    def action(self, step: int) -> np.ndarray:
        """The action of a step: its row in the newest chunk that is there by then, following the newest proposal."""
        there = [chunk for chunk in self.chunks if chunk.there <= step]
        if not there or step - there[-1].begun >= len(there[-1].actions):
            return self.hold
        newest, row, later = there[-1], step - there[-1].begun, step - self.made
        outdated = self.made < newest.begun  # the chunk knows better
        if self.proposal is None or newest.proposed is None or outdated or later >= len(self.proposal):
            return newest.actions[row]
        return newest.actions[row] + self.proposal[later] - newest.proposed[row]

    def ahead(self, step: int, count: int) -> np.ndarray:
        """What will be done from `step` on, (count, D), whatever the next chunk says, as far as is known now.

        Nothing, (0, D), before the first chunk.
        """
        decided = [self.action(step + i) for i in range(count)] if self.chunks else []
        return np.stack(decided) if decided else self.hold[None][:0]
