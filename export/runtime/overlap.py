"""Chunks that overlap, averaged."""

import math

import numpy as np

from .manifest import RuntimeContractError


class Overlap:
    """The mean of all chunks so far, by the control step that their rows are for.

    A chunk that answers to `age` control steps before the newest has the weight exp(-`decay` `age`) (Zhao et al. 2023,
    arXiv 2304.13705, algorithm 2); sums and weights are kept, not chunks. None as `decay` takes the newest alone.
    Evaluations wrap any policy alike (`worldmodel.ensemble`); a robot has nothing but this folder.

    Raises:
        RuntimeContractError: `decay` is not a number from -10 up.
    """

    def __init__(self, decay: float | None) -> None:
        if decay is not None and not decay >= -10:
            raise RuntimeContractError(f"ensemble: {decay}; expected a number from -10 (the oldest chunk) to infinity")
        self._fade = None if decay is None else math.exp(-decay)
        self.forget()

    def forget(self) -> None:
        """The next chunk is executed as it is."""
        self._sum: np.ndarray | None = None
        self._weight = np.zeros((0, 1))

    def __call__(self, chunk: np.ndarray, later: int) -> np.ndarray:
        """The mean (A, D) for the control steps of `chunk`, which begins so many after the last one did."""
        total, weight = chunk.astype(np.float64), np.ones((len(chunk), 1))
        if self._fade is not None and self._sum is not None and (rest := len(chunk) - later) > 0:
            total[:rest] += self._fade**later * self._sum[later:]
            weight[:rest] += self._fade**later * self._weight[later:]
        self._sum, self._weight = total, weight
        return (total / weight).astype(np.float32)
