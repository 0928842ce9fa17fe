"""A policy without a network, a server in a thread, and a client written from the protocol alone."""

import asyncio
import http.client
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.sync.client import connect

from export.openpi import unpack
from export.server import PolicyServer, ServerOptions

SIZE = 3


class TracePolicy:
    """Answers with a number that depends on all that this session observed, in order."""

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay
        self.reset()

    def reset(self) -> None:
        self._trace, self._steps = 0.0, 0

    def observe(self, observation: dict[str, Any]) -> None:
        value = observation.get("x", np.zeros(SIZE, np.float32))
        if set(observation) - {"x", "instruction"} or not isinstance(value, np.ndarray) or value.shape != (SIZE,):
            raise ValueError(f"x: got {sorted(observation)}, expected x float32 [{SIZE}]")
        if not np.isfinite(value).all():
            raise ValueError("x: non-finite value")
        self._trace = (31.0 * self._trace + float(value.sum()) + 1.0) % 1000.0
        self._steps += 1

    def act(self) -> dict[str, Any]:
        time.sleep(self._delay)
        if self._trace == 666.0:
            raise RuntimeError("secret of the server")
        return {"actions": np.full((2, 1), self._trace, np.float32), "steps": self._steps}


class TraceSource:
    """Sessions of `TracePolicy`."""

    metadata: dict[str, Any] = {"observations": {"x": {"shape": [SIZE], "dtype": "float32"}}}  # noqa: RUF012
    observation_bytes = 8 * SIZE

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay

    def new(self) -> TracePolicy:
        return TracePolicy(self._delay)


@contextmanager
def running(source: Any, **options: Any) -> Iterator[int]:
    """A server on a free port; yields the port."""
    server = PolicyServer(source, ServerOptions(**{"port": 0, **options}))
    loop = asyncio.new_event_loop()
    ready: asyncio.Future[int] = loop.create_future()
    stop = asyncio.Event()
    listening = threading.Event()
    ready.add_done_callback(lambda _: listening.set())
    thread = threading.Thread(target=loop.run_until_complete, args=(server.run(ready, stop),))
    thread.start()
    try:
        assert listening.wait(10)
        yield ready.result()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()


def encode(value: Any) -> Any:
    """NumPy values as openpi writes them, written out independently of `export.openpi`."""
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    assert isinstance(value, np.ndarray)
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": list(value.shape)}


class WireClient:
    """What `openpi_client.WebsocketClientPolicy` does, and access to the frames."""

    def __init__(self, port: int, *, api_key: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        scheme = "ws" if tls is None else "wss"
        self._stack = ExitStack()
        url = f"{scheme}://localhost:{port}"
        opening = connect(url, compression=None, max_size=None, additional_headers=headers, ssl=tls, close_timeout=2)
        self.socket = self._stack.enter_context(opening)
        frame = self.socket.recv(10)
        assert isinstance(frame, bytes)
        self.metadata = unpack(frame)

    def __enter__(self) -> "WireClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get_server_metadata(self) -> dict[str, Any]:
        return self.metadata

    def send(self, message: Any) -> None:
        packed = msgpack.packb(message, default=encode)
        assert packed is not None
        self.socket.send(packed)

    def receive(self) -> Any:
        answer = self.socket.recv(20)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return unpack(answer)

    def infer(self, message: dict[str, Any]) -> dict[str, Any]:
        self.send(message)
        return self.receive()


def x(*values: float) -> np.ndarray:
    """An observation of `TracePolicy`, one number repeated or as given."""
    return np.full(SIZE, values[0], np.float32) if len(values) == 1 else np.array(values, np.float32)


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def expected(*observations: np.ndarray) -> float:
    """What a session answers that saw these in this order."""
    policy = TracePolicy()
    for one in observations:
        policy.observe({"x": one})
    return float(policy.act()["actions"][0, 0])


def openpi_client(port: int, **options: Any) -> Any:
    module = pytest.importorskip("openpi_client.websocket_client_policy")
    return module.WebsocketClientPolicy("127.0.0.1", port, **options)


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def made_up_artefact(out: Path) -> Path:
    """The artefact of a small model without training."""
    from export_fakes import ROBOTS, FakeModel, fake_clips, fake_moments

    from export.build import BuildOptions, build_artefact

    options = BuildOptions(paths=("policy",), formats=("onnx",))
    build_artefact(FakeModel(), out, fake_moments(1), fake_clips(), ROBOTS, options)
    return out
