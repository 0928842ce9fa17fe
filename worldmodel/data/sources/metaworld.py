"""Meta-World (MuJoCo, simulated Sawyer) as a source of demonstrations with every sense, and as a closed-loop robot.

Frames: everything is in the robot's base frame (body `base`), SI units, cameras with OpenCV axes. One control step is
four simulator steps of 12.5 ms (20 Hz), the action held over them.

Touch: `wrench` is [fx, fy, fz, tx, ty, tz], the mean over the simulator steps of one control step. Row `wrist` is a
MuJoCo site force/torque sensor at body `hand`: what the forearm applies to the hand, in the hand's frame, the weight of
the gripper included. Rows `left_finger` and `right_finger` are the sums of contact forces on that finger (claw and
pad), in the frame of its pad, torque about the pad's centre. Taxels bin the same contacts over the pad's extent: shear
along the finger, shear across it, and the normal pressing into the pad's inner face.
"""

import warnings
from typing import Any

import numpy as np

from worldmodel.data.sources.metaworld_model import (
    build_environment,
    make_appearance,
    make_touch,
    place_cameras,
)
from worldmodel.data.sources.metaworld_tasks import TASKS
from worldmodel.data.sources.mujoco_scene import CAMERAS, RECORDED, MujocoScene
from worldmodel.errors import ConfigError

CONTROL_STEPS = 4
MAX_STEPS = 125
PROPRIO_NAMES = (
    *(f"end_effector_{axis}" for axis in "xyz"),
    "gripper_opening",
    *(f"joint_position_{j}" for j in range(7)),
    *(f"joint_velocity_{j}" for j in range(7)),
)
PROPRIO_UNITS = ("m",) * 4 + ("rad",) * 7 + ("rad/s",) * 7
ACTION_NAMES = ("delta_x", "delta_y", "delta_z", "gripper_effort")
ACTION_UNITS = ("1 = 0.01 m of mocap displacement per simulator step",) * 3 + ("1 = close at full effort",)
FORCE_NOTE = (
    "Meta-World welds the hand to a mocap body, so magnitudes are unphysical (hundreds of N): good for contact events "
    "and their direction, not for claims about force."
)

_RESTORED = ("body_pos", "body_quat", "geom_pos", "geom_quat", "geom_rgba", "site_pos", "site_quat", "site_rgba")


