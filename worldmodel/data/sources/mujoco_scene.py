"""What all scenes in MuJoCo share: pictures, camera geometry and touch, in the conventions of the records.

Frames: everything is in the robot's base frame, SI units, cameras with OpenCV axes.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from worldmodel.data.sources.rendering import close_at_exit, mujoco_module, select_gl_backend
from worldmodel.errors import ConfigError

SENSORS = ("wrist", "left_finger", "right_finger")
TAXEL_SENSORS = ("left_finger", "right_finger")
CAMERAS = ("front", "wrist")
FPS = 20.0


class MujocoScene:
    """Pictures and geometry of a MuJoCo model with two cameras.

    Args:
        simulator: name for messages.
        base: body whose frame is the robot's base frame.
        pixels: height and width of the images.
        cameras: which of `front` and `wrist` to render.
        camera_names: their names in the model, where other.

    Raises:
        ConfigError: unknown camera.
        DataError: no off-screen OpenGL.
    """

    fps = FPS
    model: Any
    data: Any
    hidden_groups: tuple[int, ...] = ()
    """Groups of geoms that no picture shows."""

    def __init__(
        self,
        simulator: str,
        *,
        base: str,
        pixels: int,
        cameras: tuple[str, ...],
        camera_names: dict[str, str] | None = None,
    ) -> None:
        if unknown := sorted(set(cameras) - set(CAMERAS)):
            raise ConfigError(f"unknown cameras {unknown}; {simulator} scenes have {list(CAMERAS)}")
        # The software rasteriser's worker threads cost more than they give at this image size.
        os.environ.setdefault("LP_NUM_THREADS", "0")
        select_gl_backend()
        self._mj: Any = mujoco_module()
        self.pixels, self.cameras = pixels, cameras
        self._camera_names = camera_names or {name: name for name in CAMERAS}
        self._base_body = base
        self._base = np.eye(4)
        self._renderer: Any = None
        self._option: Any = None
        self._unused_group = 0

    def intrinsics(self, camera: str) -> np.ndarray:
        """(3, 3) float32 pinhole matrix of `camera` in pixels of its image."""
        focal = 0.5 * self.pixels / np.tan(np.radians(self.model.camera(self._camera_names[camera]).fovy[0]) / 2)
        centre = self.pixels / 2
        return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]], np.float32)

    def camera_to_base(self, camera: str) -> np.ndarray:
        """(4, 4) float32 pose of `camera`, OpenCV axes (MuJoCo's camera looks along -z with y up)."""
        view = self.data.camera(self._camera_names[camera])
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
            self._option = self._mj.MjvOption()
            self._unused_group = max(set(range(self._mj.mjNGROUP)) - set(self.model.geom_group), default=-1)
            for group in (*self.hidden_groups, *([self._unused_group] if self._unused_group >= 0 else [])):
                self._option.geomgroup[group] = 0
        groups = self.model.geom_group.copy()
        try:
            if self._unused_group >= 0:
                self.model.geom_group[self._out_of_sight(camera)] = self._unused_group
            self._renderer.update_scene(self.data, camera=self._camera_names[camera], scene_option=self._option)
        finally:
            self.model.geom_group[:] = groups
        return self._renderer.render().copy()

    def _out_of_sight(self, camera: str) -> np.ndarray:
        """(G,) bool: geoms whose bounding sphere lies outside what `camera` sees.

        MuJoCo draws them all the same, which is most of the work of a software renderer: an arm's meshes.
        """
        view = self.data.camera(self._camera_names[camera])
        half = np.radians(self.model.camera(self._camera_names[camera]).fovy[0]) / 2
        sine, cosine = np.sin(half), np.cos(half)
        # Outward normals of the four sides, in the axes of MuJoCo's camera (looks along -z); the picture is square.
        sides = np.array([[cosine, 0, sine], [-cosine, 0, sine], [0, cosine, sine], [0, -cosine, sine]])
        centres = (self.data.geom_xpos - view.xpos) @ view.xmat.reshape(3, 3)
        beyond = np.concatenate([centres @ sides.T, centres[:, 2:]], axis=1).max(axis=1)
        radius = self.model.geom_rbound
        return (radius > 0) & (beyond > radius)  # planes have no radius

    def close(self) -> None:
        """Free the OpenGL context; the scene cannot render afterwards until it is asked to again."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _place_base(self) -> None:
        """Take the base frame from the state now."""
        self._base = np.eye(4)
        self._base[:3, :3] = self.data.body(self._base_body).xmat.reshape(3, 3)
        self._base[:3, 3] = self.data.body(self._base_body).xpos

    def _see(self, points: Sequence[np.ndarray], images: bool) -> dict[str, Any]:
        """Pictures, cameras and `points` (world frame) of an observation."""
        observation: dict[str, Any] = {}
        for camera in self.cameras:
            if images:
                observation[f"rgb.{camera}"] = self.render(camera)
            observation[f"intrinsics.{camera}"] = self.intrinsics(camera)
            observation[f"camera_to_base.{camera}"] = self.camera_to_base(camera)
        in_base = np.stack([self._to_base(point) for point in points])
        observation["points"] = in_base.astype(np.float32)
        observation["visible"] = self._in_front_image(in_base)
        observation["has_taxels"] = np.array([name in TAXEL_SENSORS for name in SENSORS])
        return observation

    def _to_base(self, point: np.ndarray) -> np.ndarray:
        return self._base[:3, :3].T @ (point - self._base[:3, 3])

    def _in_front_image(self, points: np.ndarray) -> np.ndarray:
        camera_to_base = self.camera_to_base("front")
        in_camera = (points - camera_to_base[:3, 3]) @ camera_to_base[:3, :3]
        pixels = in_camera @ self.intrinsics("front").T
        depth = pixels[:, 2]
        pixels = pixels[:, :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth)[:, None]
        return (depth > 0.01) & ((pixels >= 0) & (pixels < self.pixels)).all(-1)


RECORDED: dict[str, Any] = {
    "sensor_names": list(SENSORS),
    "taxel_sensors": list(TAXEL_SENSORS),
    "taxel_channels": ["shear_along_finger", "shear_across_finger", "normal"],
    "wrench_units": ["N"] * 3 + ["N·m"] * 3,
    "wrench_sign": "wrist: forearm on hand, gripper weight included, no bias removed; fingers: world on finger",
    "wrench_time": "mean over the simulator steps of the control step that ends at the observation",
    "visible_note": "visible = projects inside the front image and in front of it; occlusion is not tested",
    "absent": [],
}
"""Metadata that every such scene has."""


def place_camera(model: Any, name: str, position: np.ndarray, rotation: np.ndarray, fovy: float) -> None:
    """Put a camera at `position` with `rotation` (MuJoCo's axes), both in its body's frame; `fovy` in degrees."""
    camera = model.camera(name)
    camera.pos[:], camera.fovy[0] = position, fovy
    quaternion = np.zeros(4)
    mujoco_module().mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    camera.quat[:] = quaternion


def look_at(position: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rotation of a MuJoCo camera (looks along -z, y up) at `position` that faces `target`."""
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward], axis=1)


def euler(angles: np.ndarray) -> np.ndarray:
    """Rotation about x, then y, then z by `angles` in radians."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[j, i], turn[i, j] = np.sin(angle), -np.sin(angle)
        rotation = turn @ rotation
    return rotation
