"""The PushT source: what is seen, sensed and called solved agrees with gym-pusht, and the planner solves it."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import compose
from scene_checks import check_depends_on_generator_alone, project
from test_published import settings

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.closed_loop import SourceScenes, run_closed_loop
from worldmodel.controllers import ExpertFactory
from worldmodel.data.__main__ import main
from worldmodel.data.embodiments import load_embodiments
from worldmodel.data.generate import generate
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.collect import collect_episode
from worldmodel.data.sources.pusht import (
    ACTION_NAMES,
    ACTION_UNITS,
    PROPRIO_NAMES,
    PROPRIO_UNITS,
    SCALE,
    PushtScene,
)
from worldmodel.data.sources.registry import SOURCES, simulated
from worldmodel.errors import ConfigError

BLOCK = np.array([119, 136, 153])
"""Colour of the T, `LightSlateGray`; its inside is drawn lighter."""


@pytest.fixture(scope="module")
def scene() -> PushtScene:
    if find_spec("gym_pusht") is None:
        pytest.skip("gym-pusht is not installed: pip install 'worldmodel[pusht]'")
    return PushtScene("push-t")


def place(scene: PushtScene, x: float, y: float, angle: float) -> bool:
    """Lays the T down, the pusher far away in a corner, and says after a step whether it is solved."""
    scene.reset(np.random.default_rng(0), images=False)
    environment = scene.environment
    environment.agent.position = 20.0, 20.0
    environment.block.angle = angle
    environment.block.position = x, y
    environment.space.reindex_shapes_for_body(environment.block)
    return scene.step(np.array([0.02, 0.02]), images=False)[1]


def test_the_registry_has_the_names_and_units_that_are_recorded() -> None:
    entry = load_embodiments()["pusht"]
    assert entry.action and entry.proprio
    assert (entry.action.names, entry.action.units) == (ACTION_NAMES, ACTION_UNITS)
    assert (entry.proprio.names, entry.proprio.units) == (PROPRIO_NAMES, PROPRIO_UNITS)
    assert simulated(["pusht"]) == (SOURCES["pusht"], ["pusht"])


def test_variants_and_masks_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    refused: list[dict[str, Any]] = [{"variants": 1}, {"vary": [["lights"]]}, {"masks": True}]
    for asked in refused:
        with pytest.raises(ConfigError, match=r"pusht shows its scenes in one look.*metaworld, robosuite can"):
            generate("pusht", tmp_path / "data", **asked)
    assert not (tmp_path / "data").exists()


def test_bad_arguments_name_the_valid_ones(scene: PushtScene) -> None:
    with pytest.raises(ConfigError, match=r"push-u.*push-t"):
        PushtScene("push-u")
    with pytest.raises(ConfigError, match=r"\['wrist'\]; PushT scenes have \['front'\]"):
        PushtScene("push-t", cameras=("front", "wrist"))
    with pytest.raises(ConfigError, match=r"shape \(2,\).*\(3,\)"):
        scene.step(np.zeros(3))


def test_an_episode_depends_on_its_generator_alone(scene: PushtScene) -> None:
    check_depends_on_generator_alone(scene)


@pytest.mark.parametrize("seed", range(3))
def test_corners_of_the_t_are_seen_where_they_are(scene: PushtScene, seed: int) -> None:
    sharp = PushtScene("push-t", pixels=256)
    observation = sharp.reset(np.random.default_rng(seed))
    environment = sharp.environment

    def seen(x: float, y: float) -> tuple[int, bool]:
        """How far the colour at a point of the T's frame is from the T's, and whether the pusher may hide it."""
        world = environment.block.local_to_world((x, y))
        column, row, depth = project(observation, "front", np.array([world.x * SCALE, world.y * SCALE, 0.0]))
        assert depth > 0
        colour = observation["rgb.front"][int(row), int(column)].astype(int)
        return int(np.abs(colour - BLOCK).max()), (world - environment.agent.position).length < 20

    for corner in ((-57, 3), (57, 3), (57, 27), (-57, 27), (12, 117), (-12, 117)):
        off, hidden = seen(*corner)
        assert hidden or off < 35, corner
    for beside in ((-64, -4), (64, -4), (24, 117), (-24, 117)):
        assert seen(*beside)[0] > 35, beside


def test_it_is_solved_above_95_percent_of_its_place_and_not_below(scene: PushtScene) -> None:
    x, y, angle = scene.environment.goal_pose
    assert place(scene, x, y, angle)
    assert place(scene, x + 1.5, y, angle) and scene.environment._get_coverage() > 0.95
    assert not place(scene, x + 3.0, y, angle) and 0.9 < scene.environment._get_coverage() < 0.95
    assert not place(scene, x, y, angle + np.pi)


def test_the_pusher_goes_where_it_is_told_and_holds(scene: PushtScene) -> None:
    observation = scene.reset(np.random.default_rng(0), images=False)
    for _ in range(15):
        observation, _ = scene.step(np.array([0.05, 9.0]), images=False)
    np.testing.assert_allclose(observation["proprio"], [0.05, 0.512, 0, 0, 0], atol=1e-3)
    held, _ = scene.step(scene.hold, images=False)
    np.testing.assert_allclose(held["proprio"], observation["proprio"], atol=1e-3)


def test_the_planner_solves_and_its_actions_replayed_do_the_same(scene: PushtScene) -> None:
    episode = collect_episode(scene, np.random.default_rng(4))
    assert episode.meta["success"] and episode.action is not None and episode.proprio is not None
    assert episode.wrench is None and episode.points is not None and 20 < episode.length < 200
    assert np.linalg.norm(np.diff(episode.action, axis=0), axis=1).max() < 0.03, "targets move, they do not jump"
    goal = [episode.meta["point_names"].index(name) for name in ("goal", "goal_foot")]
    assert np.linalg.norm(episode.points[-1, :2] - episode.points[-1, goal], axis=1).max() < 0.01
    scene.reset(np.random.default_rng(4))
    solved = False
    for action, state, points in zip(episode.action[:-1], episode.proprio[1:], episode.points[1:], strict=True):
        observation, done = scene.step(action, images=False)
        solved |= done
        np.testing.assert_allclose(observation["proprio"], state, atol=1e-6)
        np.testing.assert_allclose(observation["points"], points, atol=1e-6)
    assert solved


def test_a_dataset_is_sound_and_a_seed_gives_the_same_bytes(
    scene: PushtScene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {"episodes": 3, "heldout_episodes": 1, "pixels": 32, "workers": 1, "progress": False}
    one, two = (generate("pusht", tmp_path / name, **how) for name in "ab")
    assert [p.read_bytes() for p in sorted(one.glob("*.tar"))] == [p.read_bytes() for p in sorted(two.glob("*.tar"))]
    assert main(["validate", str(one), "--workers", "1", "--json"]) == 0, capsys.readouterr().out
    assert not json.loads(capsys.readouterr().out)["faults"]
    reader = ShardReader(one)
    assert reader.entries[0].key == "pusht-push-t-train-000000"
    assert reader.read(0).meta["absent"] == ["tactile"] and list(reader.read(0).rgb) == ["front"]


def test_the_closed_loop_runs_to_the_tasks_own_success(scene: PushtScene) -> None:
    how: dict[str, Any] = {"trials": 1, "replan": 1, "image_every": 0, "workers": 0, "progress": False}
    result = run_closed_loop(ExpertFactory(), ["push-t"], make_scene=SourceScenes(32, source="pusht"), **how)
    assert result.tasks[0].success == 1 and result.max_steps == 300


def test_configurations_compose_to_a_model_without_a_stream_of_forces() -> None:
    config = compose("experiment=kairos_tiny", "data=pusht")
    spec = config["data"]["spec"]
    sizes = {"proprio": 5, "action": 2, "points": 3, "camera_translation": 3}
    fields = {name: {"mean": [0.1] * size, "std": [0.5] * size} for name, size in sizes.items()}
    model = build_model(config["model"], make_spec(spec), {"instructions": [], "embodiments": {"pusht": fields}})
    assert model.denoiser.streams == ("video", "camera", "points")
    assert (spec["cameras"], spec["sensors"], spec["fps"], spec["action"]) == (["front"], [], 10.0, 2)
    protocol = settings("protocol=pusht")
    assert (protocol["max_steps"], protocol["trials"], protocol["robots"]) == (300, 50, ["pusht"])
    assert protocol["replan"] % spec["stride"] == 0
