"""ALOHA and robomimic: files laid out as their own recorders lay them out, imported, validated and read as clips."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from worldmodel.contracts import ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.formats.map_file import make_mapping
from worldmodel.data.formats.registry import open_source
from worldmodel.data.formats.resolve import resolve
from worldmodel.data.importing import import_dataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.validate import validate
from worldmodel.errors import ConfigError, DataError

ALOHA = {
    "embodiment": "aloha",
    "fps": 50,
    "instruction": "Hand the cube over.",
    "split": {"heldout": 0.4},
    "cameras": {"top": "top", "wrist": "cam_wrist"},
    "proprio": ["observations/qpos", "observations/qvel"],
    "action": "action",
    "ignore": ["observations/effort"],
}


def picture(seed: int) -> np.ndarray:
    """(32, 48, 3): smooth, so that JPEG keeps it."""
    rows, columns = np.mgrid[:32, :48]
    return np.stack([rows * 4 + seed, columns * 3, np.full_like(rows, 40 * (seed % 5))], -1).astype(np.uint8)


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def write_aloha(path: Path, seed: int, *, steps: int = 12, compressed: bool = False) -> None:
    """One episode in the layout of ACT's recorders, compressed as Mobile ALOHA's do."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as root:
        root.attrs["sim"] = True
        root.attrs["compress"] = compressed
        observations = root.create_group("observations")
        images = observations.create_group("images")
        encoded = {}
        for offset, camera in enumerate(("top", "cam_wrist")):
            pictures = [picture(seed + offset + step) for step in range(steps)]
            if compressed:
                encoded[camera] = [jpeg(image) for image in pictures]
            else:
                images.create_dataset(camera, data=np.stack(pictures), chunks=(1, 32, 48, 3))
        if compressed:
            lengths = [[len(data) for data in files] for files in encoded.values()]
            size = max(map(max, lengths))
            for camera, files in encoded.items():
                padded = [np.frombuffer(data.ljust(size, b"\0"), np.uint8) for data in files]
                images.create_dataset(camera, data=np.stack(padded), chunks=(1, size))
            root.create_dataset("compress_len", data=np.array(lengths, np.float32))
        for name in ("qpos", "qvel", "effort"):
            observations.create_dataset(name, data=rng.normal(size=(steps, 14)).astype(np.float32))
        root.create_dataset("action", data=rng.normal(size=(steps, 14)).astype(np.float32))


@pytest.fixture
def aloha(tmp_path: Path) -> Path:
    folder = tmp_path / "transfer_cube"
    folder.mkdir()
    for number in (0, 1, 2, 10):
        write_aloha(folder / f"episode_{number}.hdf5", number, compressed=number % 2 == 1)
    return folder


def clips_of(root: Path, spec: ClipSpec) -> ClipDataset:
    """All training clips, each read once."""
    assert [fault for fault in validate(root) if fault.severity == "error"] == []
    clips = ClipDataset(ShardReader(root), spec, split="train")
    assert sum(1 for i in range(len(clips)) if clips[i].key) == len(clips)
    collate([clips[0], clips[len(clips) - 1]])
    return clips


def test_aloha_becomes_shards(aloha: Path, tmp_path: Path) -> None:
    root = import_dataset(
        "aloha", aloha, tmp_path / "out", mapping=make_mapping(ALOHA, "map"), workers=1, progress=False
    )
    spec = ClipSpec(
        cameras=("top", "wrist"), embodiments=("aloha",), height=32, width=48, fps=50, proprio=28, action=14
    )
    clips_of(root, spec)
    reader = ShardReader(root)
    assert sorted(entry.key for entry in reader.entries) == [f"episode-{n:06d}" for n in (0, 1, 2, 10)]
    for i, entry in enumerate(reader.entries):
        episode, number = reader.read(i), int(entry.key[-6:])
        with h5py.File(aloha / f"episode_{number}.hdf5") as file:
            np.testing.assert_array_equal(episode.action, np.asarray(file["action"]))
            assert episode.proprio is not None
            np.testing.assert_array_equal(episode.proprio[:, :14], np.asarray(file["observations/qpos"]))
        error = np.abs(episode.rgb["wrist"][5].astype(int) - picture(number + 1 + 5))
        assert error.mean() < 3, "red, green and blue in their order, steps in theirs"
        assert episode.meta["simulated"] is True and episode.meta["instruction"] == "Hand the cube over."


