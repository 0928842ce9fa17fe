"""How far an answer can be trusted: a calibrated confidence and a flag for unfamiliar observations, inside the graph."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldmodel.contracts import ClipSpec
from worldmodel.errors import ExportError

KNOTS = 12
"""Most points of the curve from the doubt of an answer to its confidence."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the model said about recorded clips, row by row."""

    doubt: np.ndarray  # (n,)
    features: np.ndarray  # (n, W)
    proprio: np.ndarray  # (n, P), standardised
    pattern: np.ndarray  # (n,) int, which senses were there
    has_proprio: np.ndarray  # (n,) bool
    error: np.ndarray  # (n,), mean absolute error of the actions in their standard deviations; NaN where unknown


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What `Trust` computes with; the same numbers stand in the manifest but for the two large matrices."""

    knots: np.ndarray  # (k,) increasing doubt
    confidence: np.ndarray  # (k,) decreasing
    good_error: float
    centres: np.ndarray  # (patterns, W), whitened
    whiten: np.ndarray  # (W, W)
    proprio_centre: np.ndarray  # (P,), whitened
    proprio_whiten: np.ndarray  # (P, P)
    thresholds: tuple[float, float]  # of the distances of features and proprioception
    report: dict[str, Any] = field(default_factory=dict)


class Trust(nn.Module):
    """Confidence and novelty of an answer.

    Confidence is the share of held-out answers with such a doubt whose error was at most `good_error`: a piecewise
    linear curve through isotonic regression (Zadrozny & Elkan 2002). Novelty is the Mahalanobis distance of what the
    action transformer reads (mean of the context) from the nearest centre of the training data, one centre for each
    pattern of present senses, with one covariance for all (Lee et al. 2018, arXiv 1807.03888), and that of the
    proprioception; each over its threshold, the larger counts.
    """

    def __init__(self, calibration: Calibration) -> None:
        super().__init__()
        for name in ("knots", "confidence", "centres", "whiten", "proprio_centre", "proprio_whiten", "thresholds"):
            value = torch.as_tensor(np.asarray(getattr(calibration, name)), dtype=torch.float32)
            self.register_buffer(name, value, persistent=False)

    def forward(self, doubt: Tensor, features: Tensor, proprio: Tensor, has_proprio: Tensor) -> tuple[Tensor, Tensor]:
        """doubt (B,), features (B, W), standardised proprioception (B, P), its presence (B,) -> confidence, novelty."""
        knots, values = self.get_buffer("knots"), self.get_buffer("confidence")
        along = ((doubt.unsqueeze(1) - knots[:-1]) / (knots[1:] - knots[:-1])).clamp(0, 1)
        confidence = values[0] + (along * (values[1:] - values[:-1])).sum(1)
        seen = features @ self.get_buffer("whiten")
        far = (seen.unsqueeze(1) - self.get_buffer("centres")).square().mean(2).amin(1).sqrt()
        place = proprio @ self.get_buffer("proprio_whiten") - self.get_buffer("proprio_centre")
        odd = place.square().mean(1).sqrt() * has_proprio
        limit = self.get_buffer("thresholds")
        return confidence, torch.maximum(far / limit[0], odd / limit[1])


def calibrate(
    known: Samples, held_out: Samples, others: dict[str, Samples], *, good_error: float | None, quantile: float
) -> Calibration:
    """Fits the curve and the thresholds, and reports how well they do on clips that they were not fitted to.

    Args:
        known: training clips, which say what is familiar.
        held_out: clips of held-out episodes: confidence and thresholds.
        others: further clips, whose flagged share is reported.
        good_error: error up to which an answer is good, in standard deviations of the actions; None is the median of
            the held-out errors.
        quantile: share of the held-out observations that are not flagged.

    Raises:
        ExportError: fewer than eight held-out clips with actions, or answers without any doubt to tell them apart.
    """
    fit = np.isfinite(held_out.error)
    doubt, error = held_out.doubt[fit], held_out.error[fit]
    if len(error) < 8:
        raise ExportError(f"confidence: {len(error)} held-out clips with actions; expected 8 or more to calibrate on")
    bound = float(np.median(error)) if good_error is None else good_error
    good = (error <= bound).astype(np.float64)
    whiten, centres = whitening(known.features, known.pattern)
    rows = known.has_proprio if known.has_proprio.any() else np.ones_like(known.has_proprio)
    proprio_whiten, proprio_centres = whitening(known.proprio[rows], np.zeros(rows.sum(), int))

    def distances(samples: Samples) -> np.ndarray:
        seen = samples.features @ whiten
        far = np.sqrt(np.square(seen[:, None] - centres).mean(2).min(1))
        odd = np.sqrt(np.square(samples.proprio @ proprio_whiten - proprio_centres[0]).mean(1)) * samples.has_proprio
        return np.stack([far, odd], 1)

    own = distances(held_out)
    thresholds = np.maximum(np.quantile(own, quantile, axis=0), 1e-6)
    # Every second clip calibrates the others: figures on clips that the curve has not seen.
    scores, flags = np.zeros(len(good)), np.zeros(len(own), bool)
    for half in (0, 1):
        inside, outside = np.arange(len(good)) % 2 == half, np.arange(len(own)) % 2 == half
        scores[~inside] = np.interp(doubt[~inside], *isotonic(doubt[inside], good[inside]))
        flags[~outside] = (own[~outside] > np.quantile(own[outside], quantile, axis=0)).any(1)
    knots, values = isotonic(doubt, good)
    report: dict[str, Any] = {
        "clips": len(good),
        "good_error": bound,
        "meaning": "share of held-out answers with such a doubt whose mean absolute error, in standard deviations of "
        "the actions, is at most good_error",
        "base_rate": float(good.mean()),
        "brier": float(np.square(scores - good).mean()),
        "brier_of_base_rate": float(good.mean() * (1 - good.mean())),
        "auroc": auroc(scores, good),
        "calibration_error": calibration_error(scores, good),
        "curve": [[float(a), float(b)] for a, b in zip(knots, values, strict=True)],
        "quantile": quantile,
        "flagged": {"heldout_episodes": float(flags.mean())},
    }
    for name, samples in others.items():
        report["flagged"][name] = float((distances(samples) > thresholds).any(1).mean())
        right = np.isfinite(samples.error)
        if right.any():
            said = np.interp(samples.doubt[right], knots, values).mean()
            report.setdefault("elsewhere", {})[name] = {
                "mean_confidence": float(said),
                "good": float((samples.error[right] <= bound).mean()),
            }
    return Calibration(
        knots=knots,
        confidence=values,
        good_error=bound,
        centres=centres,
        whiten=whiten,
        proprio_centre=proprio_centres[0],
        proprio_whiten=proprio_whiten,
        thresholds=(float(thresholds[0]), float(thresholds[1])),
        report=report,
    )


def isotonic(doubt: np.ndarray, good: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots and values of a non-increasing curve through the shares of good answers in bins of equal size.

    Pools adjacent violators (Ayer et al. 1955) over bins, and shrinks every bin by one good and one bad answer, so that
    no confidence is 0 or 1 for lack of clips.
    """
    order = np.argsort(doubt, kind="stable")
    blocks: list[list[float]] = []  # sum of doubt, count, smoothed good, smoothed count
    for part in np.array_split(order, min(KNOTS, max(2, len(doubt) // 4))):
        blocks.append([float(doubt[part].sum()), len(part), float(good[part].sum()) + 1, len(part) + 2])
        while len(blocks) > 1 and blocks[-1][2] / blocks[-1][3] > blocks[-2][2] / blocks[-2][3]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    knots, values = [b[0] / b[1] for b in blocks], [b[2] / b[3] for b in blocks]
    if len(knots) == 1 or knots[-1] - knots[0] < 1e-9:
        knots, values = [knots[0], knots[0] + 1.0], [values[0], values[-1]]
    kept = [0, *(i for i in range(1, len(knots)) if knots[i] > knots[i - 1])]
    return np.array(knots)[kept], np.array(values)[kept]


def whitening(x: np.ndarray, pattern: np.ndarray, shrink: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Whitening (W, W) of the covariance around the mean of each pattern, and the whitened means (patterns, W).

    The covariance is drawn towards its mean variance by `shrink`, as there are hardly more clips than dimensions.
    """
    means = np.stack([x[pattern == k].mean(0) for k in np.unique(pattern)])
    centred = x - means[np.searchsorted(np.unique(pattern), pattern)]
    covariance = centred.T @ centred / max(1, len(x) - len(means))
    covariance += (shrink * np.trace(covariance) / len(covariance) + 1e-6) * np.eye(len(covariance))
    variance, axes = np.linalg.eigh(covariance.astype(np.float64))
    matrix = axes / np.sqrt(variance)
    return matrix, means @ matrix


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


def no_trust(spec: ClipSpec, width: int) -> Calibration:
    """A calibration that claims nothing, for tracing and timing where nothing is measured."""
    return Calibration(
        knots=np.array([0.0, 1.0]),
        confidence=np.array([0.5, 0.5]),
        good_error=float("nan"),
        centres=np.zeros((1, width)),
        whiten=np.eye(width),
        proprio_centre=np.zeros(spec.proprio),
        proprio_whiten=np.eye(spec.proprio),
        thresholds=(FAR, FAR),
    )


FAR = 1e6
"""A threshold that nothing passes."""
