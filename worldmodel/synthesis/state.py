"""What the video transformer keeps of the frames it has read: bounded, however many they were."""

from typing import NamedTuple

from torch import Tensor

from worldmodel.synthesis.delta import DeltaState
from worldmodel.synthesis.temporal import Keys, joined, newest


class StreamState(NamedTuple):
    """The memory of every layer after `frames` frames, which have the positions 0 to frames - 1.

    A layer of (dilated) windows keeps rotated keys and values of its newest frames, k and v (B, T, N, E, d) with the
    presence mask (B, T, N): T is (window - 1) dilation, or the history that actions see where that is longer. A gated
    delta layer keeps its recurrent state (B, E, dk, dv) and the last inputs of its convolution (B, kernel - 1,
    channels). N counts the tokens of one frame, E heads. None is a layer that has read nothing.
    """

    layers: list[Keys | DeltaState | None]
    frames: int

    def detached(self) -> "StreamState":
        """The same values without their past: where truncated backpropagation through time cuts."""
        layers = [None if layer is None else type(layer)(*(x.detach() for x in layer)) for layer in self.layers]
        return self._replace(layers=layers)

    def tensors(self) -> list[Tensor]:
        """Every tensor of every layer."""
        return [x for layer in self.layers if layer is not None for x in layer]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors())


def carry(past: Keys | DeltaState | None, own: Keys | DeltaState, frames: int) -> Keys | DeltaState:
    """What a layer remembers after `past` and its `own` new frames: `frames` of them, if it is one of windows.

    It is in memory of its own and keeps nothing longer alive.
    """
    if isinstance(own, DeltaState):
        return own._replace(tail=own.tail.clone())
    whole = joined(past if isinstance(past, Keys) else None, own)
    kept = newest(whole, frames)
    return whole if kept is whole else Keys(*(x.clone() for x in kept))
