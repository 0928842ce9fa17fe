"""Errors of every stream under masks, trivial baselines, and intervals that respect episodes.

Shape legend: see `worldmodel.contracts`. Each error function returns sums and weights per clip rather than a mean, so
that absent sensors and steps past the end drop out exactly and clips of unequal content are pooled correctly:
a figure is `sum of sums / sum of weights` over the clips of a set.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from worldmodel.contracts import Observation
from worldmodel.errors import ContractError
from worldmodel.geometry import geodesic_angle

MOVED = 0.01
"""Metres an object must travel within the window to count as moving."""


class Sums(NamedTuple):
    """Weighted sums of one error: one row per clip, one column per horizon step (or a single column)."""

    total: Tensor  # (B, steps) float64
    weight: Tensor  # (B, steps) float64


def masked_sums(values: Tensor, mask: Tensor) -> Sums:
    """Sum values (B, steps, ...) over all but the first two axes where mask (same shape, bool) is True.

    Masked values may be NaN or infinite; they do not count.
    """
    if values.shape != mask.shape:
        raise ContractError(f"values {tuple(values.shape)} and mask {tuple(mask.shape)} must have one shape")
    kept = torch.where(mask, values.double(), 0.0)
    return Sums(kept.flatten(2).sum(-1) if kept.ndim > 2 else kept, mask.double().reshape(*mask.shape[:2], -1).sum(-1))


def squared_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Sums:
    """Squared error of pictures (B, T, V, 3, h, w) in [0, 1] per step, over views where mask (B, T, V) is True."""
    return masked_sums((predicted - target).square().mean((-3, -2, -1)), mask)


def psnr(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB for a data range of 1; infinite for equal pictures.

    Sets are summarised by the PSNR of their mean squared error, never by a mean of PSNRs: a simulator renders some
    still frames bit-exactly, and one infinite frame would make copying the last frame unbeatable.
    """
    return -10.0 * torch.log10(mean_squared_error)


def ssim(predicted: Tensor, target: Tensor, mask: Tensor) -> Sums:
    """Structural similarity of pictures (B, T, V, 3, h, w) in [0, 1] per step (Wang et al. 2004, eq. 13).

    Gaussian window of 11 pixels and 1.5 standard deviation, pictures mirrored at their borders: the same numbers as
    torchmetrics, at a fraction of its time for small pictures.
    """
    rows, columns = predicted.shape[-2:]
    if min(rows, columns) < 11:
        raise ContractError(f"SSIM needs pictures of at least 11x11 pixels, got {rows}x{columns}")
    x, y = (functional.pad(p.reshape(-1, 1, rows, columns), (5, 5, 5, 5), mode="reflect") for p in (predicted, target))
    offsets = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    stacked = torch.cat((x, y, x * x, y * y, x * y), dim=1)
    blurred = functional.conv2d(stacked, window.view(1, 1, 11, 1).expand(5, 1, 11, 1), groups=5)
    blurred = functional.conv2d(blurred, window.view(1, 1, 1, 11).expand(5, 1, 1, 11), groups=5)
    mean_x, mean_y, square_x, square_y, product = blurred.unbind(1)
    variance_x, variance_y = (square_x - mean_x.square()).clamp(min=0), (square_y - mean_y.square()).clamp(min=0)
    covariance = product - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x.square() + mean_y.square() + c1) * (variance_x + variance_y + c2))
    return masked_sums(similarity.mean((-2, -1)).view(predicted.shape[:-2]).mean(-1), mask)


