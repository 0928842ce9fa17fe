"""Pictures are read one by one where they lie, and only those that a clip shows."""

from pathlib import Path

import numpy as np
import pytest
from synthetic import made_up_dataset, made_up_episode, one

from worldmodel.contracts import ClipSpec
from worldmodel.data import frames, media, schema
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.errors import SampleError

SPEC = ClipSpec(
    cameras=("front",), embodiments=("toy",), height=16, width=16, action=4, proprio=4, history=2, stride=2, future=1
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up_dataset(tmp_path_factory.mktemp("pictures") / "data", {("toy", "lift"): 2}, length=30)


def test_only_the_pictures_of_a_clip_are_decoded_and_each_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def counting(data: bytes, where: str) -> np.ndarray:
        decoded.append(where)
        return media.decode_picture(data, where)

    monkeypatch.setattr(frames, "decode_picture", counting)
    clips = ClipDataset(ShardReader(root), SPEC, split="train")
    clip, again = clips[10], clips[10]
    assert decoded == [f"rgb.front.{step:06d}.jpg" for step in (8, 10, 11, 12)]
    np.testing.assert_array_equal(one(again).future.rgb, one(clip).future.rgb)
    images = ShardReader(root).read(0).rgb["front"].transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(one(clip).observation.rgb[:, 0], images[[8, 10]])
    np.testing.assert_array_equal(one(clip).future.rgb[:, 0], images[[11, 12]])
    without = ClipDataset(ShardReader(root, cache_bytes=0), SPEC, split="train")
    np.testing.assert_array_equal(one(without[10]).future.rgb, one(clip).future.rgb)


def written(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    samples = [(f"e{i}", made_up_episode(f"e{i}", "toy", "lift", rng, length=20, pixels=16)) for i in range(2)]
    write_index(folder, [write_shard(folder / "shard-000000.tar", samples)], [], {})
    return folder


@pytest.mark.parametrize("fault", ["no JPEG", "another size"])
def test_a_picture_that_was_stored_damaged_takes_only_its_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    plain, count = schema._encode_jpeg, 0

    def seventh_is_damaged(image: np.ndarray) -> bytes:
        nonlocal count
        count += 1
        if count != 8:
            return plain(image)
        return b"no picture" if fault == "no JPEG" else plain(image[:8])

    monkeypatch.setattr(schema, "_encode_jpeg", seventh_is_damaged)
    root = written(tmp_path / "data")
    strict = ClipDataset(ShardReader(root), SPEC, split="train")
    message = "rgb.front.000007.jpg: not a readable JPEG" if fault == "no JPEG" else "pictures of several sizes"
    with pytest.raises(SampleError, match=rf"shard-000000.tar: key e0: .*{message}"):
        strict[7]
    lenient = ClipDataset(ShardReader(root), SPEC, split="train", on_error="skip")
    replaced = [step for step in range(20) if lenient[step].skip is not None]
    assert replaced == [5, 6, 7, 9]  # a clip at step s shows s - 2, s, s + 1 and s + 2
    assert [lenient[step].key for step in replaced] == [f"e1@{step}" for step in replaced]
    assert lenient[27].key == "e1@7" and lenient[27].skip is None


def test_a_missing_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = schema.encode

    def without(episode: schema.Episode, *, pictures: str) -> dict[str, bytes]:
        members = plain(episode, pictures=pictures)
        return {name: data for name, data in members.items() if name != "rgb.front.000004.jpg"}

    monkeypatch.setattr("worldmodel.data.shard_writer.encode", without)
    reader = ShardReader(written(tmp_path / "data"))
    with pytest.raises(SampleError, match=r"key e0: rgb.front.000004.jpg: member is missing; stored .*{'front': 19}"):
        reader.pictures(0, "front", [3, 4])
    with pytest.raises(SampleError, match=r"rgb.side.000003.jpg: member is missing"):
        reader.pictures(0, "side", [3])
    assert reader.pictures(0, "front", [3, 5, 3]).shape == (3, 3, 16, 16)


@pytest.mark.parametrize("steps", [[3], [0, 1, 2], [3, 5, 3], [19, 0, 1, 9, 10]])
def test_raw_pictures_come_back_bit_for_bit(tmp_path: Path, steps: list[int]) -> None:
    episode = made_up_episode("e0", "toy", "lift", np.random.default_rng(0), length=20, pixels=16)
    record = write_shard(tmp_path / "shard-000000.tar", [("e0", episode)], pictures="raw")
    write_index(tmp_path, [record], [], {})
    reader = ShardReader(tmp_path)
    assert set(reader.members(0)) >= {"rgb.front.npy"}
    np.testing.assert_array_equal(reader.read(0).rgb["front"], episode.rgb["front"])
    wanted = episode.rgb["front"].transpose(0, 3, 1, 2)[steps]
    np.testing.assert_array_equal(reader.pictures(0, "front", steps), wanted)


def test_raw_pictures_of_another_kind_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = schema.encode

    def stored(array: np.ndarray) -> ShardReader:
        def encode(episode: schema.Episode, *, pictures: str) -> dict[str, bytes]:
            return {**plain(episode, pictures=pictures), "rgb.front.npy": schema._encode_npy(array)}

        monkeypatch.setattr("worldmodel.data.shard_writer.encode", encode)
        folder = tmp_path / f"{array.dtype}-{array.ndim}-{len(array)}"
        return ShardReader(written(folder))

    for array in (np.zeros((20, 3, 16, 16), np.float32), np.zeros((20, 16, 16, 3), np.uint8), np.zeros(5, np.uint8)):
        reader = stored(array)
        with pytest.raises(SampleError, match=r"key e0: rgb.front.npy: .*\(T, 3, h, w\) of uint8"):
            reader.pictures(0, "front", [0])
        with pytest.raises(SampleError, match=r"key e0: rgb.front.npy: .*\(T, 3, h, w\) of uint8"):
            reader.read(0)
    short = stored(np.zeros((7, 3, 16, 16), np.uint8))
    with pytest.raises(SampleError, match=r"key e0: rgb.front.npy: 7 pictures, step 9 is asked for"):
        short.pictures(0, "front", [9])
    with pytest.raises(SampleError, match=r"key e0: rgb.front: "):
        short.read(0)
