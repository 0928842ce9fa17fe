"""RLDS: TFRecords and features.json made here byte by byte, imported, validated and read as clips.

`fixtures/tfds` was written by tensorflow-datasets 4.9.10 itself: two episodes of 4 and 5 steps, in which step t of
episode n has action 10 n + t, state 100 n + 10 t + 0..5, gripper n + t / 4, packed (n, t), touched (t, -t), phase
t mod 3, and pictures of the colour (10 n, 20 t, 200), for the wrist reversed.
"""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worldmodel.contracts import ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.formats import tfrecord
from worldmodel.data.formats.map_file import make_mapping
from worldmodel.data.formats.registry import open_source
from worldmodel.data.formats.resolve import resolve
from worldmodel.data.importing import import_dataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.validate import validate
from worldmodel.errors import ConfigError, DataError

MAP = {
    "embodiment": "widowx",
    "fps": 5,
    "instruction": {"field": "language_instruction"},
    "split": {"source": {"train": "train", "val": "heldout_episodes"}},
    "cameras": {"front": "observation/image", "wrist": "observation/wrist"},
    "proprio": ["observation/state", "observation/gripper"],
    "action": "action",
    "ignore": ["observation/touched"],
}


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, bit by bit, as RFC 3720 defines it; no code in common with the reader."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def block(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(features: dict[str, Any]) -> bytes:
    """A serialised tf.train.Example, packed as TensorFlow packs it."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, list):
            feature = block(1, b"".join(block(1, item) for item in value))
        elif value.dtype.kind == "f":
            feature = block(2, block(1, value.astype("<f4").tobytes()))
        else:
            feature = block(3, block(1, b"".join(varint(int(item)) for item in value.flat)))
        entries += block(1, block(1, name.encode()) + block(2, feature))
    return block(1, entries)


def picture(seed: int, form: str) -> bytes:
    rows, columns = np.mgrid[:16, :24]
    image = np.stack([rows * 8 + seed, columns * 5, np.full_like(rows, 90)], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form)
    return buffer.getvalue()


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    return {
        "pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
        "tensor": {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype, "encoding": "none"},
    }


def image(form: str) -> dict[str, Any]:
    shape = {"dimensions": ["16", "24", "3"]}
    return {"image": {"shape": shape, "dtype": "uint8", "encodingFormat": form}}


def group(features: dict[str, Any]) -> dict[str, Any]:
    return {"featuresDict": {"features": features}}


def sequence(feature: dict[str, Any], length: int = -1) -> dict[str, Any]:
    return {"sequence": {"feature": feature, "length": str(length)}}


OBSERVATION = {
    "image": image("jpeg"),
    "wrist": image("png"),
    "state": tensor("float32", 7),
    "gripper": tensor("float64"),
    "touched": sequence(tensor("int32"), 2),
    "depth": {"image": {"shape": {"dimensions": ["16", "24", "1"]}, "dtype": "float32"}},
}
STEP = {
    "observation": group(OBSERVATION),
    "action": tensor("float32", 4),
    "language_instruction": {"text": {}},
    "reward": tensor("float32"),
    **{name: tensor("bool") for name in ("is_first", "is_last", "is_terminal")},
}
FEATURES = group({"steps": sequence(group(STEP)), "episode_metadata": group({"file_path": {"text": {}}})})


def episode(number: int, steps: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    flags = {name: np.zeros(steps, np.int64) for name in ("is_first", "is_last", "is_terminal")}
    flags["is_first"][0] = flags["is_last"][-1] = 1
    return {
        "steps/observation/image": [picture(number + step, "JPEG") for step in range(steps)],
        "steps/observation/wrist": [picture(number + step, "PNG") for step in range(steps)],
        "steps/observation/state": rng.normal(size=(steps, 7)).astype(np.float32),
        "steps/observation/gripper": rng.uniform(size=steps).astype(np.float32),
        "steps/observation/touched/ragged_flat_values": rng.integers(-3, 3, (steps, 2)),
        "steps/observation/touched/ragged_row_lengths_0": np.full(steps, 2),
        "steps/action": rng.normal(size=(steps, 4)).astype(np.float32),
        "steps/language_instruction": [b"put the lid on the pot"] * steps,
        "steps/reward": np.zeros(steps, np.float32),
        **{f"steps/{name}": value for name, value in flags.items()},
        "episode_metadata/file_path": [b"/raw/episode.pkl"],
    }


def write(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A TFDS version folder: two files of training episodes, one of validation; `change` alters the second episode."""
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(FEATURES))
    number, splits = 0, []
    for split, counts in (("train", (2, 1)), ("val", (1,))):
        for shard, count in enumerate(counts):
            data = b""
            for _ in range(count):
                features = episode(number, 8 + number)
                if change and number == 1:
                    change(features)
                data, number = data + record(example(features)), number + 1
            (folder / f"pots-{split}.tfrecord-{shard:05d}-of-{len(counts):05d}").write_bytes(data)
        splits.append({"name": split, "shardLengths": [str(count) for count in counts]})
    (folder / "dataset_info.json").write_text(json.dumps({"name": "pots", "fileFormat": "tfrecord", "splits": splits}))
    return folder


