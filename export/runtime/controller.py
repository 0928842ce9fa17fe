"""The loop around a policy on a robot: which action of which chunk is commanded when, and what happens on faults.

    controller = Controller(OnnxPolicy("artefact", instruction="Press the red button."))
    controller.reset(clock())
    # as messages come, from any thread
    controller.receive(stamp, {"rgb.front": picture}, clock())
    # in a thread that may take its time
    if question := controller.ask(clock()):
        controller.take(question, controller.think(question), clock())
    # at every control step
    controller.react(clock())  # with `reactive` alone
    robot.send(controller.command(clock()))

Times are seconds of one clock, given by the caller: the same messages at the same times give the same commands.
"""

import math
import threading
from typing import Any, NamedTuple

import numpy as np

from .guard import Guard
from .inbox import Inbox
from .manifest import RuntimeContractError
from .overlap import Overlap
from .policy import OnnxPolicy
from .reflex import Reflex

RUN, HOLD, STOP = "run", "hold", "stop"
PATIENCE = 8
"""Answers whose longest time of thinking is expected of the next."""


class Question(NamedTuple):
    """What the policy is asked."""

    episode: int
    begun: int  # control step of the newest picture: row 0 of the chunk
    asked: int  # control step of the question
    history: list[dict[str, np.ndarray]]  # views into what is kept, good for the length of a chunk
    instruction: str | None
    decided: np.ndarray  # (d, D) what is commanded from `begun` on in any case
    previous: np.ndarray | None  # (2, D) what was commanded before
    waits: bool  # the robot stands still until the answer is there


