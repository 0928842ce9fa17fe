"""Touch in MuJoCo: the wrench at the wrist, and contacts on two fingers as wrenches and taxels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldmodel.data.sources.rendering import mujoco_module

TAXEL_GRID = (3, 4, 4)


@dataclass(frozen=True, kw_only=True)
class Finger:
    """A finger for touch: x along it, y from the right finger to the left one, z across."""

    bodies: tuple[int, ...]
    """Bodies whose contacts are its own."""
    pad: int
    """Geom that the taxels cover, and about whose centre torques are."""
    axes: np.ndarray | None = None
    """Rows are the axes above in the frame of the pad's geom; None where they are its own."""


class Touch:
    """Reads the wrist sensor and the contacts on both fingers.

    Args:
        model: MuJoCo model.
        fingers: left and right.
        force: name of the wrist's force sensor.
        torque: name of the wrist's torque sensor.
    """

    def __init__(self, model: Any, fingers: Sequence[Finger], *, force: str, torque: str) -> None:
        self._mj, self._model, self._fingers = mujoco_module(), model, fingers
        self._finger_of_geom = np.full(model.ngeom, -1)
        self._half: list[np.ndarray] = []
        for number, finger in enumerate(fingers):
            self._finger_of_geom[np.isin(model.geom_bodyid, finger.bodies)] = number
            half = model.geom_size[finger.pad]
            self._half.append(half if finger.axes is None else np.abs(finger.axes) @ half)
        self._force = slice(model.sensor(force).adr[0], model.sensor(force).adr[0] + 3)
        self._torque = slice(model.sensor(torque).adr[0], model.sensor(torque).adr[0] + 3)

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
                number = fingers[index, side]
                if number < 0:
                    continue
                finger = self._fingers[number]
                world_to_pad = data.geom_xmat[finger.pad].reshape(3, 3).T
                if finger.axes is not None:
                    world_to_pad = finger.axes @ world_to_pad
                force = world_to_pad @ (axes.T @ contact_force[:3]) * sign
                torque = world_to_pad @ (axes.T @ contact_force[3:]) * sign
                arm = world_to_pad @ (position - data.geom_xpos[finger.pad])
                wrench[1 + number, :3] += force
                wrench[1 + number, 3:] += torque + _cross(arm, force)
                cell = ((arm / self._half[number] + 1) / 2 * 4).clip(0, 3).astype(int)
                # The left pad's inner face looks along -y, the right one's along +y.
                normal = force[1] if number == 0 else -force[1]
                taxels[1 + number, :, cell[0], cell[2]] += (force[0], force[2], normal)
        return wrench, taxels


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a × b; numpy's own takes longer than all the rest of a contact."""
    return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])