def test_aloha_reads_jpeg_files_of_varying_length(tmp_path: Path) -> None:
    path = tmp_path / "episode_0.hdf5"
    write_aloha(path, 0)
    with h5py.File(path, "a") as file:
        images = file["observations/images"]
        del images["top"]  # type: ignore[attr-defined]
        kind = h5py.vlen_dtype(np.uint8)
        vlen = images.create_dataset("top", (12,), kind)  # type: ignore[attr-defined]
        for step in range(12):
            vlen[step] = np.frombuffer(jpeg(picture(step)), np.uint8)
    source = open_source("aloha", path)
    episode = source.read(source.refs()[0], resolve(source.fields(), make_mapping(ALOHA, "map")))
    assert np.abs(episode.rgb["top"][7].astype(int) - picture(7)).mean() < 3


def without(name: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]

    return change


def shorter(name: str) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        data = file[name][:-1]
        del file[name]
        file[name] = data

    return change


def cut_off(file: Any) -> None:
    images = file["observations/images/top"]
    images[3, 200:] = 0


def nan(file: Any) -> None:
    file["action"][4, 2] = np.nan


ALOHA_FAULTS = [
    (without("observations/qvel"), r"episode_1\.hdf5: dataset 'observations/qvel' is missing; it has .*qpos"),
    (without("action"), r"action: |dataset 'action' is missing"),
    (shorter("observations/qvel"), r"episode_1\.hdf5: observations/qvel: 11 rows, the episode has 12 steps"),
    (shorter("observations/images/top"), r"observations/images/top: 11 rows, the episode has 12 steps"),
    (cut_off, r"compress_len: no row holds the lengths of the JPEG files of observations/images/top"),
    (nan, r"episode_1\.hdf5: action: NaN or infinity at step 4"),
]


@pytest.mark.parametrize(("change", "words"), ALOHA_FAULTS)
def test_each_fault_of_an_aloha_file_is_named(aloha: Path, change: Callable[[Any], None], words: str) -> None:
    with h5py.File(aloha / "episode_1.hdf5", "a") as file:
        change(file)
    source = open_source("aloha", aloha)
    mapping = resolve(source.fields(), make_mapping(ALOHA, "map"))
    with pytest.raises(DataError, match=words):
        source.read(source.refs()[1], mapping)


def test_truncated_pictures_are_found_without_compress_len(aloha: Path) -> None:
    with h5py.File(aloha / "episode_1.hdf5", "a") as file:
        cut_off(file)
        del file["compress_len"]
    source = open_source("aloha", aloha)
    with pytest.raises(DataError, match=r"observations/images/top: step 3: not a readable JPEG or PNG"):
        source.read(source.refs()[1], resolve(source.fields(), make_mapping(ALOHA, "map")))


