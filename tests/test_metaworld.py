"""The Meta-World source: pictures, poses, points and touch agree with one another and with the simulator."""

import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from scene_checks import check_depends_on_generator_alone, check_reprojection, check_rotations

from worldmodel.data.sources import rendering
from worldmodel.data.sources.appearance import ELEMENTS
from worldmodel.data.sources.collect import collect_episode
from worldmodel.data.sources.metaworld import ACTION_NAMES, PROPRIO_NAMES, PROPRIO_UNITS, MetaworldScene
from worldmodel.data.sources.metaworld_tasks import HELDOUT_TASKS, TASKS, TRAIN_TASKS
from worldmodel.data.sources.mujoco_scene import SENSORS, TAXEL_SENSORS
from worldmodel.data.sources.registry import SOURCES
from worldmodel.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scene() -> Iterator[MetaworldScene]:
    scene = MetaworldScene("pick-place-v3")
    yield scene
    scene.close()


@pytest.mark.parametrize("camera", ["front", "wrist"])
def test_reprojected_object_is_where_the_picture_changes_when_it_is_recoloured(
    scene: MetaworldScene, camera: str
) -> None:
    found = 0
    geoms = np.flatnonzero(scene.model.geom_bodyid == scene.model.body("obj").id)
    for seed in range(6):
        observation = scene.reset(np.random.default_rng(seed))
        expert = scene.expert()
        for _ in range(4):
            observation, _ = scene.step(expert.act())
        found += check_reprojection(scene, geoms, observation, camera)
    assert found >= 3


def test_observation_has_the_promised_names_shapes_and_units(scene: MetaworldScene) -> None:
    observation = scene.reset(np.random.default_rng(0))
    assert observation["rgb.front"].shape == observation["rgb.wrist"].shape == (64, 64, 3)
    assert observation["points"].shape == (3, 3) and observation["visible"].shape == (3,)
    assert scene.point_names == ("object", "object_front", "goal")
    assert np.linalg.norm(observation["points"][1] - observation["points"][0]) == pytest.approx(0.1, abs=1e-6)
    assert observation["wrench"].shape == (len(SENSORS), 6)
    assert observation["taxels"].shape == (len(SENSORS), 3, 4, 4)
    assert observation["has_taxels"].tolist() == [name in TAXEL_SENSORS for name in SENSORS]
    assert observation["proprio"].shape == (len(PROPRIO_NAMES),) == (len(PROPRIO_UNITS),)
    check_rotations(observation)
    without = scene.reset(np.random.default_rng(0), images=False)
    assert not any(name.startswith("rgb.") for name in without)
    np.testing.assert_array_equal(without["points"], observation["points"])


