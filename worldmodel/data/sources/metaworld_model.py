"""The MuJoCo side of a Meta-World scene: our cameras and wrist sensor in its model, their placement, and touch."""

from typing import Any

import numpy as np

TAXEL_GRID = (3, 4, 4)

_FRONT_POSITION, _FRONT_TARGET, _FRONT_FOVY = (0.60, 0.08, 0.55), (0.0, 0.65, 0.12), 41.0
_WRIST_POSITION, _WRIST_TARGET, _WRIST_FOVY = (0.12, -0.02, 0.04), (-0.02, 0.01, -0.09), 75.0
_HAND_TO_WORLD = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
"""The hand's nominal orientation (the weld keeps it within a few degrees): its x axis points down."""


def build_environment(task: str) -> Any:
    """The task's environment with our cameras and wrist sensor compiled into its model."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    mujoco = _mujoco()
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


def place_cameras(model: Any, rng: np.random.Generator) -> None:
    """Vary both cameras per episode, so that pose and field of view from one image are worth inferring."""
    position = np.array(_FRONT_POSITION) + rng.uniform(-0.05, 0.05, 3)
    target = np.array(_FRONT_TARGET) + rng.uniform(-0.03, 0.03, 3)
    front = model.camera("front")
    front.pos[:] = position
    front.quat[:] = _quaternion(_look_at(position, target, np.array([0.0, 0.0, 1.0])))
    front.fovy[0] = _FRONT_FOVY + rng.uniform(-4.0, 4.0)
    # Image up is the world's y axis: the camera looks down past the fingers at what they are about to touch.
    mount = _look_at(np.array(_WRIST_POSITION), np.array(_WRIST_TARGET), np.array([0.0, 1.0, 0.0]))
    wrist = model.camera("wrist")
    wrist.pos[:] = _HAND_TO_WORLD.T @ (np.array(_WRIST_POSITION) + rng.uniform(-0.01, 0.01, 3))
    jitter = _euler(np.radians(rng.uniform(-6.0, 6.0, 3)))
    wrist.quat[:] = _quaternion(_HAND_TO_WORLD.T @ mount @ jitter)
    wrist.fovy[0] = _WRIST_FOVY + rng.uniform(-4.0, 4.0)


class Touch:
    """Reads the wrist sensor and the contacts on both fingers."""

    def __init__(self, model: Any) -> None:
        self._mj, self._model = _mujoco(), model
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


def _mujoco() -> Any:
    """mujoco, imported only after a back end was chosen; its names are made at import, hidden from type checkers."""
    import mujoco

    return mujoco


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """wxyz, MuJoCo's order."""
    quaternion = np.zeros(4)
    _mujoco().mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    return quaternion


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
