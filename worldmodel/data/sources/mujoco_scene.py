"""What all scenes in MuJoCo share: pictures, camera geometry and touch, in the conventions of the records.

Frames: everything is in the robot's base frame, SI units, cameras with OpenCV axes.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from worldmodel.data.sources.appearance import ELEMENTS, Appearance
from worldmodel.data.sources.edits import edit_words
from worldmodel.data.sources.looks import Look, renamed
from worldmodel.data.sources.rendering import close_at_exit, mujoco_module, select_gl_backend
from worldmodel.data.sources.scene import Views
from worldmodel.data.sources.viewpoints import in_picture
from worldmodel.errors import ConfigError

SENSORS = ("wrist", "left_finger", "right_finger")
TAXEL_SENSORS = ("left_finger", "right_finger")
CAMERAS = ("front", "wrist")
FPS = 20.0
_GEOMETRY = (
    "xpos",
    "xquat",
    "xmat",
    "subtree_com",
    "geom_xpos",
    "geom_xmat",
    "site_xpos",
    "site_xmat",
    "cam_xpos",
    "cam_xmat",
    "light_xpos",
    "light_xdir",
)
"""What pictures are made of, and what places cameras and lights. Pictures show the geometry that a simulator's step
leaves behind, which is not always that of the state after it, so states would not do."""


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
    instruction: str
    coloured: tuple[str, ...] = ()
    """Elements whose colours the instruction names, in the order of the words."""
    things: Mapping[str, str] = {}
    """What the elements of this task are called, where other than their names."""
    appearance: Appearance
    """What belongs to which element, and how to dress the model."""
    elements: tuple[str, ...] = ELEMENTS

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
        self._target = np.zeros(3)

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
        self._aim(camera)
        return self._renderer.render().copy()

    def moment(self) -> Any:
        """Where everything is now, as far as pictures show it, for `retake`."""
        return {name: getattr(self.data, name).copy() for name in _GEOMETRY}

    def retake(self, moments: Sequence[Any], look: Look | None = None, *, images: bool = True) -> Views:
        """The pictures of `moments` of this episode taken again, in another look, with masks; changes nothing.

        Args:
            moments: from `moment`.
            look: None is the scene's own.
            images: False leaves the coloured pictures out.
        """
        now, views = self.moment(), Views({}, {}, {}, {})
        shots: dict[str, list[tuple[np.ndarray, ...]]] = {camera: [] for camera in self.cameras}
        self._prepare()
        dressed = (
            nullcontext()
            if look is None
            else self.appearance.wearing(look, self._target, self._camera_names, self._renderer)
        )
        try:
            with dressed:
                for moment in moments:
                    self._recall(moment)
                    if look is not None and (look.light or look.view):
                        self._mj.mj_camlight(self.model, self.data)
                    for camera, taken in shots.items():
                        taken.append(self._shoot(camera, images))
        finally:
            self._recall(now)
        for camera, taken in shots.items():
            for series, values in zip(views, zip(*taken, strict=True), strict=True):
                series[camera] = np.stack(values)
        return views._replace(rgb=views.rgb if images else {})

    def instruct(self, look: Look) -> str:
        """The instruction of the task when things have the colours of `look`."""
        return renamed(self.instruction, self.coloured, look)

    def edit(self, look: Look, changed: Sequence[str]) -> str:
        """What to ask for to get `look`, which changes the elements `changed`, from a picture of this task."""
        return edit_words(look, changed, self.things)

    def _recall(self, moment: dict[str, np.ndarray]) -> None:
        for name, value in moment.items():
            getattr(self.data, name)[:] = value

    def _shoot(self, camera: str, images: bool) -> tuple[np.ndarray, ...]:
        """Picture, mask, intrinsics and pose of `camera`."""
        self._aim(camera)
        image = self._renderer.render().copy() if images else np.zeros(0, np.uint8)
        return image, self._mask(), self.intrinsics(camera), self.camera_to_base(camera)

    def _mask(self) -> np.ndarray:
        """(pixels, pixels) uint8 places in `ELEMENTS` of what the scene shows as it was aimed last."""
        self._renderer.enable_segmentation_rendering()
        ids, kinds = np.moveaxis(self._renderer.render(), -1, 0)
        self._renderer.disable_segmentation_rendering()
        mask = np.zeros(ids.shape, np.uint8)
        for kind, elements in (("GEOM", self.appearance.geoms), ("SITE", self.appearance.sites)):
            shown = kinds == int(getattr(self._mj.mjtObj, f"mjOBJ_{kind}"))
            mask[shown] = elements[ids[shown]]
        return mask

    def _prepare(self) -> None:
        """Make the renderer if there is none."""
        if self._renderer is not None:
            return
        self._renderer = self._mj.Renderer(self.model, self.pixels, self.pixels)
        close_at_exit(self)
        for flag in (self._mj.mjtRndFlag.mjRND_SHADOW, self._mj.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        self._option = self._mj.MjvOption()
        self._unused_group = max(set(range(self._mj.mjNGROUP)) - set(self.model.geom_group), default=-1)
        for group in (*self.hidden_groups, *([self._unused_group] if self._unused_group >= 0 else [])):
            self._option.geomgroup[group] = 0

    def _aim(self, camera: str) -> None:
        """Tell the renderer what `camera` sees now."""
        self._prepare()
        groups = self.model.geom_group.copy()
        try:
            if self._unused_group >= 0:
                self.model.geom_group[self._out_of_sight(camera)] = self._unused_group
            self._renderer.update_scene(self.data, camera=self._camera_names[camera], scene_option=self._option)
        finally:
            self.model.geom_group[:] = groups

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
        observation["visible"] = in_picture(
            in_base, self.camera_to_base("front"), self.intrinsics("front"), self.pixels
        )
        observation["has_taxels"] = np.array([name in TAXEL_SENSORS for name in SENSORS])
        return observation

    def _to_base(self, point: np.ndarray) -> np.ndarray:
        return self._base[:3, :3].T @ (point - self._base[:3, 3])


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
