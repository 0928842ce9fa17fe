"""Meta-World (MuJoCo, simulated Sawyer) as a source of demonstrations with every sense, and as a closed-loop robot.

Frames: everything is in the robot's base frame (body `base`), SI units, cameras with OpenCV axes. One control step is
four simulator steps of 12.5 ms (20 Hz), the action held over them.

Touch: `wrench` is [fx, fy, fz, tx, ty, tz], the mean over the simulator steps of one control step. Row `wrist` is a
MuJoCo site force/torque sensor at body `hand`: what the forearm applies to the hand, in the hand's frame, the weight of
the gripper included. Rows `left_finger` and `right_finger` are the sums of contact forces on that finger (claw and
pad), in the frame of its pad, torque about the pad's centre. Taxels bin the same contacts over the pad's extent: shear
along the finger, shear across it, and the normal pressing into the pad's inner face.
"""

import os
import warnings
from typing import Any

import numpy as np

from worldmodel.data.sources.metaworld_model import TAXEL_GRID, Touch, build_environment, place_cameras
from worldmodel.data.sources.metaworld_tasks import TASKS
from worldmodel.data.sources.rendering import close_at_exit, select_gl_backend
from worldmodel.errors import ConfigError

SENSORS = ("wrist", "left_finger", "right_finger")
TAXEL_SENSORS = ("left_finger", "right_finger")
CAMERAS = ("front", "wrist")
CONTROL_STEPS = 4
FPS = 20.0
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


