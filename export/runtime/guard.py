"""The limits of the manifest once more, at the last moment: one command at a time, in memory that is made once."""

from typing import Any

import numpy as np

from .manifest import RuntimeContractError

FREE = 1e6
"""Stands for no limit, as in the graph."""


class Guard:
    """Clamps single commands to what the manifest says a robot may be told, and brings it to rest.

    Per step the same rules as the envelope inside the graph (`export.envelope.Envelope`), but with what was really
    commanded before, and where the joints really are. A robot at rest moves no joint: what is sent to a position stays
    there, efforts stay as they are, and so does a dimension whose meaning the manifest does not state, unless `rest`
    gives it a value.

    Args:
        robot: entry of `embodiments` in the manifest.
        fps: control steps per second.
        rest: by action name, the command that leaves alone what it controls.

    Raises:
        RuntimeContractError: `rest` names an action that the robot does not have.
    """

    def __init__(self, robot: dict[str, Any], fps: float, rest: dict[str, float] | None = None) -> None:
        names, limits = robot["action_names"], robot["envelope"]
        size, self.dt = len(names), 1.0 / fps
        if unknown := sorted(set(rest or {}) - set(names)):
            raise RuntimeContractError(f"rest: unknown actions {unknown}, expected some of {names}")
        self.low, self.high = np.full(size, -FREE), np.full(size, FREE)
        if limits["command_range"]:
            self.low[:], self.high[:] = np.asarray(limits["command_range"], float).T
        self.contact: float = limits["contact"] or FREE
        self.absolute, self.moves = np.zeros(size, bool), np.zeros(size, bool)
        self.measured = np.full(size, -1)
        self.rate, self.force = np.ones(size), np.full(size, FREE)
        self.speed, self.change = np.full(size, FREE), np.full(size, FREE * self.dt)
        self.near, self.far = np.full(size, -FREE), np.full(size, FREE)
        for name, joint in limits["joints"].items():
            d = names.index(name)
            self.absolute[d], self.moves[d] = joint["controls"] == "position", joint["controls"] != "effort"
            self.rate[d] = joint.get("rate", 1.0) if joint["controls"] == "velocity" else 1.0
            self.force[d], self.speed[d] = joint.get("force", FREE), joint.get("velocity", FREE)
            self.change[d] = joint.get("acceleration", FREE) * self.dt
            if joint.get("measured") is not None:
                self.measured[d] = robot["proprio_names"].index(joint["measured"])
            # Without a measured place, what is sent velocities has no position to be kept.
            if joint.get("position") is not None and (self.absolute[d] or self.measured[d] >= 0):
                self.near[d], self.far[d] = joint["position"]
        self._rest = np.array([(rest or {}).get(name, np.nan) for name in names])
        self._places = np.flatnonzero(self.measured >= 0)
        self._sources = self.measured[self._places]
        self.position, self.velocity, self.last = np.zeros(size), np.zeros(size), np.zeros(size)
        self._a, self._b, self._c = np.zeros(size), np.zeros(size), np.zeros(size)
        self._flags, self._blind, self._chosen = np.zeros(size, bool), np.zeros(size, bool), np.zeros(size)
        self.reset()

    def reset(self) -> None:
        """Nothing was commanded yet, and nobody knows where the joints are."""
        self.position[:] = np.nan
        np.copyto(self.position, 0.0, where=~self.absolute)
        self.velocity[:], self.last[:] = 0.0, np.clip(0.0, self.low, self.high)
        self._blind[:] = self.measured >= 0
        self._blind &= ~self.absolute & ((self.near > -FREE) | (self.far < FREE))
        self._commanded = False

    def measure(self, proprio: np.ndarray, since: np.ndarray) -> None:
        """Takes measured places, `since` (D,) of them ago in the joints' units; joints sent to positions go on from
        where they were sent."""
        for d, source in zip(self._places, self._sources, strict=True):
            if not (self.absolute[d] and self._commanded):
                self.position[d] = proprio[source] + since[d]
                self._blind[d] = False

    def rest(self, out: np.ndarray) -> None:
        """Writes the command (D,) that wants nothing to move; `__call__` makes of it what the limits allow."""
        np.copyto(out, self.last)
        np.copyto(out, self._rest, where=np.isfinite(self._rest, out=self._flags))
        np.copyto(out, 0.0, where=np.greater(self.moves, self.absolute, out=self._flags))
        np.copyto(out, self.position, where=np.logical_and(self.absolute, self.moves, out=self._flags))

    def __call__(self, wanted: np.ndarray, out: np.ndarray, *, still: bool) -> None:
        """Writes to `out` (D,) what may be commanded of `wanted` (D,); `still` brings every joint to rest.

        Raises:
            RuntimeContractError: a joint is sent to positions, is not measured, and was never sent anywhere, so that
                there is no place to hold; then nothing may be sent.
        """
        a, b, v = self._a, self._b, self._c
        np.clip(wanted, np.negative(self.force, out=a), self.force, out=b)
        commanded = np.clip(b, self.low, self.high, out=self._chosen)
        # A joint that is sent to positions is taken to be where it is first sent; one that has limits of position does
        # not move before it was measured.
        np.copyto(self.position, commanded, where=np.isnan(self.position, out=self._flags))
        if not np.isfinite(self.position, out=self._flags).all():
            raise RuntimeContractError(
                "command: a joint that is sent to positions has no known place yet; send nothing"
            )
        np.copyto(a, self.position)
        np.clip(a, self.near, self.far, out=a)
        np.copyto(self.position, a, where=self.absolute)
        if still:
            v[:] = 0.0
        else:
            np.multiply(commanded, self.rate, out=v)
            np.subtract(commanded, self.position, out=a)
            np.divide(a, self.dt, out=a)
            np.copyto(v, a, where=self.absolute)
            np.copyto(v, 0.0, where=self._blind)
        np.clip(v, np.subtract(self.velocity, self.change, out=a), np.add(self.velocity, self.change, out=b), out=v)
        np.clip(v, np.negative(self.speed, out=a), self.speed, out=v)
        self._room(np.subtract(self.position, self.near, out=a))
        np.maximum(v, np.negative(a, out=a), out=v)
        self._room(np.subtract(self.far, self.position, out=a))
        np.minimum(v, a, out=v)
        np.copyto(self.velocity, v)
        np.multiply(v, self.dt, out=a)
        np.add(self.position, a, out=self.position)
        np.divide(v, self.rate, out=v)
        np.clip(self.position, self.near, self.far, out=a)
        np.copyto(v, a, where=self.absolute)
        np.copyto(commanded, v, where=self.moves)
        # Rounding and a joint outside its limits must not lead out of the range of commands.
        np.clip(commanded, self.low, self.high, out=commanded)
        np.copyto(self.last, commanded)
        np.copyto(out, commanded, casting="same_kind")
        self._commanded = True

    def _room(self, distance: np.ndarray) -> None:
        """Distance to a limit (D,) -> the largest velocity from which a joint stops before it, in place."""
        b = self._b
        np.maximum(distance, 0.0, out=distance)
        np.multiply(distance, 2 / self.dt, out=distance)
        np.divide(distance, self.change, out=distance)
        np.sqrt(distance, out=b)
        np.subtract(b, 0.5, out=b)
        np.multiply(distance, 0.5, out=distance)
        np.minimum(distance, 1.0, out=distance)
        np.maximum(distance, b, out=distance)
        np.multiply(distance, self.change, out=distance)
