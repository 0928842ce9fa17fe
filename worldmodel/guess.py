"""What the history leaves behind, and what a network that predicts clean values starts from: a guess it corrects."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.contracts import STREAMS, Fused
from worldmodel.errors import ConfigError
from worldmodel.nn import repeat_rows
from worldmodel.policy.state_policy import Measured
from worldmodel.synthesis.flow import clean_to_velocity, expand_as
from worldmodel.synthesis.source import Source
from worldmodel.synthesis.state import StreamState

PREDICTS = ("clean", "velocity")


class Memory(NamedTuple):
    """The clean history after one pass: all that any denoising step needs."""

    kept: StreamState
    context: Fused  # as the video transformer reads it
    action_context: Fused  # as the action transformer reads it
    condition: Tensor | None  # (B, W) of the action transformer
    proposal: Tensor | None  # (B, A, D) what the state alone suggests
    anchors: dict[str, Tensor]
    rays: Tensor
    presence: dict[str, Tensor]
    embodiment: Tensor
    streams: tuple[str, ...]
    measured: Measured | None = None  # what foresight starts from, where it leads a stream
    source: Source | None = None  # another clip that the future follows


class Past(NamedTuple):
    """What reading goes on from, of a memory whose rest is gone."""

    kept: StreamState
    streams: tuple[str, ...]


class Decision(NamedTuple):
    """A chunk of actions, and what tells how far to trust it."""

    actions: Tensor  # (B, A, D) in the embodiment's units
    doubt: Tensor  # (B, A, D) normalised actions: the answer less what the first flow step alone would have been
    features: Tensor  # (B, W) mean of what the action transformer reads
    instruction: Tensor  # (B, W), zero where absent
    proprio: Tensor  # (B, P) newest, standardised
    memory: Memory


class Guess(nn.Module):
    """The guess, and what an answer means beside it."""

    def __init__(self, *, predicts: str, channels: int) -> None:
        super().__init__()
        if predicts not in PREDICTS:
            raise ConfigError(f"predicts: unknown target {predicts!r}; one of {', '.join(PREDICTS)}")
        self.predicts = predicts
        self.register_buffer("stream_scale", torch.ones(len(STREAMS)))
        self.register_buffer("still", torch.eye(channels + 1, channels))

    def still_latents(self, last: Tensor) -> Tensor:
        """Single-frame latents (B, 1, V, C, h', w') -> temporal latents of a film of that frame."""
        still = self.get_buffer("still")
        return (last.movedim(3, -1) @ still[:-1] + still[-1]).movedim(-1, 3)

    def to_velocity(
        self, name: str, answer: Tensor, memory: Memory, noisy: Tensor, level: Tensor, lead: Tensor | None = None
    ) -> Tensor:
        """Network output -> velocity of a stream or `actions`.

        They are the same where the model predicts `velocity`. Where it predicts `clean`, the output is how far the
        clean value lies from a guess: for video that the picture stands still or, where there is a source, is the
        source's, for actions the state policy's proposal, for the other streams the newest value or the mean, which are
        zero in their units. A picture with nothing before it is guessed as the mean, zero, too. `lead` adds to the
        guess: how conditions move a picture, and where foresight expects points and cameras.
        """
        if self.predicts == "velocity":
            return answer if lead is None else answer - lead
        if name == "actions":
            clean = answer
            if memory.proposal is not None:
                clean = clean + repeat_rows(memory.proposal, noisy.shape[0] // memory.proposal.shape[0])
        else:
            alone = name == "video" and name not in memory.anchors and memory.source is None
            clean = answer if alone else answer * self.get_buffer("stream_scale")[STREAMS.index(name)]
            if name == "video" and not alone:
                source = memory.source
                guess = self.still_latents(memory.anchors[name]) if source is None else source.video
                clean = clean + guess
            clean = clean if lead is None else clean + lead
        return clean_to_velocity(clean, noisy, level)

    def loss_weight(self, name: str, level: Tensor, like: Tensor, *, alone: bool = False) -> Tensor | float:
        """Factor on the velocity error of a stream or `actions` that makes it the error of the network's answer.

        `alone` is for a picture with nothing before it, whose unit is that of the latents.
        """
        if self.predicts == "velocity":
            return 1.0
        scale = self.get_buffer("stream_scale")[STREAMS.index(name)] if name in STREAMS and not alone else 1.0
        return expand_as(level, like) / scale
