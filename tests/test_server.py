"""The policy server on its socket: the protocol, bounds, sessions, and what strangers send."""

import http.client
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_fakes import TracePolicy, TraceSource, WireClient, encode, running, x
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from export.openpi import pack
from export.server import MESSAGE_OVERHEAD, PolicyServer, ServerOptions

# What openpi-client 0.1.2 does with websockets is deprecated there, and still works.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(TraceSource()) as number:
        yield number


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


@pytest.mark.parametrize("make", [WireClient, openpi_client])
def test_a_client_gets_metadata_and_chunks(port: int, make: Callable[[int], Any]) -> None:
    client = make(port)
    metadata = client.get_server_metadata()
    assert metadata["observations"]["x"] == {"shape": [3], "dtype": "float32"}
    assert metadata["limits"]["message_bytes"] == 2 * TraceSource.observation_bytes + MESSAGE_OVERHEAD
    assert len(metadata["session_id"]) >= 24
    first = client.infer({"x": x(1)})
    assert first["actions"].dtype == np.float32 and first["actions"].shape == (2, 1)
    assert first["actions"][0, 0] == expected(x(1))
    assert set(first["server_timing"]) == {"infer_ms"}
    second = client.infer({"x": x(2)})
    assert second["actions"][0, 0] == expected(x(1), x(2)) and second["steps"] == 2
    assert set(second["server_timing"]) == {"infer_ms", "prev_total_ms"}


@pytest.mark.parametrize("make", [WireClient, openpi_client])
def test_an_error_is_a_text_frame_and_the_end(port: int, make: Callable[[int], Any]) -> None:
    client = make(port)
    with pytest.raises(RuntimeError, match=r"x: got \['y'\], expected x float32 \[3\]"):
        client.infer({"y": x(1)})
    with pytest.raises(ConnectionClosedError) as closed:
        client.infer({"x": x(1)})
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011


