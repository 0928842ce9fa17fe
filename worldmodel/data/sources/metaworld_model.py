"""The MuJoCo side of a Meta-World scene: cameras and wrist sensor in its model, their placement, its fingers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from worldmodel.data.sources.appearance import Appearance, elements_of_bodies
from worldmodel.data.sources.rendering import mujoco_module
from worldmodel.data.sources.touch import Finger, Touch
from worldmodel.data.sources.viewpoints import euler, look_at, place_camera

_FRONT_POSITION, _FRONT_TARGET, _FRONT_FOVY = (0.60, 0.08, 0.55), (0.0, 0.65, 0.12), 41.0
_WRIST_POSITION, _WRIST_TARGET, _WRIST_FOVY = (0.12, -0.02, 0.04), (-0.02, 0.01, -0.09), 75.0
_HAND_TO_WORLD = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
"""The hand's nominal orientation (the weld keeps it within a few degrees): its x axis points down."""
_BODIES = {"base": "robot", "hand": "gripper", "tablelink": "table", "RetainingWall": "table"}
"""Elements of the bodies that all tasks have, and of what hangs on them."""


def build_environment(task: str) -> Any:
    """The task's environment with our cameras and wrist sensor compiled into its model."""
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    mujoco = mujoco_module()
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


def place_cameras(model: Any, rng: np.random.Generator) -> np.ndarray:
    """Vary both cameras per episode, so that pose and field of view from one image are worth inferring.

    Returns:
        (3,) what the front camera faces, world frame.
    """
    position = np.array(_FRONT_POSITION) + rng.uniform(-0.05, 0.05, 3)
    target = np.array(_FRONT_TARGET) + rng.uniform(-0.03, 0.03, 3)
    rotation = look_at(position, target, np.array([0.0, 0.0, 1.0]))
    place_camera(model, "front", position, rotation, _FRONT_FOVY + rng.uniform(-4.0, 4.0))
    # Image up is the world's y axis: the camera looks down past the fingers at what they are about to touch.
    mount = look_at(np.array(_WRIST_POSITION), np.array(_WRIST_TARGET), np.array([0.0, 1.0, 0.0]))
    position = _HAND_TO_WORLD.T @ (np.array(_WRIST_POSITION) + rng.uniform(-0.01, 0.01, 3))
    jitter = euler(np.radians(rng.uniform(-6.0, 6.0, 3)))
    rotation = _HAND_TO_WORLD.T @ mount @ jitter
    place_camera(model, "wrist", position, rotation, _WRIST_FOVY + rng.uniform(-8.0, 8.0))
    return target


def make_appearance(model: Any, flat: Sequence[str], *, bodies: Mapping[str, str], goals: Sequence[str]) -> Appearance:
    """What belongs to which element: everything that moves and is not the arm is the task's object.

    Args:
        model: MuJoCo model.
        flat: elements whose colour the instruction names.
        bodies: elements of bodies, and of all that hangs on them, which are others.
        goals: names of sites that mark the goal.
    """
    roots: dict[int, str] = {}
    told: set[int] = set()
    for body in range(1, model.nbody):
        name, mother = model.body(body).name, int(model.body_rootid[body])
        if name in bodies or int(model.body_parentid[body]) in told:
            told.add(body)
            if name in bodies:
                roots[body] = bodies[name]
        elif name in _BODIES:
            roots[body] = _BODIES[name]
        elif model.body_weldid[body] != 0 and model.body(mother).name not in _BODIES:
            roots[body] = "object"
    return Appearance(model, elements_of_bodies(model, roots), goals=goals, flat=flat)


def make_touch(model: Any) -> Touch:
    """The wrist sensor and both fingers: claw and pad, in the frame of the pad."""
    fingers = [
        Finger(
            bodies=tuple(model.body(f"{side}{part}").id for part in ("claw", "pad")),
            pad=model.geom(f"{side}pad_geom").id,
        )
        for side in ("left", "right")
    ]
    return Touch(model, fingers, force="wrist_force", torque="wrist_torque")
