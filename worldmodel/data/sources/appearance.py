"""The look of a MuJoCo model: which element every geom and site belongs to, and dressing the model in another look.

Nothing here changes the physics; whoever dresses a model must let MuJoCo place cameras and lights again
(`mj_camlight`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from worldmodel.data.sources.looks import Light, Look, Paint, Pattern, View, texture
from worldmodel.data.sources.rendering import mujoco_module
from worldmodel.data.sources.viewpoints import euler, look_at, orbited, place_camera

ELEMENTS = ("background", "table", "fixture", "robot", "gripper", "goal", "object", "object2")
"""What masks tell apart, in every scene alike: floor, walls and sky; the table with what belongs to it; what else
stands still; the arm; its hand; a marker of the goal; and the things that move, by the names of their points."""
_CHANGED = (
    "geom_rgba",
    "geom_matid",
    "site_rgba",
    "light_pos",
    "light_dir",
    "light_diffuse",
    "light_ambient",
    "cam_pos",
    "cam_quat",
    "cam_fovy",
)
_DEFAULT = (0.5, 0.5, 0.5, 1.0)
"""MuJoCo's colour of a geom that leaves it to its material."""
_SIDE = 256
"""Pixels of a pattern; larger textures repeat each."""
_DARKEST = 0.35
"""Share of the brightest part's colour that a thing's darkest part gets at least."""


def elements_of_bodies(model: Any, roots: Mapping[int, str]) -> np.ndarray:
    """(nbody,) places in `ELEMENTS`: a body is what `roots` says, else what its parent is; alone in the world, a
    fixture."""
    found = np.zeros(model.nbody, np.uint8)
    for body in range(1, model.nbody):
        parent = int(model.body_parentid[body])
        inherited = ELEMENTS.index("fixture") if parent == 0 else found[parent]
        found[body] = ELEMENTS.index(roots[body]) if body in roots else inherited
    return found


