"""Scripted experts for robosuite tasks: waypoints of the hand, followed by a proportional law in the action's units.

An expert is a generator of targets for the hand, one per control step, that looks at the state between them; the same
one serves every arm. Positions are in the world frame until the controller's action is computed.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from worldmodel.data.sources.robosuite_objects import raised, turned

if TYPE_CHECKING:
    from worldmodel.data.sources.robosuite import RobosuiteScene

OPEN, CLOSED = -1.0, 1.0
METRES, RADIANS = 0.05, 0.5
"""What 1 means in an action."""
GAIN, TURN_GAIN = 3.0, 2.0
"""Share of the error that one action asks for: the controller covers a fraction of what it is asked in one step."""
DOWN = np.array([0.0, 0.0, -1.0])


class Target(NamedTuple):
    """Where the hand should be, in the world frame, and what its gripper does."""

    position: np.ndarray  # (3,) m
    rotation: np.ndarray  # (3, 3), columns are the hand's axes: to the tips, right to left finger, across
    gripper: float
    speed: float = 1.0  # share of the largest action


class ScriptedExpert:
    """The scripted policy for the scene's task; `act()` gives the action (7,) for the state now."""

    def __init__(self, scene: "RobosuiteScene") -> None:
        self._scene = scene
        self._plan = PLANS.get(scene.task, _pick_place)(scene)
        self._target: Target | None = None

    def act(self) -> np.ndarray:
        """Action (7,) float32 in [-1, 1]."""
        self._target = next(self._plan, self._target)
        assert self._target is not None
        scene, target = self._scene, self._target
        position, rotation = scene.hand.position(scene.data), scene.hand.rotation(scene.data)
        move = GAIN / METRES * scene.rotation_to_base(target.position - position)
        turn = TURN_GAIN / RADIANS * scene.rotation_to_base(rotation_vector(target.rotation @ rotation.T))
        action = [*_limited(move, target.speed), *_limited(turn, target.speed), target.gripper]
        return np.array(action, np.float32)


