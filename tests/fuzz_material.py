"""Sound data to spoil and ways to spoil it: strategies for the targets of `fuzz_targets`."""

import copy
import functools
import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
from hypothesis import strategies as st
from synthetic import made_up_episode

from worldmodel.data.schema import encode
from worldmodel.data.shard_writer import write_index

KEY, LENGTH, PIXELS = "toy-000", 4, 16
NAMES = (
    "../outside/x",
    "/tmp/x",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "nul\0",
    "line\nfeed",
    "ä\u2028",
    "half \ud800",
    "x" * 300,
    "${oc.env:HOME}",
    "???",
    "sawyer",
    "panda",
    "front",
    "train",
    "task",
)
NUMBERS = (0, 1, -1, 2, 3, 4, 5, 255, 1 << 31, 1 << 40, 1 << 63, 1 << 200, -(1 << 63), 10**12)
FLOATS = (0.5, -0.0, 1e-320, 1e6, 1e30, 3e38, 1e39, 1e300, float("inf"), float("-inf"), float("nan"))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


SCALARS = st.sampled_from((None, True, False, *NUMBERS, *FLOATS, *NAMES))
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.sampled_from(NAMES), SCALARS, max_size=2)
JSON_VALUES = VALUES | st.sampled_from(([[]], [{}], {"a": {}}, deep(30), deep(200)))
DTYPES = ("<f4", "<f8", "<f2", "<i8", "<u8", "u1", "?", "<c8", "<U3", "S2", "<M8[s]", "V4", ">f4", "<f4,<i4", "<U0")