def rotation_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Geodesic angle in degrees between the rotations of poses (..., 4, 4)."""
    return torch.rad2deg(geodesic_angle(predicted[..., :3, :3], target[..., :3, :3]))


def translation_error(predicted: Tensor, target: Tensor) -> Tensor:
    """Distance in metres between the origins of poses (..., 4, 4)."""
    return (predicted[..., :3, 3] - target[..., :3, 3]).norm(dim=-1)


def trajectory_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Sums:
    """Distance in metres of points (B, F, K, 3) per frame where mask (B, F, K) is True; pooled, it is the ADE."""
    return masked_sums((predicted - target).norm(dim=-1), mask)


def last_valid(mask: Tensor) -> Tensor:
    """Keep of mask (B, F, ...) only the last True along the frames: with `trajectory_error` this gives the FDE."""
    later = mask.flip(1).cumsum(1).flip(1) - mask.long()
    return mask & (later == 0)


def moving(history: Tensor, future: Tensor) -> Tensor:
    """Which points (B, K) travel more than `MOVED` from the newest of history (B, H, K, 3) within future."""
    return (future - history[:, -1:]).norm(dim=-1).amax(1) > MOVED


def wrench_error(predicted: Tensor, target: Tensor, mask: Tensor, torque: bool = False) -> Sums:
    """Absolute error of wrenches (B, F, S, 6) over fx..fz in N, or tx..tz in N·m; mask is (B, F, S)."""
    part = slice(3, 6) if torque else slice(0, 3)
    return masked_sums((predicted - target)[..., part].abs().mean(-1), mask)


def action_error(predicted: Tensor, target: Tensor, valid: Tensor, dims: Tensor) -> Sums:
    """Absolute error of actions (B, A, D) per step over valid steps (B, A) and real dimensions (B, D).

    Unit: the embodiment's own, averaged over its dimensions.
    """
    return masked_sums((predicted - target).abs(), valid[:, :, None] & dims[:, None, :])


def overlap(predicted: Tensor, target: Tensor, mask: Tensor) -> Sums:
    """Intersection and union in pixels of masks (B, T, V, h, w) bool over pictures where mask (B, T, V) is True.

    Pooled, it is the intersection over union of a set of clips; clips with nothing in either do not count.
    """
    both, either = (
        (kind & mask[..., None, None]).flatten(1).sum(1) for kind in (predicted & target, predicted | target)
    )
    return Sums(both.double()[:, None], either.double()[:, None])


def copy_last_frame(observation: Observation, steps: int) -> Tensor:
    """Baseline of the video: the newest pictures, repeated (B, steps, V, 3, h, w) in [0, 1]."""
    return (observation.rgb[:, -1:].float() / 255).expand(-1, steps, -1, -1, -1, -1)


def constant(newest: Tensor, frames: int) -> Tensor:
    """Baseline of poses, points and wrenches: the newest value (B, ...) repeated to (B, frames, ...)."""
    return newest[:, None].expand(-1, frames, *newest.shape[1:])


def hold_pose(last_action: Tensor, gripper: Tensor, steps: int) -> Tensor:
    """Baseline of displacement actions: stay where you are, (B, steps, D).

    Zero in every dimension but the gripper's (gripper (D,) bool), which keeps the action executed one step before
    (last_action (B, D); zeros at the start of an episode, where nothing was executed).
    """
    return constant(torch.where(gripper, last_action, 0.0), steps)


def chordal_mean(rotations: Tensor) -> Tensor:
    """Rotation (3, 3) that minimises the summed squared Frobenius distance to rotations (N, 3, 3).

    The arithmetic mean projected to SO(3) (Hartley et al. 2013, "Rotation averaging", sec. 5.3).
    """
    u, _, vh = torch.linalg.svd(rotations.double().mean(0))
    sign = torch.ones(3, dtype=u.dtype)
    sign[2] = torch.linalg.det(u @ vh)
    return (u @ torch.diag(sign) @ vh).to(rotations.dtype)


@dataclass
class Rows:
    """One figure over a set of clips: our sums and those of each named baseline, a row per clip."""

    ours: list[Sums] = field(default_factory=list)
    baselines: dict[str, list[Sums]] = field(default_factory=dict)

    def add(self, ours: Sums, **baselines: Sums) -> None:
        """Append one batch; every batch brings the same baselines (underscores in their names become spaces)."""
        self.ours.append(ours)
        for name, sums in baselines.items():
            self.baselines.setdefault(name.replace("_", " "), []).append(sums)


def joined(batches: list[Sums]) -> Sums:
    """Stack the rows of several batches."""
    return Sums(torch.cat([b.total for b in batches]), torch.cat([b.weight for b in batches]))


class Summary(NamedTuple):
    """A figure and the 2.5 and 97.5 percentiles of its bootstrap distribution; NaN where nothing was measured."""

    value: float
    low: float
    high: float


def resampling_counts(episodes: list[str], seed: int, resamples: int = 1000) -> tuple[Tensor, Tensor]:
    """How often each bootstrap resample draws each episode (resamples, E), and the episode of each clip (N,)."""
    names = {name: i for i, name in enumerate(dict.fromkeys(episodes))}
    owner = torch.tensor([names[e] for e in episodes])
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(names), (resamples, len(names)), generator=generator)
    counts = torch.zeros(resamples, len(names), dtype=torch.float64)
    return counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64)), owner


def pooled(sums: Sums, decibel: bool) -> Tensor:
    """The figure of each horizon step (steps,): mean over clips, in dB of the mean if asked."""
    mean = sums.total.sum(0) / sums.weight.sum(0)
    return psnr(mean) if decibel else mean


def bootstrap(sums: Sums, counts: Tensor, owner: Tensor, decibel: bool = False) -> Tensor:
    """Figure over all clips and steps for the sample itself (first) and for each resample: (1 + resamples,).

    Whole episodes are drawn with replacement, so clips of one episode are not counted as independent.
    """
    episodes = counts.shape[1]
    total = torch.zeros(episodes, dtype=torch.float64).index_add_(0, owner, sums.total.sum(1))
    weight = torch.zeros(episodes, dtype=torch.float64).index_add_(0, owner, sums.weight.sum(1))
    every = torch.cat((torch.ones(1, episodes, dtype=torch.float64), counts))
    mean = (every @ total) / (every @ weight)
    return psnr(mean) if decibel else mean


def summary(distribution: Tensor) -> Summary:
    """Value and 95 % percentile interval of what `bootstrap` returned; resamples that drew nothing are left out."""
    value, resamples = distribution[0], distribution[1:]
    resamples = resamples[~resamples.isnan()]
    if value.isnan() or len(resamples) == 0:
        return Summary(float("nan"), float("nan"), float("nan"))
    low, high = torch.quantile(resamples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Summary(value.item(), low, high)
