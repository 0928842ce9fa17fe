"""How far an answer can be trusted: a calibrated confidence and a flag for what is unfamiliar, inside the graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.errors import ExportError

KNOTS = 12
"""Most points of the curve from the expected error of an answer to its confidence."""
PENALTY = 30.0
"""Of the ridge regression that expects the error, whose inputs have unit variance."""
SHRINK = 0.02
"""Share by which covariances are drawn towards their mean variance: there are hardly more clips than dimensions."""
NARROWEST = 0.03
"""Least deviation in any direction, of the root mean square of all numbers: one instruction has but rounding."""
NEAREST = 0.25
"""Least threshold of a distance, in deviations: what hardly varied in training is not unfamiliar by a hair."""
PARTS = ("features", "instruction", "proprio")
"""What is held against the training data, each by a distance of its own."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the model said about recorded clips, row by row."""

    doubt: np.ndarray  # (n,)
    features: np.ndarray  # (n, W)
    instruction: np.ndarray  # (n, W)
    proprio: np.ndarray  # (n, P), standardised, zero where absent
    presence: np.ndarray  # (n, 7), share of each sense that is there, the last two proprioception and instruction
    pattern: np.ndarray  # (n,) int, which senses were hidden
    error: np.ndarray  # (n,), mean absolute error of the actions in their standard deviations; NaN where unknown

    @property
    def inputs(self) -> np.ndarray:
        """What the error is expected from (n, 8 + W + P)."""
        return np.concatenate([np.log(self.doubt + TINY)[:, None], self.presence, self.features, self.proprio], 1)


TINY = 1e-6