@st.composite
def spoilt_tree(draw: st.DrawFn, value: Any) -> Any:
    """`value`, plain JSON, with a few of its parts replaced, removed, wrapped or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = None
        key: Any = None
        node = value
        for _ in range(draw(st.integers(1, 6))):
            keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
            if not keys:
                break
            holder, key = node, draw(st.sampled_from(keys))
            node = holder[key]
        if holder is None:
            return draw(JSON_VALUES)
        match draw(st.sampled_from(("replace", "replace", "replace", "remove", "wrap", "double", "add"))):
            case "remove":
                del holder[key]
            case "wrap":
                holder[key] = [node]
            case "double" if isinstance(node, list):
                holder[key] = node + node
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(NAMES))] = copy.deepcopy(draw(JSON_VALUES))
            case _:
                holder[key] = copy.deepcopy(draw(JSON_VALUES))
    return value


@st.composite
def spoilt_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with bytes flipped, cut off, cut out or put in."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(out) - 1, 0)))
        match draw(st.sampled_from(("flip", "flip", "flip", "cut", "out", "in", "huge", "deep"))):
            case "flip" if out:
                out[place] ^= draw(st.integers(1, 255))
            case "cut":
                del out[place:]
            case "out":
                del out[place : place + draw(st.integers(1, 40))]
            case "deep":
                out[place:place] = b"[" * 5000
            case "huge":
                out[place : place + 4] = b"\xff\xff\xff\x7f"
            case _:
                out[place:place] = draw(st.binary(max_size=12))
    return bytes(out)


@st.composite
def arrays(draw: st.DrawFn, like: np.ndarray | None = None) -> np.ndarray:
    """An array of any type and shape, or a sound one with a value, its type or its axes changed."""
    if like is not None and draw(st.booleans()):
        out = np.array(like)
        if out.size and out.dtype.kind == "f":
            wide = out.astype(draw(st.sampled_from((np.float32, np.float64))))
            with np.errstate(over="ignore"):
                wide.flat[draw(st.integers(0, out.size - 1))] = draw(st.sampled_from(FLOATS))
            out = wide
        change = draw(st.sampled_from(("none", "cut", "flat", "turned", "scalar", "more", "twice")))
        changed: dict[str, Any] = {
            "cut": lambda: out[:-1],
            "flat": lambda: out.ravel(),
            "turned": lambda: out.T,
            "scalar": lambda: out.ravel()[:1].reshape(()) if out.size else out,
            "more": lambda: out[..., None],
            "twice": lambda: np.concatenate([out, out]) if out.ndim else out,
        }
        return np.array(changed.get(change, lambda: out)())
    shape = tuple(draw(st.lists(st.sampled_from((0, 1, 2, 3, LENGTH, 6)), max_size=4)))
    return np.zeros(shape, draw(st.sampled_from(DTYPES)))


@st.composite
def npy(draw: st.DrawFn, like: np.ndarray | None = None) -> bytes:
    """A `.npy` file, perhaps with a head that lies."""
    buffer = io.BytesIO()
    np.save(buffer, draw(arrays(like)), allow_pickle=False)
    if draw(st.booleans()):
        return buffer.getvalue()
    shape = draw(st.lists(st.sampled_from((0, 1, -1, LENGTH, 1 << 20, 1 << 40, 1 << 62, 1 << 70)), max_size=4))
    descr = draw(st.sampled_from((*DTYPES, "|O", "nonsense", "(" * 400)))
    head = repr({"descr": descr, "fortran_order": draw(st.booleans()), "shape": tuple(shape)}).encode() + b"\n"
    if draw(st.booleans()):
        head = draw(spoilt_bytes(head))
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + draw(st.binary(max_size=16))


@st.composite
def npz(draw: st.DrawFn, like: dict[str, np.ndarray]) -> bytes:
    """A `.npz` file of arrays some of which are changed, lost or many times larger than the file."""
    kept = {name: value for name, value in like.items() if draw(st.integers(0, 9))}
    for name in like:
        if not draw(st.integers(0, 2)):
            kept[name] = draw(arrays(like[name]))
    if not draw(st.integers(0, 9)):
        kept[draw(st.sampled_from(("extra", "front.intrinsics", "x.camera_to_base", "names")))] = draw(arrays())
    buffer = io.BytesIO()
    (np.savez_compressed if draw(st.booleans()) else np.savez)(buffer, allow_pickle=False, **kept)
    return buffer.getvalue() if draw(st.booleans()) else draw(spoilt_bytes(buffer.getvalue()))


def read_npz(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data)) as archive:
        return dict(archive)


def video(pictures: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=20, width=PIXELS, height=PIXELS)
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@functools.cache
def members() -> dict[str, bytes]:
    """The members of a sound sample that has every sense, cameras as JPEG pictures, as a video and as an array."""
    rng = np.random.default_rng(0)
    episode = made_up_episode(KEY, "toy", "lift", rng, length=LENGTH, pixels=PIXELS)
    pose, matrix = np.eye(4, dtype=np.float32), np.eye(3, dtype=np.float32)
    matrix[:2, :2] *= 20
    for camera in ("front", "side", "top"):
        episode.camera_to_base[camera] = np.repeat(pose[None], LENGTH, 0)
        episode.intrinsics[camera] = np.repeat(matrix[None], LENGTH, 0)
    episode.points = rng.uniform(0.1, 1, (LENGTH, 2, 3)).astype(np.float32)
    episode.visible = np.zeros((LENGTH, 2), bool)
    episode.wrench = rng.normal(size=(LENGTH, 1, 6)).astype(np.float32)
    episode.taxels = rng.uniform(size=(LENGTH, 1, 1, 2, 2)).astype(np.float32)
    episode.times = {name: np.arange(LENGTH) / 20 for name in ("action", "rgb.front")}
    episode.meta |= {"absent": [], "cameras": ["front", "side", "top"], "point_names": ["a", "b"]}
    episode.meta |= {"sensor_names": ["wrist"], "taxel_sensors": ["wrist"], "taxel_channels": ["z"]}
    episode.meta |= {"elements": ["floor", "a"], "variant": 0}
    episode.masks = {camera: episode.rgb["front"][..., 0] % 2 for camera in ("front", "side", "top")}
    array = io.BytesIO()
    np.save(array, np.ascontiguousarray(episode.rgb["front"].transpose(0, 3, 1, 2)), allow_pickle=False)
    encoded = encode(episode)
    return encoded | {"rgb.side.mp4": video(episode.rgb["front"]), "rgb.top.npy": array.getvalue()}


def header(name: bytes, size: int, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """The 512 bytes before a tar member, with any size and kind."""
    octal = f"{size:011o}\0".encode()
    binary = (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    fields = [
        name[:100].ljust(100, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        octal if 0 <= size < 8**11 else binary,
    ]
    fields += [b"00000000000\0", b" " * 8, kind, link[:100].ljust(100, b"\0"), b"ustar\0" + b"00"]
    head = b"".join(fields).ljust(512, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def section(files: dict[str, bytes], key: str = KEY) -> bytes:
    parts = [header(f"{key}.{name}".encode(), len(data)) + padded(data) for name, data in files.items()]
    return b"".join(parts)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 512)


def place(root: Path, body: bytes, meta: dict[str, Any], change: Any = None) -> Path:
    """A dataset of one sample whose index fits whatever `body` is; `change` alters the index's entry."""
    root.mkdir()
    data = body + b"\0" * 1024
    (root / "shard-000000.tar").write_bytes(data)
    entry = {"key": KEY, "offset": 0, "size": len(body), "crc32": zlib.crc32(body), "initial_state": "0"}
    entry |= {name: meta[name] for name in ("episode_id", "length", "task", "split", "embodiment", "success")}
    digest = hashlib.sha256(data).hexdigest()
    shard = {"name": "shard-000000.tar", "samples": 1, "bytes": len(data), "sha256": digest, "entries": [entry]}
    write_index(root, [shard], [], {})
    return root
