"""Fuzz targets of the importers: LeRobot, RLDS, ALOHA, robomimic and egocentric folders, spoilt and imported."""

import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import h5py
import lerobot_fakes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import test_formats_ego
import test_formats_hdf5
import test_formats_rlds
from fuzz_material import JSON_VALUES, NAMES, VALUES, arrays, npz, read_npz, spoilt_bytes, spoilt_tree
from hypothesis import strategies as st

from worldmodel.data.formats.map_file import make_mapping
from worldmodel.data.importing import import_dataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.validate import examine


def imported(format: str, source: Path, folder: Path, mapping: Any = None) -> None:
    """Import and read what comes of it."""
    out = folder / "out"
    import_dataset(format, source, out, mapping=mapping, workers=1, progress=False)
    examine(out)
    reader = ShardReader(out)
    for i in range(len(reader)):
        reader.read(i)


@functools.cache
def lerobot_files(version: str) -> dict[str, bytes]:
    """A small dataset of that version, file by file."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "data"
        (lerobot_fakes.write_v30 if version == "v3.0" else lerobot_fakes.write_v21)(root)
        modality = {"state": {"arm": {"start": 0, "end": 2}, "grip": {"start": 2, "end": 3}}, "action": {}}
        (root / "meta/modality.json").write_text(json.dumps(modality))
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def lerobot(data: st.DataObject, folder: Path) -> None:
    """info.json, modality.json, the tables, the values in parquet files and the videos of a LeRobot dataset."""
    files = dict(lerobot_files(data.draw(st.sampled_from(("v3.0", "v2.1")))))
    name = data.draw(st.sampled_from(sorted(files)))
    kind, raw = name.rpartition(".")[2], data.draw(st.integers(0, 3)) == 0
    if raw or kind == "mp4":
        files[name] = data.draw(spoilt_bytes(files[name]) | st.just(PLAYLIST))
    elif kind == "json":
        files[name] = json.dumps(data.draw(spoilt_tree(json.loads(files[name])))).encode()
    elif kind == "jsonl":
        rows = data.draw(spoilt_tree([json.loads(line) for line in files[name].splitlines()]))
        files[name] = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])).encode()
    else:
        files[name] = data.draw(spoilt_table(pq.read_table(io.BytesIO(files[name]))))
    if data.draw(st.integers(0, 3)) == 0:
        own = {"schema_version": 1, "mapping": data.draw(spoilt_tree({**LEROBOT_MAP}))}
        files["meta/worldmodel.json"] = json.dumps(own).encode()
    write_files(folder / "source", files)
    imported("lerobot", folder / "source", folder, make_mapping(LEROBOT_MAP, "map") if raw else None)


LEROBOT_MAP: dict[str, Any] = {
    "embodiment": "so100",
    "instruction": {"field": "task"},
    "cameras": {"top": {"field": lerobot_fakes.CAMERA}},
    "proprio": [{"field": "observation.state"}],
    "action": [{"field": "action"}],
    "ignore": ["*"],
}
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n../outside/secret.mp4\n#EXT-X-ENDLIST\n"


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@st.composite
def spoilt_table(draw: st.DrawFn, sound: pa.Table) -> bytes:
    """A parquet file with a column of other values, lost, renamed, or rows that are missing or repeated."""
    for _ in range(draw(st.integers(1, 2))):
        column = draw(st.sampled_from(sound.column_names))
        number, rows = sound.column_names.index(column), sound.num_rows
        match draw(st.sampled_from(("values", "values", "values", "lose", "rename", "slice", "twice"))):
            case "lose" if len(sound.column_names) > 1:
                sound = sound.drop_columns([column])
            case "rename":
                names = [draw(st.sampled_from(NAMES[6:])) if n == column else n for n in sound.column_names]
                if len(set(names)) == len(names) and not any("\ud800" in n for n in names):
                    sound = sound.rename_columns(names)
            case "slice":
                sound = sound.slice(0, draw(st.integers(0, rows)))
            case "twice":
                sound = pa.concat_tables([sound, sound])
            case _:
                values = sound[column].to_pylist()
                for _ in range(draw(st.integers(1, 2)) if values else 0):
                    values[draw(st.integers(0, rows - 1))] = draw(VALUES)
                if draw(st.booleans()):
                    values = [draw(VALUES)] * rows
                try:
                    spoilt = sound.set_column(number, column, pa.array(values))
                    pq.write_table(spoilt, io.BytesIO())
                    sound = spoilt
                except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                    continue  # arrow itself cannot store these
    buffer = io.BytesIO()
    pq.write_table(sound, buffer)
    return buffer.getvalue()


@functools.cache
def rlds_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        root = test_formats_rlds.write(Path(name) / "data")
        return {path.name: path.read_bytes() for path in root.iterdir()}


def rlds(data: st.DataObject, folder: Path) -> None:
    """features.json, dataset_info.json, the framing of TFRecords, and the messages inside a sound frame."""
    files = dict(rlds_files())
    name = data.draw(st.sampled_from(sorted(files)))
    if name.endswith(".json") and data.draw(st.integers(0, 3)):
        files[name] = json.dumps(data.draw(spoilt_tree(json.loads(files[name])))).encode()
    elif name.endswith(".json") or data.draw(st.booleans()):
        files[name] = data.draw(spoilt_bytes(files[name]))
    else:
        features = test_formats_rlds.episode(3, 5)
        feature = data.draw(st.sampled_from(sorted(features)))
        odd: Any = [b"", b"\xff\xfe"], np.array([]), np.array([1 << 62, -(1 << 62)]), np.full(5, np.nan, np.float32)
        features[feature] = data.draw(st.sampled_from(odd) | st.lists(st.binary(max_size=9), max_size=6))
        message = test_formats_rlds.example(features)
        if data.draw(st.booleans()):
            message = data.draw(spoilt_bytes(message))
        files["pots-val.tfrecord-00000-of-00001"] = test_formats_rlds.record(message)
    write_files(folder / "source", files)
    imported("rlds", folder / "source", folder, make_mapping(test_formats_rlds.MAP, "map"))


def data_group(file: Any) -> Any:
    """The group of demonstrations, or the file where that is lost or a link to itself."""
    try:
        return file.get("data") or file
    except RuntimeError:
        return file


def hdf5(data: st.DataObject, folder: Path) -> None:
    """Datasets, attributes, links and bytes of ALOHA and robomimic files."""
    (folder / "source").mkdir()
    kind = data.draw(st.sampled_from(("aloha", "robomimic")))
    path = folder / "source" / "episode_0.hdf5"
    if kind == "aloha":
        test_formats_hdf5.write_aloha(path, 0, steps=4, compressed=data.draw(st.booleans()))
    else:
        test_formats_hdf5.write_robomimic(path, demos=2)
    mapping = make_mapping(test_formats_hdf5.ALOHA, "map") if kind == "aloha" else None
    if data.draw(st.integers(0, 3)) == 0:
        path.write_bytes(data.draw(spoilt_bytes(path.read_bytes())))
        return imported(kind, folder / "source", folder, mapping)
    with h5py.File(path, "a") as file:
        found: list[str] = []
        file.visit(found.append)
        for _ in range(data.draw(st.integers(1, 2))):
            if not found:
                break  # the only group has been replaced
            name = data.draw(st.sampled_from(sorted(found)))
            item: Any = file[name]
            if data.draw(st.booleans()):
                holder: Any = data.draw(st.sampled_from((file, item, data_group(file))))
                attributes = holder.attrs
                attribute = data.draw(st.sampled_from((*attributes, "sim", "num_samples", "env_args", "task")))
                attributes[attribute] = data.draw(ATTRIBUTES)
                continue
            like = item[()] if isinstance(item, h5py.Dataset) else None
            del file[name]
            found = [other for other in found if not f"{other}/".startswith(f"{name}/")]
            spoil_dataset(data, file, name, like)
    return imported(kind, folder / "source", folder, mapping)


ATTRIBUTES = st.sampled_from((0, -1, 2.5, np.nan, "text", b"\xff", "", "[1]", "{", '{"env_kwargs": 1}', "[" * 3000)) | (
    JSON_VALUES.map(json.dumps).filter(lambda text: len(text) < 2000)
)


def spoil_dataset(data: st.DataObject, file: Any, name: str, like: Any) -> None:
    """Put something else where the dataset or group `name` was."""
    match data.draw(
        st.sampled_from(("array", "array", "array", "link", "soft", "external", "virtual", "empty", "text"))
    ):
        case "link":
            file[name] = h5py.ExternalLink("../../outside/secret.hdf5", "/action")
        case "soft":
            file[name] = h5py.SoftLink(data.draw(st.sampled_from((f"/{name}", "/nothing", "/", "/data", "/action"))))
        case "external":
            file.create_dataset(name, (4, 14), "<f4", external=[("../../outside/secret.bin", 0, 224)])
        case "virtual":
            layout = h5py.VirtualLayout((4, 14), "<f4")
            layout[:] = h5py.VirtualSource("../../outside/secret.hdf5", "action", (4, 14))
            file.create_virtual_dataset(name, layout)
        case "empty":
            shape = data.draw(st.sampled_from(((1 << 36,), (1 << 20, 1 << 20, 3), (4, 1 << 40), (0,), ())))
            file.create_dataset(name, shape, data.draw(st.sampled_from(("<f4", "u1"))))
        case "text":
            file[name] = data.draw(st.sampled_from(("x", b"\xff", [b"a", b"b"], "demo_" + "1" * 5000)))
        case _:
            value = data.draw(arrays(like if isinstance(like, np.ndarray) else None))
            file[name] = np.array([b"x"]) if value.dtype.kind in "UMV" else value


@functools.cache
def ego_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        root = test_formats_ego.write(Path(name) / "data")
        return {path.name: path.read_bytes() for path in root.iterdir()}


def ego(data: st.DataObject, folder: Path) -> None:
    """Annotation, tracks and video of an egocentric folder."""
    files = dict(ego_files())
    name = data.draw(st.sampled_from(sorted(files)))
    if name.endswith(".json") and data.draw(st.integers(0, 3)):
        files[name] = json.dumps(data.draw(spoilt_tree(json.loads(files[name])))).encode()
    elif name.endswith(".npz"):
        files[name] = data.draw(npz(read_npz(files[name])))
    else:
        files[name] = data.draw(spoilt_bytes(files[name]) | st.just(PLAYLIST))
    if data.draw(st.integers(0, 5)) == 0:
        track = {name: value.tolist() for name, value in read_npz(ego_files()["camera.npz"]).items()}
        del files["camera.npz"]
        files["camera.json"] = json.dumps(data.draw(spoilt_tree(track))).encode()
    write_files(folder / "source" / "take_1", files)
    imported("ego", folder / "source", folder)
