"""What cameras and sensors sent, by time stamp: late and reordered messages find their place, frozen ones are known."""

import zlib

import numpy as np

from .manifest import RuntimeContractError

FINENESS = 2
"""Messages kept per control step of one name; of faster ones, the newest."""


class Readings:
    """The newest messages of one name, in memory that is made with the first of them.

    Args:
        name: for messages.
        steps: control steps that are kept.
        fps: control steps per second.
        frozen_after: messages of the same bytes after which the source is taken for frozen; None never does.
    """

    def __init__(self, name: str, steps: int, fps: float, frozen_after: int | None) -> None:
        self.name, self.fps, self.frozen_after = name, fps, frozen_after
        self._values: np.ndarray | None = None
        self._stamps = np.full(steps * FINENESS, -np.inf)
        self.reset()

    def reset(self) -> None:
        """Forgets all messages."""
        self._stamps[:] = -np.inf
        self.newest, self._repeats, self._bytes = -np.inf, 0, -1

    @property
    def frozen(self) -> bool:
        """Whether too many messages in a row had the same bytes."""
        return self.frozen_after is not None and self._repeats + 1 >= self.frozen_after

    def put(self, stamp: float, value: np.ndarray) -> bool:
        """Keeps a message; False where it is a repetition, or too old to be of use.

        Raises:
            RuntimeContractError: its shape is not that of the messages before.
        """
        if self._values is None:
            self._values = np.zeros((len(self._stamps), *value.shape), value.dtype)
        if value.shape != self._values.shape[1:]:
            was = list(self._values.shape[1:])
            raise RuntimeContractError(f"{self.name}: got shape {list(value.shape)}, was {was} before; expected one")
        slot = round(stamp * self.fps * FINENESS) % len(self._stamps)
        if stamp <= self._stamps[slot]:
            return False
        if stamp > self.newest:
            if self.frozen_after is not None:
                found = zlib.crc32(np.ascontiguousarray(value).data)
                self._repeats = self._repeats + 1 if found == self._bytes else 0
                self._bytes = found
            self.newest = stamp
        self._values[slot], self._stamps[slot] = value, stamp
        return True

    def at(self, time: float, limit: float) -> np.ndarray | None:
        """The newest value of up to `time`, half a control step later at most; None if it is older than `limit`."""
        if self._values is None or self.frozen:
            return None
        stamps = np.where(self._stamps <= time + 0.5 / self.fps, self._stamps, -np.inf)
        slot = int(stamps.argmax())
        return self._values[slot] if time - stamps[slot] <= limit else None