BAD: dict[str, tuple[Any, str]] = {
    "not a number": ({"x": x(0, np.nan, 0)}, "x: non-finite"),
    "list": ({"x": [1.0, 2.0, 3.0]}, "x: got list, expected a NumPy array"),
    "nothing": ({}, "no observation"),
    "no map": ([1], "got list, expected a map"),
    "bytes as name": ({b"x": x(1)}, "expected names that are text"),
    "long name": ({"x" * 5000: x(1)}, "at most 128 characters"),
    "many names": ({f"x{i}": x(1) for i in range(300)}, "300 names"),
    "instruction": ({"x": x(1), "instruction": b"go"}, "instruction: got bytes, expected text"),
    "reset": ({"x": x(1), "reset": 1}, "reset: got int, expected true or false"),
    "elapsed": ({"x": x(1), "elapsed": 0}, "elapsed: got int, expected control steps, 1 to"),
    "elapsed forever": ({"x": x(1), "elapsed": 1 << 40}, "elapsed: got int, expected control steps, 1 to"),
    "session": ({"x": x(1), "session_id": "guessed"}, "session_id: unknown or expired"),
    "session type": ({"x": x(1), "session_id": 5}, "session_id: got int"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_refused_by_name(port: int, case: str) -> None:
    message, reason = BAD[case]
    with WireClient(port) as client, pytest.raises(RuntimeError, match=reason):
        client.infer(message)


def test_text_frame_is_refused(port: int) -> None:
    with WireClient(port) as client:
        client.socket.send("hello")
        with pytest.raises(RuntimeError, match="expected a binary frame"):
            client.receive()


def test_long_reasons_are_cut(port: int) -> None:
    with WireClient(port) as client, pytest.raises(RuntimeError) as error:
        client.infer({f"{i:03d}" + "x" * 120: x(1) for i in range(200)})
    assert 1000 < len(str(error.value)) < 2100


def test_faults_of_the_policy_end_one_connection_and_tell_nothing(port: int) -> None:
    value = 665.0
    with WireClient(port) as client, WireClient(port) as other:
        other.infer({"x": x(1)})
        with pytest.raises(RuntimeError, match="the policy failed: RuntimeError") as error:
            client.infer({"x": x(value, 0, 0)})
        assert "secret" not in str(error.value)
        assert other.infer({"x": x(2)})["actions"][0, 0] == expected(x(1), x(2))


def test_healthz_and_metrics() -> None:
    with running(TraceSource()) as port:
        assert get(port, "/healthz") == (200, "OK\n")
        with WireClient(port) as client:
            for _ in range(3):
                client.infer({"x": x(1)})
            client.infer({"x": x(1), "act": False})
            status, text = get(port, "/metrics")
            assert status == 200 and "policy_clients 1.0" in text
            assert "policy_requests_total 4.0" in text and "policy_act_seconds_count 3.0" in text
            with pytest.raises(RuntimeError):
                client.infer({})
        wait_for(lambda: "policy_clients 0.0" in get(port, "/metrics")[1])
        text = get(port, "/metrics")[1]
        assert 'policy_errors_total{reason="request"} 1.0' in text and "policy_sessions_waiting 1.0" in text


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_eight_clients_at_once_are_answered_as_one_after_another() -> None:
    rng = np.random.default_rng(0)
    episodes = [[rng.uniform(0, 9, 3).astype(np.float32) for _ in range(40)] for _ in range(8)]
    alone = []
    for episode in episodes:
        policy = TracePolicy()
        rows = []
        for one in episode:
            policy.observe({"x": one})
            rows.append(policy.act()["actions"])
        alone.append(rows)
    answers: list[list[np.ndarray]] = [[] for _ in episodes]

    def drive(i: int) -> None:
        with WireClient(port) as client:
            barrier.wait(20)
            for one in episodes[i]:
                answers[i].append(client.infer({"x": one})["actions"])

    barrier = threading.Barrier(8)
    with running(TraceSource(delay=0.001), workers=3) as port:
        threads = [threading.Thread(target=drive, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, many in zip(alone, answers, strict=True):
        np.testing.assert_array_equal(one, many)


def test_requests_sent_ahead_are_answered_in_order() -> None:
    with running(TraceSource(delay=0.002), workers=4) as port, WireClient(port) as client:
        for i in range(30):
            client.send({"x": x(i)})
        answers = [client.receive()["actions"][0, 0] for _ in range(30)]
    assert answers == [expected(*(x(j) for j in range(i + 1))) for i in range(30)]


def test_a_slow_policy_keeps_nobody_from_being_heard() -> None:
    with running(TraceSource(delay=1.0)) as port, WireClient(port) as client:
        client.send({"x": x(1)})
        assert get(port, "/healthz")[0] == 200
        assert "policy_requests_total 0.0" in get(port, "/metrics")[1], "answered while the policy computes"
        client.receive()


def test_reset_elapsed_and_observing_only(port: int) -> None:
    with WireClient(port) as client:
        client.infer({"x": x(5)})
        assert client.infer({"reset": True}) == {"reset": True}
        assert client.infer({"x": x(1), "act": False}) == {"observed": True}
        assert client.infer({"x": x(2)})["actions"][0, 0] == expected(x(1), x(2))
        assert client.infer({"x": x(3), "reset": True})["steps"] == 1
        # Two steps without an observation lie between.
        assert client.infer({"x": x(4), "elapsed": np.int64(3)})["steps"] == 4
        assert client.infer({"x": x(3), "reset": True, "elapsed": 3})["steps"] == 1


def test_a_session_goes_on_after_a_reconnect(port: int) -> None:
    with WireClient(port) as client:
        session = client.metadata["session_id"]
        client.infer({"x": x(1), "session_id": session})
    with WireClient(port) as client:
        assert client.infer({"x": x(2), "session_id": session})["actions"][0, 0] == expected(x(1), x(2))
        assert client.infer({"x": x(3)})["steps"] == 3
    with WireClient(port) as client:
        assert client.infer({"x": x(2)})["actions"][0, 0] == expected(x(2)), "without its id a session is a new one"


def test_a_refused_observation_leaves_the_session_as_it_was(port: int) -> None:
    with WireClient(port) as client:
        session = client.metadata["session_id"]
        client.infer({"x": x(1)})
        with pytest.raises(RuntimeError, match="non-finite"):
            client.infer({"x": x(np.nan)})
    with WireClient(port) as client:
        assert client.infer({"x": x(2), "session_id": session})["actions"][0, 0] == expected(x(1), x(2))


def test_whoever_resumes_a_session_takes_it_from_a_dead_connection(port: int) -> None:
    with WireClient(port) as old, WireClient(port) as new:
        old.infer({"x": x(1)})
        assert new.infer({"x": x(2), "session_id": old.metadata["session_id"]})["steps"] == 2
        with pytest.raises((RuntimeError, ConnectionClosed), match=r"another connection has resumed|1011"):
            old.infer({"x": x(9)})
        assert new.infer({"x": x(3)})["actions"][0, 0] == expected(x(1), x(2), x(3))


def test_sessions_expire() -> None:
    with running(TraceSource(), keep_seconds=0.05) as port:
        with WireClient(port) as client:
            session = client.metadata["session_id"]
        time.sleep(0.3)
        with (
            WireClient(port) as client,
            pytest.raises(RuntimeError, match=r"unknown or expired; sessions wait 0\.05 s"),
        ):
            client.infer({"x": x(1), "session_id": session})


def test_waiting_sessions_and_clients_are_bounded() -> None:
    with running(TraceSource(), max_clients=2) as port:
        sessions = []
        for _ in range(3):
            with WireClient(port) as client:
                client.infer({"x": x(1)})
                sessions.append(client.metadata["session_id"])
            wait_for(lambda: "policy_clients 0.0" in get(port, "/metrics")[1])
        assert "policy_sessions_waiting 2.0" in get(port, "/metrics")[1]
        with WireClient(port) as first, WireClient(port) as second:
            with pytest.raises(RuntimeError, match="unknown or expired"):
                first.infer({"x": x(1), "session_id": sessions[0]})
            assert second.infer({"x": x(1), "session_id": sessions[2]})["steps"] == 2
            wait_for(lambda: "policy_clients 1.0" in get(port, "/metrics")[1])
            with WireClient(port) as third:
                with connect(f"ws://127.0.0.1:{port}") as fourth, pytest.raises(ConnectionClosedError) as closed:
                    fourth.recv(10)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
                assert third.infer({"x": x(1)})["steps"] == 1


def test_the_queue_of_one_client_is_bounded() -> None:
    with running(TraceSource(delay=0.6), max_queue=2, max_message_bytes=1 << 20) as port, WireClient(port) as client:
        raw = client.socket.socket
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        raw.settimeout(0.3)
        frame = pack({"x": x(1), "instruction": "x" * (1 << 19)})
        sent = 0
        with suppress(TimeoutError):
            for _ in range(100):
                raw.sendall(masked(frame))
                sent += 1
        # A few in the queue and what the sockets hold; the rest waits with the sender.
        assert 2 <= sent <= 30


def masked(payload: bytes, opcode: int = 2, fin: bool = True, length: int | None = None) -> bytes:
    """A frame as a client sends it, with a mask of zeros; `length` is what its head claims."""
    head = bytes([(0x80 if fin else 0) | opcode, 0x80 | 127])
    return head + (len(payload) if length is None else length).to_bytes(8, "big") + bytes(4) + payload


def raw_client(port: int) -> socket.socket:
    """A socket after the handshake and the metadata."""
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    plain.sendall(
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    received = b""
    while b"session_id" not in received:
        received += plain.recv(1 << 16)
    return plain


GOOD = pack({"x": np.ones(3, np.float32)})
FRAMES: dict[str, tuple[bytes, int | None]] = {
    "truncated": (masked(GOOD, length=len(GOOD) + 50), None),
    "half a head": (b"\x82", None),
    "claims 2**62 bytes": (masked(GOOD, length=1 << 62), 1009),
    "claims 2**63 bytes": (masked(GOOD, length=1 << 63), 1009),
    "unmasked": (b"\x82\x01\x00", 1002),
    "reserved opcode": (masked(GOOD, opcode=3), 1002),
    "reserved bit": (b"\xc2" + masked(GOOD)[1:], 1002),
    "continuation of nothing": (masked(GOOD, opcode=0), 1002),
    "long ping": (masked(b"x" * 126, opcode=9), 1002),
    "many pieces": (masked(b"", fin=False) + masked(b"", opcode=0, fin=False) * 6000, 1009),
    "pieces too large together": (masked(bytes(40_000), fin=False) + masked(bytes(40_000), opcode=0), 1009),
    "text that is no UTF-8": (masked(b"\xff\xfe", opcode=1), 1007),
    "pickle": (masked(b"\x80\x04N."), 1011),
}


@pytest.mark.parametrize("case", FRAMES)
def test_broken_frames_end_their_connection_alone(port: int, case: str) -> None:
    frame, code = FRAMES[case]
    with WireClient(port) as other:
        other.infer({"x": x(1)})
        with raw_client(port) as plain:
            plain.sendall(frame)
            if code is not None:
                received = b""
                while chunk := receive(plain):
                    received += chunk
                assert code.to_bytes(2, "big") in received
        assert other.infer({"x": x(2)})["actions"][0, 0] == expected(x(1), x(2))


def receive(plain: socket.socket) -> bytes:
    try:
        return plain.recv(1 << 16)
    except ConnectionResetError:
        return b""


def test_a_request_in_pieces_is_one_request(port: int) -> None:
    with raw_client(port) as plain:
        plain.sendall(masked(GOOD[:5], fin=False) + masked(b"", opcode=9) + masked(GOOD[5:], opcode=0))
        received = b""
        while b"actions" not in received:
            received += plain.recv(1 << 16)


def test_oversized_messages_are_not_read(port: int) -> None:
    with WireClient(port) as client:
        with pytest.raises(ConnectionClosedError) as closed:
            client.infer({"x": x(1), "instruction": "x" * (1 << 20)})
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
    wait_for(lambda: 'policy_errors_total{reason="too_big"}' in get(port, "/metrics")[1])
    with running(TraceSource(), max_message_bytes=1 << 21) as larger, WireClient(larger) as client:
        assert client.infer({"x": x(1), "instruction": "x" * (1 << 20)})["steps"] == 1


def test_web_pages_cannot_connect(port: int) -> None:
    headers = {"Origin": "http://evil.example"}
    with pytest.raises(InvalidStatus, match="403"), connect(f"ws://127.0.0.1:{port}", additional_headers=headers):
        pass


@pytest.mark.parametrize("make", [WireClient, openpi_client])
def test_api_key(make: Callable[..., Any]) -> None:
    with running(TraceSource(), api_key="s3cret") as port:
        for wrong in ({}, {"api_key": "s3cre"}, {"api_key": "s3crets"}):
            with pytest.raises(InvalidStatus, match="401"):
                make(port, **wrong)
        assert make(port, api_key="s3cret").infer({"x": x(1)})["steps"] == 1
        assert get(port, "/healthz")[0] == 200
        assert get(port, "/metrics")[0] == 401
        assert get(port, "/metrics", Authorization="Api-Key s3cret")[0] == 200
        for odd in ("Bearer s3cret", "Api-Key s3cret ü", "Api-Key"):
            assert get(port, "/metrics", Authorization=odd)[0] == 401


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[bytes, bytes]] = []

    def digest(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", digest)
    with running(TraceSource(), api_key="k") as port:
        assert get(port, "/metrics", Authorization="Api-Key x")[0] == 401
    assert compared == [(b"Api-Key x", b"Api-Key k")]


@contextmanager
def certificate(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A self-signed certificate of localhost and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")
    chain, key = folder / "chain.pem", folder / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(chain)]
    subprocess.run(["openssl", *words.split(), *names], check=True, capture_output=True)
    yield chain, key


def test_tls(tmp_path: Path) -> None:
    with (
        certificate(tmp_path) as (chain, key),
        running(TraceSource(), tls_certificate=chain, tls_key=key, api_key="k") as port,
    ):
        trust = ssl.create_default_context(cafile=str(chain))
        with WireClient(port, api_key="k", tls=trust) as client:
            assert client.infer({"x": x(1)})["steps"] == 1
        with pytest.raises(ssl.SSLCertVerificationError):
            WireClient(port, api_key="k", tls=ssl.create_default_context())
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            get(port, "/healthz")
        old = ssl.create_default_context(cafile=str(chain))
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            WireClient(port, api_key="k", tls=old)
        with WireClient(port, api_key="k", tls=trust) as client:
            assert client.infer({"x": x(1)})["steps"] == 1


@pytest.mark.parametrize("make", [WireClient, openpi_client])
def test_clients_reconnect_after_a_restart(make: Callable[[int], Any]) -> None:
    with ExitStack() as first:
        port = first.enter_context(running(TraceSource()))
        client = make(port)
        session = client.get_server_metadata()["session_id"]
        assert client.infer({"x": x(1)})["steps"] == 1
        first.close()
        with pytest.raises(ConnectionClosed):
            client.infer({"x": x(2)})
    with pytest.raises(ConnectionRefusedError):
        make(port)
    with running(TraceSource(), port=port):
        with WireClient(port) as client, pytest.raises(RuntimeError, match="do not outlive the server"):
            client.infer({"x": x(2), "session_id": session})
        assert make(port).infer({"x": x(2)})["steps"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_clients": 0}, "max_clients: got 0"),
        ({"max_queue": 0}, "max_queue: got 0"),
        ({"workers": 0}, "workers: got 0"),
        ({"max_message_bytes": 0}, "max_message_bytes: got 0"),
        ({"port": 70000}, "port: got 70000"),
        ({"keep_seconds": -1}, "keep_seconds: got -1"),
        ({"api_key": ""}, "api_key: expected one line"),
        ({"api_key": "a\nb"}, "api_key: expected one line"),
        ({"tls_key": Path("k")}, "tls_key: given without"),
        ({"tls_certificate": Path("nowhere.pem")}, r"nowhere\.pem"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyServer(TraceSource(), ServerOptions(**options))
    assert "secret" not in repr(ServerOptions(api_key="secret"))


def test_our_encoder_of_the_tests_is_openpis() -> None:
    import msgpack

    assert msgpack.packb({"x": x(1)}, default=encode) == pack({"x": x(1)})
