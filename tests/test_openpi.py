"""The wire format: openpi's bytes, and nothing that a frame says is believed."""

import importlib
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from export.openpi import CONTAINERS, FrameError, pack, unpack

ARRAY = b"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data\xc4%c%s\xc4\x05dtype%s\xc4\x05shape%s"
SCALAR = b"\x83\xc4\x0d__npgeneric__\xc3\xc4\x04data%s\xc4\x05dtype%s"
# msgpack written out by hand from its specification and openpi's two maps.
FRAMES: dict[str, tuple[Any, bytes]] = {
    "int16": (np.array([1, -2], "<i2"), ARRAY % (4, b"\x01\x00\xfe\xff", b"\xa3<i2", b"\x91\x02")),
    "uint8 rows": (np.array([[7], [8]], np.uint8), ARRAY % (2, b"\x07\x08", b"\xa3|u1", b"\x92\x02\x01")),
    "bool": (np.array([True, False]), ARRAY % (2, b"\x01\x00", b"\xa3|b1", b"\x91\x02")),
    "big endian": (np.array([1.0], ">f4"), ARRAY % (4, b"\x3f\x80\x00\x00", b"\xa3>f4", b"\x91\x01")),
    "no axes": (np.array(0, "<u4"), ARRAY % (4, b"\x00" * 4, b"\xa3<u4", b"\x90")),
    "empty": (np.zeros((0, 5), "<f8"), ARRAY % (0, b"", b"\xa3<f8", b"\x92\x00\x05")),
    "strings": (np.array(["ab"]), ARRAY % (8, b"a\0\0\0b\0\0\0", b"\xa3<U2", b"\x91\x01")),
    "columns": (np.array([[1, 2], [3, 4]], "<i1").T, ARRAY % (4, b"\1\3\2\4", b"\xa3|i1", b"\x92\x02\x02")),
    "float scalar": (np.float32(0.5), SCALAR % (b"\xcb\x3f\xe0\0\0\0\0\0\0", b"\xa3<f4")),
    "int scalar": (np.int64(-1), SCALAR % (b"\xff", b"\xa3<i8")),
    "bool scalar": (np.bool_(True), SCALAR % (b"\xc3", b"\xa3|b1")),
    "half scalar": (np.float16(0.5), SCALAR % (b"\xcb\x3f\xe0\0\0\0\0\0\0", b"\xa3<f2")),
    "nested": (
        {"a": {"b": [1, None, "c"]}, "d": 0.5},
        b"\x82\xa1a\x81\xa1b\x93\x01\xc0\xa1c\xa1d\xcb\x3f\xe0" + bytes(6),
    ),
    "bytes": ({"raw": b"\x00"}, b"\x81\xa3raw\xc4\x01\x00"),
}


def same(a: Any, b: Any) -> bool:
    """Equal in value, type, dtype and shape, not-a-number included."""
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_openpis_bytes(name: str) -> None:
    value, frame = FRAMES[name]
    assert pack(value) == frame
    assert same(value, unpack(frame))


def test_numpys_own_str_float_and_bytes_travel_as_pythons() -> None:
    for value in (np.str_("é"), np.float64(0.5), np.bytes_(b"x")):
        assert pack(value) == msgpack.packb(value.item())


DTYPES = arrays.scalar_dtypes().filter(lambda d: d.kind in "biufSU" and d.itemsize <= 64)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | arrays.arrays(DTYPES, arrays.array_shapes(min_dims=0, min_side=0))
    | st.sampled_from([np.float16(0.1), np.uint64((1 << 64) - 1), np.float32("nan"), np.bool_(False), np.int8(-3)])
)
# The marks that openpi itself knows its arrays by cannot be keys of anything else.
KEYS = st.text() | st.binary().filter(lambda key: key not in (b"__ndarray__", b"__npgeneric__"))
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=4))


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    database=None,
    derandomize=True,
)
@given(VALUES)
def test_what_is_packed_comes_back_and_openpi_packs_the_same(value: Any) -> None:
    frame = pack(value)
    assert same(value, unpack(frame))
    try:
        openpi = importlib.import_module("openpi_client.msgpack_numpy")
    except ImportError:
        return
    assert openpi.packb(value) == frame
    assert same(value, openpi.unpackb(frame))


@pytest.mark.parametrize(
    "value",
    [
        np.array([object()]),
        np.array([1j]),
        np.zeros(1, "<f4,<i4"),
        np.complex64(1),
        {1, 2},
        {"x": object()},
        1 << 70,
    ],
    ids=["objects", "complex array", "records", "complex number", "set", "object", "long integer"],
)
def test_what_openpi_refuses_is_not_packed(value: Any) -> None:
    with pytest.raises(FrameError):
        pack(value)