def test_leaving_out_what_a_camera_cannot_see_changes_no_pixel(
    scene: MetaworldScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = []
    for everything in (False, True):
        if everything:
            monkeypatch.setattr(scene, "_out_of_sight", lambda _: np.zeros(scene.model.ngeom, bool))
        else:
            assert scene._out_of_sight("wrist").any() and not scene._out_of_sight("front").all()
        scene.reset(np.random.default_rng(4), images=False)
        expert = scene.expert()
        pictures.append([scene.step(expert.act())[0][f"rgb.{camera}"] for _ in range(5) for camera in scene.cameras])
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_cameras_vary_between_episodes_and_the_wrist_one_moves_with_the_hand(scene: MetaworldScene) -> None:
    first = scene.reset(np.random.default_rng(0), images=False)
    moved, _ = scene.step(np.array([1.0, 0.0, 0.0, 0.0]), images=False)
    np.testing.assert_array_equal(first["camera_to_base.front"], moved["camera_to_base.front"])
    assert np.linalg.norm(moved["camera_to_base.wrist"] - first["camera_to_base.wrist"]) > 0.005
    other = scene.reset(np.random.default_rng(1), images=False)
    for name in ("camera_to_base.front", "intrinsics.front", "intrinsics.wrist"):
        assert np.abs(other[name] - first[name]).max() > 1e-3


def test_wrist_camera_is_rigid_with_the_hand(scene: MetaworldScene) -> None:
    observation = scene.reset(np.random.default_rng(0), images=False)
    mounts = []
    for _ in range(3):
        hand_to_base = np.eye(4)
        hand_to_base[:3, :3] = scene.data.body("hand").xmat.reshape(3, 3)
        hand_to_base[:3, 3] = scene.data.body("hand").xpos
        mounts.append(np.linalg.inv(hand_to_base) @ observation["camera_to_base.wrist"])
        observation, _ = scene.step(np.array([1.0, 0.5, -0.5, 0.0]), images=False)
    np.testing.assert_allclose(mounts[1:], [mounts[0]] * 2, atol=1e-5)


def test_an_episode_is_a_function_of_its_generator_alone(scene: MetaworldScene) -> None:
    check_depends_on_generator_alone(scene)


def test_gripped_object_is_felt_by_both_fingers_in_opposite_directions(scene: MetaworldScene) -> None:
    episode = collect_episode(scene, np.random.default_rng(0))
    assert episode.meta["success"] and episode.length == len(episode.action)  # type: ignore[arg-type]
    assert episode.wrench is not None and episode.taxels is not None and episode.action is not None
    assert episode.action.shape[1] == len(ACTION_NAMES) and np.abs(episode.action).max() <= 1
    grip = episode.wrench[-3]
    assert grip[1, 1] > 10 and grip[2, 1] < -10  # left finger is pushed along +y of its pad, right one along -y
    assert (episode.taxels[-3, :, 2].sum(axis=(1, 2)) > 10).all()
    for finger, sign in ((0, 1), (1, -1)):
        normal = episode.taxels[:, finger, 2].sum(axis=(1, 2))
        np.testing.assert_allclose(normal, sign * episode.wrench[:, 1 + finger, 1], rtol=1e-4, atol=1e-2)


def test_every_task_has_a_sentence_of_its_own() -> None:
    for task, info in TASKS.items():
        assert info.instruction.endswith(".") and task not in info.instruction
        assert len(info.instruction.encode()) <= 96
    assert len({info.instruction for info in TASKS.values()}) == len(TASKS)


def test_benchmarks_are_meta_worlds_own_and_the_fifteen_come_first() -> None:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, ML10_V3, ML45_V3, MT10_V3

    theirs = {"ml10": ML10_V3, "ml45": ML45_V3, "mt10": {"train": MT10_V3, "test": {}}}
    ours = SOURCES["metaworld"].benchmarks
    assert list(ours) == list(theirs)
    for name, split in theirs.items():
        assert ours[name] == (tuple(split["train"]), tuple(split["test"]))
    assert set(TASKS) == set(ALL_V3_ENVIRONMENTS)
    # Random streams of episodes count on it.
    assert SOURCES["metaworld"].tasks[:15] == (*TRAIN_TASKS, *HELDOUT_TASKS)


@pytest.mark.parametrize("task", ["assembly-v3", "push-wall-v3", "hammer-v3", "stick-push-v3"])
def test_the_second_point_turns_with_the_object(task: str) -> None:
    scene = MetaworldScene(task, cameras=())
    scene.reset(np.random.default_rng(0), images=False)
    assert len(scene.point_names) <= 4
    # The object is what lies free; the arm and the rest of the table do not.
    (joint,) = np.flatnonzero(scene.model.jnt_type == scene._mj.mjtJoint.mjJNT_FREE)
    quaternion = scene.data.qpos[scene.model.jnt_qposadr[joint] + 3 :][:4]
    turn, turned, expected = np.array([0.8, 0.36, -0.48, 0.0]), np.zeros(4), np.zeros(3)
    before = dict(scene._named_points())
    scene._mj.mju_rotVecQuat(expected, before["object_front"] - before["object"], turn)
    scene._mj.mju_mulQuat(turned, turn, quaternion)
    quaternion[:] = turned
    scene._mj.mj_forward(scene.model, scene.data)
    after = dict(scene._named_points())
    np.testing.assert_allclose(after["object_front"] - after["object"], expected, atol=1e-9)


def test_an_expert_that_held_actions_would_make_miss_is_slower() -> None:
    scene = MetaworldScene("bin-picking-v3", cameras=())
    scene.reset(np.random.default_rng(0), images=False)
    expert, solved, actions = scene.expert(), False, []
    while not solved and len(actions) < scene.max_steps:
        actions.append(expert.act())
        _, solved = scene.step(actions[-1], images=False)
    assert solved and np.abs(actions)[:, :3].max() == TASKS["bin-picking-v3"].pace < 1
    assert np.abs(actions)[:, 3].max() > TASKS["bin-picking-v3"].pace


@pytest.mark.parametrize(
    ("task", "geoms", "goals"),
    [
        ("bin-picking-v3", {"objA": "object", "binA": "fixture", "binB": "goal"}, set()),
        ("coffee-button-v3", {"cmbutton": "object", "mug": "object2", "cm_link": "fixture"}, {"coffee_goal"}),
        ("hammer-v3", {"hammer": "object", "nail_link": "object2", "hammerblock": "fixture"}, {"goal"}),
        ("door-lock-v3", {"lock_link": "object", "door_link": "fixture"}, {"goal_lock"}),
    ],
)
def test_what_moves_and_what_marks_the_goal_have_their_elements(
    task: str, geoms: dict[str, str], goals: set[str]
) -> None:
    scene = MetaworldScene(task, cameras=())
    for body, element in geoms.items():
        of_body = scene.model.geom_bodyid == scene.model.body(body).id
        assert of_body.any() and {ELEMENTS[place] for place in scene.appearance.geoms[of_body]} == {element}
    marked = np.flatnonzero(scene.appearance.sites == ELEMENTS.index("goal"))
    assert {scene.model.site(site).name for site in marked} == goals


def test_bad_arguments_name_the_valid_ones(scene: MetaworldScene) -> None:
    with pytest.raises(ConfigError, match=r"reech-v3.*reach-v3"):
        MetaworldScene("reech-v3")
    with pytest.raises(ConfigError, match=r"side.*front.*wrist"):
        MetaworldScene("reach-v3", cameras=("side",))
    with pytest.raises(ConfigError, match=r"shape \(4,\).*got \(3,\)"):
        scene.step(np.zeros(3))


def test_back_end_honours_the_user_and_reports_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert rendering.select_gl_backend() == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(rendering, "_PROBE", "raise SystemExit('no driver')")
    with pytest.raises(DataError, match=r"egl: no driver.*apt-get install libegl1 libgl1-mesa-dri.*libosmesa6"):
        rendering.select_gl_backend()


def test_no_noise_when_the_interpreter_exits_with_a_scene_open() -> None:
    code = (
        "import numpy as np; from worldmodel.data.sources.metaworld import MetaworldScene;"
        "scene = MetaworldScene('reach-v3'); scene.reset(np.random.default_rng(0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.returncode == 0 and done.stderr == ""
