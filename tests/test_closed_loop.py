"""The loop itself, on a made-up scene: seeds, start states, replanning, images, parallel equality."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldmodel.closed_loop import Rollout, Scene, run_closed_loop, trial_generator
from worldmodel.contracts import Policy
from worldmodel.errors import ConfigError, ContractError
from worldmodel.trials import CLOSED_LOOP_STREAM, wilson_interval


class LineScene:
    """A point on a line that must reach 0; it starts between -1 and 1, so some starts are solved already."""

    hold = np.zeros(4, np.float32)
    max_steps = 125

    def __init__(self, task: str, solved_within: float = 0.1, embodiment: str = "sawyer") -> None:
        self.task, self.solved_within, self.embodiment = task, solved_within, embodiment
        self.position = 0.0
        self.log: list[tuple[str, bool]] = []

    def _observe(self, images: bool) -> dict[str, Any]:
        observation: dict[str, Any] = {"proprio": np.array([self.position], np.float32), "instruction": self.task}
        if images:
            observation["rgb.front"] = np.full((2, 2, 3), int(100 * self.position) % 256, np.uint8)
        return observation

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        self.position = float(rng.uniform(-1, 1))
        self.log.append(("reset", images))
        return self._observe(images)

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        self.position += 0.05 * float(np.clip(action[0], -1, 1))
        self.log.append(("step", images))
        return self._observe(images), abs(self.position) < self.solved_within


class TowardsZero:
    """Moves towards 0, or away from it in the task `hopeless`."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.acted_at: list[int] = []

    def reset(self) -> None:
        self.seen.clear()
        self.acted_at.clear()

    def observe(self, observation: dict[str, Any]) -> None:
        self.seen.append(observation)

    def act(self) -> np.ndarray:
        self.acted_at.append(len(self.seen) - 1)
        direction = -np.sign(self.seen[-1]["proprio"][0]) * (-1 if self.seen[-1]["instruction"] == "hopeless" else 1)
        return np.full((8, 4), direction)


@dataclass(frozen=True)
class TowardsZeroFactory:
    """Picklable, so that spawned workers can build the policy."""

    def __call__(self, robot: str) -> Policy:
        return TowardsZero()


@dataclass(frozen=True)
class LineScenes:
    """Picklable, so that spawned workers can build the scene."""

    def __call__(self, task: str, robot: str | None) -> Scene:
        return LineScene(task)


def test_wilson_interval_matches_published_values() -> None:
    # Newcombe, Two-sided confidence intervals for the single proportion, Statistics in Medicine 17 (1998), table I.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    with pytest.raises(ConfigError, match="3 successes of 2 trials"):
        wilson_interval(3, 2)


def test_success_is_counted_per_task_and_already_solved_starts_are_redrawn() -> None:
    result = run_closed_loop(
        TowardsZeroFactory(),
        ["easy", "hopeless"],
        trials=40,
        max_steps=25,
        workers=0,
        make_scene=LineScenes(),
        progress=False,
    )
    easy, hopeless = result.tasks
    assert (easy.success, hopeless.success, result.mean_success) == (1.0, 0.0, 0.5)
    assert easy.redrawn > 0 and hopeless.redrawn > 0
    assert 1 <= easy.mean_steps < 25 and hopeless.mean_steps == 25
    assert easy.interval == wilson_interval(40, 40)
    plain = json.loads(json.dumps(result.to_json()))
    assert plain["max_steps"] == 25 and "robots" not in plain and "robot" not in plain["tasks"][0]
    assert plain["tasks"][0]["successes"] == 40 and len(plain["tasks"][1]["outcomes"]) == 40
    assert "| easy | 100% |" in result.table()


def test_workers_do_not_change_the_result(tmp_path: Path) -> None:
    results = [
        run_closed_loop(
            TowardsZeroFactory(),
            ["a", "b"],
            trials=4,
            seed=3,
            max_steps=15,
            workers=workers,
            make_scene=LineScenes(),
            progress=False,
        )
        for workers in (0, 2)
    ]
    assert results[0].to_json() == results[1].to_json()
    results[0].write(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 3


def test_trial_starts_differ_from_each_other_and_from_recorded_episodes() -> None:
    def state(words: list[int]) -> int:
        return int(np.random.default_rng(np.random.SeedSequence(words)).integers(2**62))

    trials = [
        int(trial_generator(seed, task, trial, attempt).integers(2**62))
        for seed in (0, 1)
        for task in ("reach-v3", "push-v3")
        for trial in range(20)
        for attempt in range(2)
    ]
    episodes = [state([0, split, task, episode]) for split in range(3) for task in range(15) for episode in range(20)]
    assert len({*trials, *episodes}) == len(trials) + len(episodes)
    assert CLOSED_LOOP_STREAM > 1000


def test_images_are_rendered_only_where_the_policy_looks() -> None:
    scene, policy = LineScene("easy", solved_within=-1), TowardsZero()
    rollout = Rollout(replan=4, max_steps=10, image_every=4)
    assert not rollout(scene, policy, "easy", 0).success
    # The first reset and step ask whether the start state is solved already.
    assert scene.log[:2] == [("reset", False), ("step", False)]
    assert [images for _, images in scene.log[2:]] == [step % 4 == 0 for step in range(11)]
    assert policy.acted_at == [0, 4, 8]
    scene = LineScene("easy", solved_within=-1)
    Rollout(max_steps=10, image_every=0)(scene, policy, "easy", 0)
    assert not any(images for _, images in scene.log)


def test_recorded_frames_come_back() -> None:
    result = run_closed_loop(
        TowardsZeroFactory(),
        ["hopeless"],
        trials=2,
        max_steps=9,
        image_every=0,
        record=1,
        workers=0,
        make_scene=LineScenes(),
        progress=False,
    )
    (frames,) = result.frames["hopeless"]
    assert len(frames) == 3 and frames[0].dtype == np.uint8


def test_bad_settings_and_bad_actions_are_named() -> None:
    with pytest.raises(ConfigError, match="image_every 4 does not divide replan 6"):
        Rollout(replan=6)
    with pytest.raises(ConfigError, match="replan 0"):
        Rollout(replan=0)
    with pytest.raises(ConfigError, match="0 tasks"):
        run_closed_loop(TowardsZeroFactory(), [], workers=0, make_scene=LineScenes())

    class Broken(TowardsZero):
        def act(self) -> np.ndarray:
            return np.full((8, 4), np.nan)

    with pytest.raises(ContractError, match=r"easy, trial 0, step 0: actions \[8, 4\], all finite: False"):
        Rollout()(LineScene("easy"), Broken(), "easy", 0)
    with pytest.raises(ContractError, match="start states were solved already"):
        Rollout()(LineScene("easy", solved_within=2), TowardsZero(), "easy", 0)


def test_scene_policies_get_the_scene() -> None:
    class Expert(TowardsZero):
        scene: Any = None

        def attach(self, scene: Any) -> None:
            self.scene = scene

    scene, expert = LineScene("easy"), Expert()
    Rollout()(scene, expert, "easy", 0)
    assert expert.scene is scene