def test_masked_crc_equals_the_reference() -> None:
    assert crc32c(b"123456789") == 0xE3069283, "the check value of CRC-32C"
    for data in (b"", b"123456789", bytes(range(256))):
        assert struct.pack("<I", tfrecord.masked_crc(data)) == masked(data)


def test_rlds_becomes_shards(tmp_path: Path) -> None:
    write(tmp_path / "pots" / "1.0.0")
    root = import_dataset(
        "rlds", tmp_path / "pots", tmp_path / "out", mapping=make_mapping(MAP, "map"), workers=1, progress=False
    )
    assert [fault for fault in validate(root) if fault.severity == "error"] == []
    reader = ShardReader(root)
    assert [entry.key for entry in reader.entries] == [
        "pots-train-000000-000000",
        "pots-train-000000-000001",
        "pots-train-000001-000000",
        "pots-val-000000-000000",
    ]
    assert [entry.length for entry in reader.entries] == [7, 8, 9, 10], "the step with is_last has no action"
    spec = ClipSpec(cameras=("front", "wrist"), embodiments=("widowx",), height=16, width=24, fps=5)
    clips = ClipDataset(reader, spec, split="train")
    collate([clips[i] for i in range(len(clips))])
    stored, source = reader.read(1), episode(1, 9)
    np.testing.assert_array_equal(stored.action, source["steps/action"][:8])
    assert stored.proprio is not None
    np.testing.assert_array_equal(stored.proprio[:, :7], source["steps/observation/state"][:8])
    np.testing.assert_array_equal(stored.proprio[:, 7], source["steps/observation/gripper"][:8])
    assert stored.meta["instruction"] == "put the lid on the pot"
    expected = np.asarray(Image.open(io.BytesIO(picture(1 + 3, "PNG"))))
    assert np.abs(stored.rgb["wrist"][3].astype(int) - expected).mean() < 3


def test_what_tfds_itself_wrote_becomes_shards(tmp_path: Path) -> None:
    observed = [f"observation/{name}" for name in ("state", "gripper", "packed", "touched")]
    mapping = MAP | {"split": {"heldout": 0.0}, "proprio": [*observed, "phase"], "ignore": []}
    fixture = Path(__file__).parent / "fixtures" / "tfds"
    root = import_dataset(
        "rlds", fixture, tmp_path / "out", mapping=make_mapping(mapping, "map"), workers=1, progress=False
    )
    assert [fault for fault in validate(root) if fault.severity == "error"] == []
    reader = ShardReader(root)
    spec = ClipSpec(cameras=("front", "wrist"), embodiments=("widowx",), height=8, width=8, fps=5)
    clips = ClipDataset(reader, spec, split="train")
    collate([clips[i] for i in range(len(clips))])
    assert sorted(entry.length for entry in reader.entries) == [3, 4]
    for i, entry in enumerate(reader.entries):
        episode, n = reader.read(i), entry.length - 3
        for t in range(entry.length):
            assert episode.action is not None and episode.proprio is not None
            assert episode.action[t].tolist() == [10 * n + t] * 4
            state = [100 * n + 10 * t + column for column in range(6)]
            assert episode.proprio[t].tolist() == [*state, n + t / 4, n, t, t, -t, t % 3]
            np.testing.assert_allclose(episode.rgb["front"][t, 4, 4], (10 * n, 20 * t, 200), atol=4)
            np.testing.assert_allclose(episode.rgb["wrist"][t, 4, 4], (200, 20 * t, 10 * n), atol=4)
        assert episode.meta["instruction"] == "put the lid on the pot"


def test_sequences_inside_steps_and_integers_are_read(tmp_path: Path) -> None:
    source = open_source("rlds", write(tmp_path / "pots"))
    fields = source.fields()
    assert fields.vectors["observation/touched"].shape == (2,) and "observation/depth" in fields.missing
    mapping = resolve(fields, make_mapping(MAP | {"proprio": ["observation/touched"], "ignore": ["*"]}, "map"))
    found = source.read(source.refs()[1], mapping).proprio
    np.testing.assert_array_equal(found, episode(1, 9)["steps/observation/touched/ragged_flat_values"][:8])


