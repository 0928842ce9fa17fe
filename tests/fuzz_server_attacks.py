"""What strangers do to a policy server. Each attack is determined by its random generator and says how it ended."""

import re
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import msgpack
import numpy as np
from fuzz_server_material import PICKLES, TEXTS, frame, pick, spoilt, values
from server_fakes import encode

SECONDS = 20.0


class Target(NamedTuple):
    """Where the server listens, a sound observation of it, and what is to be closed at last."""

    port: int
    observation: dict[str, Any]
    sockets: ExitStack

    def connect(self) -> socket.socket:
        """A socket before the handshake."""
        return self.sockets.enter_context(socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS))


HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def opened(target: Target) -> socket.socket:
    """A socket after handshake and metadata."""
    plain = target.connect()
    plain.sendall(HANDSHAKE)
    received = b""
    while b"message_bytes" not in received:
        chunk = plain.recv(1 << 16)
        if not chunk:
            raise ConnectionError(f"no metadata: {received[:200]!r}")
        received += chunk
    return plain


def ending(plain: socket.socket, rng: np.random.Generator) -> str:
    """Ends the connection in one of several ways. Raises TimeoutError if the server does not close it in turn."""
    style = int(rng.integers(0, 4))
    if style == 0:
        # No goodbye: the kernel resets the connection.
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        plain.close()
        return "reset"
    if style == 1:
        plain.close()
        return "left"
    received = b""
    try:
        if style == 2:
            plain.settimeout(0.5)
            with suppress(TimeoutError):
                received += plain.recv(1 << 16)
            plain.settimeout(SECONDS)
        plain.sendall(b"\x88\x82" + bytes(4) + b"\x03\xe8")
        plain.shutdown(socket.SHUT_WR)
        while chunk := plain.recv(1 << 16):
            received += chunk
    except ConnectionError:
        pass
    finally:
        plain.close()
    if found := re.findall(rb"\x88[\x02-\x7d](\x03[\xe8-\xf5])", received):
        return f"closed with {struct.unpack('>H', found[-1])[0]}"
    return f"HTTP {received[9:12].decode()}" if received.startswith(b"HTTP/1.1 ") else "closed without a word"


def payload(target: Target, message: Any) -> bytes:
    """The msgpack of a message."""
    packed = msgpack.packb(message, default=encode)
    assert packed is not None
    return packed


def broken_msgpack(target: Target, rng: np.random.Generator) -> str:
    plain = opened(target)
    plain.sendall(frame(spoilt(payload(target, target.observation), rng)))
    return ending(plain, rng)


def hostile_values(target: Target, rng: np.random.Generator) -> str:
    message: dict[Any, Any] = dict(target.observation)
    for _ in range(rng.integers(1, 4)):
        key = pick(rng, [*message, "reset", "act", "elapsed", "session_id", *TEXTS])
        message[str(key)] = values(rng)
    plain = opened(target)
    plain.sendall(frame(payload(target, message if rng.integers(8) else values(rng))))
    return ending(plain, rng)


def wrong_numbers(target: Target, rng: np.random.Generator) -> str:
    message = dict(target.observation)
    key = str(pick(rng, [name for name, value in message.items() if isinstance(value, np.ndarray)]))
    array = np.array(message[key])
    if array.dtype.kind == "f":
        array = array.astype(pick(rng, ["<f4", "<f8", "<f2", ">f8"]))
        array.flat[rng.integers(array.size)] = pick(rng, [np.nan, np.inf, -np.inf, 6e4])
    message[key] = pick(rng, (array, array, array.T, array[:-1]))
    plain = opened(target)
    for _ in range(rng.integers(1, 4)):
        plain.sendall(frame(payload(target, message)))
    return ending(plain, rng)


def broken_frames(target: Target, rng: np.random.Generator) -> str:
    plain = opened(target)
    good = payload(target, target.observation)
    stream = b"".join(frame(good[: rng.integers(0, len(good))], rng) for _ in range(rng.integers(1, 5)))
    try:
        plain.sendall(spoilt(stream, rng) if rng.integers(2) else stream)
    except OSError:
        return "closed while sending"
    return ending(plain, rng)


