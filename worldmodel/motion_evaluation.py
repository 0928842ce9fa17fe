"""How well a model separates what moves from what stands, beside baselines that need no learning.

Truth and its definition: see `motion_loss`. Baselines, with their thresholds set on training clips: pixels that differ
from the median of their clip (`frame difference`), and pixels where something moved in enough of the training frames
(`mean mask`); for positions the mean of training, for motion none.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmodel import metrics
from worldmodel.contracts import MOVERS, Batch, ClipSpec, Separation
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.transforms import hide
from worldmodel.holdout import Clip
from worldmodel.metrics import Rows, Sums
from worldmodel.model import WorldModel
from worldmodel.motion_loss import MotionTruth, motion_truth

_SAMPLES = 96
"""Training clips that baselines are fitted to."""
_DIFFERENCES = (4, 8, 12, 16, 24, 32, 48, 64, 96)
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


class MotionMeans(NamedTuple):
    """What the baselines take from training clips."""

    shares: Tensor  # (V, M, h, w) how often each pixel shows a slot that moves
    share: float  # from which on `mean mask` says so
    difference: float  # levels of 255 from which on `frame difference` says so
    tracks: Tensor  # (M, 3) mean position, metres
    moves: Tensor  # (M,) bool, whether a slot moves in most clips


class Overlay(NamedTuple):
    """One clip with what was found to move and what does, for pictures."""

    clip: Clip
    rgb: np.ndarray  # (T, V, 3, h, w) uint8
    found: np.ndarray  # (T, V, M, h, w) bool
    true: np.ndarray


def has_masks(reader: ShardReader, split: str) -> bool:
    """Whether the episodes of a split have masks, by the first of them."""
    first = next((i for i, entry in enumerate(reader.entries) if entry.split == split), None)
    return first is not None and "elements" in reader.read(first, images=False).meta


def motion_means(reader: ShardReader, spec: ClipSpec) -> MotionMeans:
    """Fits the baselines to clips that are spread evenly over the train split."""
    dataset = ClipDataset(reader, spec, split="train", masks=True)
    items = np.linspace(0, len(dataset) - 1, min(_SAMPLES, len(dataset))).round().astype(int)
    batch = collate([dataset[int(item)] for item in items])
    truth = motion_truth(batch, spec.stride)
    seen = truth.seen[..., None, None, None]
    count = seen.sum((0, 1)).clamp(min=1)
    shares = (truth.masks & seen).sum((0, 1)) / count
    moved, change = truth.masks.any(3), frame_difference(batch, spec.stride)

    def best(thresholds: tuple[float, ...], found: list[Tensor]) -> float:
        scores = [metrics.pooled(metrics.overlap(each, moved, truth.seen), False).item() for each in found]
        return thresholds[int(np.nanargmax(scores))]

    any_slot = shares.amax(1).expand_as(change)
    known = truth.known[..., None]
    total = (truth.tracks * known).sum((0, 1)) / known.sum((0, 1)).clamp(min=1)
    return MotionMeans(
        shares=shares,
        share=best(_SHARES, [any_slot >= share for share in _SHARES]),
        difference=best(_DIFFERENCES, [change >= level for level in _DIFFERENCES]),
        tracks=total,
        moves=truth.moves.float().mean(0) > 0.5,
    )


def frame_difference(batch: Batch, stride: int) -> Tensor:
    """(B, T, V, h, w) levels of 255 by which a pixel's channels differ at most from their median over the clip."""
    frames = clip_frames(batch, stride).float()
    return (frames - frames.median(1, keepdim=True).values).abs().amax(3)


def clip_frames(batch: Batch, stride: int) -> Tensor:
    """(B, T, V, 3, h, w) uint8, history and the last frames of future latent frames."""
    return torch.cat([batch.observation.rgb, batch.future.rgb[:, stride - 1 :: stride]], 1)


