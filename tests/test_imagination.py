"""Imagined against real outcomes: candidates, states that come back, and what the figures mean."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_closed_loop import TowardsZero
from test_streaming import flat_observation

from benchmarks.imagination import tables
from worldmodel.errors import ConfigError, ContractError
from worldmodel.imagination import (
    Candidates,
    State,
    coverage,
    execute,
    fitted_width,
    horizon,
    imagine,
    nominal,
    rank_correlation,
    ranked_pairs,
    reach,
    widened,
)


class PushScene:
    """A hand on a line that pushes an object before it; with `drift` no episode repeats another."""

    embodiment, hold, max_steps = "sawyer", np.zeros(4, np.float32), 125

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
    state = max((reached(scene, trial) for trial in range(20)), key=lambda each: each.history[-1]["proprio"][0])
    state = state._replace(chunks=np.abs(state.chunks))  # all of them push
    before, real = execute(scene, state, seed=3, steps=8)
    ends = before.hand[0] + 0.01 * state.chunks[:, :8, 0].sum(1)
    assert np.allclose(real.hand[:, 0], ends, atol=1e-5)
    assert np.allclose(real.points[:, 0, 0], np.maximum(before.points[0, 0], ends), atol=1e-5)
    assert real.points[:, 0, 0].max() > before.points[0, 0]
    again = reached(PushScene(), state.trial)
    assert np.array_equal(again.done, state.done) and len(again.history) == len(again.done) + 1
    assert len(again.done) % 4 == 0


def test_a_simulator_that_does_not_come_back_is_refused():
    scene = PushScene(drift=1e-3)
    state = reached(scene)
    with pytest.raises(ContractError, match="the same actions led to another state"):
        execute(scene, state, seed=3, steps=8)


def test_what_is_imagined_is_read_where_the_chunk_ends(tiny_model, monkeypatch):
    """The hand goes with its camera; candidates share their noise, samples have their own."""
    spec = tiny_model.spec
    history = [flat_observation(spec, step) for step in range(3)]
    chunks = np.random.default_rng(0).uniform(-1, 1, (3, spec.chunk, 4)).astype(np.float32)
    asked: dict[str, Any] = {}

    def predict(observation: Any, future: Any, mode: str, **settings: Any) -> Any:
        asked.update(settings, mode=mode, actions=future.actions)
        rows = len(future.actions)
        path = observation.camera_to_base[:, -1:].repeat(1, spec.future, 1, 1, 1)
        path[:, :, 1, 0, 3] += torch.arange(rows)[:, None] + 0.1 * torch.arange(1, spec.future + 1)
        points = torch.zeros(rows, spec.future, spec.points, 3) + torch.arange(rows)[:, None, None, None]
        return SimpleNamespace(camera_to_base=path, points=points)

    monkeypatch.setattr(tiny_model, "predict", predict)
    state = State("push", 0, np.zeros((2, 4), np.float32), history, chunks)
    given: dict[str, Any] = {"samples": 4, "generator": torch.Generator().manual_seed(0)}
    imagined, samples = imagine(tiny_model, state, camera="wrist", **given)
    hand = history[-1]["proprio"][0] + 0.1 * (horizon(spec) // spec.stride)
    assert np.allclose(imagined.hand[:, 0] - hand, [0, 1, 2], atol=1e-5)
    assert np.allclose(samples.hand[:, 0] - hand, [3, 4, 5, 6], atol=1e-5)
    assert imagined.points.shape == (3, len(history[-1]["points"]), 3) and samples.points[0, 0, 0] == 3
    assert (
        np.allclose(asked["actions"][:, :, :4], chunks[[0, 1, 2, 0, 0, 0, 0]]) and not asked["actions"][:, :, 4:].any()
    )
    for noise in asked["noise"].values():
        assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2])
        assert len({float(row.flatten()[0]) for row in noise}) == 5
    with pytest.raises(ConfigError, match="'top' is none of front, wrist"):
        imagine(tiny_model, state, camera="top", **given)


def test_noise_has_the_shapes_that_the_model_takes(tiny_model):
    history = [flat_observation(tiny_model.spec, step) for step in range(3)]
    state = State("push", 0, np.zeros((2, 4), np.float32), history, np.zeros((2, 8, 4), np.float32))
    imagined, samples = imagine(
        tiny_model, state, camera="wrist", samples=2, generator=torch.Generator().manual_seed(0)
    )
    assert np.array_equal(imagined.hand[0], imagined.hand[1]), "the same actions and noise"
    assert np.isfinite(samples.points).all()


def test_pairs_count_where_they_clearly_differ():
    real = np.array([0.0, 1.0, 1.001, 3.0])
    assert ranked_pairs(real, real, 0.01) == (5, 5)
    assert ranked_pairs(real, -real, 0.01) == (0, 5)
    assert ranked_pairs(real, np.array([0.0, 3.0, 2.0, 1.0]), 0.01) == (3, 5)
    assert ranked_pairs(real, np.zeros(4), 0.01) == (2.5, 5)
    assert rank_correlation(real, real**3) == pytest.approx(1) and rank_correlation(real, -real) == pytest.approx(-1)
    assert np.isnan(rank_correlation(real, np.zeros(4)))
    assert rank_correlation(np.array([0.0, 0, 0, 1]), np.array([3.0, 2, 1, 4])) == pytest.approx(0.7746, abs=1e-4)


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


@pytest.mark.parametrize("drop", [0, 4])
def test_widening_covers_what_it_was_fitted_to_however_skewed(drop):
    rng = np.random.default_rng(0)
    drawn = [rng.exponential(1, (19, 1)) ** 3 for _ in range(200)]
    truth = [rng.exponential(2, 1) ** 3 for _ in range(200)]
    factor = fitted_width(drawn, truth, drop)
    shares = [
        np.mean([coverage(widened(d, f), t, drop) for d, t in zip(drawn, truth, strict=True)])
        for f in (0.9 * factor, factor * (1 + 1e-9))
    ]
    assert shares[0] < nominal(19, drop) <= shares[1]


def test_tables_say_what_the_states_say():
    outcomes = {"real": [0.0, 0.1, 0.2], "imagined": [0.0, 0.2, 0.1], "integrated actions": [0.0, 0.0, 0.0]}
    one = {
        "outcomes": {kind: {"hand to object": value} for kind, value in outcomes.items()},
        "errors": {"imagined": {"hand": 0.001, "object": 0.002}, "all stays": {"hand": 0.003, "object": 0.004}},
        "samples": {part: np.linspace(0, 1, 19)[:, None].repeat(3, 1).tolist() for part in ("hand", "object")},
        "truth": {"hand": [0.5, 0.5, 2.0], "object": [0.5, 0.5, 0.5]},
    }
    found = tables([one, one], 0.005, 19)
    assert "| hand to object | imagined | 66.7% | 67%-67% | 0.50 | 0.50 to 0.50 | 6 | 2 |" in found
    assert "| hand to object | integrated actions | 50.0% | 50%-50% | – | – | 6 | 2 |" in found
    assert "object to goal" not in found and "| all stays | 3.0 | 3.0-3.0 | 4.0 | 4.0-4.0 |" in found
    assert "| hand | 90% | 67% | 67%-67% |" in found and "| object | 90% | 100% | 100%-100% |" in found