def _limited(vector: np.ndarray, most: float) -> np.ndarray:
    """`vector` in its direction, no component beyond `most`."""
    return vector / max(1.0, np.abs(vector).max() / most)


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) in rad of a rotation matrix; any axis for half a turn."""
    cosine = np.clip((np.trace(rotation) - 1) / 2, -1.0, 1.0)
    angle = np.arccos(cosine)
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    norm = np.linalg.norm(axis)
    return axis if norm < 1e-8 else axis / norm * angle


def turn_matrix(axis: np.ndarray, angle: float) -> np.ndarray:
    """Rotation (3, 3) by `angle` in rad about the unit vector `axis`."""
    return np.stack([turned(column, np.zeros(3), axis, angle) for column in np.eye(3)], axis=1)


def pointing(approach: np.ndarray, closing: np.ndarray) -> np.ndarray:
    """Hand whose fingers point along `approach` and close along `closing`, as far as that is at right angles."""
    x = approach / np.linalg.norm(approach)
    y = closing - (closing @ x) * x
    y /= np.linalg.norm(y)
    return np.stack([x, y, np.cross(x, y)], axis=1)


Plan = Iterator[Target]


def _go(
    scene: "RobosuiteScene", target: Callable[[], Target], *, near: float, steps: int, turn: float = 0.1, rest: int = 1
) -> Plan:
    """Towards `target` until within `near` metres and `turn` rad of it for `rest` steps, `steps` at most."""
    there = 0
    for _ in range(steps):
        goal = target()
        yield goal
        off = np.linalg.norm(goal.position - scene.hand.position(scene.data))
        angle = np.linalg.norm(rotation_vector(goal.rotation @ scene.hand.rotation(scene.data).T))
        there = there + 1 if off < near and angle < turn else 0
        if there == rest:
            return


def _hold(target: Target, steps: int) -> Plan:
    for _ in range(steps):
        yield target


def _grasp_from_above(scene: "RobosuiteScene", item: Any, axes: tuple[int, ...]) -> np.ndarray:
    """The hand's rotation for an item that is pinched along one of its body's `axes` (none: any way)."""
    now = scene.hand.rotation(scene.data)[:, 1] * [1.0, 1.0, 0.0]
    directions = [sign * item.rotation[:, axis] for axis in axes for sign in (1.0, -1.0)]
    closing = max(directions, key=lambda direction: direction @ now) if directions else now
    return pointing(DOWN, closing)


def _pick(scene: "RobosuiteScene", item: Any, axes: tuple[int, ...], *, rise: float, lift: float) -> Plan:
    """Take `item` `rise` metres above its origin and lift it by `lift`; what was missed is tried again."""
    for _ in range(3):
        rotation = _grasp_from_above(scene, item, axes)

        def above(rotation: np.ndarray = rotation) -> Target:
            return Target(raised(item.position, rise + 0.10), rotation, OPEN)

        def at(rotation: np.ndarray = rotation) -> Target:
            # Not lower than is safe while it is still beside the item: a finger would land on it.
            beside = np.linalg.norm((item.position - scene.hand.position(scene.data))[:2])
            safe = min(0.10, 4 * max(0.0, float(beside) - 0.01))
            return Target(raised(item.position, rise + safe), rotation, OPEN, 0.5)

        yield from _go(scene, above, near=0.02, steps=60, rest=2)
        yield from _go(scene, at, near=0.008, steps=40)
        place = Target(scene.hand.position(scene.data), rotation, CLOSED)
        yield from _hold(place, 8)
        up = place._replace(position=raised(place.position, lift))
        yield from _go(scene, lambda up=up: up, near=0.02, steps=40)
        if np.linalg.norm(item.position - scene.hand.position(scene.data)) < rise + 0.05:
            return


def _lift(scene: "RobosuiteScene") -> Plan:
    yield from _pick(scene, scene.objects.cube, (0, 1), rise=0.0, lift=0.12)


def _stack(scene: "RobosuiteScene") -> Plan:
    objects = scene.objects
    yield from _pick(scene, objects.cube, (0, 1), rise=0.0, lift=0.12)
    rotation = scene.hand.rotation(scene.data)
    held = pointing(DOWN, rotation[:, 1])

    def over(height: float, gripper: float = CLOSED, speed: float = 0.6) -> Callable[[], Target]:
        def target() -> Target:
            offset = scene.hand.position(scene.data) - objects.cube.position
            return Target(raised(objects.goal + offset, height), held, gripper, speed)

        return target

    yield from _go(scene, over(0.06), near=0.01, steps=60)
    yield from _go(scene, over(0.003, speed=0.3), near=0.006, steps=30)
    place = Target(scene.hand.position(scene.data), held, OPEN)
    yield from _hold(place, 6)
    yield from _hold(place._replace(position=raised(place.position, 0.12)), 20)


GRASPS: dict[str, tuple[tuple[int, ...], float]] = {
    "PickPlaceMilk": ((0, 1), 0.02),
    "PickPlaceBread": ((0, 1), 0.01),
    "PickPlaceCereal": ((1,), 0.0),
    "PickPlaceCan": ((), 0.01),
}
"""Body axes along which each object can be pinched, and how far above its origin, in metres."""


def _pick_place(scene: "RobosuiteScene") -> Plan:
    objects = scene.objects
    axes, rise = GRASPS[scene.task]
    yield from _pick(scene, objects.item, axes, rise=rise, lift=0.20)
    held = pointing(DOWN, scene.hand.rotation(scene.data)[:, 1])
    height = scene.hand.position(scene.data)[2]

    def over() -> Target:
        position = objects.goal + scene.hand.position(scene.data) - objects.item.position
        position[2] = height
        return Target(position, held, CLOSED)

    # Compartments are wider than this; the far ones are at the end of some arms' reach.
    yield from _go(scene, over, near=0.05, steps=80)
    place = scene.hand.position(scene.data)
    place[2] += objects.goal[2] + 0.02 - objects.model.bottom_offset[2] - objects.item.position[2]
    yield from _go(scene, lambda: Target(place, held, CLOSED, 0.6), near=0.02, steps=40)
    place = scene.hand.position(scene.data)
    yield from _hold(Target(place, held, OPEN), 6)
    yield from _hold(Target(raised(place, 0.15), held, OPEN), 40)


TURN, OPENING = 1.35, 0.40
"""How far the handle is turned down and the door pulled, in rad; the bolt is out of the frame from 1.16 on."""
LEAN = 0.8
"""Angle in rad between straight down and the hand's approach, which keeps wide palms off the door."""
TILT = 0.7
"""Share of the handle's turn that the hand makes with it: enough to keep its palm off the bar."""


def _door(scene: "RobosuiteScene") -> Plan:
    """Take the bar of the handle, one finger behind or below it, turn it down and pull along the door's arc."""
    objects = scene.objects
    pivot, axis = objects.axis(objects.turn)
    hinge, upright = objects.axis(objects.hinge)
    now = scene.hand.rotation(scene.data)[:, 1]
    into = axis * np.sign(axis @ (pivot - objects.handle))
    approach = np.cos(LEAN) * DOWN + np.sin(LEAN) * into
    across = np.cos(LEAN) * into - np.sin(LEAN) * DOWN
    rotation = pointing(approach, across if across @ now > 0 else -across)

    yield from _go(scene, lambda: Target(objects.handle - 0.12 * approach, rotation, OPEN), near=0.02, steps=80)
    yield from _go(scene, lambda: Target(objects.handle, rotation, OPEN, 0.5), near=0.012, steps=50)
    grasp = scene.hand.position(scene.data)
    yield from _hold(Target(grasp, rotation, CLOSED), 10)

    def held(down: float, out: float) -> Target:
        position = turned(turned(grasp, pivot, axis, down), hinge, upright, out)
        tilted = turn_matrix(upright, out) @ turn_matrix(axis, TILT * down) @ rotation
        return Target(position, tilted, CLOSED)

    for down in np.linspace(0.0, TURN, 30):
        yield held(down, 0.0)
    for out in np.linspace(0.0, OPENING, 30):
        yield held(TURN, out)
    yield from _hold(held(TURN, OPENING), 40)


PLANS: dict[str, Callable[["RobosuiteScene"], Plan]] = {"Lift": _lift, "Stack": _stack, "Door": _door}
"""By task; the others are picking and placing."""
