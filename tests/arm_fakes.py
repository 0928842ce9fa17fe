"""A made-up simulator with the robots of robosuite: tests of several arms need no MuJoCo."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from worldmodel.data.embodiments import load_embodiments
from worldmodel.data.sources.mujoco_scene import RECORDED

TASKS = {"Lift": 24, "Stack": 30}
TRAINED, HELDOUT = ["panda", "ur5e"], "kinova3"


class Arm:
    """A hand without inertia that must reach a cube; its joints show nothing."""

    hold = np.zeros(7, np.float32)
    elements = ()

    def __init__(self, task: str, robot: str, pixels: int, cameras: tuple[str, ...]) -> None:
        self.task, self.embodiment, self.pixels, self.cameras = task, robot, pixels, cameras
        self.max_steps = TASKS[task]
        self.robot = load_embodiments()[robot]
        self.started: list[np.ndarray] = []

    def _observe(self, images: bool) -> dict[str, Any]:
        assert self.robot.proprio is not None
        proprio = np.zeros(len(self.robot.proprio.names), np.float32)
        proprio[:3], proprio[4:] = self.place, np.linspace(-1, 1, len(proprio) - 4) + 0.1 * self.place[0]
        pose = np.eye(4, dtype=np.float32)
        pose[:3, 3] = [0.5, 0.0, 0.5]
        lens = np.array([[60, 0, 32], [0, 60, 32], [0, 0, 1]], np.float32)
        shade = int(100 + 200 * self.place[0]) % 256
        observation: dict[str, Any] = {
            "points": np.stack([self.cube, self.cube + 0.1]).astype(np.float32),
            "visible": np.ones(2, bool),
            "wrench": np.full((3, 6), self.place[1], np.float32),
            "taxels": np.full((3, 3, 4, 4), self.place[2], np.float32),
            "has_taxels": np.array([False, True, True]),
            "proprio": proprio,
            "instruction": f"{self.task} the cube.",
        }
        for camera in self.cameras:
            observation |= {f"intrinsics.{camera}": lens, f"camera_to_base.{camera}": pose}
            if images:
                observation[f"rgb.{camera}"] = np.full((self.pixels, self.pixels, 3), shade, np.uint8)
        return observation

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        self.place, self.cube = rng.uniform(-0.2, 0.2, 3), rng.uniform(0.4, 0.5, 3)
        self.started.append(self.place.copy())
        return self._observe(images)

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        assert action.shape == (7,)
        self.place = self.place + 0.05 * np.clip(action[:3], -1, 1)
        return self._observe(images), bool(np.abs(self.place - self.cube).max() < 0.03)

    def expert(self) -> Any:
        return self

    def act(self) -> np.ndarray:
        return np.append(np.clip((self.cube - self.place) / 0.05, -0.7, 0.7), np.zeros(4)).astype(np.float32)

    def metadata(self) -> dict[str, Any]:
        assert self.robot.action and self.robot.proprio
        named = {"cameras": list(self.cameras), "point_names": ["object", "object_front"], "fps": 20.0, "source": "x"}
        named |= {"embodiment": self.embodiment, "task": self.task, "instruction": f"{self.task} the cube."}
        named |= {"action_names": list(self.robot.action.names), "action_units": list(self.robot.action.units)}
        named |= {"proprio_names": list(self.robot.proprio.names), "proprio_units": list(self.robot.proprio.units)}
        return RECORDED | named

    def close(self) -> None: ...


@dataclass(frozen=True)
class Arms:
    """Picklable, so that spawned workers can build the scenes."""

    def __call__(self, task: str, robot: str | None) -> Arm:
        assert robot is not None
        return Arm(task, robot, 64, ("front", "wrist"))
