"""Fault drill on a made-up scene: whatever goes wrong between sensors and arm, commands stay finite and inside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import SPEC
from test_controller import observed

from export.drill import FAULTS, ONSET, Line, Watch, drill_trial
from export.runtime import Controller, OnnxPolicy
from worldmodel.closed_loop import Rollout
from worldmodel.errors import ConfigError

torch.set_num_threads(1)

STEPS = 60


class Hand:
    """A hand without inertia that is never done; keeps what it was told."""

    embodiment, hold, max_steps = "sawyer", np.zeros(4, np.float32), 125

    def __init__(self) -> None:
        self.told: list[np.ndarray] = []

    def _observe(self, images: bool) -> dict[str, Any]:
        observation = observed(len(self.told) % 250, images)
        observation["proprio"][:3] = self.place
        return observation

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        self.told, self.place = [], np.array([rng.uniform(-0.4, 0.4), 0.7, 0.25])
        return self._observe(images)

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        self.told.append(np.array(action))
        self.place = self.place + action[:3] * 0.8 / SPEC.fps
        return self._observe(images), False


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_reaches_the_arm(robot_artefact: Path, fault: str, needed: bool) -> None:
    policy = OnnxPolicy(robot_artefact, allow_missing=() if needed else ("front",))
    rollout, scene = Rollout(max_steps=STEPS, delay=2), Hand()
    make = lambda: Controller(policy, replan=4, realtime=True, stop_after=0.5)  # noqa: E731
    result = drill_trial(make, scene, "task", 0, fault, rollout=rollout)
    assert result.watch.not_finite == result.watch.outside == 0 and len(scene.told) == STEPS
    assert result.watch.farthest < 1e-6
    # A camera that the policy needs and does not have ends in a stop, everything else goes on.
    assert (result.states["stop"] > 0) == (needed and fault.startswith("camera"))
    if not result.states["stop"]:
        assert result.states["run"] > 0.8 * STEPS
    assert (result.dropped > 0) == (fault == "force not a number")


def test_without_faults_the_loop_is_the_usual_one(robot_artefact: Path) -> None:
    policy, scene, rollout = OnnxPolicy(robot_artefact), Hand(), Rollout(max_steps=STEPS)
    rollout(scene, policy, "task", 0)
    usual = np.stack(scene.told)
    drill_trial(lambda: Controller(policy, replan=4), scene, "task", 0, "none", rollout=rollout)
    np.testing.assert_allclose(np.stack(scene.told), usual, atol=1e-5)


def test_the_watch_sees_what_the_limits_forbid(robot_artefact: Path) -> None:
    watch = Watch(OnnxPolicy(robot_artefact).robot, SPEC.fps)
    watch(np.array([1.0, -1.0, 0.0, 1.0]), observed(0))
    assert (watch.not_finite, watch.outside) == (0, 0)
    watch(np.array([0.0, 0.0, 0.0, 1.1]), observed(0))
    watch(np.array([np.nan, 0.0, 0.0, 0.0]), observed(0) | {"proprio": np.array([0, 0.3, 0.25, 0, 0])})
    assert (watch.not_finite, watch.outside) == (1, 2) and watch.farthest == pytest.approx(0.1)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_line_does_what_its_fault_says(fault: str) -> None:
    line = Line(fault, "front", SPEC.fps, 4, np.random.default_rng(0))
    pictures: list[tuple[int, int]] = []
    late, arrived, bad = 0, 0, 0
    for step in range(400):
        line.send(step, observed(step % 250, step % 4 == 0))
        for sent, message in line.due(step):
            arrived += "proprio" in message
            late = max(late, step - sent)
            bad += bool(np.isnan(message.get("wrench", 0)).any())
            if "rgb.front" in message:
                pictures.append((sent, int(message["rgb.front"][0, 0, 0])))
    times = [sent for sent, _ in pictures]
    assert (times == sorted(times)) == (fault != "reordered frames")
    assert late == {"stalls of 200 ms": 4, "reordered frames": 5}.get(fault, 0)
    assert bad == (400 - ONSET if fault == "force not a number" else 0)
    assert (max(times) < ONSET) == (fault == "camera dropped")
    assert (len({value for sent, value in pictures if sent >= ONSET}) == 1) == (fault == "camera frozen")
    assert arrived >= 395


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of none, camera dropped"):
        Line("flood", "front", 20.0, 4, np.random.default_rng(0))
