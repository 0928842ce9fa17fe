"""Fault drill: an artefact drives the simulated arm through its controller while messages are lost, late or wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from export.runtime import Controller
from worldmodel.closed_loop import Rollout, Scene
from worldmodel.errors import ConfigError

ONSET = 8
"""Control step from which on a fault is there: the arm is under way."""
STALL = 0.2
"""Seconds."""
FAULTS = (
    "none",
    "camera dropped",
    "camera frozen",
    "force not a number",
    "stalls of 200 ms",
    "reordered frames",
)


@dataclass
class Line:
    """The way from the sensors to the controller, with one fault, in control steps.

    `camera dropped` and `camera frozen`: the first camera is silent, or repeats its picture, from `ONSET` on. `force
    not a number`: so is every wrench from there on. `stalls of 200 ms`: one begins at one in 20 steps; what was
    measured in it, and what the policy answers, arrives at its end. `reordered frames`: three of ten pictures arrive
    one step after the picture that follows them, three of ten other messages one or two steps late.
    """

    fault: str
    camera: str
    fps: float
    every: int  # control steps between two pictures
    random: np.random.Generator
    _waiting: list[tuple[int, int, dict[str, Any]]] = field(default_factory=list)
    _stalled: int = -1  # until this step
    _picture: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ConfigError(f"fault: got {self.fault!r}, expected one of {', '.join(FAULTS)}")

    def send(self, step: int, observation: dict[str, Any]) -> None:
        """Takes what was measured at a step."""
        message, rgb = dict(observation), f"rgb.{self.camera}"
        if self.fault == "stalls of 200 ms" and step > self._stalled and self.random.random() < 1 / 20:
            self._stalled = step + round(STALL * self.fps)
        if self.fault == "camera dropped" and step >= ONSET:
            message = {key: value for key, value in message.items() if not key.endswith(f".{self.camera}")}
        if self.fault == "camera frozen" and rgb in message:
            if step < ONSET:
                self._picture = message[rgb]
            message[rgb] = self._picture
        if self.fault == "force not a number" and step >= ONSET and "wrench" in message:
            message["wrench"] = np.full_like(message["wrench"], np.nan)
        parts = [message]
        if self.fault == "reordered frames":
            seen = {key: message.pop(key) for key in list(message) if key.partition(".")[1]}
            parts = [message, seen]
        for part, late in zip(parts, (int(self.random.integers(1, 3)), self.every + 1), strict=False):
            behind = self.fault == "reordered frames" and self.random.random() < 0.3
            self._waiting.append((self.arrival(step + late * behind), step, part))

    def arrival(self, step: int) -> int:
        """When something arrives that would arrive at this step."""
        return max(step, self._stalled)

    def due(self, step: int) -> list[tuple[int, dict[str, Any]]]:
        """What arrives at a step, with the step that it was measured at."""
        there = [(sent, message) for arrival, sent, message in self._waiting if arrival <= step]
        self._waiting = [entry for entry in self._waiting if entry[0] > step]
        return there


@dataclass
class Watch:
    """Looks at every command that the arm gets, with the limits of the manifest and no code of the controller's."""

    robot: dict[str, Any]
    fps: float
    not_finite: int = 0
    outside: int = 0  # commands above the range, velocity, acceleration or force of any action
    farthest: float = 0.0  # how far the measured place was outside its limits, in their unit
    _before: np.ndarray | None = None

    def __call__(self, command: np.ndarray, observation: dict[str, Any]) -> None:
        """Takes one command and what was measured when it was given."""
        limits, names = self.robot["envelope"], self.robot["action_names"]
        now = np.array(command, float)
        self.not_finite += int(not np.isfinite(now).all())
        broken = any(
            not low - 1e-6 <= u <= high + 1e-6 for u, (low, high) in zip(now, limits["command_range"], strict=False)
        )
        before = np.zeros_like(now) if self._before is None else self._before
        for name, joint in limits["joints"].items():
            d, kind = names.index(name), joint["controls"]
            if kind == "effort":
                broken |= not abs(now[d]) <= joint.get("force", np.inf) + 1e-6
            elif kind == "velocity":
                speed, change = now[d] * joint["rate"], (now[d] - before[d]) * joint["rate"] * self.fps
                broken |= not abs(speed) <= joint.get("velocity", np.inf) * (1 + 1e-5)
                broken |= not abs(change) <= joint.get("acceleration", np.inf) * (1 + 1e-5)
            elif self._before is not None:
                broken |= not abs(now[d] - before[d]) * self.fps <= joint.get("velocity", np.inf) * (1 + 1e-4)
            if joint.get("position") is not None and joint.get("measured") is not None:
                place = float(observation["proprio"][self.robot["proprio_names"].index(joint["measured"])])
                low, high = joint["position"]
                self.farthest = max(self.farthest, low - place, place - high)
        self.outside += int(broken)
        self._before = now


@dataclass(frozen=True)
class Drilled:
    """What became of one trial."""

    success: bool
    steps: int
    states: dict[str, int]  # control steps in each state of the controller
    dropped: int  # values that the controller did not use
    watch: Watch


def drill_trial(
    make_controller: Callable[[], Controller],
    scene: Scene,
    task: str,
    trial: int,
    fault: str,
    *,
    rollout: Rollout,
) -> Drilled:
    """Runs one trial of the closed loop through a controller and a faulty line; start states are those of `rollout`.

    Raises:
        ConfigError: no such fault.
    """
    controller = make_controller()
    controller.reset(0.0)
    policy, fps, every = controller.policy, controller.fps, rollout.image_every
    faults = np.random.default_rng([rollout.seed, trial, FAULTS.index(fault) if fault in FAULTS else 0])
    line, watch = Line(fault, policy.cameras[0], fps, every, faults), Watch(policy.robot, fps)
    rng, _ = rollout.start(scene, task, trial)
    observation, answer = scene.reset(rng, images=True), None
    states = {"run": 0, "hold": 0, "stop": 0}
    success, step = False, 0
    for step in range(rollout.limit(scene)):
        now = step / fps
        line.send(step, observation)
        for sent, message in line.due(step):
            controller.receive(sent / fps, message, now)
        controller.react(now)
        if answer is None and (question := controller.ask(now)) is not None:
            answer = (step + rollout.delay, question, controller.think(question))
        if answer is not None and line.arrival(answer[0]) <= step:
            controller.take(answer[1], answer[2], now)
            answer = None
        command = controller.command(now).copy()
        states[controller.state] += 1
        watch(command, observation)
        observation, success = scene.step(command, images=(step + 1) % every == 0)
        if success:
            break
    return Drilled(success, step + 1, states, sum(controller.dropped.values()), watch)
