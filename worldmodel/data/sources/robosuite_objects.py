"""What each robosuite task is about: where its objects and its goal are, in the world frame."""

from typing import Any, Protocol

import numpy as np

_FRONT = np.array([0.1, 0.0, 0.0])
"""Position and a second point 10 cm along the object's own x axis together say how it is turned."""


class Objects(Protocol):
    """The named points of a task."""

    def begin(self) -> None:
        """Takes note of the start state."""
        ...

    def points(self) -> list[tuple[str, np.ndarray]]:
        """Names and world positions, in a fixed order."""
        ...

    def elements(self) -> dict[int, str]:
        """Bodies of the task with the names that masks give to them and to what hangs on them."""
        ...


class Body:
    """A body of the model, seen in the state now."""

    def __init__(self, environment: Any, number: int) -> None:
        self._data, self.number = environment.sim.data._data, number

    @property
    def position(self) -> np.ndarray:
        """(3,) world frame."""
        return self._data.xpos[self.number].copy()

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3) body to world."""
        return self._data.xmat[self.number].reshape(3, 3).copy()

    def points(self) -> list[tuple[str, np.ndarray]]:
        """The two points that give its pose."""
        return [("object", self.position), ("object_front", self.position + self.rotation @ _FRONT)]


class LiftObjects:
    """The cube; the goal is above where it stood."""

    height = 0.10

    def __init__(self, environment: Any) -> None:
        self.cube = Body(environment, environment.cube_body_id)

    def begin(self) -> None:
        """Takes note of the start state."""
        self.goal = raised(self.cube.position, self.height)

    def points(self) -> list[tuple[str, np.ndarray]]:
        """Names and world positions, in a fixed order."""
        return [*self.cube.points(), ("goal", self.goal)]

    def elements(self) -> dict[int, str]:
        """Bodies of the task with the names that masks give to them and to what hangs on them."""
        return {self.cube.number: "object"}


class StackObjects:
    """The red cube A and the green cube B; the goal is where A rests on B."""

    def __init__(self, environment: Any) -> None:
        self.cube = Body(environment, environment.cubeA_body_id)
        self.base = Body(environment, environment.cubeB_body_id)
        self._rise = environment.cubeA.size[2] + environment.cubeB.size[2]

    def begin(self) -> None:
        """Takes note of the start state."""

    @property
    def goal(self) -> np.ndarray:
        """(3,) centre of A when it rests on B."""
        return raised(self.base.position, self._rise)

    def points(self) -> list[tuple[str, np.ndarray]]:
        """Names and world positions, in a fixed order."""
        return [*self.cube.points(), ("object2", self.base.position), ("goal", self.goal)]

    def elements(self) -> dict[int, str]:
        """Bodies of the task with the names that masks give to them and to what hangs on them."""
        return {self.cube.number: "object", self.base.number: "object2"}


class PickPlaceObjects:
    """The one object in the first bin; the goal is the middle of its compartment of the second bin."""

    def __init__(self, environment: Any) -> None:
        name = environment.objects[environment.object_id].name
        self.model = environment.objects[environment.object_id]
        self.item = Body(environment, environment.obj_body_id[name])
        self.goal = environment.target_bin_placements[environment.object_id].copy()
        # A faint copy of the object lies in its compartment.
        self._marker = environment.obj_body_id[environment.visual_objects[environment.object_id].name]

    def begin(self) -> None:
        """Takes note of the start state."""

    def points(self) -> list[tuple[str, np.ndarray]]:
        """Names and world positions, in a fixed order."""
        return [*self.item.points(), ("goal", self.goal)]

    def elements(self) -> dict[int, str]:
        """Bodies of the task with the names that masks give to them and to what hangs on them."""
        return {self.item.number: "object", self._marker: "goal"}


class DoorObjects:
    """The door's handle; the goal is where it is when the door is open."""

    angle = 0.35
    """Opening in rad at the goal; robosuite counts 0.3 as open."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.door = Body(environment, environment.object_body_ids["door"])
        self.latch = Body(environment, environment.object_body_ids["latch"])
        model = environment.sim.model._model
        self.hinge, self.turn = (model.joint(name).id for name in environment.door.joints[:2])

    @property
    def handle(self) -> np.ndarray:
        """(3,) middle of the bar that a hand takes."""
        return np.array(self._environment._handle_xpos)

    def axis(self, joint: int) -> tuple[np.ndarray, np.ndarray]:
        """A point on the axis of `joint` and its unit direction, world frame."""
        data = self._environment.sim.data._data
        return data.xanchor[joint].copy(), data.xaxis[joint].copy()

    def angle_of(self, joint: int) -> float:
        """Position of `joint` in rad."""
        data = self._environment.sim.data._data
        return float(data.qpos[self._environment.sim.model._model.jnt_qposadr[joint]])

    def begin(self) -> None:
        """Takes note of the start state."""
        self.goal = turned(self.handle, *self.axis(self.hinge), self.angle - self.angle_of(self.hinge))

    def points(self) -> list[tuple[str, np.ndarray]]:
        """Names and world positions, in a fixed order."""
        front = self.handle + self.latch.rotation @ _FRONT
        return [("object", self.handle), ("object_front", front), ("object2", self.door.position), ("goal", self.goal)]

    def elements(self) -> dict[int, str]:
        """Bodies of the task with the names that masks give to them and to what hangs on them."""
        return {self.door.number: "object2", self.latch.number: "object"}


def raised(point: np.ndarray, height: float) -> np.ndarray:
    """`point` (3,) moved up by `height` metres."""
    return point + np.array([0.0, 0.0, height])


def turned(point: np.ndarray, anchor: np.ndarray, axis: np.ndarray, angle: float) -> np.ndarray:
    """`point` after a turn by `angle` about the line through `anchor` along the unit vector `axis` (Rodrigues)."""
    arm = point - anchor
    across, along = np.cross(axis, arm), axis * (axis @ arm)
    return anchor + along + (arm - along) * np.cos(angle) + across * np.sin(angle)


def objects_of(task: str, environment: Any) -> Any:
    """The objects of `task`."""
    kinds = {"Lift": LiftObjects, "Stack": StackObjects, "Door": DoorObjects}
    return kinds.get(task, PickPlaceObjects)(environment)