def score_motion(
    model: WorldModel, batch: Batch, clips: list[Clip], means: MotionMeans, rows: dict[str, Rows]
) -> list[Overlay]:
    """Scores a batch, with camera poses and without, and returns it for pictures."""
    stride = model.spec.stride
    truth = motion_truth(batch, stride)
    found = model.separate(batch.observation, batch.future)
    blind = model.separate(hide(batch.observation, ("camera",)), batch.future)
    _score_masks(model.spec, batch, truth, found, blind, means, rows)
    _score_tracks(truth, found, blind, means, rows)
    shown, frames = found.shown(), clip_frames(batch, stride)
    return [Overlay(clip, *(x[i].cpu().numpy() for x in (frames, shown, truth.masks))) for i, clip in enumerate(clips)]


def _score_masks(
    spec: ClipSpec,
    batch: Batch,
    truth: MotionTruth,
    found: Separation,
    blind: Separation,
    means: MotionMeans,
    rows: dict[str, Rows],
) -> None:
    """Intersection over union of all that moves, by view, and of each slot."""
    changed = frame_difference(batch, spec.stride) >= means.difference
    usual = (means.shares >= means.share).expand_as(truth.masks)
    ours, unposed, true = found.shown(), blind.shown(), truth.masks
    for v, view in enumerate(("", *(f"/{name}" for name in spec.cameras))):
        seen = truth.seen if v == 0 else truth.seen & (torch.arange(len(spec.cameras)) == v - 1)
        _put(
            rows,
            f"moving_iou{view}",
            metrics.overlap(ours.any(3), true.any(3), seen),
            frame_difference=metrics.overlap(changed, true.any(3), seen),
            mean_mask=metrics.overlap(usual.any(3), true.any(3), seen),
        )
    _put(rows, "moving_iou_unposed", metrics.overlap(unposed.any(3), true.any(3), truth.seen))
    for m, slot in enumerate(MOVERS):
        there = truth.seen & truth.known[:, :1, m, None]
        _put(
            rows,
            f"slot_iou/{slot}",
            metrics.overlap(ours[:, :, :, m], true[:, :, :, m], there),
            frame_difference=metrics.overlap(changed, true[:, :, :, m], there),
            mean_mask=metrics.overlap(usual[:, :, :, m], true[:, :, :, m], there),
        )


def _score_tracks(
    truth: MotionTruth, found: Separation, blind: Separation, means: MotionMeans, rows: dict[str, Rows]
) -> None:
    """Millimetres of position and of motion since the first frame, of what moves; and whether it does."""
    moving = truth.known & truth.moves[:, None]
    rest = means.tracks.expand_as(truth.tracks)
    ours, true = (track - track[:, :1] for track in (found.tracks, truth.tracks))
    for m, slot in enumerate(MOVERS):
        part = (slice(None), slice(None), slice(m, m + 1))

        def distance(one: Tensor, other: Tensor, part: tuple[slice, ...] = part) -> Sums:
            sums = metrics.trajectory_error(1000 * one[part], 1000 * other[part], moving[part])
            return Sums(sums.total.sum(1, keepdim=True), sums.weight.sum(1, keepdim=True))

        _put(rows, f"slot_track/{slot}", distance(found.tracks, truth.tracks),
             mean_position=distance(rest, truth.tracks))  # fmt: skip
        _put(rows, f"slot_track_unposed/{slot}", distance(blind.tracks, truth.tracks),
             mean_position=distance(rest, truth.tracks))  # fmt: skip
        _put(rows, f"slot_motion/{slot}", distance(ours, true), no_motion=distance(torch.zeros_like(true), true))
        there = truth.known[:, :1, m]
        right, usual = ((guess == truth.moves[:, m])[:, None] for guess in (found.moves[:, m] > 0, means.moves[m]))
        _put(rows, f"slot_moves/{slot}", metrics.masked_sums(right.float(), there),
             more_frequent=metrics.masked_sums(usual.float(), there))  # fmt: skip


def _put(rows: dict[str, Rows], name: str, ours: Sums, **baselines: Sums) -> None:
    rows.setdefault(name, Rows()).add(ours, **baselines)
