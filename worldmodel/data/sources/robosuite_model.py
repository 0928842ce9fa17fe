"""The MuJoCo side of a robosuite scene: its construction, the placement of cameras, and the geometry of grippers."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from worldmodel.data.sources.appearance import Appearance, elements_of_bodies
from worldmodel.data.sources.mujoco_scene import FPS
from worldmodel.data.sources.touch import Finger, Touch
from worldmodel.data.sources.viewpoints import euler, look_at, place_camera
from worldmodel.errors import DataError

CAMERA_NAMES = {"front": "agentview", "wrist": "robot0_eye_in_hand"}
"""robosuite's cameras that ours take the place of."""

_FRONT = {
    "Door": ((0.55, 0.35, 1.45), (-0.15, -0.25, 1.05), 45.0),
    "PickPlace": ((1.10, 0.05, 1.60), (0.05, 0.02, 0.97), 50.0),
    "": ((0.65, 0.10, 1.35), (-0.09, 0.0, 0.91), 41.0),
}
"""Position, target (world frame) and field of view in degrees by the start of the task's name."""
_WRIST_FOVY = 75.0
_NEARER = (0.15, 0.10)
"""How much nearer to both bins an arm stands than robosuite puts it, in metres: the shorter ones cannot reach all of
them with a hand that points down."""

_BODIES = {"robot0_": "robot", "gripper0_": "gripper", "fixed_mount": "robot", "table": "table", "bin": "table"}
"""Elements of bodies by the start of their names."""


def build_environment(task: str, robot: str) -> Any:
    """The task's environment with robosuite's own controller for `robot`, without its renderers.

    Raises:
        DataError: robosuite is not installed.
    """
    with silenced():
        try:
            robosuite: Any = import_module("robosuite")
            controllers: Any = import_module("robosuite.controllers")
        except ImportError as error:
            raise DataError(
                f"robosuite cannot be imported ({error}); install the extra: pip install 'worldmodel[robosuite]'"
            ) from error
        environment = robosuite.make(
            task,
            robots=robot,
            controller_configs=controllers.load_composite_controller_config(controller="BASIC", robot=robot),
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            use_object_obs=False,
            control_freq=FPS,
            ignore_done=True,
            hard_reset=False,
            renderer="mujoco",
            seed=0,
        )
    model = environment.sim.model._model
    # MuJoCo lets neighbouring links touch only where the parent can move: Sawyer's base would hold its first joint.
    for geom in range(model.ngeom):
        body = int(model.geom_bodyid[geom])
        if model.body(body).name.startswith("robot0_") and model.body_weldid[body] == 0:
            model.geom_contype[geom] = model.geom_conaffinity[geom] = 0
    if task.startswith("PickPlace"):
        model.body("robot0_base").pos[:2] += _NEARER
    # Shadows and multisampling cost more than ten times the rest of a picture on a CPU.
    model.vis.quality.offsamples = 0
    model.vis.quality.shadowsize = 0
    return environment


@contextmanager
def silenced() -> Iterator[None]:
    """Without robosuite's warnings that a single arm has no legs: it prints a dozen at each reset."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def place_cameras(model: Any, task: str, rng: np.random.Generator) -> np.ndarray:
    """Vary both cameras per episode, so that pose and field of view from one image are worth inferring.

    The wrist camera is jittered about where it is in the model, so restore that first.

    Returns:
        (3,) what the front camera faces, world frame.
    """
    position, target, fovy = next(value for start, value in _FRONT.items() if task.startswith(start))
    position = np.array(position) + rng.uniform(-0.05, 0.05, 3)
    target = np.array(target) + rng.uniform(-0.03, 0.03, 3)
    rotation = look_at(position, target, np.array([0.0, 0.0, 1.0]))
    place_camera(model, CAMERA_NAMES["front"], position, rotation, fovy + rng.uniform(-4.0, 4.0))
    wrist = model.camera(CAMERA_NAMES["wrist"])
    position = wrist.pos + rng.uniform(-0.01, 0.01, 3)
    rotation = _matrix(wrist.quat) @ euler(np.radians(rng.uniform(-6.0, 6.0, 3)))
    place_camera(model, CAMERA_NAMES["wrist"], position, rotation, _WRIST_FOVY + rng.uniform(-4.0, 4.0))
    return target


def make_appearance(model: Any, objects: Mapping[int, str], hidden: Sequence[int], flat: Sequence[str]) -> Appearance:
    """What belongs to which element; `objects` says it of the task's own bodies."""
    roots = {
        body: element
        for body in range(1, model.nbody)
        for start, element in _BODIES.items()
        if model.body(body).name.startswith(start)
    }
    return Appearance(model, elements_of_bodies(model, roots | dict(objects)), hidden_groups=hidden, flat=flat)


class Hand:
    """What is needed of an arm's end: its tool point, its axes, its fingers and its joints.

    Axes that all grippers share: x along the fingers to their tips, y from the right finger to the left one, z across.
    """

    def __init__(self, environment: Any) -> None:
        robot = environment.robots[0]
        gripper = robot.gripper["right"]
        model, data = environment.sim.model._model, environment.sim.data._data
        self.gripper_name = type(gripper).__name__
        self.joint_positions = list(robot._ref_joint_pos_indexes)
        self.joint_velocities = list(robot._ref_joint_vel_indexes)
        self._site = model.site(gripper.important_sites["grip_site"]).id
        geoms = {name: [model.geom(geom).id for geom in found] for name, found in gripper.important_geoms.items()}
        self._pads = [geoms[f"{side}_fingerpad"][0] for side in ("left", "right")]
        middle = data.geom_xpos[self._pads].mean(0)
        along = middle - data.body(robot.robot_model.eef_name["right"]).xpos
        closing = data.geom_xpos[self._pads[0]] - data.geom_xpos[self._pads[1]]
        self._axes_in_site = _snapped(along, closing, data.site_xmat[self._site].reshape(3, 3))
        fingers = []
        for side, pad in zip(("left", "right"), self._pads, strict=True):
            bodies = {int(model.geom_bodyid[geom]) for geom in (*geoms[f"{side}_finger"], *geoms[f"{side}_fingerpad"])}
            axes = _snapped(along, closing, data.geom_xmat[pad].reshape(3, 3))
            fingers.append(Finger(bodies=tuple(sorted(bodies)), pad=pad, axes=axes))
        sensors = gripper.important_sensors
        self.touch = Touch(model, fingers, force=sensors["force_ee"], torque=sensors["torque_ee"])

    def position(self, data: Any) -> np.ndarray:
        """(3,) tool point between the fingertips, world frame."""
        return data.site_xpos[self._site].copy()

    def rotation(self, data: Any) -> np.ndarray:
        """(3, 3) whose columns are the hand's x, y and z in the world frame."""
        return data.site_xmat[self._site].reshape(3, 3) @ self._axes_in_site.T

    def opening(self, data: Any) -> float:
        """Distance of the centres of the finger pads in metres."""
        return float(np.linalg.norm(data.geom_xpos[self._pads[0]] - data.geom_xpos[self._pads[1]]))


def _snapped(along: np.ndarray, closing: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """The axis of `frame` nearest to each of x (`along`), y (`closing`) and z, as rows in that frame."""
    rows = []
    for direction in (along, closing):
        local = frame.T @ direction
        axis = np.abs(local).argmax()
        rows.append(np.eye(3)[axis] * np.sign(local[axis]))
    return np.stack([*rows, np.cross(*rows)])


def _matrix(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrix of a wxyz quaternion."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
