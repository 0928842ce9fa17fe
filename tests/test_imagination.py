"""Imagined against real outcomes: candidates, states that come back, and what the figures mean."""

from typing import Any

import numpy as np
import pytest
from test_closed_loop import TowardsZero

from worldmodel.errors import ConfigError, ContractError
from worldmodel.imagination import (
    Candidates,
    coverage,
    execute,
    fitted_width,
    nominal,
    rank_correlation,
    ranked_pairs,
    reach,
    widened,
)


class PushScene:
    """A hand on a line that pushes an object before it; with `drift` no episode repeats another."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift, self.resets = drift, 0

    def _observe(self) -> dict[str, Any]:
        points = np.array([[self.object, 0, 0], [1, 0, 0]], np.float32)
        return {"proprio": np.array([self.hand, 0, 0], np.float32), "points": points, "instruction": "push"}

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        self.resets += 1
        self.hand, self.object = float(rng.uniform(-1, -0.5)) + self.drift * self.resets, 0.0
        return self._observe()

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        self.hand += 0.01 * float(action[0])
        self.object = max(self.object, self.hand)
        return self._observe(), False


def reached(scene: Any, trial: int = 0) -> Any:
    settings = {"task": "push", "trial": trial, "seed": 3, "replan": 4, "stride": 4}
    return reach(scene, TowardsZero(), Candidates(count=6), **settings)


def test_candidates_are_the_policys_own_chunk_and_others_within_limits():
    chunk = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
    found = Candidates(count=5, spread=0.5)(chunk, np.random.default_rng(0))
    assert np.array_equal(found[0], chunk) and np.abs(found).max() == 1
    middle = np.zeros((8, 4), np.float32)
    apart = Candidates(count=5, spread=0.1)(middle, np.random.default_rng(0))[1:]
    assert np.array_equal(apart[:, 0], apart[:, 7]) and len({float(x) for x in apart[:, 0, 0]}) == 4
    with pytest.raises(ConfigError, match="at least 2"):
        Candidates(count=1)


def test_every_candidate_starts_from_the_state_that_was_reached():
    scene = PushScene()
    states = [reached(scene, trial) for trial in range(6)]
    assert len({len(state.done) for state in states}) > 1
    state = max(states, key=lambda each: len(each.done))
    before, real = execute(scene, state, seed=3, steps=8)
    assert np.allclose(before.hand, state.history[-1]["proprio"])
    ends = before.hand[0] + 0.01 * state.chunks[:, :8, 0].sum(1)
    assert np.allclose(real.hand[:, 0], ends, atol=1e-6)
    assert np.allclose(
        real.points[:, 0, 0], np.maximum(before.points[0, 0], np.maximum(ends, before.hand[0])), atol=2e-2
    )
    again = reached(PushScene(), state.trial)
    assert np.array_equal(again.chunks, state.chunks) and np.array_equal(again.done, state.done)


def test_a_simulator_that_does_not_come_back_is_refused():
    scene = PushScene()
    state = next(state for state in (reached(scene, trial) for trial in range(9)) if len(state.done) > 20)
    state.history[-1]["points"] = state.history[-1]["points"] + 0.01
    with pytest.raises(ContractError, match="the same actions led to another state"):
        execute(scene, state, seed=3, steps=8)


def test_pairs_count_where_they_clearly_differ():
    real = np.array([0.0, 1.0, 1.001, 3.0])
    assert ranked_pairs(real, real, 0.01) == (5, 5)
    assert ranked_pairs(real, -real, 0.01) == (0, 5)
    assert ranked_pairs(real, np.array([0.0, 3.0, 2.0, 1.0]), 0.01) == (3, 5)
    assert ranked_pairs(real, np.zeros(4), 0.01) == (2.5, 5)
    assert rank_correlation(real, real**3) == pytest.approx(1) and rank_correlation(real, -real) == pytest.approx(-1)
    assert np.isnan(rank_correlation(real, np.zeros(4)))


@pytest.mark.parametrize("drop", [0, 4])
def test_samples_of_the_truth_cover_it_as_often_as_they_should(drop):
    rng = np.random.default_rng(0)
    drawn = rng.standard_exponential((19, 4000))
    truth = rng.standard_exponential(4000)
    assert coverage(drawn, truth, drop).mean() == pytest.approx(nominal(19, drop), abs=0.03)
    assert (nominal(19, 0), nominal(19, 4)) == (0.9, 0.5)


def test_samples_that_are_too_sure_are_widened_to_cover():
    rng = np.random.default_rng(0)
    drawn = [0.1 * rng.standard_normal((19, 3)) for _ in range(600)]
    truth = [rng.standard_normal(3) for _ in range(600)]
    assert np.mean([coverage(d, t, 0) for d, t in zip(drawn, truth, strict=True)]) < 0.3
    factor = fitted_width(drawn[::2], truth[::2], 0)
    rest = [coverage(widened(d, factor), t, 0) for d, t in zip(drawn[1::2], truth[1::2], strict=True)]
    assert np.mean(rest) == pytest.approx(0.9, abs=0.03) and 5 < factor < 15
