"""Chunks that overlap, averaged by age."""

import math
from typing import Any

import numpy as np
import pytest

from export.runtime import RuntimeContractError
from export.runtime.overlap import Overlap
from worldmodel.ensemble import EnsembleFactory
from worldmodel.errors import ConfigError


class Counting:
    """Answers chunks of three: call n says n at its first step, then n + 10, n + 20."""

    def reset(self) -> None:
        self.calls = 0

    def observe(self, observation: dict[str, Any]) -> None:
        """Nothing."""

    def act(self) -> np.ndarray:
        self.calls += 1
        return np.array([[self.calls], [self.calls + 10], [self.calls + 20]], np.float32)


def test_every_step_is_the_weighted_mean_of_what_was_said_of_it():
    policy = EnsembleFactory(lambda _: Counting(), math.log(2))("arm")
    for _ in range(2):
        policy.reset()
        policy.observe({})
        assert policy.act().ravel().tolist() == [1, 11, 21]
        policy.observe({})
        # One step later: 2, 12, 22 with weight 1 and 11, 21 with a half.
        assert policy.act().ravel() == pytest.approx([(2 + 5.5) / 1.5, (12 + 10.5) / 1.5, 22])
        for _ in range(2):
            policy.observe({})
        # The first chunk is over; of the second its last step is left, two steps old.
        assert policy.act().ravel() == pytest.approx([(3 + 22 / 4) / 1.25, 13, 23])


def test_the_first_chunk_counts_from_when_it_is_there():
    policy = EnsembleFactory(lambda _: Counting(), math.log(2), delay=1)("arm")
    for _ in range(2):
        policy.reset()
        policy.observe({})
        assert policy.act().ravel().tolist() == [1, 11, 21]
        for _ in range(2):
            policy.observe({})
        # It began a step ago, not two.
        assert policy.act().ravel() == pytest.approx([(2 + 5.5) / 1.5, (12 + 10.5) / 1.5, 22])
        policy.observe({})
        # The second began when it was asked for: a step ago; the first two steps ago.
        assert policy.act()[0] == pytest.approx((3 + 12 / 2 + 21 / 4) / 1.75)
    policy.reset()
    policy.act()
    with pytest.raises(ConfigError, match="asked again before 1 control steps"):
        policy.act()


def test_decay_decides_which_chunk_counts():
    for decay, expected in ((math.inf, 2.0), (0.0, 6.5), (-10.0, 11.0)):
        policy = EnsembleFactory(lambda _: Counting(), decay)("arm")
        policy.observe({})
        policy.act()
        policy.observe({})
        assert policy.act()[0, 0] == pytest.approx(expected, abs=1e-3)
    for wrong in (math.nan, -math.inf):
        with pytest.raises(ConfigError, match="decay"):
            EnsembleFactory(lambda _: Counting(), wrong)("arm")


@pytest.mark.parametrize("decay", [0.1, -0.5, 0.0, math.inf])
def test_the_runtime_of_a_robot_averages_alike(decay: float):
    rng = np.random.default_rng(0)
    chunks, gaps = rng.normal(size=(12, 8, 2)).astype(np.float32), rng.integers(1, 12, 12)

    class Told(Counting):
        def act(self) -> np.ndarray:
            self.calls += 1
            return chunks[self.calls - 1]

    policy, overlap = EnsembleFactory(lambda _: Told(), decay)("arm"), Overlap(decay)
    for chunk, gap in zip(chunks, gaps, strict=True):
        for _ in range(gap):
            policy.observe({})
        np.testing.assert_allclose(overlap(chunk, int(gap)), policy.act(), rtol=1e-5, atol=1e-6)
    overlap.forget()
    assert (overlap(chunks[0], 1) == chunks[0]).all()
    newest = Overlap(None)
    assert all((newest(chunk, 2) == chunk).all() for chunk in chunks)
    with pytest.raises(RuntimeContractError, match="ensemble: nan"):
        Overlap(math.nan)
