"""Checks that hold for every simulated scene: its pictures, poses and points agree with one another."""

from typing import Any

import numpy as np


def project(observation: dict[str, Any], camera: str, point: np.ndarray) -> np.ndarray:
    """Column, row and depth of a point of the base frame in the picture of `camera`."""
    base_to_camera = np.linalg.inv(observation[f"camera_to_base.{camera}"])
    in_camera = base_to_camera[:3, :3] @ point + base_to_camera[:3, 3]
    pixels = observation[f"intrinsics.{camera}"] @ in_camera
    return np.array([*(pixels[:2] / pixels[2]), pixels[2]])


def check_reprojection(scene: Any, geoms: np.ndarray, observation: dict[str, Any], camera: str) -> bool:
    """Hold the first point against the pixels that change when `geoms`, its object, are hidden.

    Independent of the renderer's own matrices. False where the object is out of the picture or behind something.
    """
    x, y, depth = project(observation, camera, observation["points"][0])
    if depth <= 0 or not (4 <= x < 60 and 4 <= y < 60):
        return False
    colours = scene.model.geom_rgba[geoms].copy()
    materials = scene.model.geom_matid[geoms].copy()
    scene.model.geom_rgba[geoms, 3] = 0
    scene.model.geom_matid[geoms] = -1  # a material's own colour would hide the change
    hidden = scene.render(camera)
    scene.model.geom_rgba[geoms], scene.model.geom_matid[geoms] = colours, materials
    difference = np.abs(hidden.astype(int) - observation[f"rgb.{camera}"]).sum(-1)
    rows, columns = np.nonzero(difference > 30)
    if len(rows) < 3:
        return False
    assert columns.min() - 1.5 <= x <= columns.max() + 2.5
    assert rows.min() - 1.5 <= y <= rows.max() + 2.5
    return True


def check_rotations(observation: dict[str, Any]) -> None:
    """Camera poses are rigid."""
    for camera in ("front", "wrist"):
        rotation = observation[f"camera_to_base.{camera}"][:3, :3].astype(float)
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-5)
        np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)


def check_depends_on_generator_alone(scene: Any, steps: int = 6) -> None:
    """An episode is the same after another one as before it."""

    def run(seed: int) -> dict[str, Any]:
        observation = scene.reset(np.random.default_rng(seed))
        expert = scene.expert()
        for _ in range(steps):
            observation, _ = scene.step(expert.act())
        return observation

    first = run(3)
    run(4)
    again = run(3)
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name], err_msg=name)
