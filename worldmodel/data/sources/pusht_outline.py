"""The T of PushT seen from its own frame: where a push can begin, and ways around it. Lengths are in pixels."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

PLANE = 512.0
"""Height and width of the plane."""
RADIUS = 15.0
"""Of the pusher."""
CORNERS = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)
"""(8, 2) in order around the T; its origin is the middle of the bar's upper edge."""
CLEARANCE = 9.0
"""From the pusher's edge to the T: where a push begins, and on the way around."""
SAFE = 3.0
"""The least of it on any way."""
SPACING = 11.0
SLANTS = np.radians([-35.0, 0.0, 35.0])
"""Directions of pushes, from that straight into the T."""
MARGIN = 6.0
"""From the plane's edge, for ways."""


class Push(NamedTuple):
    """A straight push: where the pusher's centre begins, clear of the T, and its unit direction."""

    start: np.ndarray
    direction: np.ndarray


@cache
def pushes() -> tuple[Push, ...]:
    """All that are tried: along the outline, every few pixels, in three directions, where the pusher has room."""
    found = []
    for corner, following in zip(CORNERS, np.roll(CORNERS, -1, 0), strict=True):
        side = following - corner
        length = float(np.linalg.norm(side))
        inward = np.array([-side[1], side[0]]) / length
        number = round(length / SPACING)
        for share in (np.arange(number) + 0.5) / number:
            touch = corner + share * side - inward * RADIUS
            for slant in SLANTS:
                c, s = np.cos(slant), np.sin(slant)
                direction = np.array([c * inward[0] - s * inward[1], s * inward[0] + c * inward[1]])
                found.append(Push(touch - direction * CLEARANCE, direction))
    free = _distance(np.stack([push.start for push in found])) >= RADIUS + SAFE + 1
    return tuple(push for push, clear in zip(found, free, strict=True) if clear)


class Detours:
    """Shortest ways of the pusher around the T, by the corners of a wider one, within the plane."""

    def __init__(self) -> None:
        import shapely

        self._wide = shapely.Polygon(CORNERS).buffer(RADIUS + SAFE)
        shapely.prepare(self._wide)
        self._corners = np.array(
            shapely.Polygon(CORNERS).buffer(RADIUS + CLEARANCE, join_style="mitre").exterior.coords
        )
        self._corners = self._corners[:-1]
        self._starts = np.stack([push.start for push in pushes()])
        self._between = self._legs(self._corners, self._corners)
        self._to_starts = self._legs(self._corners, self._starts)

    def lengths(self, pose: Any, pusher: np.ndarray) -> np.ndarray:
        """(len(pushes()),) length of the way from `pusher` to the start of each push; infinite where there is none."""
        out, leave = self._leave(pose, pusher)
        ways, _ = self._corner_ways(pose, out)
        direct = self._legs(out[None], self._starts)[0]
        total = leave + np.minimum(direct, (ways[:, None] + self._to_starts).min(0))
        return np.where(_inside(pose.place(self._starts)), total, np.inf)

    def path(self, pose: Any, pusher: np.ndarray, start: np.ndarray) -> np.ndarray:
        """(N, 2) corners of the way from `pusher` in the plane to `start` in the T's frame, both included."""
        out, _ = self._leave(pose, pusher)
        ways, before = self._corner_ways(pose, out)
        last = self._legs(self._corners, start[None])[:, 0]
        points = [start]
        if self._legs(out[None], start[None])[0, 0] > (ways + last).min():
            corner = int(np.argmin(ways + last))
            while corner >= 0:
                points.append(self._corners[corner])
                corner = int(before[corner])
        return np.concatenate([pusher[None], pose.place(np.stack([*points, out])[::-1])])

    def _corner_ways(self, pose: Any, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) lengths from `out` to each corner, and the corner before it, -1 for none (Bellman-Ford)."""
        usable = _inside(pose.place(self._corners))
        ways = np.where(usable, self._legs(out[None], self._corners)[0], np.inf)
        before = np.full(len(ways), -1)
        between = np.where(usable[:, None] & usable, self._between, np.inf)
        for _ in range(len(ways)):
            longer = ways[:, None] + between
            through = longer.argmin(0)
            shorter = longer[through, np.arange(len(ways))] < ways - 1e-9
            if not shorter.any():
                break
            ways = np.where(shorter, longer.min(0), ways)
            before = np.where(shorter, through, before)
        return ways, before

    def _leave(self, pose: Any, pusher: np.ndarray) -> tuple[np.ndarray, float]:
        """Where the pusher is clear of the T, in the T's frame, and how far that is from where it is."""
        import shapely

        at = (pusher - (pose.x, pose.y)) @ pose.rotation()
        if not shapely.intersects_xy(self._wide, *at):
            return at, 0.0
        edge = self._wide.exterior
        nearest = np.array(edge.interpolate(edge.project(shapely.Point(at))).coords[0])
        outward = nearest - at
        out = nearest + outward / max(float(np.linalg.norm(outward)), 1e-9)
        return out, float(np.linalg.norm(out - at))

    def _legs(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """(M, N) lengths of the straight ways from `one` (M, 2) to `other` (N, 2); infinite through the T."""
        import shapely

        pairs = np.stack(np.broadcast_arrays(one[:, None], other[None]), axis=2)
        clear = ~shapely.intersects(self._wide, shapely.linestrings(pairs))
        return np.where(clear, np.linalg.norm(pairs[:, :, 0] - pairs[:, :, 1], axis=-1), np.inf)


def _inside(points: np.ndarray) -> np.ndarray:
    return np.asarray(((points >= MARGIN) & (points <= PLANE - MARGIN)).all(-1))


def _distance(points: np.ndarray) -> np.ndarray:
    """(N,) from each of `points` (N, 2) to the T, 0 in it."""
    import shapely

    return np.asarray(shapely.distance(shapely.Polygon(CORNERS), shapely.points(points)))