class Controller:
    """Commands a robot from time-stamped observations; every command is finite and inside the limits of the manifest.

    `command` answers at once and makes no array; `ask` and `think` are for a thread of their own. A chunk answers to
    the time of the newest picture, and the row for now is executed whenever the chunk arrives; one that a robot at rest
    has waited for, its first for one, begins with its first row when it is there, and ends early by as much. A value
    that is not finite, out of range or older than what is kept is dropped, single points and sensors by themselves; a
    camera that repeats itself or is silent is absent: its sense is masked where the policy allows it, else the policy
    is not asked. Without a new chunk the rows of the last are executed to the end or to the deadline, then the robot is
    brought to rest and holds (`hold`); after `stop_after` seconds of this it stays there until `reset` (`stop`).

    Args:
        policy: used by this controller alone.
        replan: control steps between two questions; half a chunk by default.
        ensemble: commands the mean of chunks that overlap, see `Overlap`; not with `realtime`, whose chunks continue
            what is done.
        realtime: tells the policy what is commanded while it thinks, as long as its last answers took; for models
            trained with a rate `decided`.
        reactive: lets commands follow what is measured while a chunk is executed, see `react`; not with `ensemble`.
        deadline: seconds from the picture that a chunk answers to, after which no row of it is commanded; at most, and
            by default, the length of a chunk.
        stop_after: seconds of holding.
        stale_after: seconds up to which a value stands for now, by `images` and `sensors`; default from the manifest.
        frozen_after: pictures of the same bytes after which a camera is absent; default from the manifest.
        rest: see `Guard`.

    Raises:
        RuntimeContractError: a setting out of its range, or `reactive` without the path `proposal`.
    """

    def __init__(
        self,
        policy: OnnxPolicy,
        *,
        replan: int | None = None,
        ensemble: float | None = None,
        realtime: bool = False,
        reactive: bool = False,
        deadline: float | None = None,
        stop_after: float = 1.0,
        stale_after: dict[str, float] | None = None,
        frozen_after: int | None = None,
        rest: dict[str, float] | None = None,
    ) -> None:
        control = policy.manifest["control"]
        self.policy, self.fps, self.realtime, self.stop_after = policy, policy.fps, realtime, stop_after
        self.replan = policy.horizon // 2 if replan is None else replan
        self.deadline = policy.horizon / self.fps if deadline is None else deadline
        if not (1 <= self.replan <= policy.horizon and 0 < self.deadline <= policy.horizon / self.fps):
            raise RuntimeContractError(
                f"controller: replan {self.replan}, deadline {self.deadline:g} s; expected 1 to {policy.horizon} steps "
                f"and at most {policy.horizon / self.fps:g} s, the length of a chunk"
            )
        if (realtime or reactive) and ensemble is not None:
            other = "realtime" if realtime else "reactive"
            raise RuntimeContractError(f"controller: ensemble {ensemble:g} and {other}; expected one of them")
        if reactive and not policy.proposes:
            raise RuntimeContractError("controller: reactive needs an artefact that was built with the path `proposal`")
        self._reflex = Reflex(policy) if reactive else None
        self._overlap = Overlap(ensemble)
        self.stale_after = {**control["stale_after"], **(stale_after or {})}
        if set(self.stale_after) != {"images", "sensors"} or not min(self.stale_after.values()) > 0:
            raise RuntimeContractError(
                f"stale_after: got {stale_after}, expected seconds above 0 of images and sensors"
            )
        frozen = control["frozen_after"] if frozen_after is None else frozen_after
        self._inbox = Inbox(policy, self.stale_after, frozen, self._say)
        self.guard = Guard(policy.robot, self.fps, rest)
        size = len(policy.action_names)
        self._wanted, self._out = np.zeros(size), np.zeros(size, np.float32)
        self._log, self._moved = np.zeros((64, size), np.float32), np.zeros((64, size))
        self._since = np.zeros(size)
        self._lock, self._episode = threading.Lock(), 0
        self.reset(0.0)

    def reset(self, now: float) -> None:
        """Starts an episode at this time: forgets messages, chunks and faults, and ends a stop."""
        with self._lock:
            self._inbox.reset(now)
            self.policy.reset()
            self.guard.reset()
            self.state, self.reason = HOLD, "nothing observed yet"
            self._episode += 1
            self._start, self._step, self._first = now, -1, -1
            self._began, self._saw, self._ran, self._asked, self._open, self._held = -1, -1, -1, -1, False, 0
            self._chunk: np.ndarray | None = None
            if self._reflex is not None:
                self._reflex.forget()
            self._overlap.forget()
            self._thought = [0] * PATIENCE
            self._answers, self._heavy, self._peak = 0, 0.0, 0.0
            self._heavy_at = self._measured_at = -math.inf

    @property
    def dropped(self) -> dict[str, int]:
        """Messages that were not used, and points and sensors of others, by name, since the last reset."""
        return self._inbox.dropped

    def receive(self, stamp: float, observation: dict[str, Any], now: float) -> None:
        """Takes what was measured at `stamp`, names as in `OnnxPolicy.observe`, each of them by itself.

        Points and sensors that are not finite are absent; the others of their value stay.

        Raises:
            RuntimeContractError: an unknown name, or an instruction that does not fit.
        """
        with self._lock:
            used = self._inbox.put(stamp, observation, now)
            if "wrench" in used:
                force = float(np.sqrt(np.square(used["wrench"][:, :3], dtype=float).sum(1)).max())
                # A blow between two commands counts too.
                self._peak = max(self._peak, force)
                if stamp >= self._heavy_at:
                    self._heavy, self._heavy_at = force, stamp
            if "proprio" in used and stamp >= self._measured_at:
                self._measure(stamp, used["proprio"])

    def ask(self, now: float) -> Question | None:
        """What to ask the policy now; None while it is asked, too early, stopped, or the observation is not good."""
        with self._lock:
            if self._open or self.state == STOP:
                return None
            time = self._inbox.time(now)
            begun = self._number(time) if time is not None else -1
            if time is None or (self._asked >= 0 and begun < self._asked + self.replan):
                return None
            count = self.policy.history * self.policy.stride
            count = min(count, begun - self._first + 1) if self._first >= 0 else 1
            history = self._inbox.history(time, count)
            if history is None:
                return None
            if self._first < 0:
                self._first = begun
            step = self._number(now)
            waits = self._ran < begun and not self._fresh(max(step, self._step + 1))
            expected = step + max(self._thought) if self.realtime and not waits else begun
            count = min(max(0, expected - begun), self.policy.horizon // 2)
            decided = np.zeros((count, len(self._out)), np.float32)
            for row in range(count):
                self._planned(begun + row, decided[row])
            done = [self._log[s % len(self._log)] for s in (begun - 2, begun - 1) if 0 <= s <= self._step]
            previous = np.stack(done) if len(done) == 2 else None
            self._asked, self._open = begun, True
            return Question(self._episode, begun, step, history, self._inbox.instruction, decided, previous, waits)

    def think(self, question: Question) -> np.ndarray | None:
        """The chunk (A, D); None if the model refuses the observation or its answer is not finite. Takes long."""
        self.policy.load(question.history, question.instruction)
        decided = question.decided if self.realtime else question.decided[:0]
        try:
            chunk = self.policy.act_after(decided, previous=question.previous)
            if self._reflex is not None:
                self._reflex.draft(self.policy.propose(decided))
            return chunk
        except RuntimeContractError as error:
            self.reason = str(error)
            return None

    def react(self, now: float) -> None:
        """Looks at what is measured now; commands follow it until the next look (see `Reflex`).

        Takes as long as the path `proposal`: call it before each command, or in a thread of its own. Without `reactive`
        it does nothing.
        """
        with self._lock:
            if self._reflex is None:
                return
            episode, step = self._episode, self._number(now)
            count = min(self.policy.history * self.policy.stride, step - max(self._first, 0) + 1)
            history = self._inbox.history(now, count)
            instruction = self._inbox.instruction
        try:
            proposal = None if history is None else self._reflex.look(history, instruction)
        except RuntimeContractError as error:
            self.reason = str(error)
            return
        with self._lock:
            if episode == self._episode:
                self._reflex.follow(proposal, step)

    def take(self, question: Question, chunk: np.ndarray | None, now: float) -> None:
        """Takes the answer, which is commanded from the row for now on, or from its first if the robot has waited; not
        one that is not finite, too late or of an earlier episode."""
        with self._lock:
            if question.episode != self._episode:
                return
            self._open = False
            took = self._number(now) - question.asked
            self._thought[self._answers % PATIENCE] = max(0, took)
            self._answers += 1
            if chunk is None or chunk.shape != (self.policy.horizon, len(self._out)) or not np.isfinite(chunk).all():
                return
            if now - self._start - question.begun / self.fps >= self.deadline:
                self.reason = f"the chunk came {took} control steps after its question, too late"
                return
            rested = question.waits and self._ran < question.begun
            began = max(self._number(now), self._step + 1) if rested else question.begun
            # What was planned before a halt is over; and what had to wait may begin after what answers a later picture.
            if rested or self.state != RUN or began < self._began:
                self._overlap.forget()
            self._chunk = self._overlap(chunk, began - self._began)
            self._began, self._saw = began, question.begun
            if self._reflex is not None:
                self._reflex.take()

    def command(self, now: float) -> np.ndarray:
        """What to command at this control step, (D,) in the robot's units; the array is written anew at the next.

        `state` and `reason` then say how it came about. Within one control step the answer stays.

        Raises:
            RuntimeContractError: see `Guard`.
        """
        with self._lock:
            step = self._number(now)
            if step <= self._step:
                return self._out
            fresh = self._fresh(step)
            if fresh:
                self._row(step, self._wanted)
                self.state, self.reason, self._held, self._ran = RUN, "", 0, step
            else:
                self.guard.rest(self._wanted)
                # Steps that nobody asked for count too.
                self._held += step - max(self._step, 0)
                self.state = STOP if self.state == STOP or self._held > self.stop_after * self.fps else HOLD
            known = self._heavy if now - self._heavy_at <= self.stale_after["sensors"] else 0.0
            touched, self._peak = max(self._peak, known) > self.guard.contact, 0.0
            self.guard(self._wanted, self._out, still=touched or not fresh)
            self._log[step % len(self._log)] = self._out
            self._moved[step % len(self._log)] = self.guard.velocity
            self._step = step
            return self._out

    def _say(self, reason: str) -> None:
        self.reason = reason

    def _number(self, time: float) -> int:
        """The control step of a time."""
        return round((time - self._start) * self.fps)

    def _fresh(self, step: int) -> bool:
        """Whether a row of the chunk is commanded at a step."""
        if self._chunk is None or self.state == STOP or not 0 <= step - self._began < self.policy.horizon:
            return False
        return step - self._saw < self.deadline * self.fps - 1e-6

    def _planned(self, step: int, out: np.ndarray) -> None:
        """What was or will be commanded at a step as things are."""
        if 0 <= step <= self._step:
            out[:] = self._log[step % len(self._log)]
        elif self._fresh(step):
            self._row(step, out)
        else:
            self.guard.rest(self._wanted)
            out[:] = np.nan_to_num(self._wanted)

    def _row(self, step: int, out: np.ndarray) -> None:
        """The row of the chunk for a step, following what is proposed since."""
        assert self._chunk is not None
        np.copyto(out, self._chunk[step - self._began])
        if self._reflex is not None:
            self._reflex(step - self._began, step, out)

    def _measure(self, stamp: float, proprio: np.ndarray) -> None:
        """Where the joints are: where they were at the stamp, and what they were told to move since."""
        self._measured_at = stamp
        self._since[:] = 0.0
        for step in range(max(self._number(stamp), self._step - len(self._moved) + 1, 0), self._step + 1):
            self._since += self._moved[step % len(self._moved)] / self.fps
        self.guard.measure(proprio, self._since)