def without_wrist(features: dict[str, Any]) -> None:
    del features["steps/observation/wrist"]


def short_state(features: dict[str, Any]) -> None:
    features["steps/observation/state"] = features["steps/observation/state"][:-1]


def short_images(features: dict[str, Any]) -> None:
    features["steps/observation/image"].pop()


def no_picture(features: dict[str, Any]) -> None:
    features["steps/observation/image"][2] = b"GIF89a"


def text_for_numbers(features: dict[str, Any]) -> None:
    features["steps/action"] = [b"left"] * 9


FAULTS = [
    (without_wrist, r"pots-train\.tfrecord-00000-of-00002: offset \d+: steps/observation/wrist: declared in features"),
    (short_state, r"steps/observation/state: 56 values, 9 steps of shape \(7,\) need 63"),
    (short_images, r"steps/observation/image: 8 values, the episode has 9 steps"),
    (no_picture, r"steps/observation/image: step 2: not a readable JPEG or PNG"),
    (text_for_numbers, r"steps/action: bytes where features\.json declares float32"),
]


@pytest.mark.parametrize(("change", "words"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_each_fault_of_a_record_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    source = open_source("rlds", write(tmp_path / "pots", change))
    with pytest.raises(DataError, match=words):
        source.read(source.refs()[1], resolve(source.fields(), make_mapping(MAP, "map")))


def read_all(folder: Path) -> None:
    source = open_source("rlds", folder)
    mapping = resolve(source.fields(), make_mapping(MAP, "map"))
    for ref in source.refs():
        source.read(ref, mapping)


def test_damage_is_found_with_file_and_offset(tmp_path: Path) -> None:
    folder = write(tmp_path / "pots")
    path = folder / "pots-train.tfrecord-00000-of-00002"
    whole = path.read_bytes()
    first, second = tfrecord.record_offsets(path)

    def attempt(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(DataError) as error:
            read_all(folder)
        return str(error.value)

    place = f"{path}: offset {second}: "
    data_bit = bytearray(whole)
    data_bit[second + 40] ^= 1
    assert f"{place}the record's data do not match their CRC32C" in attempt(bytes(data_bit))
    length_bit = bytearray(whole)
    length_bit[second] ^= 1
    assert f"{place}the record's length does not match its CRC32C" in attempt(bytes(length_bit))
    assert f"{place}truncated, the record has" in attempt(whole[:-10])
    assert f"{place}truncated, 5 of 12 bytes" in attempt(whole[: second + 5])
    assert "1 records, dataset_info.json says 2" in attempt(whole[:second])
    assert "gunzip it" in attempt(b"\x1f\x8b" + whole[2:])
    assert f"{path}: offset 0: the record is no tf.train.Example" in attempt(record(b"\xff\xff") + whole[second:])
    path.unlink()
    with pytest.raises(DataError, match=r"split 'train': files \[0\] of 2 are missing"):
        open_source("rlds", folder).refs()


def test_folders_and_maps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "pots" / "1.0.0")
    write(tmp_path / "pots" / "1.1.0")
    with pytest.raises(DataError, match=r"2 folders with features\.json.*1\.1\.0; give one of them"):
        open_source("rlds", tmp_path / "pots")
    folder = tmp_path / "pots" / "1.0.0"
    mapping = make_mapping(MAP | {"cameras": {"front": "observation/image"}}, "map")
    with pytest.raises(
        ConfigError, match=r"observation/wrist: not used by the map(.|\n)*camera  observation/wrist  16x24"
    ):
        import_dataset("rlds", folder, tmp_path / "out", mapping=mapping, workers=1, progress=False)
    depth = make_mapping(MAP | {"proprio": ["observation/depth"]}, "map")
    with pytest.raises(
        ConfigError, match=r"'observation/depth' is declared but missing: float32 picture is not supported"
    ):
        import_dataset("rlds", folder, tmp_path / "out", mapping=depth, workers=1, progress=False)
    (folder / "features.json").write_text(json.dumps(group({"image": image("png")})))
    with pytest.raises(DataError, match="no sequence 'steps', so no RLDS"):
        open_source("rlds", folder)
    (folder / "features.json").write_text(json.dumps({"featuresDict": []}))
    with pytest.raises(DataError, match=r"features\.json: top level: featuresDict has no features"):
        open_source("rlds", folder)
