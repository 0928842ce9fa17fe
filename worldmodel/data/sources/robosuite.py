"""robosuite (MuJoCo, five arms) as a source of demonstrations with every sense, and as a closed-loop robot.

Frames: everything is in the robot's base frame (body `robot0_base`), SI units, cameras with OpenCV axes. One control
step is 25 simulator steps of 2 ms (20 Hz). An action goes as it is to robosuite's operational-space controller: a
change of position and of orientation (axis times angle) in the base frame from where the hand is, and the gripper.

Touch: `wrench` is [fx, fy, fz, tx, ty, tz], the mean over the simulator steps of one control step. Row `wrist` is the
force/torque sensor between arm and gripper that robosuite's models have: what the arm applies to the gripper, in the
frame of the sensor's site, the weight of the gripper included. Rows `left_finger` and `right_finger` are the sums of
contact forces on that finger, in axes that all grippers share: x along the finger to its tip, y from the right finger
to the left one, z across; torque about the centre of the pad. Taxels bin the same contacts over the pad's extent: shear
along the finger, shear across it, and the normal pressing into the pad's inner face.
"""

from typing import Any

import numpy as np

from worldmodel.data.sources.mujoco_scene import CAMERAS, RECORDED, MujocoScene
from worldmodel.data.sources.robosuite_experts import ScriptedExpert
from worldmodel.data.sources.robosuite_model import (
    CAMERA_NAMES,
    Hand,
    build_environment,
    make_appearance,
    place_cameras,
    silenced,
)
from worldmodel.data.sources.robosuite_objects import objects_of
from worldmodel.data.sources.robosuite_tasks import ROBOTS, TASKS
from worldmodel.errors import ConfigError

ACTION_NAMES = (
    *(f"delta_{axis}" for axis in "xyz"),
    *(f"delta_rotation_{axis}" for axis in "xyz"),
    "gripper",
)
ACTION_UNITS = ("1 = 0.05 m per control step",) * 3 + ("1 = 0.5 rad per control step",) * 3 + ("1 = close",)
FORCE_NOTE = (
    "Contact is MuJoCo's soft contact and arms are torque-controlled, so magnitudes are of the right order; the "
    "grippers' own actuators set how hard they pinch."
)
_RESTORED = ("body_pos", "body_quat", "cam_pos", "cam_quat", "cam_fovy", "geom_rgba", "site_pos", "site_rgba")


def proprio_names(joints: int) -> tuple[str, ...]:
    """Names of the proprioception of an arm with that many joints."""
    return (
        *(f"end_effector_{axis}" for axis in "xyz"),
        "gripper_opening",
        *(f"joint_position_{j}" for j in range(joints)),
        *(f"joint_velocity_{j}" for j in range(joints)),
    )


def proprio_units(joints: int) -> tuple[str, ...]:
    """Units of the proprioception of an arm with that many joints."""
    return ("m",) * 4 + ("rad",) * joints + ("rad/s",) * joints


