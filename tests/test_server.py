"""The policy server on its socket: the protocol, its options, requests and sessions."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_fakes import (
    TracePolicy,
    TraceSource,
    WireClient,
    encode,
    expected,
    get,
    openpi_client,
    running,
    wait_for,
    x,
)
from websockets.exceptions import ConnectionClosed, ConnectionClosedError
from websockets.sync.client import connect

from export.openpi import pack
from export.server import MESSAGE_OVERHEAD, PolicyServer, ServerOptions

# What openpi-client 0.1.2 does with websockets is deprecated there, and still works.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(TraceSource()) as number:
        yield number


@pytest.mark.parametrize("make", [WireClient, openpi_client])
def test_a_client_gets_metadata_and_chunks(port: int, make: Callable[[int], Any]) -> None:
    client = make(port)
    metadata = client.get_server_metadata()
    assert metadata["observations"]["x"] == {"shape": [3], "dtype": "float32"}
    assert metadata["limits"]["message_bytes"] == 2 * TraceSource.observation_bytes + MESSAGE_OVERHEAD
    assert len(metadata["session_id"]) >= 24
    assert set(metadata["requests"]) == {"reset", "act", "elapsed", "session_id"}
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
