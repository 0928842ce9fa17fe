"""Maps and imports in general: nothing guessed, nothing lost when killed, the same bytes on every run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from lerobot_fakes import write_v21, write_v30
from test_data_generate import digests

from worldmodel.data.__main__ import USAGE, main
from worldmodel.data.formats.assemble import assemble, task_name
from worldmodel.data.formats.base import Field, Fields, Recording, Ref, episode_key
from worldmodel.data.formats.lerobot import LeRobotSource
from worldmodel.data.formats.map_file import load_mapping, make_mapping, to_yaml
from worldmodel.data.formats.mapping import Split
from worldmodel.data.formats.resolve import resolve
from worldmodel.data.formats.suggest import suggest
from worldmodel.data.importing import assign_splits, import_dataset
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError

FIELDS = Fields(
    where="demo",
    fps=10,
    embodiment="Arm 7",
    cameras={"observation.images.top": (32, 32)},
    vectors={
        "observation.state": Field((3,), ("a", "b", "c")),
        "action": Field((2,)),
        "observation.wrench.wrist": Field((6,)),
        "observation.extrinsics.top": Field((4, 4)),
        "observation.intrinsics.top": Field((4,)),
        "observation.mystery": Field((5,)),
    },
    texts=("task",),
)


def test_what_only_the_user_knows_stops_with_a_map_to_finish(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(FIELDS)
    message = str(error.value)
    for part in (
        "observation.mystery: matches no known name",
        "wrench.wrist.frame: ???",
        "camera_to_base.top.maps: ???",
        "vector  observation.wrench.wrist  (6,)",
        "embodiment: arm-7",
    ):
        assert part in message
    path = tmp_path / "map.yaml"
    path.write_text(to_yaml(suggest(FIELDS).mapping))
    with pytest.raises(
        ConfigError, match=r"wrench.wrist.frame, camera_to_base.top.maps, camera_to_base.top.axes: still"
    ):
        load_mapping(path)
    answers = path.read_text().replace("frame: '???'", "frame: flange").replace("maps: '???'", "maps: base_to_camera")
    path.write_text(answers.replace("axes: '???'", "axes: opengl"))
    mapping = resolve(FIELDS, load_mapping(path))
    assert mapping.ignore == ["observation.mystery"] and mapping.proprio[0].names == ["a", "b", "c"]
    assert resolve(FIELDS, make_mapping(mapping.as_dict(), "")) == mapping


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ignore": []}, "observation.mystery: not used by the map"),
        ({"cameras": {"top": "observation.images.side"}}, "the data has no 'observation.images.side'; it has"),
        ({"cameras": {"a.b": "observation.images.top"}}, "letters, digits"),
        ({"proprio": [{"field": "observation.state", "slice": [1, 9]}]}, r"slice \[1, 9\] must be"),
        ({"proprio": ["observation.state", "observation.state"]}, r"names \['a', 'b', 'c'\] are used twice"),
        ({"proprio": [{"field": "observation.state", "names": ["a"]}]}, "1 names for 3 columns"),
        ({"wrench": {"w": {"field": "action", "frame": "hand"}}}, "2 columns; a wrench has 6"),
        ({"split": {"source": {"train": "test"}}}, "are no splits of ours"),
        ({"split": {"heldout": 2}}, "heldout 2.0 must be"),
        ({"fps": 0, "colour": 1}, "colour"),
        ({"fps": "fast"}, "fast"),
        ({"intrinsics": {}}, "a pose needs intrinsics.top"),
        ({"points": {"field": "observation.state", "frame": "world"}}, "must be in the robot's base frame"),
        ({"pair_video": "luck"}, "'luck' is none of time, number"),
    ],
)
def test_maps_that_do_not_fit_are_refused(change: dict[str, object], words: str) -> None:
    plain = suggest(FIELDS).mapping
    plain["wrench"]["wrist"]["frame"] = "flange"
    plain["camera_to_base"]["top"] |= {"maps": "camera_to_base", "axes": "opencv"}
    with pytest.raises(ConfigError, match=words):
        resolve(FIELDS, make_mapping(plain | change, "map"))


def test_ambiguous_names_are_refused() -> None:
    two = Fields("demo", 10, "arm", vectors={"observation.state": Field((3,)), "qpos": Field((3,))}, texts=("task",))
    with pytest.raises(ConfigError, match=r"observation.state, qpos: several fields look like proprio"):
        resolve(two)
    unnamed = Fields("demo", vectors={"qpos": Field((3,))})
    with pytest.raises(ConfigError, match=r"(?s)embodiment: \?\?\?, only you know.*fps.*instruction") as error:
        resolve(unnamed)
    assert "instruction: {text: '???'}" in str(error.value)


def test_suggested_cameras_lose_the_prefix_that_all_have() -> None:
    names = ("observation/image", "observation/wrist_image", "observation.images.top", "obs/images/left", "rgb/right")
    suggested = suggest(Fields("demo", cameras=dict.fromkeys(names))).mapping["cameras"]
    assert list(suggested) == ["image", "wrist_image", "top", "left", "right"]
    assert [camera["field"] for camera in suggested.values()] == list(names)


def test_poses_of_either_direction_and_axes_become_camera_to_base() -> None:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation * np.sign(np.linalg.det(rotation)), rng.normal(size=3)
    flip = np.diag([1.0, -1, -1, 1])
    forms = {
        ("camera_to_base", "opencv"): pose,
        ("base_to_camera", "opencv"): np.linalg.inv(pose),
        ("camera_to_base", "opengl"): pose @ flip,
        ("base_to_camera", "opengl"): np.linalg.inv(pose @ flip),
    }
    recording = Recording("demo", 2, 10, images={"top": np.zeros((2, 32, 32, 3), np.uint8)})
    fields = Fields("demo", cameras={"top": None}, vectors={"pose": Field((4, 4))})
    plain: dict[str, object] = {}
    for (maps, axes), matrix in forms.items():
        plain = {
            "embodiment": "arm",
            "fps": 10,
            "task": "look",
            "cameras": {"top": {"field": "top", "size": [16, 64]}},
            "camera_to_base": {"top": {"field": "pose", "maps": maps, "axes": axes}},
            "intrinsics": {"top": {"matrix": [[30, 0, 16], [0, 30, 16], [0, 0, 1]]}},
        }
        recording.vectors["pose"] = np.stack([matrix] * 2)
        episode = assemble(recording, resolve(fields, make_mapping(plain, "map")))
        np.testing.assert_allclose(episode.camera_to_base["top"][1], pose, atol=1e-6)
        assert episode.rgb["top"].shape == (2, 16, 64, 3)
        assert episode.intrinsics["top"][0].tolist() == [[60, 0, 32], [0, 15, 8], [0, 0, 1]]
    recording.vectors["pose"] = recording.vectors["pose"] * 2
    with pytest.raises(DataError, match=r"demo: camera_to_base.top: no rotation at step 0"):
        assemble(recording, resolve(fields, make_mapping(plain, "map")))


def test_splits_by_hash_stay_when_episodes_are_added() -> None:
    refs = [Ref(episode_key("episode", i), (i,)) for i in range(400)]
    all_of_them = assign_splits(refs, Split(heldout=0.1))
    assert assign_splits(refs[:300], Split(heldout=0.1)) == all_of_them[:300]
    assert 20 < all_of_them.count("heldout_episodes") < 60
    assert assign_splits(refs[:3], Split(heldout=1e-9)).count("heldout_episodes") == 1
    assert set(assign_splits(refs, Split())) == {"train"}
    with pytest.raises(DataError, match="episodes of source splits"):
        assign_splits(refs, Split(source={"train": "train"}))


def test_task_names_are_short_and_stable() -> None:
    assert task_name("Open the drawer!") == "open-the-drawer"
    long = "pick the " + "very " * 30 + "small cube"
    assert len(task_name(long)) <= 60 and task_name(long) == task_name(long) != task_name(long + " now")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_v21(tmp_path / "source", extra={"observation.wrench": 6})
    arguments = ["import", "lerobot", str(source), str(tmp_path / "out"), "--quiet", "--workers", "1"]
    assert main(arguments) == USAGE
    message = capsys.readouterr().err
    assert "wrench.wrench.frame: ???" in message and "suggested map" in message and not (tmp_path / "out").exists()
    suggested = to_yaml(suggest(LeRobotSource(source).fields()).mapping).replace("???", "tool")
    (tmp_path / "map.yaml").write_text(suggested)
    assert main([*arguments, "--map", str(tmp_path / "map.yaml")]) == 0
    assert ShardReader(tmp_path / "out").read(0).meta["sensor_frames"] == {"wrench": "tool"}
    assert main(["export", "lerobot", str(tmp_path / "out"), str(tmp_path / "lerobot"), "--quiet"]) == 0
    assert main(["validate", str(tmp_path / "out")]) in (0, 1)  # plain pictures are warned of
    assert main(["import", "lerobot", str(tmp_path), str(tmp_path / "new"), "--quiet"]) == 2
    assert "info.json" in capsys.readouterr().err
    assert main([*arguments[:3], str(tmp_path / "out"), "--map", str(tmp_path / "none.yaml")]) == USAGE


def test_an_import_killed_at_any_point_continues_with_the_same_bytes(tmp_path: Path) -> None:
    source = write_v30(tmp_path / "source")
    whole = import_dataset("lerobot", source, tmp_path / "whole", workers=1, progress=False, episodes_per_shard=1)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "worldmodel.data", "import", "lerobot", str(source), str(out), "--quiet"]
    command += ["--workers", "2", "--episodes-per-shard", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((out / ".progress").glob("shard-*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (out / "shard-000002.tar.99999.tmp").write_bytes(b"half a shard")
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{process.pid}") or _members(process.pid):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.05)
    import_dataset("lerobot", source, out, workers=1, progress=False, episodes_per_shard=1)
    assert digests(out) == digests(whole)
    assert sorted(e.key for e in ShardReader(out).entries) == [f"episode-{i:06d}" for i in range(3)]


def _members(session: int) -> list[int]:
    """Processes of a session that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