class RobosuiteScene(MujocoScene):
    """One robosuite task with one arm, cameras, touch and proprioception; reuse it across episodes of the task.

    Args:
        task: a name of `robosuite_tasks.TASKS`, for example `Lift`.
        robot: a name of `robosuite_tasks.ROBOTS`, for example `panda`.
        pixels: height and width of both images.
        cameras: which of `front` and `wrist` to render.

    Raises:
        ConfigError: unknown task, robot or camera.
        DataError: robosuite is not installed, or no off-screen OpenGL.
    """

    hidden_groups = (0,)
    hold = np.zeros(len(ACTION_NAMES), np.float32)

    def __init__(
        self, task: str, *, robot: str = "panda", pixels: int = 64, cameras: tuple[str, ...] = CAMERAS
    ) -> None:
        if task not in TASKS:
            raise ConfigError(f"unknown robosuite task {task!r}; known: {', '.join(TASKS)}")
        if robot not in ROBOTS:
            raise ConfigError(f"unknown robot {robot!r}; known: {', '.join(ROBOTS)}")
        super().__init__("robosuite", base="robot0_base", pixels=pixels, cameras=cameras, camera_names=CAMERA_NAMES)
        self.task, self.embodiment = task, robot
        self.instruction, self.max_steps, self.coloured, self.things = TASKS[task]
        self.environment = build_environment(task, ROBOTS[robot])
        self._take_model()
        self.hand = Hand(self.environment)
        self._wrench, self._taxels = self.hand.touch.read(self.data)
        self._pristine = {name: getattr(self.model, name).copy() for name in _RESTORED}
        self.objects = objects_of(task, self.environment)
        self.appearance = make_appearance(self.model, self.objects.elements(), self.hidden_groups, self.coloured)
        self.point_names: tuple[str, ...] = ()

    def _take_model(self) -> None:
        # robosuite wraps both; every name below is MuJoCo's own.
        self.model, self.data = self.environment.sim.model._model, self.environment.sim.data._data

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        """Draw object, robot and camera placement from `rng` and return the first observation.

        The result is a function of `rng` alone: whatever an earlier episode changed in the model is undone first.
        """
        for name, value in self._pristine.items():
            getattr(self.model, name)[:] = value
        seed_environment(self.environment, int(rng.integers(2**31)))
        with silenced():
            self.environment.reset()
        self._target = place_cameras(self.model, self.task, rng)
        self._mj.mj_forward(self.model, self.data)
        self._place_base()
        self.objects.begin()
        self._wrench, self._taxels = self.hand.touch.read(self.data)
        self.point_names = tuple(name for name, _ in self.objects.points())
        return self._observe(images)

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        """Give `action` (7,), clipped to [-1, 1], to the controller for one control step.

        Returns:
            The next observation and whether the task is solved after it.
        """
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if action.shape != (len(ACTION_NAMES),):
            raise ConfigError(f"robosuite takes actions of shape (7,) {ACTION_NAMES}, got {action.shape}")
        environment = self.environment
        steps = round(environment.control_timestep / environment.model_timestep)
        wrench, taxels = np.zeros_like(self._wrench), np.zeros_like(self._taxels)
        # The loop of robosuite's own `step` without its observables, which cost more than the physics.
        for number in range(steps):
            environment.sim.step1()
            environment._pre_action(action.astype(np.float64), number == 0)
            environment.sim.step2()
            step_wrench, step_taxels = self.hand.touch.read(self.data)
            wrench += step_wrench / steps
            taxels += step_taxels / steps
        environment.cur_time += environment.control_timestep
        # What an integration step leaves behind is the geometry before it.
        self._mj.mj_forward(self.model, self.data)
        self._wrench, self._taxels = wrench, taxels
        return self._observe(images), bool(environment._check_success())

    def expert(self) -> ScriptedExpert:
        """The task's scripted expert, reading this scene's full state."""
        return ScriptedExpert(self)

    def metadata(self) -> dict[str, Any]:
        """Names, frames and units of everything an episode of this scene records."""
        joints = len(self.hand.joint_positions)
        return {
            **RECORDED,
            "embodiment": self.embodiment,
            "task": self.task,
            "instruction": self.instruction,
            "fps": self.fps,
            "source": "robosuite",
            "licence": "MIT (robosuite and its assets)",
            "cameras": list(self.cameras),
            "point_names": list(self.point_names),
            "sensor_frames": {
                "wrist": "the gripper's ft_frame",
                "left_finger": "x to the tip, y right to left finger",
                "right_finger": "x to the tip, y right to left finger",
            },
            "force_note": FORCE_NOTE,
            "robot": ROBOTS[self.embodiment],
            "gripper": self.hand.gripper_name,
            "proprio_names": list(proprio_names(joints)),
            "proprio_units": list(proprio_units(joints)),
            "action_names": list(ACTION_NAMES),
            "action_units": list(ACTION_UNITS),
            "action_frame": "base; deltas are from the hand's pose when the action is given",
        }

    def to_base(self, point: np.ndarray) -> np.ndarray:
        """`point` (3,) of the world in the base frame."""
        return self._to_base(point)

    def rotation_to_base(self, rotation: np.ndarray) -> np.ndarray:
        """`rotation` (3, 3) of the world in the base frame."""
        return self._base[:3, :3].T @ rotation

    def _observe(self, images: bool) -> dict[str, Any]:
        observation = self._see([point for _, point in self.objects.points()], images)
        observation["wrench"] = self._wrench.astype(np.float32)
        observation["taxels"] = self._taxels.astype(np.float32)
        observation["proprio"] = self._proprio()
        observation["instruction"] = self.instruction
        return observation

    def _proprio(self) -> np.ndarray:
        position = self.data.qpos[self.hand.joint_positions]
        velocity = self.data.qvel[self.hand.joint_velocities]
        hand = self._to_base(self.hand.position(self.data))
        opening = [self.hand.opening(self.data)]
        return np.concatenate([hand, opening, position, velocity]).astype(np.float32)


def seed_environment(environment: Any, seed: int) -> None:
    """Make everything that robosuite draws at the next reset a function of `seed`."""
    rng = np.random.default_rng(seed)
    environment.rng = rng
    sampler = environment.placement_initializer
    for each in (sampler, *getattr(sampler, "samplers", {}).values()):
        each.rng = rng