@dataclass(frozen=True, kw_only=True)
class Familiar:
    """Where the training data lie: distances are root mean squares of whitened differences from the nearest centre."""

    whiten: np.ndarray  # (W, W)
    centres: np.ndarray  # (k, W), whitened

    def distance(self, x: np.ndarray) -> np.ndarray:
        """(n, W) -> (n,)."""
        return np.sqrt(np.square((x @ self.whiten)[:, None] - self.centres).mean(2).min(1))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `Trust` computes with; curve and figures of it stand in the manifest."""

    weights: np.ndarray  # (8 + W + P,) of the expected logarithm of the error
    offset: float
    knots: np.ndarray  # (k,) increasing
    confidence: np.ndarray  # (k,) decreasing
    familiar: Mapping[str, Familiar]  # by PARTS
    thresholds: np.ndarray  # (3,) of the distances
    report: dict[str, Any] = field(default_factory=dict)


class Trust(nn.Module):
    """Confidence and novelty of an answer.

    A ridge regression, fitted on training clips, expects the error from the doubt of the answer, the present senses,
    what the action transformer reads and the proprioception. Confidence is the share of held-out answers with such an
    expectation whose error was good: a curve by isotonic regression (Zadrozny & Elkan 2002). Novelty is the largest of
    three Mahalanobis distances, each over its threshold: of what the action transformer reads, of the instruction and
    of the proprioception; the first has one centre for each pattern of hidden senses and one covariance for all (Lee et
    al. 2018, arXiv 1807.03888).
    """

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        c = calibration
        arrays: dict[str, Any] = {"weights": c.weights, "offset": c.offset, "knots": c.knots}
        arrays |= {"confidence": c.confidence, "thresholds": c.thresholds}
        for name in PARTS:
            arrays |= {f"{name}_whiten": c.familiar[name].whiten, f"{name}_centres": c.familiar[name].centres}
        for name, value in arrays.items():
            self.register_buffer(name, torch.as_tensor(np.asarray(value), dtype=torch.float32), persistent=False)

    def forward(
        self, doubt: Tensor, features: Tensor, instruction: Tensor, proprio: Tensor, presence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """doubt (B,), features, instruction (B, W), proprio (B, P), presence (B, 7) -> confidence and novelty (B,)."""
        inputs = torch.cat([(doubt + TINY).log().unsqueeze(1), presence, features, proprio], 1)
        expected = inputs @ self.get_buffer("weights") + self.get_buffer("offset")
        knots, values = self.get_buffer("knots"), self.get_buffer("confidence")
        along = ((expected.unsqueeze(1) - knots[:-1]) / (knots[1:] - knots[:-1])).clamp(0, 1)
        confidence = values[0] + (along * (values[1:] - values[:-1])).sum(1)
        far = []
        for name, x in zip(PARTS, (features, instruction, proprio), strict=True):
            seen = (x @ self.get_buffer(f"{name}_whiten")).unsqueeze(1) - self.get_buffer(f"{name}_centres")
            far.append(seen.square().mean(2).amin(1).sqrt())
        # What is absent is not unfamiliar.
        there = torch.cat([torch.ones_like(presence[:, :1]), presence[:, [6, 5]]], 1)
        return confidence, (torch.stack(far, 1) / self.get_buffer("thresholds") * there).amax(1)


def calibrate(
    known: Samples, held_out: Samples, others: dict[str, Samples], *, good_error: float | None, quantile: float
) -> Calibration:
    """Fits the regression, the curve and the thresholds, and reports how well they do on clips not fitted to.

    Args:
        known: training clips, which say what is familiar and which errors to expect.
        held_out: clips of held-out episodes: confidence and thresholds.
        others: further clips, whose flagged share and confidence are reported.
        good_error: error up to which an answer is good, in standard deviations of the actions; None is the median of
            the held-out errors.
        quantile: share of the held-out observations that stay below each threshold.

    Raises:
        ExportError: fewer than eight clips with actions, of training or held out.
    """
    right, fit = np.isfinite(known.error), np.isfinite(held_out.error)
    if min(right.sum(), fit.sum()) < 8:
        raise ExportError(
            f"confidence: {right.sum()} training and {fit.sum()} held-out clips with actions; expected 8 or more"
        )
    weights, offset = ridge(known.inputs[right], np.log(known.error[right] + 1e-3))
    expected, error = (held_out.inputs @ weights + offset)[fit], held_out.error[fit]
    bound = float(np.median(error)) if good_error is None else good_error
    good = (error <= bound).astype(np.float64)
    told, measured = known.presence[:, 6] > 0, known.presence[:, 5] > 0
    one = np.zeros(len(told), int)
    familiar = {
        "features": familiarity(known.features, known.pattern),
        "instruction": familiarity(known.instruction[told], one[told]),
        "proprio": familiarity(known.proprio[measured], one[measured]),
    }

    def distances(samples: Samples) -> np.ndarray:
        there = np.stack([np.ones(len(samples.doubt)), samples.presence[:, 6], samples.presence[:, 5]], 1)
        return np.stack([familiar[name].distance(getattr(samples, name)) for name in PARTS], 1) * there

    own = distances(held_out)
    thresholds = np.maximum(np.quantile(own, quantile, axis=0), NEAREST)
    # Every second clip calibrates the others: figures on clips that the curve has not seen.
    scores, flags = np.zeros(len(good)), np.zeros(len(own), bool)
    for half in (0, 1):
        inside, chosen = np.arange(len(good)) % 2 == half, np.arange(len(own)) % 2 == half
        scores[~inside] = np.interp(expected[~inside], *isotonic(expected[inside], good[inside]))
        limits = np.maximum(np.quantile(own[chosen], quantile, axis=0), NEAREST)
        flags[~chosen] = (own[~chosen] > limits).any(1)
    knots, values = isotonic(expected, good)
    report: dict[str, Any] = {
        "clips": len(good),
        "good_error": bound,
        "meaning": "confidence: share of held-out answers of such an expected error whose mean absolute error, in "
        "standard deviations of the actions, was at most good_error; it claims nothing out of distribution",
        "base_rate": float(good.mean()),
        "brier": float(np.square(scores - good).mean()),
        "brier_of_base_rate": float(good.mean() * (1 - good.mean())),
        "auroc": auroc(scores, good),
        "calibration_error": calibration_error(scores, good),
        "curve": [[float(a), float(b)] for a, b in zip(knots, values, strict=True)],
        "quantile": quantile,
        "flagged": {"heldout_episodes": float(flags.mean())},
        "elsewhere": {},
    }
    for name, samples in others.items():
        odd = (distances(samples) > thresholds).any(1)
        report["flagged"][name] = float(odd.mean())
        rows = np.isfinite(samples.error)
        if rows.any():
            said = np.interp((samples.inputs @ weights + offset)[rows], knots, values)
            report["elsewhere"][name] = {
                "mean_confidence": float(said.mean()),
                "good": float((samples.error[rows] <= bound).mean()),
            }
    return Calibration(
        weights=weights,
        offset=offset,
        knots=knots,
        confidence=values,
        familiar=familiar,
        thresholds=thresholds,
        report=report,
    )


def ridge(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights and offset of a ridge regression on standardised inputs, for inputs as they are."""
    mean, std = x.mean(0), x.std(0) + 1e-3
    scaled = (x - mean) / std
    weights = np.linalg.solve(scaled.T @ scaled + PENALTY * np.eye(x.shape[1]), scaled.T @ (y - y.mean())) / std
    return weights, float(y.mean() - mean @ weights)