def pieces(target: Target, rng: np.random.Generator) -> str:
    plain = opened(target)
    good, size = payload(target, target.observation), int(pick(rng, [1, 7, 400]))
    parts = [good[i : i + size] for i in range(0, min(len(good), size * 6000), size)]
    stream = b"".join(
        bytes([0x02 if i == 0 else 0, 0x80 | 126]) + struct.pack(">H", len(p)) + bytes(4) + p
        for i, p in enumerate(parts)
    )
    try:
        plain.sendall(stream + (b"\x80\x80\0\0\0\0" if rng.integers(2) else b""))
    except OSError:
        return "closed while sending"
    return ending(plain, rng)


def oversized(target: Target, rng: np.random.Generator) -> str:
    plain = opened(target)
    try:
        plain.sendall(frame(bytes(int(rng.integers(1 << 17, 1 << 22)))))
    except OSError:
        return "closed while sending"
    return ending(plain, rng)


def pickles(target: Target, rng: np.random.Generator) -> str:
    plain, data = opened(target), pick(rng, PICKLES)
    array = {b"__ndarray__": True, b"data": data, b"dtype": "|O", b"shape": [1]}
    scalar = {b"__npgeneric__": True, b"data": data, b"dtype": "|O"}
    npy = b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(128) + data
    key = next(iter(target.observation))
    choices: list[Any] = [
        array,
        scalar,
        data,
        npy,
        msgpack.ExtType(42, data),
        {"__pickle__": data, "__reduce__": ["os.system"]},
    ]
    raw = data if rng.integers(3) == 0 else payload(target, {**target.observation, key: pick(rng, choices)})
    plain.sendall(frame(raw))
    return ending(plain, rng)


def broken_http(target: Target, rng: np.random.Generator) -> str:
    plain = target.connect()
    heads = (
        spoilt(HANDSHAKE, rng),
        HANDSHAKE.replace(b"\r\n\r\n", b"\r\n" + b"X: y\r\n" * 300 + b"\r\n"),
        HANDSHAKE.replace(b"Host: x", b"Host: " + b"x" * 20_000),
        HANDSHAKE.replace(b"GET /", b"GET /" + b"%2e" * 9000),
        HANDSHAKE.replace(b"GET", b"POST"),
        HANDSHAKE.replace(b"Host: x", b"Origin: http://evil.example"),
        HANDSHAKE.replace(b"Host: x", b"Authorization: Api-Key \xff\xfe"),
        HANDSHAKE.replace(b"Host: x", b"Sec-WebSocket-Extensions: permessage-deflate"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.bytes(200),
        rng.bytes(int(rng.integers(1, 3000))),
        b"GET /metrics?" + rng.bytes(20).hex().encode() + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"",
    )
    try:
        plain.sendall(pick(rng, heads))
        plain.sendall(frame(payload(target, target.observation)))
    except OSError:
        return "closed while sending"
    return ending(plain, rng)


def guessed_sessions(target: Target, rng: np.random.Generator) -> str:
    plain = opened(target)
    guesses = (rng.bytes(18).hex(), "", "a" * 24, "\0", np.str_("x"), rng.bytes(8), [1], {"$ne": None}, 0)
    plain.sendall(frame(payload(target, {**target.observation, "session_id": pick(rng, guesses)})))
    return ending(plain, rng)


def flood(target: Target, rng: np.random.Generator) -> str:
    plain = opened(target)
    plain.settimeout(0.2)
    one = frame(payload(target, {**target.observation, "act": bool(rng.integers(2))}))
    try:
        for _ in range(rng.integers(5, 60)):
            plain.sendall(one)
        plain.sendall(one[: rng.integers(len(one))])
    except OSError:
        pass
    plain.settimeout(SECONDS)
    return ending(plain, rng)


ATTACKS: dict[str, Callable[[Target, np.random.Generator], str]] = {
    attack.__name__: attack
    for attack in (
        broken_msgpack,
        hostile_values,
        wrong_numbers,
        broken_frames,
        pieces,
        oversized,
        pickles,
        broken_http,
        guessed_sessions,
        flood,
    )
}