class MetaworldScene(MujocoScene):
    """One Meta-World task with cameras, touch and proprioception; reuse it across episodes of the task.

    Args:
        task: a name of `metaworld_tasks.TASKS`, for example `reach-v3`.
        pixels: height and width of both images.
        cameras: which of `front` and `wrist` to render.

    Raises:
        ConfigError: unknown task or camera.
        DataError: no off-screen OpenGL.
    """

    embodiment = "sawyer"
    hold = np.zeros(len(ACTION_NAMES), np.float32)
    max_steps = MAX_STEPS

    def __init__(self, task: str, *, pixels: int = 64, cameras: tuple[str, ...] = CAMERAS) -> None:
        if task not in TASKS:
            raise ConfigError(f"unknown Meta-World task {task!r}; known: {', '.join(TASKS)}")
        super().__init__("Meta-World", base="base", pixels=pixels, cameras=cameras)
        self.task = task
        info = TASKS[task]
        self.instruction, self.coloured, self.things = info.instruction, info.coloured, info.things
        self._env = build_environment(task)
        self.model, self.data = self._env.model, self._env.data
        self._pristine = {name: getattr(self.model, name).copy() for name in _RESTORED}
        self.appearance = make_appearance(self.model, info.coloured, bodies=info.bodies, goals=info.goals)
        self._touch = make_touch(self.model)
        self._joints = [self.model.joint(f"right_j{j}") for j in range(7)]
        self._wrench, self._taxels = self._touch.read(self.data)
        self._raw: np.ndarray = np.zeros(39)
        self.point_names: tuple[str, ...] = ()

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        """Draw object, goal and camera placement from `rng` and return the first observation.

        The result is a function of `rng` alone: whatever an earlier episode changed in the model is undone first.
        """
        for name, value in self._pristine.items():
            getattr(self.model, name)[:] = value
        self._mj.mj_resetData(self.model, self.data)
        self._mj.mj_forward(self.model, self.data)
        self._env.seed(int(rng.integers(2**31)))
        self._raw, _ = self._env.reset()
        self._target = place_cameras(self.model, rng)
        self._mj.mj_forward(self.model, self.data)
        self._wrench, self._taxels = self._touch.read(self.data)
        self._place_base()
        self.point_names = tuple(name for name, _ in self._named_points())
        return self._observe(images)

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        """Hold `action` (4,), clipped to [-1, 1], for one control step.

        Returns:
            The next observation and whether the task was successful at any simulator step in between.
        """
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if action.shape != (4,):
            raise ConfigError(f"Meta-World takes actions of shape (4,) {ACTION_NAMES}, got {action.shape}")
        success = False
        wrench, taxels = np.zeros_like(self._wrench), np.zeros_like(self._taxels)
        for _ in range(CONTROL_STEPS):
            self._raw, _, _, _, info = self._env.step(action)
            success |= bool(info["success"])
            step_wrench, step_taxels = self._touch.read(self.data)
            wrench += step_wrench / CONTROL_STEPS
            taxels += step_taxels / CONTROL_STEPS
        self._wrench, self._taxels = wrench, taxels
        return self._observe(images), success

    def expert(self) -> "Expert":
        """The task's scripted expert, reading this scene's full state."""
        return Expert(self)

    def metadata(self) -> dict[str, Any]:
        """Names, frames and units of everything an episode of this scene records."""
        return {
            **RECORDED,
            "embodiment": self.embodiment,
            "task": self.task,
            "instruction": self.instruction,
            "fps": self.fps,
            "source": "metaworld",
            "licence": "MIT (Meta-World assets and experts)",
            "cameras": list(self.cameras),
            "point_names": list(self.point_names),
            "sensor_frames": {"wrist": "hand", "left_finger": "leftpad", "right_finger": "rightpad"},
            "force_note": FORCE_NOTE,
            "proprio_names": list(PROPRIO_NAMES),
            "proprio_units": list(PROPRIO_UNITS),
            "action_names": list(ACTION_NAMES),
            "action_units": list(ACTION_UNITS),
        }

    def render(self, camera: str) -> np.ndarray:
        """(pixels, pixels, 3) uint8 image from `camera` now."""
        # Stepping puts goal markers back where the XML has them, so move them before every picture.
        for site, position in self._env._target_site_config:
            self._env._set_pos_site(site, np.asarray(position).copy())
        return super().render(camera)

    def _observe(self, images: bool) -> dict[str, Any]:
        observation = self._see([point for _, point in self._named_points()], images)
        observation["wrench"] = self._wrench.astype(np.float32)
        observation["taxels"] = self._taxels.astype(np.float32)
        observation["proprio"] = self._proprio()
        observation["instruction"] = self.instruction
        return observation

    def _named_points(self) -> list[tuple[str, np.ndarray]]:
        """World positions of what the task is about, in a fixed order."""
        positions = np.asarray(self._env._get_pos_objects(), float).reshape(-1, 3)
        points = [("object", positions[0])]
        if (order := TASKS[self.task].quaternion) is not None:
            quaternion = np.asarray(self._env._get_quat_objects(), float)[:4]
            wxyz = quaternion if order == "wxyz" else quaternion[[3, 0, 1, 2]]
            offset = np.zeros(3)
            self._mj.mju_rotVecQuat(offset, np.array([0.1, 0.0, 0.0]), wxyz)
            # Position and a second point 10 cm along the object's own x axis together say how it is turned.
            points.append(("object_front", positions[0] + offset))
        if len(positions) > 1:
            points.append(("object2", positions[1]))
        if self._env._target_pos is not None:
            points.append(("goal", np.asarray(self._env._target_pos, float)))
        return points

    def _proprio(self) -> np.ndarray:
        opening = np.linalg.norm(self.data.body("rightclaw").xpos - self.data.body("leftclaw").xpos)
        position = [self.data.qpos[joint.qposadr[0]] for joint in self._joints]
        velocity = [self.data.qvel[joint.dofadr[0]] for joint in self._joints]
        hand = self._to_base(self._env.get_endeff_pos())
        return np.concatenate([hand, [opening], position, velocity]).astype(np.float32)


class Expert:
    """Meta-World's scripted policy for the scene's task; `act()` gives the action (4,) for the state now."""

    def __init__(self, scene: MetaworldScene) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._scene = scene
        self._policy = ENV_POLICY_MAP[scene.task]()

    def act(self) -> np.ndarray:
        """Action (4,) float32 in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "constants may be too high": clipped below
            action = np.clip(self._policy.get_action(self._scene._raw), -1.0, 1.0).astype(np.float32)
        action[:3] *= TASKS[self._scene.task].pace
        return action
