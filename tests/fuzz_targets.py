"""What the fuzzer spoils and reads: each target draws a dataset that is wrong somewhere and reads it as users do.

A target lets errors through: which of them may come out is the business of `fuzz_shards`.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fuzz_formats import ego, ego_files, hdf5, imported, lerobot, lerobot_files, rlds, rlds_files, write_files
from fuzz_material import (
    KEY,
    NAMES,
    header,
    members,
    npy,
    npz,
    padded,
    place,
    read_npz,
    section,
    spoilt_bytes,
    spoilt_tree,
)
from hypothesis import strategies as st

from worldmodel.contracts import ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.formats.lerobot_export import export_lerobot
from worldmodel.data.formats.map_file import load_mapping, to_yaml
from worldmodel.data.overview import series, table
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, write_statistics
from worldmodel.data.validate import examine
from worldmodel.errors import WorldModelError

SPEC = ClipSpec(
    cameras=("front", "side", "top"),
    sensors=("wrist",),
    embodiments=("toy",),
    height=16,
    width=16,
    history=2,
    stride=1,
    chunk=2,
    taxels=(1, 2, 2),
    proprio=4,
    action=4,
)


class BlindError(AssertionError):
    """A check of `validate` broke down instead of finding a fault."""


def each(*steps: Callable[[], object]) -> None:
    """Run all steps, whatever of our own errors the others end in; the last such error comes out."""
    last: WorldModelError | None = None
    for step in steps:
        try:
            step()
        except WorldModelError as error:
            str(error).encode("utf-8", "replace")
            last = error
    if last is not None:
        raise last


def read_everything(root: Path) -> None:
    """Read, window, validate, list, measure and export a dataset."""

    def look() -> None:
        for fault in examine(root).faults:
            if re.search(r" failed: \w+(Error|Warning|Exception)", fault.message) and "DataError" not in fault.message:
                raise BlindError(fault.message)

    def clips(on_error: str, masks: bool = False) -> None:
        reader = ShardReader(root, cache_bytes=1 << 20, check_sizes=False)
        dataset = ClipDataset(reader, SPEC, split="train", on_error=on_error, masks=masks)
        collate([dataset[i] for i in {0, 1, len(dataset) - 1}])

    def read(images: bool) -> None:
        reader = ShardReader(root)
        for i in range(len(reader)):
            reader.read(i, images=images)

    each(
        lambda: read(True),
        lambda: read(False),
        look,
        lambda: clips("raise"),
        lambda: clips("skip"),
        lambda: clips("raise", masks=True),
        lambda: table(root),
        lambda: series(ShardReader(root)),
        lambda: write_statistics(root),
        lambda: export_lerobot(root, root.parent / "exported", lossless=True, progress=False),
    )


def sample_members(data: st.DataObject, folder: Path) -> None:
    """Members of a sample whose checksums are right: metadata, arrays, pictures and video."""
    files = dict(members())
    meta = json.loads(files["meta.json"])
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(files)))
        if data.draw(st.integers(0, 9)) == 0:
            del files[name]
        elif name == "meta.json":
            if data.draw(st.booleans()):
                files[name] = json.dumps(data.draw(spoilt_tree(meta))).encode()
            else:
                files[name] = data.draw(spoilt_bytes(files[name]))
        elif name.endswith(".npz"):
            files[name] = data.draw(npz(read_npz(members()[name])))
        elif name.endswith(".npy"):
            files[name] = data.draw(npy(np.load(io.BytesIO(members()[name]))))
        else:
            files[name] = data.draw(spoilt_bytes(files[name]))
        if "meta.json" not in files:
            break
    read_everything(place(folder / "data", section(files), meta))


def tar_structure(data: st.DataObject, folder: Path) -> None:
    """Headers of any name, kind and size between the members of a sound sample."""
    files, meta = dict(members()), json.loads(members()["meta.json"])
    names = [name.encode("utf-8", "replace") for name in NAMES] + [f"{KEY}.{name}".encode() for name in files]
    sizes = (0, 1, 511, 512, 513, -1, -512, -1024, -(1 << 40), 1 << 33, 1 << 62)
    body = section(files)
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from([bytes([c]) for c in b"0123456717xgLKSVX\0"]))
        content = data.draw(st.binary(max_size=40) | st.sampled_from(PAX))
        size = data.draw(st.sampled_from((len(content), *sizes)))
        name, link = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
        repeat = data.draw(st.sampled_from((1, 1, 1, 2, 400)))
        extra = (header(name, size, kind, link) + padded(content)) * repeat
        where = 512 * data.draw(st.integers(0, len(body) // 512))
        body = body[:where] + extra + body[where:]
    if data.draw(st.booleans()):
        body = data.draw(spoilt_bytes(body)) or b"\0"
    read_everything(place(folder / "data", body, meta))


PAX = (
    b"25 path=../../outside/x\n",
    b"13 size=-512\n",
    b"20 size=99999999999\n",
    b"13 mtime=nan\n",
    b"31 GNU.sparse.size=99999999999\n",
    b"24 GNU.sparse.map=0,1,x\n",
    b"22 GNU.sparse.major=1\n",
    b"21 hdrcharset=BINARY\n",
    b"99999 path=x\n",
    b"-5 path=x\n",
    b"0 path=x\n",
    b"9" * 5000 + b" a=b\n",
)


def index(data: st.DataObject, folder: Path) -> None:
    """index.json and stats.json of a sound shard."""
    root = place(folder / "data", section(members()), json.loads(members()["meta.json"]))
    write_statistics(root)
    name = data.draw(st.sampled_from(("index.json", "index.json", "stats.json")))
    if data.draw(st.integers(0, 3)):
        text = json.dumps(data.draw(spoilt_tree(json.loads((root / name).read_text())))).encode()
    else:
        text = data.draw(spoilt_bytes((root / name).read_bytes()))
    (root / name).write_bytes(text)
    each(lambda: load_statistics(root), lambda: read_everything(root))


def maps(data: st.DataObject, folder: Path) -> None:
    """The YAML of a map, over a sound source."""
    text = data.draw(
        spoilt_tree(FULL_MAP).map(
            lambda value: yaml.safe_dump(value) if data.draw(st.booleans()) else json.dumps(value)
        )
        | spoilt_bytes(to_yaml(FULL_MAP).encode()).map(lambda raw: raw.decode("utf-8", "replace"))
        | st.sampled_from(ODD_YAML)
    )
    path = folder / "map.yaml"
    path.write_text(text, "utf-8", "replace")
    write_files(folder / "source", ego_files())
    imported("ego", folder / "source", folder, load_mapping(path))


FULL_MAP: dict[str, Any] = {
    "embodiment": "human",
    "fps": 15,
    "task": None,
    "instruction": {"field": "instruction"},
    "success": {"value": True},
    "split": {"heldout": 0.1},
    "cameras": {"ego": {"field": "ego", "size": [24, 32], "color": "bgr"}},
    "camera_to_base": {"ego": {"field": "camera_to_world", "maps": "camera_to_base", "axes": "opencv"}},
    "intrinsics": {"ego": {"matrix": [[50.0, 0, 32], [0, 50.0, 24], [0, 0, 1]]}},
    "points": {"field": "points", "visible": "visible", "frame": "base", "names": ["a", "b", "c"]},
    "tactile": {"pad": {"field": "visible", "shape": [1, 1, 3]}},
    "proprio": [{"field": "points", "slice": [0, 3], "names": ["x", "y", "z"]}],
    "ignore": ["x*"],
    "licence": "MIT",
}
ODD_YAML = (
    "embodiment: &a [*a]",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nembodiment: *c",
    "embodiment: !!timestamp x",
    "embodiment: !!python/object/apply:os.system [ls]",
    "fps: 2001-99-99",
    "fps: 0x" + "f" * 9000,
    "fps: 0b_",
    "{" * 2000,
    "- " * 2000,
    "? [a]\n: b",
    "embodiment: ${oc.env:HOME}",
    "embodiment: ${",
    "1: 2\n~: 3",
    "\0",
    "--- a\n--- b",
)


def prepare() -> None:
    """Makes the sound data that is kept, which takes files that an example may not write."""
    for make in (members, ego_files, rlds_files, lambda: lerobot_files("v2.1"), lambda: lerobot_files("v3.0")):
        make()


TARGETS: dict[str, Callable[[st.DataObject, Path], None]] = {
    target.__name__: target for target in (sample_members, tar_structure, index, lerobot, rlds, hdf5, ego, maps)
}
