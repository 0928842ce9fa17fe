"""PushT (pymunk, through gym-pusht): a round pusher, a T and the place where it belongs, seen from above.

The world is a plane of 512 x 512 pixels without a metric size; one pixel is taken as one millimetre. Base frame: origin
at the upper left corner of the picture, x right and y down as in it, z into the table. The one camera stands `HEIGHT`
above the middle and looks straight down, so that a point (x, y, 0) is seen exactly where it is drawn.

One control step is ten simulator steps of 10 ms (10 Hz). An action is where the pusher is to be; gym-pusht's own
controller takes it there, as if the pusher hung on a damped spring, without ever overshooting. The T slides without
inertia. It is solved when it covers more than 95 % of its place, which is gym-pusht's own `is_success`.
"""

import os
import warnings
from typing import Any

import numpy as np

from worldmodel.data.sources.pusht_expert import PushtExpert
from worldmodel.data.sources.viewpoints import in_picture
from worldmodel.errors import ConfigError, DataError

TASKS = {"push-t": "Push the T onto the green T."}
"""Task -> instruction."""
CAMERAS = ("front",)
FPS = 10.0
MAX_STEPS = 300
PIXELS = 512
"""Height and width of the simulator's plane."""
SCALE = 1e-3
"""Metres that a pixel of the plane is taken for."""
HEIGHT = 0.512
"""Metres of the camera above the plane, which sets its field of view: 53 degrees."""
PROPRIO_NAMES = (*(f"end_effector_{axis}" for axis in "xyz"), *(f"end_effector_velocity_{axis}" for axis in "xy"))
PROPRIO_UNITS = ("m",) * 3 + ("m/s",) * 2
ACTION_NAMES = ("target_x", "target_y")
ACTION_UNITS = ("m",) * 2
POINTS = {"object": (0.0, 15.0), "object_foot": (0.0, 105.0)}
"""Points of the T, in pixels of its own frame: the middle of the bar and near the end of the stem. Two of them say how
it lies. The same points of its place are called `goal` instead of `object`."""
SCALE_NOTE = "the simulated plane has no metric size; one of its 512 pixels is taken as 1 mm"


class PushtScene:
    """The plane with pusher and T; reuse it across episodes.

    Args:
        task: a name of `TASKS`.
        pixels: height and width of the images.
        cameras: `front` or nothing.

    Raises:
        ConfigError: unknown task or camera.
        DataError: gym-pusht is not installed.
    """

    embodiment = "pusht"
    max_steps = MAX_STEPS

    def __init__(self, task: str, *, pixels: int = 64, cameras: tuple[str, ...] = CAMERAS) -> None:
        if task not in TASKS:
            raise ConfigError(f"unknown PushT task {task!r}; known: {', '.join(TASKS)}")
        if unknown := sorted(set(cameras) - set(CAMERAS)):
            raise ConfigError(f"unknown cameras {unknown}; PushT scenes have {list(CAMERAS)}")
        self.task, self.pixels, self.cameras = task, pixels, cameras
        self.environment = build_environment(pixels)
        self.hold = np.zeros(len(ACTION_NAMES), np.float32)
        centre = pixels / 2
        focal = pixels * HEIGHT / (PIXELS * SCALE)
        self._intrinsics = np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], np.float32)
        self._camera_to_base = np.eye(4, dtype=np.float32)
        self._camera_to_base[:3, 3] = PIXELS * SCALE / 2, PIXELS * SCALE / 2, -HEIGHT

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        """Draw pusher and T as gym-pusht does, as a function of `rng` alone, and return the first observation."""
        self.environment.reset(seed=int(rng.integers(2**31)))
        return self._observe(images)

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        """Pull the pusher towards `action` (2,), metres in the base frame, clipped to the plane, for one control step.

        Returns:
            The next observation and whether the T covers more than 95 % of its place.
        """
        action = np.clip(np.asarray(action, np.float64), 0.0, PIXELS * SCALE)
        if action.shape != (len(ACTION_NAMES),):
            raise ConfigError(f"PushT takes actions of shape (2,) {ACTION_NAMES}, got {action.shape}")
        info = self.environment.step(action / SCALE)[-1]
        return self._observe(images), bool(info["is_success"])

    def expert(self) -> PushtExpert:
        """A planner that pushes in a copy of the simulator before it pushes here."""
        return PushtExpert(self.environment, build_environment(self.pixels), scale=SCALE)

    def metadata(self) -> dict[str, Any]:
        """Names, frames and units of everything an episode of this scene records."""
        return {
            "embodiment": self.embodiment,
            "task": self.task,
            "instruction": TASKS[self.task],
            "fps": FPS,
            "source": "pusht",
            "licence": "Apache-2.0 (gym-pusht)",
            "cameras": list(self.cameras),
            "point_names": [*POINTS, *(name.replace("object", "goal") for name in POINTS)],
            "visible_note": "visible = projects inside the front image; occlusion by the pusher is not tested",
            "proprio_names": list(PROPRIO_NAMES),
            "proprio_units": list(PROPRIO_UNITS),
            "action_names": list(ACTION_NAMES),
            "action_units": list(ACTION_UNITS),
            "action_frame": "base",
            "scale_note": SCALE_NOTE,
            "absent": ["tactile"],
        }

    def close(self) -> None:
        """Free the simulator."""
        self.environment.close()

    def _observe(self, images: bool) -> dict[str, Any]:
        environment, points = self.environment, self._points()
        pusher = np.array(environment.agent.position) * SCALE
        # An action is a place, so the one that changes nothing is where the pusher is.
        self.hold = pusher.astype(np.float32)
        observation: dict[str, Any] = {}
        for camera in self.cameras:
            if images:
                observation[f"rgb.{camera}"] = environment._render()
            observation[f"intrinsics.{camera}"] = self._intrinsics.copy()
            observation[f"camera_to_base.{camera}"] = self._camera_to_base.copy()
        observation["points"] = points
        observation["visible"] = in_picture(points, self._camera_to_base, self._intrinsics, self.pixels)
        velocity = np.array(environment.agent.velocity) * SCALE
        observation["proprio"] = np.concatenate([pusher, [0.0], velocity]).astype(np.float32)
        observation["instruction"] = TASKS[self.task]
        return observation

    def _points(self) -> np.ndarray:
        """(4, 3) float32 metres in the base frame, in the order of `point_names`."""
        environment = self.environment
        goal = environment.get_goal_pose_body(environment.goal_pose)
        placed = [body.local_to_world(point) for body in (environment.block, goal) for point in POINTS.values()]
        return np.array([(x * SCALE, y * SCALE, 0.0) for x, y in placed], np.float32)


def build_environment(pixels: int) -> Any:
    """gym-pusht's environment, its pictures of `pixels` x `pixels`.

    Raises:
        DataError: gym-pusht is not installed.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    try:
        with warnings.catch_warnings():
            # pygame asks setuptools for its own files, gym-pusht hides but one kind of that warning.
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")
            from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise DataError(f"PushT needs gym-pusht ({error}): pip install 'worldmodel[pusht]'") from error
    return PushTEnv(obs_type="state", observation_width=pixels, observation_height=pixels)