class Appearance:
    """Dresses a model in looks and undresses it exactly.

    Args:
        model: MuJoCo model.
        bodies: (nbody,) from `elements_of_bodies`.
        goals: names of sites that mark the goal.
        hidden_groups: groups of geoms that no picture shows.
        flat: elements whose colour an instruction names: these lose their textures, others keep them, tinted.
    """

    def __init__(
        self,
        model: Any,
        bodies: np.ndarray,
        *,
        goals: Sequence[str] = (),
        hidden_groups: Sequence[int] = (),
        flat: Sequence[str] = (),
    ) -> None:
        self._model, self._mj, self._flat = model, mujoco_module(), frozenset(flat)
        self.geoms: np.ndarray = bodies[model.geom_bodyid]
        """(ngeom,) places in `ELEMENTS`."""
        self.sites: np.ndarray = bodies[model.site_bodyid]
        """(nsite,) places in `ELEMENTS`."""
        for site in range(model.nsite):
            if model.site(site).name in goals:
                self.sites[site] = ELEMENTS.index("goal")
        # MuJoCo shows the groups up to 2 unless told otherwise.
        self._seen = (model.geom_group <= 2) & ~np.isin(model.geom_group, list(hidden_groups))
        self._textures = {name: self._textures_of(name) for name in ("table", "background")}

    @contextmanager
    def wearing(self, look: Look, target: np.ndarray, cameras: Mapping[str, str], renderer: Any) -> Iterator[None]:
        """The model in `look` inside the block, and as it was afterwards.

        Args:
            look: what to wear.
            target: (3,) that the front camera faces, world frame.
            cameras: names in the model of `front` and `wrist`.
            renderer: `mujoco.Renderer` of the model, whose context holds the textures.
        """
        model = self._model
        kept = {name: getattr(model, name).copy() for name in _CHANGED}
        head = model.vis.headlight
        lamp = {name: getattr(head, name).copy() for name in ("ambient", "diffuse")}
        pixels = {number: self._pixels(number).copy() for numbers in self._textures.values() for number in numbers}
        try:
            for element, paint in look.colours.items():
                self._paint(element, paint)
            for element, pattern in look.surfaces.items():
                self._cover(element, pattern)
            if look.light is not None:
                self._light(look.light)
            if look.view is not None:
                self._place(look.view, target, cameras)
            self._upload(renderer, pixels)
            yield
        finally:
            for name, value in kept.items():
                getattr(model, name)[:] = value
            for name, value in lamp.items():
                getattr(head, name)[:] = value
            for number, value in pixels.items():
                self._pixels(number)[:] = value
            self._upload(renderer, pixels)

    def _members(self, element: str) -> tuple[np.ndarray, np.ndarray]:
        """Visible geoms and all sites of an element."""
        place = ELEMENTS.index(element)
        return np.flatnonzero((self.geoms == place) & self._seen), np.flatnonzero(self.sites == place)

    def _textures_of(self, element: str) -> list[int]:
        """Textures that this element alone shows; the sky's belong to the background."""
        shown: dict[int, set[int]] = {}
        for geom in np.flatnonzero(self._seen):
            if (material := int(self._model.geom_matid[geom])) >= 0:
                for number in self._model.mat_texid[material].ravel():
                    if number >= 0:
                        shown.setdefault(int(number), set()).add(int(self.geoms[geom]))
        sky = self._mj.mjtTexture.mjTEXTURE_SKYBOX
        for number in np.flatnonzero(self._model.tex_type == sky):
            shown.setdefault(int(number), set()).add(ELEMENTS.index("background"))
        alone = (number for number, elements in shown.items() if elements == {ELEMENTS.index(element)})
        return sorted(number for number in alone if self._model.tex_nchannel[number] >= 3)

    def _pixels(self, number: int) -> np.ndarray:
        """(rows, columns, channels) of a texture in the model: cubes have their faces one below another."""
        model = self._model
        shape = tuple(int(getattr(model, f"tex_{name}")[number]) for name in ("height", "width", "nchannel"))
        first = int(model.tex_adr[number])
        return model.tex_data[first : first + int(np.prod(shape))].reshape(shape)

    def _upload(self, renderer: Any, numbers: Mapping[int, np.ndarray]) -> None:
        renderer._gl_context.make_current()
        for number in numbers:
            self._mj.mjr_uploadTexture(self._model, renderer._mjr_context, number)

    def _own_rgba(self, geom: int) -> np.ndarray:
        """(4,) colour that a geom is shown with."""
        material, own = int(self._model.geom_matid[geom]), self._model.geom_rgba[geom]
        by_material = material >= 0 and np.allclose(own, _DEFAULT)
        return (self._model.mat_rgba[material] if by_material else own).copy()

    def _textured(self, geom: int) -> bool:
        material = int(self._model.geom_matid[geom])
        return material >= 0 and bool((self._model.mat_texid[material] >= 0).any())

    def _paint(self, element: str, paint: Paint) -> None:
        """One colour, its shades from part to part as they were."""
        geoms, sites = self._members(element)
        before = {int(geom): self._own_rgba(geom) for geom in geoms}
        brightest = max((rgba[:3].mean() for rgba in before.values()), default=0.0)
        keep = {geom for geom in before if self._textured(geom) and element not in self._flat}
        for geom, rgba in before.items():
            shade = max(_DARKEST, float(rgba[:3].mean() / brightest)) if brightest > 0 else 1.0
            self._model.geom_rgba[geom] = (*(shade * channel for channel in paint.rgb), rgba[3])
            if geom not in keep:
                self._model.geom_matid[geom] = -1
        self._model.site_rgba[sites, :3] = paint.rgb

    def _cover(self, element: str, pattern: Pattern) -> None:
        """A pattern where there are textures, its first colour elsewhere."""
        for number in self._textures[element]:
            pixels = self._pixels(number)
            side = pixels.shape[1]
            factor = side // _SIDE if side % _SIDE == 0 else 1
            image = texture(pattern, side // factor).repeat(factor, 0).repeat(factor, 1)
            for first in range(0, len(pixels), len(image)):
                pixels[first : first + len(image), :, :3] = image[: len(pixels) - first]
        for geom in self._members(element)[0]:
            if not self._textured(int(geom)):
                self._model.geom_rgba[geom, :3] = pattern.rgb[0]

    def _light(self, light: Light) -> None:
        model, head = self._model, self._model.vis.headlight
        turn, tilt = np.radians((light.turn, light.tilt))
        about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
        about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        rotation = about_z @ about_x
        model.light_dir[:] = model.light_dir @ rotation.T
        model.light_pos[:] = model.light_pos @ rotation.T
        for lamps in (model.light_diffuse, head.diffuse):
            lamps[:] = np.clip(lamps * light.diffuse, 0, 1)
        for lamps in (model.light_ambient, head.ambient):
            lamps[:] = np.clip(lamps * light.ambient, 0, 1)

    def _place(self, view: View, target: np.ndarray, cameras: Mapping[str, str]) -> None:
        front, wrist = (self._model.camera(cameras[name]) for name in ("front", "wrist"))
        position = target + view.distance * orbited(front.pos - target, view.azimuth, view.elevation)
        rotation = look_at(position, target, np.array([0.0, 0.0, 1.0]))
        place_camera(self._model, cameras["front"], position, rotation, float(front.fovy[0]) + view.front_fovy)
        matrix = np.zeros(9)
        self._mj.mju_quat2Mat(matrix, wrist.quat)
        rotation = matrix.reshape(3, 3) @ euler(np.radians(view.rotation))
        position = wrist.pos + np.array(view.offset)
        place_camera(self._model, cameras["wrist"], position, rotation, float(wrist.fovy[0]) + view.wrist_fovy)
