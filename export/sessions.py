"""Sessions of a policy server: who observes what, and what each request is answered. Knows nothing of sockets.

A request is a dict of observations by name, as in `OnnxPolicy.observe`, of one control step; beside them may stand the
names of `REQUESTS`.
"""

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from export.openpi import pack, unpack

REQUESTS = {
    "reset": "true starts an episode before this observation; alone, it is only acknowledged",
    "act": "false only observes: the answer has no actions",
    "elapsed": "control steps since the previous observation, 1 by default; the steps between are unobserved",
    "session_id": "goes on with the session that an earlier connection was told",
}
"""Names in a request that are no observations, and what they do; clients are told so."""
MAX_ELAPSED = 1_000
MAX_KEYS, MAX_KEY = 256, 128


class RequestError(ValueError):
    """A request cannot be answered; the message is for the client."""


class SessionPolicy(Protocol):
    """What one session talks to. Only one thread calls it at a time."""

    def reset(self) -> None:
        """Starts an episode."""
        ...

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes one control step; raises ValueError if it does not fit, and is then as it was before."""
        ...

    def act(self) -> dict[str, Any]:
        """The answer: `actions` (H, D) and whatever else belongs to it."""
        ...


class PolicySource(Protocol):
    """Makes policies that share a network and nothing that an episode changes."""

    metadata: dict[str, Any]
    """Sent to every client on connect; msgpack values."""
    observation_bytes: int
    """Size of the largest observation, to derive the limit of messages from."""

    def new(self) -> SessionPolicy:
        """A policy at the start of an episode."""
        ...


@dataclass(eq=False)
class Session:
    """One robot's episode. `owner` is the connection that it answers, None while it waits to be resumed."""

    id: str
    policy: SessionPolicy
    owner: "Client | None"
    lock: threading.Lock = field(default_factory=threading.Lock)
    observed: bool = False
    released: float = 0.0


class Client:
    """One connection's side of the store; `on_takeover` is called when another connection resumes its session."""

    def __init__(self, on_takeover: Callable[[], None]) -> None:
        self.on_takeover = on_takeover
        self.session: Session | None = None
        self.previous_ms: float | None = None
        """How long the previous request took, its transport included; openpi reports it with the next answer."""


class SessionStore:
    """Sessions by id. Methods may be called from any thread.

    Args:
        source: makes the policies.
        keep_seconds: how long a session waits for its client to come back.
        keep: how many wait at most; the one that has waited longest goes first.
    """

    def __init__(self, source: PolicySource, *, keep_seconds: float, keep: int) -> None:
        self._source = source
        self.keep_seconds = keep_seconds
        self._keep = keep
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def open(self, client: Client) -> str:
        """Starts a session for a new connection; returns its id, which nobody can guess."""
        session = Session(secrets.token_urlsafe(18), self._source.new(), client)
        with self._lock:
            self._sessions[session.id] = session
        client.session = session
        return session.id

    def close(self, client: Client) -> None:
        """The connection is gone: its session waits to be resumed."""
        with self._lock:
            session = client.session
            client.session = None
            if session is not None and session.owner is client:
                session.owner, session.released = None, time.monotonic()
            self._expire()

    @property
    def waiting(self) -> int:
        """Number of sessions without a connection."""
        with self._lock:
            self._expire()
            return sum(session.owner is None for session in self._sessions.values())

    def answer(self, client: Client, frame: bytes) -> tuple[bytes, float | None]:
        """The frame that answers `frame`, and the seconds that the policy took to act, None if it did not.

        Raises:
            RequestError: the request or an observation is wrong; or another connection has resumed the session.
            FrameError: the frame is not msgpack.
            ValueError: from the policy, naming the field and what would be right.
        """
        observation, control = _request(unpack(frame))
        if control["session_id"] is not None:
            self._resume(client, control["session_id"])
        session = client.session
        if session is None:
            raise RequestError("the session is closed")
        with session.lock:
            if session.owner is not client:
                raise RequestError("session_id: another connection has resumed this session")
            policy = session.policy
            if control["reset"]:
                policy.reset()
                session.observed = False
                if not observation:
                    return pack({"reset": True}), None
            # Before an episode's first observation there is nothing that could have been missed.
            for _ in range(control["elapsed"] - 1 if session.observed else 0):
                policy.observe({})
            policy.observe(observation)
            session.observed = True
            if not control["act"]:
                return pack({"observed": True}), None
            started = time.perf_counter()
            result = policy.act()
            seconds = time.perf_counter() - started
        timing = {"infer_ms": 1e3 * seconds}
        if client.previous_ms is not None:
            timing["prev_total_ms"] = client.previous_ms
        return pack({**result, "server_timing": timing}), seconds

    def _resume(self, client: Client, session_id: str) -> None:
        """Gives `client` the session of that id and takes it from whoever has it."""
        if client.session is not None and client.session.id == session_id:
            return
        with self._lock:
            self._expire()
            session = self._sessions.get(session_id)
            if session is None:
                raise RequestError(
                    f"session_id: unknown or expired; sessions wait {self.keep_seconds:g} s for their client and do "
                    "not outlive the server. Connect again without session_id to start one"
                )
            if client.session is not None:
                self._sessions.pop(client.session.id, None)
            former, session.owner, client.session = session.owner, client, session
        if former is not None:
            former.on_takeover()

    def _expire(self) -> None:
        """Forgets sessions that have waited too long or are too many; the lock is held."""
        now = time.monotonic()
        waiting = sorted((s for s in self._sessions.values() if s.owner is None), key=lambda s: s.released)
        surplus = len(waiting) - self._keep
        for place, session in enumerate(waiting):
            if place < surplus or now - session.released > self.keep_seconds:
                del self._sessions[session.id]


_CONTROLS: dict[str, tuple[Any, type, str]] = {
    "reset": (False, bool, "true or false"),
    "act": (True, bool, "true or false"),
    "elapsed": (1, int, f"control steps, 1 to {MAX_ELAPSED}"),
    "session_id": (None, str, "text from the metadata of an earlier connection"),
}


def _request(message: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Observation and control values of a message, with observations that are arrays or texts."""
    if not isinstance(message, dict):
        raise RequestError(f"got {type(message).__name__}, expected a map of observations by name")
    if len(message) > MAX_KEYS:
        raise RequestError(f"{len(message)} names, expected at most {MAX_KEYS}")
    control = {name: default for name, (default, _, _) in _CONTROLS.items()}
    observation: dict[str, Any] = {}
    for key, value in message.items():
        if not isinstance(key, str) or len(key) > MAX_KEY:
            raise RequestError(f"{key[:40]!r}: expected names that are text of at most {MAX_KEY} characters")
        if key in _CONTROLS:
            _, kind, expected = _CONTROLS[key]
            plain = value.item() if isinstance(value, np.generic) else value
            if type(plain) is not kind or (key == "elapsed" and not 1 <= plain <= MAX_ELAPSED):
                raise RequestError(f"{key}: got {type(value).__name__}, expected {expected}")
            control[key] = plain
        elif isinstance(value, np.ndarray | np.generic | str):
            observation[key] = str(value) if isinstance(value, np.str_) else value
        elif key == "instruction":
            raise RequestError(f"{key}: got {type(value).__name__}, expected text")
        else:
            raise RequestError(f"{key}: got {type(value).__name__}, expected a NumPy array")
    if not observation and not control["reset"]:
        raise RequestError("no observation; the metadata of the connection lists their names, shapes and dtypes")
    return observation, control
