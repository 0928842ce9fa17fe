"""Pushing the T to its place: straight pushes, tried out in a second simulator before they are made.

Without inertia, where a push leaves the T depends on the line along which the pusher moves and not on its speed, so a
push that is tried once tells the outcome of all shorter ones. A plan is the best push, or the best two of which the
second begins where the first leaves the T, by the control steps that it takes and those that are then left to go.
Lengths here are in pixels of the simulator's plane, places of pushes are in the T's own frame.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from worldmodel.data.sources.pusht_outline import CORNERS, PLANE, Detours, Push, pushes

TRAVEL, PUSH = 20.0, 10.0
"""How far the target moves in a control step, around the T and while pushing."""
ARRIVED, STOPPED = 3.0, 0.7
"""Distances at which the pusher counts as there: before a push, and after it."""
PATIENCE = 8
"""Control steps that the pusher is waited for at most."""
OVERHEAD = 8.0
"""Control steps that a push takes beside its way: to come to rest before it and after it."""
PACE = 2.0
"""How far the pusher moves in a simulator step while a push is tried."""
TOUCHED = 1.0
"""How far the T has moved at least where a push counts."""
LONGEST = 150.0
"""Of a push, its way to the T included."""
EVERY = 2
"""Simulator steps between two outcomes that are looked at."""
SECOND = 8
"""First pushes for which a second is looked for."""
CLOSE, NEARER, FAR = 1.5, 25.0, 4.0
"""What is left to go from a distance (see `Pose.away`): `NEARER` control steps for each factor e above `CLOSE`, where
the T counts as placed, and one for every `FAR` of it."""
TURNS = np.radians([-6.0, -3.0, -1.5, 0.0, 1.5, 3.0, 6.0])
"""By how much a push is turned when it begins, to end where it was to."""


class Pose(NamedTuple):
    """Where the T's origin is and how it is turned (rad)."""

    x: float
    y: float
    angle: float

    def place(self, points: np.ndarray) -> np.ndarray:
        """`points` (..., 2) of the T's frame in the plane."""
        return points @ self.rotation().T + (self.x, self.y)

    def rotation(self) -> np.ndarray:
        """(2, 2) from the T's frame to the plane."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        return np.array([[c, -s], [s, c]])

    def away(self, poses: np.ndarray) -> np.ndarray:
        """(N,) how far the T's corners in `poses` (N, 3) are from where they are in this one, root mean square.

        Turns count by the arcs of the corners about their middle: chords would call half a turn no farther than less.
        """
        c, s = np.cos(poses[:, 2]), np.sin(poses[:, 2])
        x, y = CORNERS.mean(0)
        centre = poses[:, :2] + np.stack([c * x - s * y, s * x + c * y], axis=1)
        shift = np.square(centre - self.place(CORNERS.mean(0))).sum(1)
        turn = (poses[:, 2] - self.angle + np.pi) % (2 * np.pi) - np.pi
        return np.sqrt(shift + _SPREAD * np.square(turn))


_SPREAD = float(np.square(CORNERS - CORNERS.mean(0)).sum(1).mean())


class Trial(NamedTuple):
    """Outcomes of one push by its length, ascending."""

    lengths: np.ndarray  # (N,)
    poses: np.ndarray  # (N, 3) as `Pose`


class Option(NamedTuple):
    """A push of a certain length, where it leaves the T and what it costs in control steps, those to go included."""

    push: Push
    length: float
    pose: Pose
    steps: float
    cost: float


class PushtExpert:
    """`act()` gives the action (2,) float32, metres, for the state now of gym-pusht's `environment`.

    Args:
        environment: what is acted in; it is read only.
        rehearsal: another one, in which pushes are tried.
        scale: metres in a pixel.
    """

    def __init__(self, environment: Any, rehearsal: Any, *, scale: float) -> None:
        self._environment, self._scale = environment, scale
        self._rehearsal = Rehearsal(rehearsal)
        self._goal = Pose(*(float(value) for value in environment.goal_pose))
        self._detours = Detours()
        self._targets = self._moves()

    def act(self) -> np.ndarray:
        """Target of the pusher, (2,) float32 in metres."""
        return (np.clip(next(self._targets), 0.0, PLANE) * self._scale).astype(np.float32)

    def _moves(self) -> Iterator[np.ndarray]:
        """Targets without end: around the T, along a push, and again."""
        while True:
            plan = self._plan(self._pose(), self._pusher())
            if not plan:
                yield self._pusher()
            for option in plan:
                pose, push = self._pose(), option.push
                yield from self._follow(self._detours.path(pose, self._pusher(), push.start), TRAVEL)
                yield from self._settle(pose.place(push.start), ARRIVED)
                line = self._aim(self._pusher(), pose.rotation() @ push.direction, option.pose)
                yield from self._follow(line, PUSH)
                yield from self._settle(line[-1], STOPPED)

    def _follow(self, path: np.ndarray, speed: float) -> Iterator[np.ndarray]:
        """Targets on `path` (N, 2), `speed` apart."""
        pieces = np.linalg.norm(np.diff(path, axis=0), axis=1)
        along = np.concatenate([[0.0], np.cumsum(pieces)])
        # At least one, so that a plan that comes to nothing takes time too.
        for number in range(1, max(1, int(np.ceil(along[-1] / speed - 1e-9))) + 1):
            at = min(number * speed, along[-1])
            yield np.array([np.interp(at, along, path[:, axis]) for axis in range(2)])

    def _settle(self, target: np.ndarray, distance: float) -> Iterator[np.ndarray]:
        """`target` until the pusher is there."""
        for _ in range(PATIENCE):
            if np.linalg.norm(self._pusher() - target) < distance:
                return
            yield target

    def _plan(self, pose: Pose, pusher: np.ndarray) -> list[Option]:
        """The pushes to make now, one or two; none where the pusher gets to none."""
        first = sorted(self._options(pose, pusher), key=lambda option: option.cost)
        best, least = first[:1], min((option.cost for option in first), default=np.inf)
        for option in first[:SECOND]:
            end = pose.place(option.push.start + option.push.direction * option.length)
            for second in self._options(option.pose, end):
                if (cost := option.steps + second.cost) < least:
                    best, least = [option, second], cost
        return best

    def _options(self, pose: Pose, pusher: np.ndarray) -> list[Option]:
        """Every push from `pose` that the pusher can get to, at its best length."""
        ways, options = self._detours.lengths(pose, pusher), []
        for push, way in zip(pushes(), ways, strict=True):
            if not np.isfinite(way):
                continue
            trial = self._rehearsal.push(pose, pose.place(push.start), pose.rotation() @ push.direction)
            if len(trial.lengths):
                steps = way / TRAVEL + trial.lengths / PUSH + OVERHEAD
                costs = steps + self._left(trial.poses)
                n = int(costs.argmin())
                options.append(Option(push, trial.lengths[n], Pose(*trial.poses[n]), steps[n], costs[n]))
        return options

    def _left(self, poses: np.ndarray) -> np.ndarray:
        """(N,) control steps that it may take from `poses` (N, 3) on."""
        away = self._goal.away(poses)
        return away / FAR + NEARER * np.maximum(0.0, np.log(away / CLOSE))

    def _aim(self, pusher: np.ndarray, direction: np.ndarray, wanted: Pose) -> np.ndarray:
        """The line (2, 2) from where the pusher is along which it brings the T closest to `wanted`."""
        best, least = pusher, np.inf
        for turn in TURNS:
            c, s = np.cos(turn), np.sin(turn)
            turned = np.array([c * direction[0] - s * direction[1], s * direction[0] + c * direction[1]])
            trial = self._rehearsal.push(self._pose(), pusher, turned, pace=1.0, every=1)
            if len(trial.lengths) and (off := wanted.away(trial.poses)).min() < least:
                best, least = pusher + turned * trial.lengths[off.argmin()], off.min()
        return np.stack([pusher, best])

    def _pose(self) -> Pose:
        block = self._environment.block
        return Pose(block.position.x, block.position.y, block.angle)

    def _pusher(self) -> np.ndarray:
        return np.array(self._environment.agent.position)


class Rehearsal:
    """Straight pushes in a simulator of its own."""

    def __init__(self, environment: Any) -> None:
        environment.reset(seed=0)
        self._space, self._agent, self._block = environment.space, environment.agent, environment.block
        self._dt = environment.dt
        for shape in self._space.shapes:
            shape.collision_type = 1  # gym-pusht counts contacts of type 0, in Python

    def push(
        self, pose: Pose, start: np.ndarray, direction: np.ndarray, *, pace: float = PACE, every: int = EVERY
    ) -> Trial:
        """Outcomes of pushing along `direction` (2,) from `start` (2,), from the first touch on."""
        agent, block = self._agent, self._block
        block.angle = pose.angle
        block.position = pose.x, pose.y  # after the angle, which turns the T about its centre of gravity
        block.velocity, block.angular_velocity = (0.0, 0.0), 0.0
        agent.position = float(start[0]), float(start[1])
        speed = pace / self._dt
        agent.velocity = float(direction[0] * speed), float(direction[1] * speed)
        self._space.reindex_shapes_for_body(block)
        self._space.reindex_shapes_for_body(agent)
        room = _room(start, direction)
        poses = []
        for _ in range(int(min(LONGEST, room) / (pace * every))):
            for _ in range(every):
                self._space.step(self._dt)
            poses.append((*block.position, block.angle))
        reached = np.reshape(poses, (-1, 3))
        touched = pose.away(reached) > TOUCHED
        return Trial((pace * every * np.arange(1, len(poses) + 1))[touched], reached[touched])


def _room(start: np.ndarray, direction: np.ndarray) -> float:
    """How far the pusher can go before its target would leave the plane."""
    with np.errstate(divide="ignore"):
        ends = np.where(direction > 0, (PLANE - start) / direction, -start / direction)
    return float(np.min(np.where(direction == 0, np.inf, ends)))
