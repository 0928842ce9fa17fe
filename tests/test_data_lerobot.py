"""LeRobot datasets: both layouts as sources, what must be refused, and the round trip through the export."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import one

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq
from lerobot_fakes import CAMERA, FPS, LENGTHS, SENTENCES, SIZE, level, rows, state, video, write_v21, write_v30

from worldmodel.contracts import SCHEMA_VERSION, ClipSpec
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.formats.base import inside
from worldmodel.data.formats.lerobot import LeRobotSource
from worldmodel.data.formats.lerobot_export import export_lerobot
from worldmodel.data.formats.mapping import Camera, Columns
from worldmodel.data.formats.resolve import resolve
from worldmodel.data.importing import import_dataset
from worldmodel.data.schema import Episode
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import write_statistics
from worldmodel.data.validate import validate
from worldmodel.errors import ConfigError, DataError


def read_all(root: Path) -> list[Episode]:
    source = LeRobotSource(root)
    mapping = resolve(source.fields())
    return [source.read(ref, mapping) for ref in source.refs()]


def rewrite(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("layout", ["v2.1", "v2.1 with pictures in the tables", "v3.0"])
def test_every_layout_gives_the_same_episodes(layout: str, tmp_path: Path) -> None:
    root = tmp_path / "source"
    write_v30(root) if layout == "v3.0" else write_v21(root, dtype="image" if "pictures" in layout else "video")
    for i, episode in enumerate(read_all(root)):
        assert episode.length == LENGTHS[i] and episode.meta["fps"] == FPS and episode.meta["embodiment"] == "so100"
        assert episode.meta["instruction"] == SENTENCES[i] and episode.meta["task"] == SENTENCES[i].lower().replace(
            " ", "-"
        ).rstrip(".")
        assert episode.meta["proprio_names"] == ["x", "y", "gripper"]
        assert episode.meta["action_names"] == ["action.0", "action.1", "action.2"]
        assert episode.proprio is not None and episode.action is not None
        np.testing.assert_array_equal(episode.proprio, state(i))
        np.testing.assert_array_equal(episode.action, -state(i))
        assert episode.rgb["top"].shape == (LENGTHS[i], SIZE, SIZE, 3)
        wanted = [level(i, step) for step in range(LENGTHS[i])]
        np.testing.assert_allclose(episode.rgb["top"].mean((1, 2, 3)), wanted, atol=2)
        assert episode.meta["absent"] == ["camera", "objects", "tactile"]


def test_imported_data_are_sound_and_train(tmp_path: Path) -> None:
    out = import_dataset("lerobot", write_v30(tmp_path / "source"), tmp_path / "out", workers=1, progress=False)
    assert [fault for fault in validate(out) if fault.severity == "error"] == []
    reader = ShardReader(out)
    assert [(e.key, e.split, e.length) for e in reader.entries] == [
        ("episode-000000", "train", LENGTHS[0]),
        ("episode-000001", "train", LENGTHS[1]),
        ("episode-000002", "heldout_episodes", LENGTHS[2]),
    ]
    spec = ClipSpec(
        cameras=("top",), sensors=("wrist",), embodiments=("so100",), height=SIZE, width=SIZE, fps=FPS, stride=2
    )
    clips = ClipDataset(reader, spec, split="train")
    assert len([clips[i] for i in range(len(clips))]) == sum(LENGTHS[:2])
    assert one(clips[3]).observation.has_wrench.tolist() == [False] and one(clips[3]).observation.has_rgb.tolist() == [
        True
    ]


def test_names_of_columns_from_modality_json(tmp_path: Path) -> None:
    root = write_v21(tmp_path / "source")
    parts = {"arm": {"start": 0, "end": 2}, "hand": {"start": 2, "end": 3}}
    (root / "meta/modality.json").write_text(json.dumps({"state": parts, "action": parts}))
    rewrite(
        root / "meta/info.json", lambda info: info["features"]["action"].update(names=["motor_0", "motor_1", "m_2"])
    )
    source = LeRobotSource(root)
    mapping = resolve(source.fields())
    assert mapping.action[0].names == ["arm.0", "arm.1", "hand.0"] and mapping.proprio[0].names == ["x", "y", "gripper"]
    mapping.proprio = [Columns("state.hand")]
    mapping = resolve(source.fields(), mapping)
    assert mapping.proprio[0].slice == [2, 3] and mapping.proprio[0].names == ["gripper"]
    episode = source.read(source.refs()[1], mapping)
    assert episode.proprio is not None
    np.testing.assert_array_equal(episode.proprio, state(1)[:, 2:])
    (root / "meta/modality.json").write_text(json.dumps({"state": {"arm": {"start": 0, "end": 9}}}))
    with pytest.raises(DataError, match=r"modality.json: state.arm: 0..9 is not within the 3 of observation.state"):
        LeRobotSource(root).fields()


def test_time_stamps_that_do_not_start_at_zero_are_a_question(tmp_path: Path) -> None:
    root = write_v21(tmp_path / "source")
    for i in range(len(LENGTHS)):
        path = root / f"data/chunk-000/episode_{i:06d}.parquet"
        table = pq.read_table(path)
        later = pa.array(table["timestamp"].to_numpy() + 1 / FPS)
        pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", later), path)
    source = LeRobotSource(root)
    with pytest.raises(ConfigError, match=r"(?s)pair_video: time stamps start at 0.100 s.*pair_video: \?\?\?") as error:
        resolve(source.fields())
    assert "observation.state" in str(error.value)
    fields = source.fields()
    fields.questions.clear()
    mapping = resolve(fields)
    with pytest.raises(
        DataError, match=r"episode 0: observation.images.top: episode_000000.mp4: frame of step 5: none"
    ):
        source.read(source.refs()[0], mapping)
    mapping.pair_video = "number"
    assert source.read(source.refs()[0], mapping).rgb["top"][5].mean() == pytest.approx(level(0, 5), abs=2)


def test_frames_and_stamps_out_of_tolerance_are_named(tmp_path: Path) -> None:
    root = write_v30(tmp_path / "source")
    frames = [level(0, step) for step in range(LENGTHS[0])] + [level(1, step) for step in range(LENGTHS[1] - 2)]
    video(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", frames)
    source = LeRobotSource(root)
    mapping = resolve(source.fields())
    source.read(source.refs()[0], mapping)
    with pytest.raises(DataError, match=r"episode 1: .*file-000.mp4: frame of step 7: none at 1.300000 s") as error:
        source.read(source.refs()[1], mapping)
    assert "1.200000, the last one" in str(error.value)
    table = rows(2, list(dict.fromkeys(SENTENCES)))
    stamps = table["timestamp"].to_numpy().copy()
    stamps[4:] += 0.05
    path = root / "data/chunk-000/file-001.parquet"
    pq.write_table(table.set_column(2, "timestamp", pa.array(stamps)), path)
    with pytest.raises(DataError, match=r"file-001.parquet: episode 2: timestamp: frame 4 is at 0.45"):
        source.read(source.refs()[2], mapping)


def test_declared_but_missing_is_said_and_not_mapped(tmp_path: Path) -> None:
    root = write_v21(tmp_path / "source")
    ghost = {"dtype": "video", "shape": [8, 8, 3], "names": None}
    rewrite(root / "meta/info.json", lambda info: info["features"].update({"observation.images.ghost": ghost}))
    fields = LeRobotSource(root).fields()
    assert list(fields.cameras) == [CAMERA] and "not one video file" in fields.missing["observation.images.ghost"]
    mapping = resolve(fields)
    mapping.cameras["ghost"] = Camera("observation.images.ghost")
    with pytest.raises(ConfigError, match=r"cameras.ghost: 'observation.images.ghost' is declared but missing"):
        resolve(fields, mapping)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("../../{episode_index:06d}.parquet", "leads out of"),
        ("/etc/{episode_index:06d}.parquet", "leads out of"),
        ("data\\..\\..\\{episode_index}.parquet", "leads out of"),
        ("data/{episode_index.__class__}.parquet", "no template"),
        ("data/{secret}.parquet", "asks for 'secret'"),
        ("data/{episode_index:999999999d}.parquet", "no template"),
    ],
)
def test_paths_in_metadata_stay_inside(template: str, words: str, tmp_path: Path) -> None:
    root = write_v21(tmp_path / "source")
    rewrite(root / "meta/info.json", lambda info: info.update(data_path=template))
    with pytest.raises(DataError, match=r"info.json: data_path") as error:
        LeRobotSource(root)
    assert words in str(error.value)
    assert inside(root, "data/x", "") == root / "data/x"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda info: info.update(codebase_version="v1.6"), "codebase_version 'v1.6'; v2.0, v2.1 and v3.0 are read"),
        (lambda info: info.pop("features"), "features must map"),
        (lambda info: info.update(fps="fast"), "fps 'fast' must be a positive number"),
        (lambda info: info.update(splits={"train": "all"}), "split 'train' is 'all'"),
        (lambda info: info["features"]["action"].update(shape=[-3]), r"action: shape \[-3\]"),
        (lambda info: info["features"]["action"].update(shape=[4]), "action: not"),
    ],
)
def test_damaged_descriptions_are_data_errors(change: Any, words: str, tmp_path: Path) -> None:
    root = write_v21(tmp_path / "source")
    rewrite(root / "meta/info.json", change)
    with pytest.raises(DataError, match=words):
        read_all(root)


def make_episode(number: int, rng: np.random.Generator) -> tuple[str, Episode]:
    """Every sense, with names that a wrong order would betray."""
    t, key = 6 + number, f"bench-{number:03d}"
    meta = {
        "schema_version": SCHEMA_VERSION,
        "episode_id": key,
        "embodiment": "bench",
        "task": "stack-v1",
        "instruction": "Stack the blocks." if number else "",
        "split": ("train", "heldout_episodes", "train")[number],
        "fps": 12.5,
        "length": t,
        "success": number != 2,
        "source": "bench",
        "licence": "CC0",
        "cameras": ["wrist", "front"],
        "point_names": ["red", "blue"],
        "sensor_names": ["wrist", "left"],
        "sensor_frames": {"wrist": "flange", "left": "pad"},
        "taxel_sensors": ["right", "left"],
        "taxel_channels": ["shear", "normal"],
        "wrench_units": ["N"] * 3 + ["N·m"] * 3,
        "wrench_sign": "world on tool",
        "proprio_names": ["q0", "q1"],
        "proprio_units": ["rad", "rad"],
        "action_names": ["dq0", "dq1", "grip"],
        "action_units": ["rad/s", "rad/s", "1"],
        "absent": [],
        "a_note": {"of": ["any", "kind"]},
    }
    pose = np.broadcast_to(np.eye(4, dtype=np.float32), (t, 4, 4)).copy()
    pose[:, :3, 3] = rng.normal(size=(t, 3))
    matrix = np.broadcast_to(np.array([[30, 0, 16], [0, 30, 12], [0, 0, 1]], np.float32), (t, 3, 3)).copy()
    ramp = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32, 1) // 4
    pictures = {c: np.broadcast_to(ramp + 9 * i + number, (t, 24, 32, 3)).copy() for i, c in enumerate(meta["cameras"])}
    return key, Episode(
        meta=meta,
        rgb=pictures,
        intrinsics=dict.fromkeys(meta["cameras"], matrix),
        camera_to_base={"wrist": pose, "front": pose[::-1].copy()},
        points=rng.normal(size=(t, 2, 3)).astype(np.float32),
        visible=np.zeros((t, 2), bool),
        wrench=rng.normal(size=(t, 2, 6)).astype(np.float32),
        taxels=rng.normal(size=(t, 2, 2, 3, 4)).astype(np.float32),
        proprio=rng.normal(size=(t, 2)).astype(np.float32),
        action=rng.normal(size=(t, 3)).astype(np.float32),
    )


@pytest.mark.parametrize("lossless", [True, False])
def test_round_trip_loses_nothing(lossless: bool, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    rng = np.random.default_rng(0)
    samples = [make_episode(n, rng) for n in range(3)]
    # Another task: other points, and fewer of them.
    other = samples[1][1]
    assert other.points is not None and other.visible is not None
    other.points, other.visible, other.meta["point_names"] = other.points[:, :1], other.visible[:, :1], ["lid"]
    shards = [write_shard(ours / "shard-000000.tar", samples)]
    write_index(ours, shards, [], {})
    write_statistics(ours)
    lerobot = export_lerobot(ours, tmp_path / "lerobot", lossless=lossless, progress=False)
    info = json.loads((lerobot / "meta/info.json").read_text())
    assert info["splits"] == {"train": "0:2", "heldout_episodes": "2:3"} and info["fps"] == 12.5
    back = import_dataset("lerobot", lerobot, tmp_path / "back", workers=1, progress=False)
    assert [fault for fault in validate(back) if fault.severity == "error"] == []
    before, after = ShardReader(ours), ShardReader(back)
    assert sorted(e.key for e in after.entries) == sorted(e.key for e in before.entries)
    assert json.loads((back / "stats.json").read_text()) == json.loads((ours / "stats.json").read_text())
    place = {entry.key: i for i, entry in enumerate(after.entries)}
    for i, entry in enumerate(before.entries):
        a, b = before.read(i), after.read(place[entry.key])
        assert a.meta == b.meta and list(a.rgb) == list(b.rgb)
        for name in ("points", "visible", "wrench", "taxels", "proprio", "action"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert getattr(a, name).dtype == getattr(b, name).dtype
        for camera in a.rgb:
            np.testing.assert_array_equal(a.camera_to_base[camera], b.camera_to_base[camera])
            np.testing.assert_array_equal(a.intrinsics[camera], b.intrinsics[camera])
            assert np.abs(a.rgb[camera].astype(int) - b.rgb[camera]).mean() < (1 if lossless else 3)
    with pytest.raises(ConfigError, match="not an empty folder"):
        export_lerobot(ours, lerobot)


def test_export_refuses_episodes_that_differ(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = [make_episode(n, rng) for n in range(2)]
    samples[1][1].meta["action_names"] = ["a", "b", "c"]
    write_index(tmp_path, [write_shard(tmp_path / "shard-000000.tar", samples)], [], {})
    with pytest.raises(DataError, match="key bench-001: action: not as in the first episode"):
        export_lerobot(tmp_path, tmp_path / "out", progress=False)
