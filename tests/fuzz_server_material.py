"""Values, arrays, bytes and frames that a policy server must not trust."""

import pickle
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np


class _Payload:
    """Runs a program when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch unpickled",)


PICKLES = [pickle.dumps(_Payload(), protocol) for protocol in (0, 2, 4, 5)]
TEXTS = (
    "",
    "x" * 300,
    "nul\0",
    "ä\u2028",
    "__ndarray__",
    "session_id",
    "reset",
    "rgb.front",
    "../../x",
    "%s%n",
    "${x}",
)
NUMBERS = (0, 1, -1, 255, 1 << 31, 1 << 63, -(1 << 63), 0.5, -0.0, 1e300, float("nan"), float("inf"), True, False, None)
DTYPES = (
    "<f4",
    "<f8",
    "<f2",
    "<f16",
    "<i8",
    "|u1",
    "|b1",
    "<U3",
    "|S2",
    "<M8[s]",
    "<m8[ns]",
    ">f4",
    "|O",
    "|V8",
    "<c8",
)
WRONG_DTYPES = ("f4,O", "(2,)<f4", "O", "float32", "<f3", "|O8", "<U1000000000", "<M8[99999999s]", "<M8[x]", "<U0", "ä")


def pick(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options, as it is."""
    return options[int(rng.integers(len(options)))]


def values(rng: np.random.Generator, depth: int = 0) -> Any:
    """Any value of msgpack, arrays that lie about themselves among them."""
    match int(rng.integers(0, 10 if depth < 4 else 6)):
        case 0:
            return pick(rng, NUMBERS)
        case 1:
            return pick(rng, TEXTS)
        case 2:
            return rng.bytes(int(rng.integers(0, 30)))
        case 3:
            return msgpack.ExtType(int(rng.integers(0, 128)), PICKLES[0])
        case 4 | 5:
            return arrays(rng)
        case 6 | 7:
            return [values(rng, depth + 1) for _ in range(rng.integers(0, 4))]
        case 8:
            return {pick(rng, TEXTS): values(rng, depth + 1) for _ in range(rng.integers(0, 4))}
        case _:
            kind = b"__npgeneric__" if rng.integers(2) else b"__ndarray__"
            keys = (b"data", b"dtype", b"shape")
            return {kind: True} | {key: values(rng, depth + 1) for key in keys if rng.integers(4)}


def arrays(rng: np.random.Generator) -> dict[bytes, Any]:
    """The map of an array of any type and shape, often not filled as it says."""
    names = DTYPES if rng.integers(4) else WRONG_DTYPES
    shape: list[Any] = [int(pick(rng, [0, 1, 2, 3, 6, 8, 18, 64])) for _ in range(rng.integers(0, 4))]
    data = rng.bytes(min(int(np.prod(shape, dtype=np.int64)) * int(pick(rng, [1, 2, 4, 8])), 5000))
    if not rng.integers(4):
        shape = [pick(rng, (-1, 1 << 31, 1 << 62, (1 << 64) - 1, 1.5, None, "8", [1])), *shape]
    if not rng.integers(6):
        data = pick(rng, PICKLES)
    return {b"__ndarray__": True, b"data": data, b"dtype": pick(rng, names), b"shape": shape}


def spoilt(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with bytes flipped, cut off, cut out or put in."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        place = int(rng.integers(0, len(out) + 1))
        match int(rng.integers(0, 6)):
            case 0 | 1 if place < len(out):
                out[place] ^= int(rng.integers(1, 256))
            case 2:
                del out[place:]
            case 3:
                del out[place : place + int(rng.integers(1, 40))]
            case 4:
                out[place : place + 4] = pick(rng, [b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"])
            case _:
                out[place:place] = pick(rng, [b"\x91" * 2000, b"\x80" * 2000, b"\xdd\x7f\xff\xff\xff", rng.bytes(8)])
    return bytes(out)


def frame(payload: bytes, rng: np.random.Generator | None = None) -> bytes:
    """A binary frame as clients send it; with a generator, its head may lie."""
    opcode, fin, mask, length = 2, 0x80, 0x80, len(payload)
    if rng is not None:
        opcode = int(pick(rng, [2, 2, 0, 1, 3, 8, 9, 10, 15]))
        fin = int(pick(rng, [0x80, 0x80, 0, 0xC0, 0x90]))
        mask = int(pick(rng, [0x80, 0x80, 0x80, 0]))
        length = int(pick(rng, [length, length, length + 9, max(length - 9, 0), 1 << 20, (1 << 63) - 1]))
    return bytes([fin | opcode, mask | 127]) + length.to_bytes(8, "big") + bytes(4 if mask else 0) + payload
