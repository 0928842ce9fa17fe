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

from worldmodel.data.sources.metaworld_tasks import TASKS
from worldmodel.data.sources.rendering import close_at_exit, select_gl_backend
from worldmodel.errors import ConfigError

SENSORS = ("wrist", "left_finger", "right_finger")
TAXEL_SENSORS = ("left_finger", "right_finger")
TAXEL_GRID = (3, 4, 4)
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

_FRONT_POSITION, _FRONT_TARGET, _FRONT_FOVY = (0.60, 0.08, 0.55), (0.0, 0.65, 0.12), 41.0
_WRIST_POSITION, _WRIST_TARGET, _WRIST_FOVY = (0.12, -0.02, 0.04), (-0.02, 0.01, -0.09), 75.0
_HAND_TO_WORLD = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
"""The hand's nominal orientation (the weld keeps it within a few degrees): its x axis points down."""
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

        self._mj = mujoco
        self.task, self.pixels, self.cameras = task, pixels, cameras
        self.instruction = TASKS[task].instruction
        self._env = _build_environment(task)
        self.model, self.data = self._env.model, self._env.data
        self._pristine = {name: getattr(self.model, name).copy() for name in _RESTORED}
        self._renderer: Any = None
        self._touch = _Touch(self.model)
        self._joints = [self.model.joint(f"right_j{j}") for j in range(7)]
        self._wrench = np.zeros((3, 6))
        self._taxels = np.zeros((3, *TAXEL_GRID))
        self._raw: np.ndarray = np.zeros(39)
        self.point_names: tuple[str, ...] = ()
        close_at_exit(self)

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
        self._place_cameras(rng)
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

    def _place_cameras(self, rng: np.random.Generator) -> None:
        """Vary both cameras per episode, so that pose and field of view from one image are worth inferring."""
        position = np.array(_FRONT_POSITION) + rng.uniform(-0.05, 0.05, 3)
        target = np.array(_FRONT_TARGET) + rng.uniform(-0.03, 0.03, 3)
        front = self.model.camera("front")
        front.pos[:] = position
        front.quat[:] = self._quaternion(_look_at(position, target, np.array([0.0, 0.0, 1.0])))
        front.fovy[0] = _FRONT_FOVY + rng.uniform(-4.0, 4.0)
        # Image up is the world's y axis: the camera looks down past the fingers at what they are about to touch.
        mount = _look_at(np.array(_WRIST_POSITION), np.array(_WRIST_TARGET), np.array([0.0, 1.0, 0.0]))
        wrist = self.model.camera("wrist")
        wrist.pos[:] = _HAND_TO_WORLD.T @ (np.array(_WRIST_POSITION) + rng.uniform(-0.01, 0.01, 3))
        jitter = _euler(np.radians(rng.uniform(-6.0, 6.0, 3)))
        wrist.quat[:] = self._quaternion(_HAND_TO_WORLD.T @ mount @ jitter)
        wrist.fovy[0] = _WRIST_FOVY + rng.uniform(-4.0, 4.0)

    def _quaternion(self, rotation: np.ndarray) -> np.ndarray:
        quaternion = np.zeros(4)
        self._mj.mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
        return quaternion


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


class _Touch:
    """Reads the wrist sensor and the contacts on both fingers."""

    def __init__(self, model: Any) -> None:
        import mujoco

        self._mj, self._model = mujoco, model
        self._pads = [model.geom(f"{side}pad_geom").id for side in ("left", "right")]
        self._finger_of_geom = np.full(model.ngeom, -1)
        for finger, side in enumerate(("left", "right")):
            bodies = [model.body(f"{side}{part}").id for part in ("claw", "pad")]
            self._finger_of_geom[np.isin(model.geom_bodyid, bodies)] = finger
        self._force = slice(model.sensor("wrist_force").adr[0], model.sensor("wrist_force").adr[0] + 3)
        self._torque = slice(model.sensor("wrist_torque").adr[0], model.sensor("wrist_torque").adr[0] + 3)

    def read(self, data: Any) -> tuple[np.ndarray, np.ndarray]:
        """Wrench (3, 6) and taxels (3, 3, 4, 4) of the last simulator step."""
        wrench, taxels = np.zeros((3, 6)), np.zeros((3, *TAXEL_GRID))
        wrench[0, :3], wrench[0, 3:] = data.sensordata[self._force], data.sensordata[self._torque]
        fingers = self._finger_of_geom[data.contact.geom]
        contact_force = np.zeros(6)
        for index in np.flatnonzero((fingers >= 0).any(-1)):
            self._mj.mj_contactForce(self._model, data, int(index), contact_force)
            axes, position = data.contact.frame[index].reshape(3, 3), data.contact.pos[index]
            # MuJoCo reports what geom 1 does to geom 2.
            for side, sign in ((0, -1.0), (1, 1.0)):
                finger = fingers[index, side]
                if finger < 0:
                    continue
                pad = self._pads[finger]
                world_to_pad = data.geom_xmat[pad].reshape(3, 3).T
                force = world_to_pad @ (axes.T @ contact_force[:3]) * sign
                torque = world_to_pad @ (axes.T @ contact_force[3:]) * sign
                arm = world_to_pad @ (position - data.geom_xpos[pad])
                wrench[1 + finger, :3] += force
                wrench[1 + finger, 3:] += torque + np.cross(arm, force)
                size = self._model.geom_size[pad]
                cell = ((arm / size + 1) / 2 * 4).clip(0, 3).astype(int)
                # The left pad's inner face looks along -y, the right one's along +y.
                normal = force[1] if finger == 0 else -force[1]
                taxels[1 + finger, :, cell[0], cell[2]] += (force[0], force[2], normal)
        return wrench, taxels


def _build_environment(task: str) -> Any:
    """The task's environment with our cameras and wrist sensor compiled into its model."""
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    base = ALL_V3_ENVIRONMENTS[task]

    def initialize_simulation(self: Any) -> tuple[Any, Any]:
        spec = mujoco.MjSpec.from_file(self.fullpath)
        hand = spec.body("hand")
        spec.worldbody.add_camera(name="front")
        hand.add_camera(name="wrist")
        hand.add_site(name="wrist_sensor", rgba=[0, 0, 0, 0])
        kinds = {"wrist_force": mujoco.mjtSensor.mjSENS_FORCE, "wrist_torque": mujoco.mjtSensor.mjSENS_TORQUE}
        for name, kind in kinds.items():
            spec.add_sensor(name=name, type=kind, objtype=mujoco.mjtObj.mjOBJ_SITE, objname="wrist_sensor")
        model = spec.compile()
        # Shadows and multisampling cost more than ten times the rest of a picture on a CPU.
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        return model, mujoco.MjData(model)

    environment: Any = type(base.__name__, (base,), {"_initialize_simulation": initialize_simulation})()
    environment._set_task_called = True
    environment._freeze_rand_vec = False
    environment.seeded_rand_vec = True
    # Experts need the goal in the observation, whose bounds are cached from the partially observable constructor.
    environment._partially_observable = False
    environment.__dict__.pop("sawyer_observation_space", None)
    # Whoever runs the loop limits the episode.
    environment.max_path_length = 10**9
    return environment


def _look_at(position: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rotation of a MuJoCo camera (looks along -z, y up) at `position` that faces `target`."""
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward], axis=1)


def _euler(angles: np.ndarray) -> np.ndarray:
    """Rotation about x, then y, then z by `angles` in radians."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[j, i], turn[i, j] = np.sin(angle), -np.sin(angle)
        rotation = turn @ rotation
    return rotation
