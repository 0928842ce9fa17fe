"""The openpi wire format: msgpack in which a NumPy array is a map of its bytes, dtype and shape. Never pickle.

Bytes are those of `openpi_client.msgpack_numpy` (https://github.com/Physical-Intelligence/openpi): an array is
`{b"__ndarray__": True, b"data": ..., b"dtype": "<f4", b"shape": [...]}`, a NumPy scalar
`{b"__npgeneric__": True, b"data": item, b"dtype": ...}`. Reading is stricter than there, since frames come from a
network: dtypes that hold objects or have fields are refused, data must fill the shape exactly, and one frame makes a
bounded number of containers.
"""

import math
import re
from typing import Any

import msgpack
import numpy as np

CONTAINERS = 4096
"""Maps and lists of one frame, at most: an empty one takes one byte on the wire and 64 in memory."""

_DTYPE = re.compile(r"[<>|](?:b1|[iu][1248]|f(?:2|4|8|16)|[US][0-9]{1,9}|[mM]8(?:\[[0-9]{0,9}[a-zA-Z]{1,2}\])?)")
_ARRAY = frozenset((b"__ndarray__", b"data", b"dtype", b"shape"))
_SCALAR = frozenset((b"__npgeneric__", b"data", b"dtype"))
_SCALAR_DATA: dict[str, tuple[type, ...]] = {
    "b": (bool,),
    "i": (int,),
    "u": (int,),
    "f": (float,),
    "U": (str,),
    "S": (bytes,),
}


class FrameError(ValueError):
    """A frame is not the wire format, or holds what it must not."""


def pack(value: Any) -> bytes:
    """The frame of nested dicts, lists, numbers, texts, arrays and NumPy scalars.

    Raises:
        FrameError: an array of objects, records or complex numbers, or a value that msgpack does not know.
    """
    try:
        packed = msgpack.packb(value, default=_encode)
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"cannot be sent: {error}") from None
    assert packed is not None
    return packed


def unpack(frame: bytes) -> Any:
    """The value that a frame holds; its arrays are read-only views of the frame.

    Raises:
        FrameError: truncated or malformed msgpack, trailing bytes, too many containers, or an array that does not fit
            its dtype and shape.
    """
    count = 0

    def counted(_: Any) -> None:
        nonlocal count
        count += 1
        if count > CONTAINERS:
            raise FrameError(f"more than {CONTAINERS} maps and lists in one frame")

    def mapping(value: dict[Any, Any]) -> Any:
        counted(value)
        return _decode(value)

    def sequence(value: list[Any]) -> list[Any]:
        counted(value)
        return value

    try:
        return msgpack.unpackb(frame, object_hook=mapping, list_hook=sequence)
    except FrameError:
        raise
    # ValueError is the base of msgpack's own errors and of wrong UTF-8.
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise FrameError(f"not a msgpack frame: {type(error).__name__}: {error}"[:500]) from None


def _encode(value: Any) -> Any:
    """What openpi makes of NumPy values."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "VOc":
            raise FrameError(f"dtype {value.dtype}: records, objects and complex numbers have no place in a frame")
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise FrameError(f"{type(value).__name__} has no form in this format")


def _decode(value: dict[Any, Any]) -> Any:
    """Array or scalar of a map that says it is one; other maps as they are."""
    if b"__ndarray__" in value:
        dtype = _dtype(value, _ARRAY)
        shape, data = value[b"shape"], value[b"data"]
        if (
            not isinstance(shape, list)
            or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
            or len(shape) > 16
        ):
            raise FrameError(f"array: shape {_short(shape)}, expected a list of at most 16 sizes")
        if not isinstance(data, bytes):
            raise FrameError(f"array: data is {type(data).__name__}, expected bytes")
        if dtype.itemsize == 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise FrameError(f"array: {len(data)} bytes do not fill {dtype.str} {shape}")
        try:
            return np.ndarray(shape, dtype, data)
        except ValueError as error:  # no data and axes whose product has no address
            raise FrameError(f"array: shape {shape}: {error}") from None
    if b"__npgeneric__" in value:
        dtype, data = _dtype(value, _SCALAR), value[b"data"]
        if type(data) not in _SCALAR_DATA.get(dtype.kind, ()):
            raise FrameError(f"scalar: {type(data).__name__} as {dtype.str}")
        try:
            return dtype.type(data)
        except OverflowError as error:
            raise FrameError(f"scalar: {error}") from None
    return value


def _dtype(value: dict[Any, Any], keys: frozenset[bytes]) -> np.dtype[Any]:
    """The dtype of an encoded array or scalar that has exactly these keys."""
    if value.keys() != keys:
        raise FrameError(f"encoded array with keys {_short(sorted(map(str, value)))}, expected {sorted(keys)}")
    text = value[b"dtype"]
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise FrameError(f"dtype {_short(text)}: expected one of numbers, bool, text or time, such as '<f4' or '|u1'")
    try:
        return np.dtype(text)
    except (TypeError, ValueError) as error:
        raise FrameError(f"dtype {text!r}: {error}") from None


def _short(value: Any) -> str:
    """A value of unknown size for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