def array(data: Any, dtype: Any, shape: Any, **extra: Any) -> bytes:
    fields = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    packed = msgpack.packb(fields | {key.encode(): value for key, value in extra.items()})
    assert packed is not None
    return packed


def scalar(data: Any, dtype: Any) -> bytes:
    packed = msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})
    assert packed is not None
    return packed


HOSTILE: dict[str, tuple[bytes, str]] = {
    "object": (array(b"\0" * 8, "|O", [1]), "dtype '|O'"),
    "object with size": (array(b"\0" * 8, "|O8", [1]), "dtype '|O8'"),
    "record": (array(b"\0" * 8, "<f4,<i4", [1]), "dtype '<f4,<i4'"),
    "record as list": (array(b"\0" * 8, [["a", "|O"]], [1]), "dtype"),
    "void": (array(b"\0" * 4, "|V4", [1]), "dtype"),
    "complex": (array(b"\0" * 8, "<c8", [1]), "dtype"),
    "shape in dtype": (array(b"\0" * 8, "(2,)<f4", [1]), "dtype"),
    "name of a dtype": (array(b"\0" * 4, "float32", [1]), "dtype"),
    "huge text dtype": (array(b"\0" * 4, "<U999999999", [1]), "do not fill|dtype"),
    "too few bytes": (array(b"\0" * 3, "<f4", [1]), "3 bytes do not fill <f4"),
    "too many bytes": (array(b"\0" * 9, "<f4", [2]), "9 bytes do not fill <f4"),
    "negative size": (array(b"\0" * 4, "<f4", [-1]), r"shape \[-1\]"),
    "size no int": (array(b"\0" * 4, "<f4", [1.0]), "shape"),
    "size is bool": (array(b"\0" * 4, "<f4", [True]), "shape"),
    "shape no list": (array(b"\0" * 4, "<f4", 1), "shape 1"),
    "many axes": (array(b"\0" * 4, "<f4", [1] * 65), "shape"),
    "product overflows": (array(b"", "<f4", [0, *[(1 << 31) - 1] * 5]), "shape"),
    "product overflows to zero": (array(b"", "<f4", [1 << 16] * 4), "do not fill"),
    "huge size": (array(b"", "<f4", [1 << 62]), "shape"),
    "no bytes per item": (array(b"", "<U0", [1 << 30]), "do not fill"),
    "data is text": (array("abcd", "<f4", [1]), "data is str"),
    "data is a list": (array([1], "<f4", [1]), "data is list"),
    "extra key": (array(b"\0" * 4, "<f4", [1], extra=1), "keys"),
    "missing key": (b"\x81\xc4\x0b__ndarray__\xc3", "keys"),
    "scalar out of range": (scalar(300, "|i1"), "scalar"),
    "scalar parsed from text": (scalar("1.5", "<f4"), "scalar: str as <f4"),
    "scalar object": (scalar("x", "|O"), "dtype"),
    "scalar is a map": (scalar({}, "<f4"), "scalar: dict"),
    "deep": (b"\x91" * 5000 + b"\x01", "StackError"),
    "wide": (b"\xdc\xff\xff" + b"\x90" * 0xFFFF, f"more than {CONTAINERS}"),
    "lying length": (b"\xdd\xff\xff\xff\xff\x01", "exceeds max_array_len"),
    "lying map": (b"\xdf\xff\xff\xff\xff\x01", "exceeds max_map_len"),
    "lying bytes": (b"\xc6\xff\xff\xff\xff\x01", "exceeds max_bin_len|incomplete"),
    "key is a list": (b"\x81\x90\x01", "map key"),
    "key is a number": (b"\x81\x01\x01", "map key"),
    "wrong UTF-8": (b"\xa2\xff\xfe", "utf-8"),
    "unused byte": (b"\xc1", "FormatError"),
    "nothing": (b"", "incomplete"),
    "trailing": (b"\x01\x01", "extra data"),
    "truncated": (FRAMES["int16"][1][:-3], "incomplete"),
    "pickle": (b"\x80\x04\x95\x0b\0\0\0\0\0\0\0\x8c\x02os\x94\x8c\x06system\x94\x93\x94.", "extra data"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_frame_is_refused(case: str) -> None:
    frame, message = HOSTILE[case]
    with pytest.raises(FrameError, match=message):
        unpack(frame)


def test_arrays_are_read_only_views_of_the_frame() -> None:
    image = unpack(pack({"rgb": np.zeros((8, 8, 3), np.uint8)}))["rgb"]
    assert not image.flags.writeable and not image.flags.owndata


def test_the_real_client_package_reads_its_own_frames_as_we_do() -> None:
    openpi = pytest.importorskip("openpi_client.msgpack_numpy")
    for value, frame in FRAMES.values():
        assert openpi.packb(value) == frame
        assert same(value, openpi.unpackb(frame))
