"""A clip that the predicted one follows: another recording of the same motion, with the part that is to change.

Where the old clip shows what the new one will, it is the guess of a network that predicts clean values, so that there
is nothing to learn about what stays. What is to change is told cell by cell, what is asked for beside it; all of it
enters at the tokens of the video alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from worldmodel.nn import FeedForward

PARTS = 2
"""Parts of a latent cell along each side in which masks are told."""


class Source(NamedTuple):
    """The clip that is followed, as the cameras of the new one see it; letters as in `contracts`."""

    video: Tensor  # (B, F, V, C, h', w') latents of its pictures; grey, or repeated edges, in the holes
    mask: Tensor  # (B, F, V, 4 R, h', w') how much of each quarter of a cell changes, at each of the R steps
    holes: Tensor  # the same of what the pictures do not tell
    text: Tensor  # (B, W) the instruction, zero where absent
    picture: Tensor  # (B, W) the reference picture, zero where absent


def cell_shares(mask: Tensor, stride: int, spatial: int) -> Tensor:
    """Masks of pictures (B, F R, V, h, w) -> shares of quarters of latent cells (B, F, V, 4 R, h', w')."""
    parts = functional.avg_pool2d(mask.flatten(0, 1).float(), spatial // PARTS)
    shares = functional.pixel_unshuffle(parts.unsqueeze(2), PARTS).unflatten(0, mask.shape[:2])
    return shares.unflatten(1, (-1, stride)).transpose(2, 3).flatten(3, 4)


class SourceEncoder(nn.Module):
    """What a source tells the tokens of the video; all of it starts at zero, so that it disturbs nothing.

    The instruction and the reference picture reach the cells that change by a short way, beside the cross-attention of
    the blocks, and `paint` guesses from them the colour in which to begin. Tokens that follow a source are answered by
    a `head` of their own, for they have another guess. `plane` is the height above the base, in metres, of the plane in
    which most of what cameras see lies: through it a source is looked at from another place (see `geometry.seen_from`).
    """

    def __init__(
        self, *, width: int, context: int, patch: int, latent_channels: int, stride: int, plane: float
    ) -> None:
        super().__init__()
        self.plane = plane
        self.cells = nn.Linear((latent_channels + 2 * stride * PARTS**2) * patch**2, width, bias=False)
        self.asked = FeedForward(width=2 * context, hidden=width, out=width)
        self.paint = FeedForward(width=2 * context, hidden=width, out=3)
        self.head = nn.Linear(width, latent_channels * patch**2)
        self.reference = nn.Parameter(torch.zeros(context))
        nn.init.zeros_(self.cells.weight)
        for last in (self.asked[-1], self.paint[-1], self.head):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def colour(self, text: Tensor, picture: Tensor) -> Tensor:
        """Red, green and blue (B, 3) in [0, 1] of what is asked for in words and in a picture, (B, W) each."""
        return self.paint(torch.cat([text, picture], -1)).sigmoid()

    def forward(self, source: Source, patchify: Callable[[Tensor], Tensor]) -> Tensor:
        """What is added to the tokens of the video, (B, F, V, cells, W)."""
        x = self.cells(patchify(torch.cat([source.video, source.mask, source.holes], 3)))
        changes = (patchify(source.mask) > 0).any(-1, keepdim=True)
        asked = self.asked(torch.cat([source.text, source.picture], -1))
        return x + changes * asked[:, None, None, None]