def isotonic(x: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots and values of a non-increasing curve through the shares of good answers in bins of equal size.

    Pools adjacent violators (Ayer et al. 1955) over bins, and shrinks every bin by one good and one bad answer, so that
    no confidence is 0 or 1 for lack of clips.
    """
    order = np.argsort(x, kind="stable")
    blocks: list[list[float]] = []  # sum of x, count, smoothed good, smoothed count
    for part in np.array_split(order, min(KNOTS, max(2, len(x) // 4))):
        blocks.append([float(x[part].sum()), len(part), float(good[part].sum()) + 1, len(part) + 2])
        while len(blocks) > 1 and blocks[-1][2] / blocks[-1][3] > blocks[-2][2] / blocks[-2][3]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    knots, values = [b[0] / b[1] for b in blocks], [b[2] / b[3] for b in blocks]
    if len(knots) == 1 or knots[-1] - knots[0] < 1e-9:
        knots, values = [knots[0], knots[0] + 1.0], [values[0], values[-1]]
    kept = [0, *(i for i in range(1, len(knots)) if knots[i] > knots[i - 1])]
    return np.array(knots)[kept], np.array(values)[kept]


def familiarity(x: np.ndarray, pattern: np.ndarray) -> Familiar:
    """Whitening of the covariance around the mean of each pattern, and the whitened means."""
    if not len(x):
        return Familiar(whiten=np.eye(x.shape[1]), centres=np.zeros((1, x.shape[1])))
    kinds = np.unique(pattern)
    means = np.stack([x[pattern == kind].mean(0) for kind in kinds]).astype(np.float64)
    centred = x - means[np.searchsorted(kinds, pattern)]
    covariance = centred.T @ centred / max(1, len(x) - len(means))
    covariance += (SHRINK * np.trace(covariance) / len(covariance)) * np.eye(len(covariance))
    variance, axes = np.linalg.eigh(covariance)
    matrix = axes / np.sqrt(np.maximum(variance, NARROWEST**2 * np.square(x).mean() + TINY))
    return Familiar(whiten=matrix, centres=means @ matrix)


def auroc(scores: np.ndarray, good: np.ndarray) -> float:
    """Probability that a good answer has more confidence than a bad one, ties counting half; 0.5 without both kinds."""
    high, low = scores[good > 0.5], scores[good <= 0.5]
    if not len(high) or not len(low):
        return 0.5
    return float(((high[:, None] > low).mean() + (high[:, None] >= low).mean()) / 2)


def calibration_error(scores: np.ndarray, good: np.ndarray, bins: int = 5) -> float:
    """Mean distance of confidence and share of good answers over bins of equal size."""
    parts = np.array_split(np.argsort(scores, kind="stable"), bins)
    return float(sum(len(p) * abs(scores[p].mean() - good[p].mean()) for p in parts if len(p)) / len(scores))


def no_trust(width: int, proprio: int) -> Calibration:
    """A calibration that claims nothing, for tracing and timing where nothing is measured."""
    sizes = dict(zip(PARTS, (width, width, proprio), strict=True))
    return Calibration(
        weights=np.zeros(8 + width + proprio),
        offset=0.0,
        knots=np.array([0.0, 1.0]),
        confidence=np.array([0.5, 0.5]),
        familiar={name: Familiar(whiten=np.eye(size), centres=np.zeros((1, size))) for name, size in sizes.items()},
        thresholds=np.full(3, 1e6),
    )
