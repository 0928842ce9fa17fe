"""The robosuite source: arms, cameras, points and touch agree with one another and with the simulator."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scene_checks import check_depends_on_generator_alone, check_reprojection, check_rotations
from test_data_generate import digests

from worldmodel.closed_loop import SourceScenes, run_closed_loop
from worldmodel.controllers import ExpertFactory
from worldmodel.data.embodiments import load_embodiments
from worldmodel.data.generate import generate, make_plan
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.collect import collect_episode
from worldmodel.data.sources.looks import draw_look
from worldmodel.data.sources.mujoco_scene import SENSORS
from worldmodel.data.sources.robosuite import (
    ACTION_NAMES,
    ACTION_UNITS,
    RobosuiteScene,
    proprio_names,
    proprio_units,
)
from worldmodel.data.sources.robosuite_tasks import HELDOUT_TASKS, ROBOTS, TASKS
from worldmodel.errors import ConfigError, DataError

installed = pytest.mark.skipif(
    find_spec("robosuite") is None, reason="robosuite is not installed: pip install 'worldmodel[robosuite]'"
)
JOINTS = {"panda": 7, "ur5e": 6, "sawyer_osc": 7, "kinova3": 7, "iiwa": 7}


@pytest.fixture(scope="module")
def scene() -> Iterator[RobosuiteScene]:
    scene = RobosuiteScene("Lift")
    yield scene
    scene.close()


def test_the_registry_has_every_robot_with_the_names_and_units_that_are_recorded() -> None:
    registry = load_embodiments()
    assert set(JOINTS) == set(ROBOTS)
    for robot, joints in JOINTS.items():
        entry = registry[robot]
        assert entry.action and entry.proprio and entry.gripper
        assert (entry.action.names, entry.action.units) == (ACTION_NAMES, ACTION_UNITS)
        assert (entry.proprio.names, entry.proprio.units) == (proprio_names(joints), proprio_units(joints))
        assert (entry.gripper.open, entry.gripper.closed) == (-1, 1)


def test_every_task_has_a_sentence_without_its_name() -> None:
    for task, info in TASKS.items():
        assert info.instruction.endswith(".") and task not in info.instruction
        assert len(info.instruction.encode()) <= 96


def test_bad_arguments_name_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown robots \['r2d2'\]; robosuite has panda, ur5e"):
        generate("robosuite", tmp_path, robots=["r2d2"])
    with pytest.raises(ConfigError, match=r"unknown robots \['panda'\]; metaworld has sawyer"):
        generate("metaworld", tmp_path, robots=["panda"])
    with pytest.raises(ConfigError, match=r"held-out robots \['ur5e'\] are not among the robots \['panda'\]"):
        generate("robosuite", tmp_path, robots=["panda"], heldout_robots=["ur5e"])
    with pytest.raises(ConfigError, match=r"Wipe.*Lift"):
        RobosuiteScene("Wipe")
    with pytest.raises(ConfigError, match=r"r2d2.*panda"):
        RobosuiteScene("Lift", robot="r2d2")


@pytest.mark.skipif(find_spec("robosuite") is not None, reason="robosuite is installed")
def test_a_missing_simulator_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(DataError, match=r"robosuite.*worldmodel\[robosuite\]"):
        RobosuiteScene("Lift")


@installed
@pytest.mark.parametrize("camera", ["front", "wrist"])
def test_reprojected_object_is_where_the_picture_changes_when_it_is_hidden(scene: RobosuiteScene, camera: str) -> None:
    found = 0
    geoms = np.flatnonzero(scene.model.geom_bodyid == scene.environment.cube_body_id)
    for seed in range(4):
        observation = scene.reset(np.random.default_rng(seed))
        expert = scene.expert()
        for _ in range(8):
            observation, _ = scene.step(expert.act(), images=False)
        observation["rgb." + camera] = scene.render(camera)
        found += check_reprojection(scene, geoms, observation, camera)
    assert found >= 2


@installed
def test_observation_is_as_registered_and_an_episode_depends_on_its_generator_alone(scene: RobosuiteScene) -> None:
    observation = scene.reset(np.random.default_rng(0))
    assert observation["rgb.front"].shape == observation["rgb.wrist"].shape == (64, 64, 3)
    assert observation["points"].shape == (len(scene.point_names), 3)
    assert observation["wrench"].shape == (len(SENSORS), 6) and observation["taxels"].shape == (len(SENSORS), 3, 4, 4)
    assert observation["proprio"].shape == (len(proprio_names(JOINTS["panda"])),)
    check_rotations(observation)
    check_depends_on_generator_alone(scene)


@installed
def test_one_unit_of_action_is_what_the_registry_says_in_the_base_frame(scene: RobosuiteScene) -> None:
    controller = scene.environment.robots[0].part_controllers["right"]
    np.testing.assert_allclose(controller.output_max, [0.05] * 3 + [0.5] * 3)
    assert (controller.input_type, controller.input_ref_frame) == ("delta", "base")
    scene.reset(np.random.default_rng(0), images=False)
    np.testing.assert_allclose(controller.origin_ori, scene.data.body("robot0_base").xmat.reshape(3, 3), atol=1e-6)
    for axis in range(3):
        before = scene.reset(np.random.default_rng(0), images=False)["proprio"][:3]
        after = [scene.step(np.eye(7)[axis] - np.eye(7)[6], images=False)[0] for _ in range(5)]
        moved = after[-1]["proprio"][:3] - before
        assert moved[axis] > 0.03 and np.abs(np.delete(moved, axis)).max() < 0.03


@installed
def test_the_expert_lifts_and_both_fingers_feel_it(scene: RobosuiteScene) -> None:
    resting = scene.reset(np.random.default_rng(0), images=False)
    weight = scene.model.body_subtreemass[scene.model.body("gripper0_right_right_gripper").id] * 9.81
    episode = collect_episode(scene, np.random.default_rng(0))
    assert episode.meta["success"] and episode.wrench is not None and episode.taxels is not None
    assert episode.action is not None and np.abs(episode.action).max() <= 1
    assert np.linalg.norm(resting["wrench"][0, :3]) == pytest.approx(weight, rel=0.3)
    grip = episode.wrench[-3]
    assert grip[1, 1] > 1 and grip[2, 1] < -1  # both pads are pushed outwards, the left one along +y
    for finger, sign in ((0, 1), (1, -1)):
        normal = episode.taxels[:, finger, 2].sum(axis=(1, 2))
        np.testing.assert_allclose(normal, sign * episode.wrench[:, 1 + finger, 1], rtol=1e-4, atol=1e-2)


@installed
@pytest.mark.parametrize("task", ["Stack", "Door", "PickPlaceCan"])
def test_pictures_can_be_taken_again_in_another_look_with_masks_of_the_task(task: str) -> None:
    scene = RobosuiteScene(task)
    observation = scene.reset(np.random.default_rng(0))
    moments = [scene.moment()]
    plain, other = scene.retake(moments), scene.retake(moments, draw_look(np.random.default_rng(1)))
    again = scene.retake(moments)
    shown = {scene.elements[i] for masks in plain.masks.values() for i in np.unique(masks)}
    assert {"robot", "object"} <= shown and ("object2" in shown) == (task != "PickPlaceCan")
    for camera in scene.cameras:
        np.testing.assert_array_equal(plain.rgb[camera][0], observation[f"rgb.{camera}"])
        np.testing.assert_array_equal(again.rgb[camera], plain.rgb[camera])
        np.testing.assert_array_equal(again.masks[camera], plain.masks[camera])
        assert np.abs(other.rgb[camera].astype(int) - plain.rgb[camera]).mean() > 10
    one = scene.retake(moments, draw_look(np.random.default_rng(1), ["element"], shown=["object"]))
    for camera in scene.cameras:
        np.testing.assert_array_equal(one.masks[camera], plain.masks[camera])
        np.testing.assert_array_equal(one.camera_to_base[camera], plain.camera_to_base[camera])
        changed = np.abs(one.rgb[camera].astype(int) - plain.rgb[camera]).max(-1) > 0
        other_things = one.masks[camera] != scene.elements.index("object")
        assert (changed & other_things).mean() < 0.01  # seen through the glassy marks of the grasp site
        assert other_things.all() or changed[~other_things].mean() > 0.9
    scene.close()


@installed
def test_the_closed_loop_drives_every_arm_of_a_task_from_start_states_of_its_own() -> None:
    scenes = SourceScenes(32, ("front",), "robosuite")
    how: dict[str, Any] = {"robots": ["panda", "kinova3"], "trials": 1, "replan": 1, "image_every": 0, "record": 1}
    result = run_closed_loop(ExpertFactory(), ["Lift"], **how, workers=0, make_scene=scenes, progress=False)
    assert [(row.name, row.success) for row in result.tasks] == [("Lift by panda", 1), ("Lift by kinova3", 1)]
    assert result.max_steps == TASKS["Lift"].max_steps
    first, second = (frames[0][0] for frames in result.frames.values())
    assert first.shape == (32, 32, 3) and np.abs(first.astype(int) - second).mean() > 1


@installed
@pytest.mark.parametrize("robot", ROBOTS)
def test_an_arm_that_holds_stays_where_it_is(robot: str) -> None:
    scene = RobosuiteScene("Lift", robot=robot, cameras=())
    before = scene.reset(np.random.default_rng(0))["proprio"][:3]
    after = [scene.step(scene.hold) for _ in range(10)]
    assert np.linalg.norm(after[-1][0]["proprio"][:3] - before) < 0.01 and not after[-1][1]


@installed
def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "robots": ["panda"],
        "tasks": ["Lift"],
        "episodes": 1,
        "heldout_episodes": 0,
        "pixels": 16,
    }
    one, two = (generate("robosuite", tmp_path / name, **settings, workers=1, progress=False) for name in "ab")
    assert digests(one) == digests(two)
    assert ShardReader(one).entries[0].key == "robosuite-Lift-panda-train-000000"


def test_shards_are_split_by_task_and_robot() -> None:
    counts = {"train": 30, "heldout_episodes": 2, "heldout_tasks": 1}
    plan = make_plan(
        "robosuite",
        benchmark=None,
        tasks=["Lift", *HELDOUT_TASKS],
        robots=["ur5e", "panda"],
        heldout_robots=["ur5e"],
        counts=counts,
        seed=0,
        pixels=64,
    )
    assert [(c.what["split"], c.what["task"], c.what["robot"], c.what["first"], c.count) for c in plan.chunks()] == [
        ("train", "Lift", "panda", 0, 25),
        ("train", "Lift", "panda", 25, 5),
        ("heldout_episodes", "Lift", "panda", 0, 2),
        ("heldout_tasks", "PickPlaceMilk", "panda", 0, 1),
        ("heldout_robots", "Lift", "ur5e", 0, 2),
    ]
