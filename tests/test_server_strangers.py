"""What strangers send to the policy server: broken frames, floods, wrong keys; and TLS."""

import hmac
import http.client
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_fakes import (
    TraceSource,
    WireClient,
    expected,
    get,
    openpi_client,
    running,
    wait_for,
    x,
)
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from export.openpi import pack

# What openpi-client 0.1.2 does with websockets is deprecated there, and still works.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with running(TraceSource()) as number:
        yield number


def test_the_queue_of_one_client_is_bounded() -> None:
    with running(TraceSource(delay=0.6), max_queue=2, max_message_bytes=1 << 20) as port, WireClient(port) as client:
        raw = client.socket.socket
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        raw.settimeout(0.3)
        frame = pack({"x": x(1), "instruction": "x" * (1 << 19)})
        sent, started = 0, time.monotonic()
        with suppress(TimeoutError):
            for _ in range(100):
                raw.sendall(masked(frame))
                sent += 1
        # A few in the queue and what the sockets hold, and what was answered on a slow machine; the rest waits.
        assert 2 <= sent <= 30 + (time.monotonic() - started) / 0.6


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