class MetaworldScene:
    """One Meta-World task with cameras, touch and proprioception; reuse it across episodes of the task.

    Args:
        task: one of the 15 ML10 names, for example `reach-v3`.
        pixels: height and width of both images.
        cameras: which of `front` and `wrist` to render.

    Raises:
        ConfigError: unknown task or camera.
        DataError: no off-screen OpenGL.
    """

    embodiment = "sawyer"
    fps = FPS

    def __init__(self, task: str, *, pixels: int = 64, cameras: tuple[str, ...] = CAMERAS) -> None:
        if task not in TASKS:
            raise ConfigError(f"unknown Meta-World task {task!r}; known: {', '.join(TASKS)}")
        if unknown := sorted(set(cameras) - set(CAMERAS)):
            raise ConfigError(f"unknown cameras {unknown}; Meta-World scenes have {list(CAMERAS)}")
        # The software rasteriser's worker threads cost more than they give at this image size.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        select_gl_backend()
        import mujoco

        self._mj: Any = mujoco  # built at import, so type checkers see none of its names
        self.task, self.pixels, self.cameras = task, pixels, cameras
        self.instruction = TASKS[task].instruction
        self._env = build_environment(task)
        self.model, self.data = self._env.model, self._env.data
        self._pristine = {name: getattr(self.model, name).copy() for name in _RESTORED}
        self._renderer: Any = None
        self._touch = Touch(self.model)
        self._joints = [self.model.joint(f"right_j{j}") for j in range(7)]
        self._wrench = np.zeros((3, 6))
        self._taxels = np.zeros((3, *TAXEL_GRID))
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
        place_cameras(self.model, rng)
        self._mj.mj_forward(self.model, self.data)
        self._wrench, self._taxels = self._touch.read(self.data)
        self._base = np.eye(4)
        self._base[:3, :3] = self.data.body("base").xmat.reshape(3, 3)
        self._base[:3, 3] = self.data.body("base").xpos
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
            "embodiment": self.embodiment,
            "task": self.task,
            "instruction": self.instruction,
            "fps": self.fps,
            "source": "metaworld",
            "licence": "MIT (Meta-World assets and experts)",
            "cameras": list(self.cameras),
            "point_names": list(self.point_names),
            "sensor_names": list(SENSORS),
            "taxel_sensors": list(TAXEL_SENSORS),
            "taxel_channels": ["shear_along_finger", "shear_across_finger", "normal"],
            "sensor_frames": {"wrist": "hand", "left_finger": "leftpad", "right_finger": "rightpad"},
            "wrench_units": ["N"] * 3 + ["N·m"] * 3,
            "wrench_sign": "wrist: forearm on hand, gripper weight included, no bias removed; fingers: world on finger",
            "wrench_time": "mean over the simulator steps of the control step that ends at the observation",
            "force_note": FORCE_NOTE,
            "visible_note": "visible = projects inside the front image and in front of it; occlusion is not tested",
            "proprio_names": list(PROPRIO_NAMES),
            "proprio_units": list(PROPRIO_UNITS),
            "action_names": list(ACTION_NAMES),
            "action_units": list(ACTION_UNITS),
            "absent": [],
        }

    def intrinsics(self, camera: str) -> np.ndarray:
        """(3, 3) float32 pinhole matrix of `camera` in pixels of its image."""
        focal = 0.5 * self.pixels / np.tan(np.radians(self.model.camera(camera).fovy[0]) / 2)
        centre = self.pixels / 2
        return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], np.float32)

    def camera_to_base(self, camera: str) -> np.ndarray:
        """(4, 4) float32 pose of `camera`, OpenCV axes (MuJoCo's camera looks along -z with y up)."""
        view = self.data.camera(camera)
        camera_to_world = np.eye(4)
        camera_to_world[:3, :3] = view.xmat.reshape(3, 3) @ np.diag([1.0, -1.0, -1.0])
        camera_to_world[:3, 3] = view.xpos
        return (np.linalg.inv(self._base) @ camera_to_world).astype(np.float32)

    def render(self, camera: str) -> np.ndarray:
        """(pixels, pixels, 3) uint8 image from `camera` now."""
        if self._renderer is None:
            self._renderer = self._mj.Renderer(self.model, self.pixels, self.pixels)
            close_at_exit(self)
            for flag in (self._mj.mjtRndFlag.mjRND_SHADOW, self._mj.mjtRndFlag.mjRND_REFLECTION):
                self._renderer.scene.flags[flag] = 0
        # Stepping puts goal markers back where the XML has them, so move them before every picture.
        for site, position in self._env._target_site_config:
            self._env._set_pos_site(site, np.asarray(position).copy())
        self._renderer.update_scene(self.data, camera=camera)
        return self._renderer.render().copy()

    def close(self) -> None:
        """Free the OpenGL context; the scene cannot render afterwards until it is asked to again."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _observe(self, images: bool) -> dict[str, Any]:
        observation: dict[str, Any] = {}
        for camera in self.cameras:
            if images:
                observation[f"rgb.{camera}"] = self.render(camera)
            observation[f"intrinsics.{camera}"] = self.intrinsics(camera)
            observation[f"camera_to_base.{camera}"] = self.camera_to_base(camera)
        points = np.stack([self._to_base(point) for _, point in self._named_points()])
        observation["points"] = points.astype(np.float32)
        observation["visible"] = self._in_front_image(points)
        observation["wrench"] = self._wrench.astype(np.float32)
        observation["taxels"] = self._taxels.astype(np.float32)
        observation["has_taxels"] = np.array([name in TAXEL_SENSORS for name in SENSORS])
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

    def _to_base(self, point: np.ndarray) -> np.ndarray:
        return self._base[:3, :3].T @ (point - self._base[:3, 3])

    def _in_front_image(self, points: np.ndarray) -> np.ndarray:
        camera_to_base = self.camera_to_base("front")
        in_camera = (points - camera_to_base[:3, 3]) @ camera_to_base[:3, :3]
        pixels = in_camera @ self.intrinsics("front").T
        depth = pixels[:, 2]
        pixels = pixels[:, :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth)[:, None]
        return (depth > 0.01) & ((pixels >= 0) & (pixels < self.pixels)).all(-1)

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
            action = self._policy.get_action(self._scene._raw)
        return np.clip(action, -1.0, 1.0).astype(np.float32)