def test_damaged_and_foreign_files_are_refused(aloha: Path, tmp_path: Path) -> None:
    whole = (aloha / "episode_0.hdf5").read_bytes()
    (aloha / "episode_0.hdf5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"episode_0\.hdf5: not a readable HDF5 file"):
        open_source("aloha", aloha).fields()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file named \*\.hdf5 or \*\.h5"):
        open_source("aloha", tmp_path / "empty")
    with pytest.raises(DataError, match=r"no group data/demo_N.*is this a robomimic file"):
        open_source("robomimic", aloha / "episode_1.hdf5").refs()


def test_a_camera_that_no_map_names_stops_the_import(aloha: Path, tmp_path: Path) -> None:
    mapping = make_mapping(ALOHA | {"cameras": {"top": "top"}}, "map")
    with pytest.raises(ConfigError, match=r"cam_wrist: not used by the map(.|\n)*camera  cam_wrist  32x48"):
        import_dataset("aloha", aloha, tmp_path / "out", mapping=mapping, workers=1, progress=False)
    with pytest.raises(ConfigError, match=r"embodiment: \?\?\?, only you know(.|\n)*fps: \?\?\?"):
        import_dataset("aloha", aloha, tmp_path / "out", workers=1, progress=False)
    wrong = make_mapping(ALOHA | {"cameras": {"top": "top", "wrist": "cam_left"}}, "map")
    with pytest.raises(ConfigError, match=r"cameras\.wrist: the data has no 'cam_left'; it has \['cam_wrist', 'top'\]"):
        import_dataset("aloha", aloha, tmp_path / "out", mapping=wrong, workers=1, progress=False)


def write_robomimic(path: Path, *, demos: int = 4, robots: Any = "Panda") -> None:
    """A file in the layout of robomimic's dataset_states_to_obs."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        kwargs = {"robots": robots, "control_freq": 20, "reward_shaping": False}
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": kwargs}, indent=4)
        data.attrs["total"] = 0
        for number in range(demos):
            steps = 10 + number
            demo = data.create_group(f"demo_{number}")
            demo.create_dataset("actions", data=rng.uniform(-1, 1, (steps, 7)))
            demo.create_dataset("states", data=rng.normal(size=(steps, 32)))
            rewards = np.zeros(steps)
            rewards[-1] = number != 1
            demo.create_dataset("rewards", data=rewards)
            demo.create_dataset("dones", data=rewards.astype(int))
            for group in ("obs", "next_obs"):
                for name, width in (("robot0_eef_pos", 3), ("robot0_eef_quat", 4), ("robot0_gripper_qpos", 2)):
                    demo.create_dataset(f"{group}/{name}", data=rng.normal(size=(steps, width)))
                images = np.stack([picture(number + step) for step in range(steps)])
                demo.create_dataset(f"{group}/agentview_image", data=images, compression="gzip")
            demo.attrs["num_samples"] = steps
            demo.attrs["model_file"] = "<mujoco/>"
        names = [f"demo_{number}".encode() for number in range(demos)]
        file.create_dataset("mask/train", data=np.array(names[:-1]))
        file.create_dataset("mask/valid", data=np.array(names[-1:]))
        file.create_dataset("mask/50_percent", data=np.array(names[: demos // 2]))


def test_robomimic_needs_no_map(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "lift.hdf5")
    root = import_dataset("robomimic", tmp_path / "lift.hdf5", tmp_path / "out", workers=1, progress=False)
    reader = ShardReader(root)
    spec = ClipSpec(cameras=reader.read(0).meta["cameras"], embodiments=("panda",), height=32, width=48, proprio=9)
    clips = clips_of(root, spec)
    assert clips.left_out == 1, "demo_1 was never rewarded"
    assert {entry.key: entry.split for entry in reader.entries} == {
        f"lift-demo-{n:06d}": "heldout_episodes" if n == 3 else "train" for n in range(4)
    }
    episode = reader.read(0)
    assert episode.meta["instruction"] == "Lift" and episode.meta["filter_keys"] == ["50_percent"]
    assert episode.meta["fps"] == 20 and episode.action is not None and episode.action.shape == (10, 7)
    image = next(iter(episode.rgb.values()))[4]
    assert np.abs(image.astype(int) - picture(4)).mean() < 3


def test_robomimic_takes_the_instruction_and_the_picture_convention_of_libero(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "libero.hdf5")
    with h5py.File(tmp_path / "libero.hdf5", "a") as file:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        file["data"].attrs["macros_image_convention"] = "opengl"
    source = open_source("robomimic", tmp_path)
    episode = source.read(source.refs()[2], resolve(source.fields()))
    assert episode.meta["instruction"] == "open the drawer"
    np.testing.assert_array_equal(next(iter(episode.rgb.values()))[1], picture(3)[::-1])


ROBOMIMIC_FAULTS = [
    (without("data/demo_2/obs/robot0_eef_pos"), r"lift\.hdf5: demo_2: dataset 'obs/robot0_eef_pos' is missing"),
    (without("data/demo_2/actions"), r"demo_2: dataset 'actions' is missing; it has .*obs/robot0_eef_pos"),
    (shorter("data/demo_2/obs/robot0_eef_quat"), r"demo_2: obs/robot0_eef_quat: 11 rows, the episode has 12 steps"),
    (shorter("data/demo_2/obs/agentview_image"), r"demo_2: obs/agentview_image: 11 rows, the episode has 12 steps"),
    (shorter("data/demo_2/actions"), r"demo_2: actions: 11 rows, attribute num_samples says 12"),
]


@pytest.mark.parametrize(("change", "words"), ROBOMIMIC_FAULTS)
def test_each_fault_of_a_robomimic_file_is_named(tmp_path: Path, change: Callable[[Any], None], words: str) -> None:
    write_robomimic(tmp_path / "lift.hdf5")
    source = open_source("robomimic", tmp_path / "lift.hdf5")
    mapping = resolve(source.fields())
    with h5py.File(tmp_path / "lift.hdf5", "a") as file:
        change(file)
    with pytest.raises(DataError, match=words):
        source.read(source.refs()[2], mapping)


def test_robomimic_splits_that_overlap_are_refused(tmp_path: Path) -> None:
    write_robomimic(tmp_path / "lift.hdf5")
    with h5py.File(tmp_path / "lift.hdf5", "a") as file:
        del file["mask/valid"]
        file["mask/valid"] = np.array([b"demo_2"])
    with pytest.raises(DataError, match=r"mask: demo_2 is in 'train' and in 'valid'"):
        open_source("robomimic", tmp_path / "lift.hdf5").refs()
    with h5py.File(tmp_path / "lift.hdf5", "a") as file:
        file["data"].attrs["env_args"] = "{not json"
    with pytest.raises(DataError, match=r"attribute env_args is not valid JSON"):
        open_source("robomimic", tmp_path / "lift.hdf5").fields()
