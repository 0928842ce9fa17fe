"""Damaged data: each fault is a `DataError` that names file, key and field, and `validate` lists it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from worldmodel.data import schema
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import (
    STATISTICS,
    field_statistics,
    load_statistics,
    statistics_hash,
    write_statistics,
)
from worldmodel.data.validate import validate
from worldmodel.errors import DataError

KEY = "metaworld-drawer-close-v3-train-000000"


@pytest.fixture
def copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dataset, tmp_path / "copy")


def rewrite(root: Path, change: Callable[[schema.Episode], None]) -> None:
    """Write the first shard again with its first episode changed, and an index that fits."""
    reader = ShardReader(root)
    first = reader.index["shards"][0]
    samples = [(entry.key, reader.read(i)) for i, entry in enumerate(reader.entries) if entry.shard == first["name"]]
    change(samples[0][1])
    shards = [write_shard(root / first["name"], samples), *reader.index["shards"][1:]]
    write_index(root, shards, list(reader.heldout_tasks), {})


def nan_in_action(episode: schema.Episode) -> None:
    assert episode.action is not None
    episode.action[5, 2] = np.nan


def no_rotation(episode: schema.Episode) -> None:
    episode.camera_to_base["wrist"][7, :3, :3] *= 1.1


def mirrored(episode: schema.Episode) -> None:
    episode.camera_to_base["front"][:, :3, 0] *= -1


def short_proprio(episode: schema.Episode) -> None:
    assert episode.proprio is not None
    episode.proprio = episode.proprio[:-1]


def old_schema(episode: schema.Episode) -> None:
    episode.meta["schema_version"] = 0


def lost_touch(episode: schema.Episode) -> None:
    episode.wrench = None


def unknown_absence(episode: schema.Episode) -> None:
    episode.meta["absent"] = ["smell"]


def wrong_focal(episode: schema.Episode) -> None:
    episode.intrinsics["front"][:, 0, 0] = 0


FAULTS: list[tuple[Callable[[schema.Episode], None], str, str]] = [
    (nan_in_action, "action", "NaN or infinity at step 5"),
    (no_rotation, "camera_to_base.wrist", "no rotation at step 7"),
    (mirrored, "camera_to_base.front", "determinant -1"),
    (short_proprio, "proprio", "must agree"),
    (old_schema, "meta.json", "schema_version 0, this version reads 1"),
    (lost_touch, "tactile.npz", "member is missing"),
    (unknown_absence, "meta.json", "smell"),
    (wrong_focal, "intrinsics.front", "positive focal lengths"),
]


@pytest.mark.parametrize(("change", "field", "words"), FAULTS, ids=[fault[0].__name__ for fault in FAULTS])
def test_each_fault_names_file_key_and_field(
    copy: Path, change: Callable[[schema.Episode], None], field: str, words: str
) -> None:
    rewrite(copy, change)
    with pytest.raises(DataError) as error:
        ShardReader(copy).read(0, images=False)
    for part in ("shard-000000.tar", KEY, field, words):
        assert part in str(error.value)
    listed = [fault for fault in validate(copy) if fault.key == KEY]
    assert listed and listed[0].file == "shard-000000.tar"
    assert field in listed[0].field and listed[0].message and listed[0].fix


def test_truncated_shard(copy: Path) -> None:
    shard = copy / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[: 1 << 18])
    with pytest.raises(DataError, match=r"shard-000000.tar: 262144 bytes.*first damaged key metaworld-.*truncated"):
        ShardReader(copy)
    found = validate(copy)
    assert found[0].file == "shard-000000.tar" and found[0].field == "size"
    assert any("truncated" in fault.message and fault.key for fault in found[1:])


def test_altered_shard_is_found_when_read_and_by_validate(copy: Path) -> None:
    shard = copy / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    reader = ShardReader(copy)
    number = next(i for i, entry in enumerate(reader.entries) if entry.shard == shard.name)
    with pytest.raises(DataError, match=r"shard-000001.tar: key metaworld-.*altered"):
        reader.read(number)
    assert {("shard-000001.tar", "sha256")} <= {(fault.file, fault.field) for fault in validate(copy)}


def test_missing_shard_and_index(copy: Path) -> None:
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar: shard is missing"):
        ShardReader(copy)
    (copy / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json: not readable JSON"):
        ShardReader(copy)
    (copy / "index.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(DataError, match="schema_version 9, this version reads 1"):
        ShardReader(copy)


def test_pickled_member_is_refused(tiny_dataset: Path) -> None:
    members = ShardReader(tiny_dataset).members(0)
    path = np.array([{"not": "data"}], dtype=object)
    import io

    buffer = io.BytesIO()
    np.save(buffer, path, allow_pickle=True)
    with pytest.raises(DataError, match=r"here: action.npy: not a plain numpy array"):
        schema.decode({**members, "action.npy": buffer.getvalue()}, "here")


def test_leaks_are_listed(copy: Path) -> None:
    index = json.loads((copy / "index.json").read_text())
    heldout = index["shards"][2]["entries"][0]
    train = index["shards"][0]["entries"][0]
    heldout["initial_state"] = train["initial_state"]
    heldout["episode_id"] = train["episode_id"]
    index["shards"][4]["entries"][0]["split"] = "train"
    (copy / "index.json").write_text(json.dumps(index))
    found = {(fault.file, fault.field) for fault in validate(copy)}
    assert {("shard-000002.tar", "initial_state"), ("shard-000002.tar", "episode_id")} <= found
    assert ("shard-000004.tar", "split") in found


def test_reprojection_fault_is_listed(copy: Path) -> None:
    def opencv_mixed_up(episode: schema.Episode) -> None:
        for pose in episode.camera_to_base.values():
            pose[:, :3, 1:3] *= -1

    rewrite(copy, opencv_mixed_up)
    assert any(fault.field == "visible" and "OpenCV" in fault.fix for fault in validate(copy))


def test_round_trip_and_video_members(tiny_dataset: Path) -> None:
    reader = ShardReader(tiny_dataset)
    episode = reader.read(0)
    again = schema.decode(schema.encode(episode), "here")
    for name in ("points", "visible", "wrench", "taxels", "proprio", "action"):
        np.testing.assert_array_equal(getattr(again, name), getattr(episode, name))
    assert again.meta == episode.meta
    # A second JPEG pass changes little.
    assert np.abs(again.rgb["wrist"].astype(int) - episode.rgb["wrist"]).mean() < 2
    members = {name: data for name, data in schema.encode(episode).items() if not name.startswith("rgb.front")}
    members["rgb.front.mp4"] = _mp4(episode.rgb["front"])
    video = schema.decode(members, "here")
    assert np.abs(video.rgb["front"].astype(int) - episode.rgb["front"]).mean() < 8
    members["rgb.front.mp4"] = b"no video"
    with pytest.raises(DataError, match=r"rgb\.front\.mp4: not a readable video"):
        schema.decode(members, "here")


def _mp4(images: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=20, width=images.shape[2], height=images.shape[1])
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_statistics_use_the_train_split_only_and_floor_still_dimensions(tiny_dataset: Path, copy: Path) -> None:
    reader, statistics = ShardReader(tiny_dataset), load_statistics(tiny_dataset)
    train = [reader.read(i, images=False) for i, entry in enumerate(reader.entries) if entry.split == "train"]
    action = np.concatenate([episode.action for episode in train if episode.action is not None])
    assert statistics["instructions"] == sorted({episode.meta["instruction"] for episode in train})
    measured = field_statistics(statistics, "sawyer", "action")
    np.testing.assert_allclose(measured["mean"], action.mean(0), atol=1e-6)
    assert measured["count"] == len(action) and (measured["std"] >= 1e-3).all()
    shapes = {
        name: field_statistics(statistics, "sawyer", name)["mean"].shape
        for name in ("proprio", "wrench", "taxels", "points", "camera_translation")
    }
    assert shapes == {
        "proprio": (18,),
        "wrench": (3, 6),
        "taxels": (3, 1, 1),
        "points": (3,),
        "camera_translation": (3,),
    }
    assert statistics_hash(write_statistics(copy)) == statistics_hash(statistics)
    with pytest.raises(DataError, match=r"no embodiment 'panda'.*sawyer"):
        field_statistics(statistics, "panda", "action")
    (copy / STATISTICS).unlink()
    with pytest.raises(DataError, match=r"stats.json: no such file.*worldmodel.data stats"):
        load_statistics(copy)
