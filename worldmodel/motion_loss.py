"""What moves in a clip, as the simulator knows it, and the loss of the network that is to say it from the pictures.

A thing moves in a clip if it is somewhere in it farther than `metrics.MOVED` from where it was at the first frame, in
the base frame, whatever the cameras do. The robot is one thing, arm and gripper, and is where its gripper is.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from worldmodel.contracts import MOVERS, Batch
from worldmodel.data.transforms import modality_dropout
from worldmodel.draws import Draws
from worldmodel.errors import DataError
from worldmodel.losses import masked_mean
from worldmodel.metrics import MOVED
from worldmodel.model import WorldModel


class MotionTruth(NamedTuple):
    """What `Separation` should be, over the T = H + F frames of history and latent frames."""

    masks: Tensor  # (B, T, V, M, h, w) bool, pixels of what moves
    moves: Tensor  # (B, M) bool
    tracks: Tensor  # (B, T, M, 3) metres, base frame
    known: Tensor  # (B, T, M) bool, which of the tracks are
    seen: Tensor  # (B, T, V) bool, pictures that are there and inside the episode


def motion_truth(batch: Batch, stride: int) -> MotionTruth:
    """The truth of a batch that has masks, `stride` (R) steps a latent frame. Raises `DataError` if it has none."""
    masks, future = batch.masks, batch.future
    if masks is None:
        raise DataError("clips without masks do not say what moves: load them with masks=True")
    pixels = torch.cat([masks.history, masks.future[:, stride - 1 :: stride]], 1)
    past = torch.ones_like(future.valid[:, :1]).expand(-1, masks.history.shape[1])
    valid = torch.cat([past, future.valid], 1)
    shown, tracks, known = [], [], []
    for names in MOVERS.values():
        places = [masks.elements.index(name) for name in names if name in masks.elements]
        shown.append(torch.isin(pixels, torch.tensor(places, dtype=pixels.dtype, device=pixels.device)))
        place = places[0] if places else 0
        tracks.append(masks.positions[:, :, place])
        known.append(masks.located[:, place] if places else torch.zeros_like(masks.located[:, 0]))
    track, there = torch.stack(tracks, 2), torch.stack(known, 1)
    moves = there & ((track - track[:, :1]).norm(dim=-1).amax(1) > MOVED)
    return MotionTruth(
        masks=torch.stack(shown, 3) & moves[:, None, None, :, None, None],
        moves=moves,
        tracks=track,
        known=there[:, None] & valid[..., None],
        seen=valid[..., None] & batch.observation.has_rgb[:, None],
    )


def motion_loss(model: WorldModel, batch: Batch, dropout: Mapping[str, float], generator: Draws) -> dict[str, Tensor]:
    """Masks (cross-entropy and Dice, Milletari et al. 2016, arXiv 1606.04797, sec. 3), motion (cross-entropy) and
    tracks (L1 of the standardised position), each of the slot of its own: their order is fixed."""
    truth = motion_truth(batch, model.spec.stride)
    observation, _ = modality_dropout(batch.observation, dropout, generator)
    found = model.separate(observation, batch.future)
    target = truth.masks.to(found.masks)
    entropy = F.binary_cross_entropy_with_logits(found.masks, target, reduction="none").mean((-3, -2, -1))
    weight = truth.seen[..., None, None, None].to(target)
    probability = found.masks.sigmoid() * weight
    dims = (1, 2, 4, 5)
    both = (probability * target).sum(dims)
    dice = 1 - (2 * both + 1) / (probability.sum(dims) + (target * weight).sum(dims) + 1)
    where = [model.normaliser.standardise("points", t, observation.embodiment) for t in (found.tracks, truth.tracks)]
    losses = {
        "masks": masked_mean(entropy, truth.seen),
        "dice": dice.mean(),
        "moves": F.binary_cross_entropy_with_logits(found.moves, truth.moves.to(found.moves)),
        "tracks": masked_mean((where[0] - where[1]).abs(), truth.known),
    }
    return {"loss": 5 * losses["masks"] + losses["dice"] + 0.2 * losses["moves"] + losses["tracks"], **losses}
