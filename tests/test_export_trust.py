"""Confidence is a frequency on clips that it was not fitted to; novelty tells other data from the training data."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.trust import KNOTS, Samples, Trust, auroc, calibrate, familiarity, isotonic, no_trust
from worldmodel.errors import ExportError

torch.set_num_threads(1)

W, P = 6, 4


def samples(count: int, seed: int, shift: float = 0.0) -> Samples:
    """Answers whose error grows with their doubt and one feature; `shift` moves the instruction away."""
    rng = np.random.default_rng(seed)
    doubt, features = rng.lognormal(size=count), rng.normal(size=(count, W))
    presence = np.ones((count, 7))
    presence[::5, 5] = 0
    proprio = rng.normal(size=(count, P)) * presence[:, 5:6]
    error = 0.1 * doubt * np.exp(features[:, 0] + 0.5 * rng.normal(size=count))
    return Samples(
        doubt=doubt,
        features=features,
        instruction=rng.normal(size=(count, W)) + shift,
        proprio=proprio,
        presence=presence,
        pattern=np.arange(count) % 2,
        error=error,
    )


def ask(trust: Trust, s: Samples) -> tuple[np.ndarray, np.ndarray]:
    parts = (s.doubt, s.features, s.instruction, s.proprio, s.presence)
    confidence, novelty = trust(*(torch.tensor(x, dtype=torch.float32) for x in parts))
    return confidence.numpy(), novelty.numpy()


def test_confidence_is_the_share_of_good_answers() -> None:
    made = calibrate(samples(400, 0), samples(400, 1), {"moved": samples(80, 2, 9.0)}, good_error=None, quantile=0.99)
    report = made.report
    assert report["auroc"] > 0.85 and report["calibration_error"] < 0.1
    assert report["brier"] < 0.7 * report["brier_of_base_rate"]
    fresh = samples(2000, 3)
    confidence, novelty = ask(Trust(made), fresh)
    good = fresh.error <= made.report["good_error"]
    for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
        inside = (confidence >= low) & (confidence < high)
        assert abs(confidence[inside].mean() - good[inside].mean()) < 0.1, (low, high)
    assert (novelty > 1).mean() < 0.1
    assert report["flagged"]["moved"] > 0.95 and (ask(Trust(made), samples(80, 4, 9.0))[1] > 1).mean() > 0.95
    # In the graph it is what the report was made with.
    expected = np.interp(fresh.inputs @ made.weights + made.offset, made.knots, made.confidence)
    np.testing.assert_allclose(confidence, expected, atol=1e-4)


def test_what_is_absent_is_not_unfamiliar() -> None:
    trust = Trust(calibrate(samples(200, 0), samples(200, 1), {}, good_error=0.2, quantile=0.99))
    strange = samples(40, 2)
    strange = replace(strange, proprio=np.full((40, P), 50.0), instruction=np.full((40, W), 50.0))
    assert (ask(trust, strange)[1] > 1).all()
    presence = strange.presence.copy()
    presence[:, 5:] = 0
    assert (ask(trust, replace(strange, presence=presence))[1] > 1).mean() < 0.2


def test_a_single_instruction_is_familiar_whatever_the_rounding() -> None:
    told = np.random.default_rng(3).normal(size=W)

    def alike(n: int, seed: int, noise: float = 1e-6) -> Samples:
        rounding = noise * np.random.default_rng(seed).normal(size=(n, W))
        return replace(samples(n, seed), instruction=told + rounding)

    trust = Trust(calibrate(alike(200, 0), alike(200, 1), {}, good_error=0.2, quantile=0.99))
    exact = ask(trust, alike(80, 4, 0.0))[1]
    np.testing.assert_allclose(ask(trust, alike(80, 4))[1], exact, atol=2e-4)
    assert (exact > 1).mean() < 0.1
    assert (ask(trust, replace(alike(80, 4), instruction=np.roll(told, 1)[None].repeat(80, 0)))[1] > 1).all()


def test_isotonic_curves_never_rise_and_pool_what_would() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    knots, values = isotonic(x, (rng.random(300) < 1 / (1 + np.exp(3 * x))).astype(float))
    assert len(knots) <= KNOTS and (np.diff(knots) > 0).all() and (np.diff(values) <= 0).all()
    assert 0 < values[-1] < 0.2 and 0.8 < values[0] < 1
    knots, values = isotonic(x, (x > 0).astype(float))
    assert len(knots) == 2 and values[0] == values[1] == pytest.approx(0.5, abs=0.05)


def test_familiarity_is_the_mahalanobis_distance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 3)) * [1.0, 10.0, 0.1] + 4
    near = familiarity(x, np.zeros(len(x), int))
    far = near.distance(np.array([[4.0, 4, 4], [7, 4, 4], [4, 34, 4]]))
    np.testing.assert_allclose(far[0], 0, atol=0.05)
    assert far[2] == pytest.approx(3 / np.sqrt(3), rel=0.1)


def test_ranks_with_ties_and_without_both_kinds() -> None:
    assert auroc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1.0, 1, 0, 0])) == 0.875
    assert auroc(np.ones(3), np.ones(3)) == 0.5


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(ExportError, match=r"200 training and 7 held-out clips with actions; expected 8 or more"):
        calibrate(samples(200, 0), samples(7, 1), {}, good_error=None, quantile=0.99)
    confidence, novelty = ask(Trust(no_trust(W, P)), samples(5, 0))
    assert (confidence == 0.5).all() and (novelty < 1e-3).all()
