"""Validation: every fault planted in a clean dataset is found, named by file, key and field, and nothing else is."""

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldmodel.data import validate as validation
from worldmodel.data.__main__ import USAGE, main
from worldmodel.data.checks import gripper, structure, timing
from worldmodel.data.checks.finding import Sample
from worldmodel.data.schema import Episode, encode
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import write_statistics
from worldmodel.data.validate import ShardResult, examine, examine_shard, validate

KEY = "metaworld-drawer-close-v3-train-000000"
Change = Callable[[Episode], Any]


@pytest.fixture
def copy(tiny_dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_dataset, tmp_path / "copy")


def rewrite(root: Path, change: Change, *, everywhere: bool = False) -> None:
    """Write the dataset again with its first episode, or every one, changed."""
    reader = ShardReader(root)
    shards, number = [], 0
    for shard in reader.index["shards"]:
        samples = []
        for entry in shard["entries"]:
            episode = reader.read(number)
            if everywhere or number == 0:
                change(episode)
            samples.append((entry["key"], episode))
            number += 1
        shards.append(write_shard(root / shard["name"], samples))
        if not everywhere:
            shards += reader.index["shards"][1:]
            break
    write_index(root, shards, list(reader.heldout_tasks), {})


def array(value: np.ndarray | None) -> np.ndarray:
    assert value is not None
    return value


def spike(episode: Episode) -> None:
    array(episode.action)[8, 1] = 40


def stuck_axis(episode: Episode) -> None:
    array(episode.wrench)[:, 0, 2] = 7


def stuck_joint(episode: Episode) -> None:
    array(episode.proprio)[:, 6] = 0.25


def clipped(episode: Episode) -> None:
    array(episode.wrench)[5:12, 0, 0] = 2000


def black(episode: Episode) -> None:
    episode.rgb["front"][4] = 0


def plain(episode: Episode) -> None:
    episode.rgb["wrist"][6] = 120


def frozen(episode: Episode) -> None:
    episode.rgb["front"][3:] = episode.rgb["front"][3]


def gripper_flipped(episode: Episode) -> None:
    array(episode.action)[:, 3] *= -1


def point_astray(episode: Episode) -> None:
    array(episode.points)[3, 0, 2] += 100


def axes_of_opengl(episode: Episode) -> None:
    for pose in episode.camera_to_base.values():
        pose[:, :3, 1:3] *= -1


def no_rotation(episode: Episode) -> None:
    episode.camera_to_base["wrist"][7, :3, :3] *= 1.1


def no_number(episode: Episode) -> None:
    array(episode.proprio)[5, 2] = np.nan


def short(episode: Episode) -> None:
    episode.points = array(episode.points)[:-1]


def no_rate(episode: Episode) -> None:
    episode.meta["fps"] = 0


def other_rate(episode: Episode) -> None:
    episode.meta["fps"] = 25.0


def doubles(episode: Episode) -> None:
    episode.action = array(episode.action).astype(np.float64)


def no_intrinsics(episode: Episode) -> None:
    del episode.intrinsics["wrist"]


def clocks(episode: Episode) -> dict[str, np.ndarray]:
    episode.times = {stream: np.arange(episode.length) / 20.0 for stream in ("action", "rgb.front")}
    return episode.times


def backward(episode: Episode) -> None:
    times = clocks(episode)
    for stream in times.values():
        stream[9] = stream[7]
    del times["action"]


def slow_clock(episode: Episode) -> None:
    times = clocks(episode)
    times["action"] *= 2
    del times["rgb.front"]


def dropped(episode: Episode) -> None:
    times = clocks(episode)
    times["rgb.front"][12:] += 0.03
    times["action"][12:] += 0.01


def late(episode: Episode) -> None:
    clocks(episode)["rgb.front"] += 0.04


PLANTED: list[tuple[Change, str, str, str]] = [
    (spike, "action", "warning", "'delta_y' changes by 41 at step 8"),
    (stuck_axis, "wrench", "warning", "wrist fz is 7 at all"),
    (stuck_joint, "proprio", "warning", "joint_position_2 is 0.25"),
    (clipped, "wrench", "warning", "wrist fx stays at 2000 for 7 steps"),
    (black, "rgb.front", "warning", "1 of .* black, the first at step 4"),
    (plain, "rgb.wrist", "warning", "one colour, the first at step 6"),
    (frozen, "rgb.front", "warning", "stands still from step 3"),
    (gripper_flipped, "action", "warning", "'gripper_opening' .* action_units say otherwise"),
    (point_astray, "visible", "error", "'object' at step 3"),
    (axes_of_opengl, "visible", "error", "project into no picture"),
    (no_rotation, "camera_to_base.wrist", "error", "no rotation at step 7"),
    (no_number, "proprio", "error", "NaN or infinity at step 5"),
    (short, "points", "error", "steps, meta.json says length"),
    (no_rate, "meta.json fps", "error", "0 is no rate"),
    (other_rate, "meta.json fps", "warning", "25, most episodes of 'sawyer' have 20"),
    (doubles, "action", "warning", "float64"),
    (no_intrinsics, "intrinsics.wrist", "error", "is missing"),
    (backward, "times.rgb.front", "error", "not go forward at step 9"),
    (slow_clock, "times.action", "error", "10 Hz, meta.json says fps 20"),
    (dropped, "times.rgb.front", "warning", "80.0 ms before step 12"),
    (late, "times.rgb.front", "error", "40.0 ms away from 'action'"),
]


def test_a_fresh_dataset_is_clean_and_all_of_it_was_looked_at(tiny_dataset: Path) -> None:
    report = examine(tiny_dataset)
    assert (report.status, report.faults, report.notes) == (0, [], [])
    assert report.projection.visible == report.projection.visible_inside > 300


@pytest.mark.parametrize(("change", "field", "severity", "words"), PLANTED, ids=[p[0].__name__ for p in PLANTED])
def test_each_planted_fault_is_found_alone(copy: Path, change: Change, field: str, severity: str, words: str) -> None:
    rewrite(copy, change)
    if severity == "warning":
        write_statistics(copy)
    report = examine(copy)
    assert {(f.file, f.key, f.field, f.severity) for f in report.faults} == {("shard-000000.tar", KEY, field, severity)}
    assert any(re.search(words, fault.message) for fault in report.faults), report.faults
    assert all(fault.fix for fault in report.faults)
    assert report.status == (2 if severity == "error" else 1)


def test_a_dead_channel_is_named_once(copy: Path) -> None:
    def dead(episode: Episode) -> None:
        array(episode.taxels)[:, 1, 2] = 0

    rewrite(copy, dead, everywhere=True)
    write_statistics(copy)
    (fault,) = validate(copy)
    assert (fault.field, fault.severity) == ("taxels", "warning")
    assert "right_finger normal is 0 at every step of all 7 episodes" in fault.message


def test_copies_within_a_split_warn_and_across_splits_are_errors(copy: Path) -> None:
    reader = ShardReader(copy)
    shards = list(reader.index["shards"])
    first, entries = reader.read(0), reader.entries
    twin = Episode(**{**vars(first), "meta": {**first.meta, "episode_id": "twin"}})
    leak = Episode(**{**vars(first), "meta": {**first.meta, "episode_id": "leak", "split": "heldout_episodes"}})
    shards[0] = write_shard(copy / shards[0]["name"], [(entries[0].key, first), ("twin", twin)])
    write_index(copy, shards, list(reader.heldout_tasks), {})
    write_statistics(copy)
    assert [(f.key, f.field, f.severity) for f in validate(copy)] == [("twin", "content", "warning")]
    shards[2] = write_shard(copy / shards[2]["name"], [("leak", leak)])
    write_index(copy, shards, list(reader.heldout_tasks), {})
    found = {(f.file, f.key, f.field, f.severity) for f in validate(copy)}
    assert found == {
        ("shard-000000.tar", "twin", "content", "warning"),
        ("shard-000002.tar", "leak", "content", "error"),
    }


def test_one_damaged_member_does_not_hide_another(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(episode: Episode, *, pictures: str) -> dict[str, bytes]:
        members = encode(episode, pictures=pictures)
        if episode.meta["episode_id"] == KEY:
            members["rgb.front.000003.jpg"] = b"no picture"
            members["tactile.npz"] = b"no archive"
            members["smell.npy"] = b""
        return members

    monkeypatch.setattr("worldmodel.data.shard_writer.encode", damage)
    rewrite(copy, no_number)
    found = {(fault.field, fault.severity) for fault in validate(copy) if fault.key == KEY}
    assert found == {
        ("rgb.front.000003.jpg", "error"),
        ("tactile.npz", "error"),
        ("proprio", "error"),
        ("smell.npy", "warning"),
    }


def test_totals_of_the_index_and_stray_shards(copy: Path) -> None:
    index = json.loads((copy / "index.json").read_text())
    index["splits"]["train"]["steps"] += 1
    (copy / "index.json").write_text(json.dumps(index))
    (copy / "shard-000099.tar").touch()
    assert [(f.file, f.field, f.severity) for f in validate(copy)] == [
        ("index.json", "splits", "error"),
        ("shard-000099.tar", "", "warning"),
    ]


def test_video_rate_and_members_that_are_passed_over(tiny_dataset: Path) -> None:
    from test_data_faults import _mp4

    reader = ShardReader(tiny_dataset)
    episode, entry = reader.read(0), reader.entries[0]
    members = {"rgb.front.mp4": _mp4(episode.rgb["front"]), "rgb.back.000000.jpg": b"", "rgb.front.000999.jpg": b""}
    assert not list(timing.check_video_rate(Sample(entry, members, episode)))
    faster = Episode(**{**vars(episode), "meta": {**episode.meta, "fps": 30.0}})
    (fault,) = timing.check_video_rate(Sample(entry, members, faster))
    assert fault.field == "rgb.front.mp4" and "20 frames/s" in fault.message
    passed_over = [fault.field for fault in structure.check_members(Sample(entry, members, episode))]
    assert passed_over == ["rgb.back.000000.jpg", "rgb.front.000999.jpg"]


def test_gripper_columns_are_matched_by_name() -> None:
    two = {"action_names": ["left_gripper", "right_gripper"], "proprio_names": ["right_gripper_width", "left_gripper"]}
    assert gripper.pairs(two) == [(0, 1), (1, 0)]
    fingers = {"action_names": ["gripper"], "proprio_names": ["gripper_qpos_0", "gripper_qpos_1"]}
    assert gripper.pairs(fingers) is None
    assert gripper.pairs({"action_names": ["dx"], "proprio_names": ["x"]}) is None


def test_unknown_names_are_noted_not_guessed(copy: Path) -> None:
    def renamed(episode: Episode) -> None:
        episode.meta |= {"embodiment": "gantry", "action_names": ["a", "b", "c", "d"]}

    rewrite(copy, renamed, everywhere=True)
    write_statistics(copy)
    report = examine(copy)
    assert report.status == 0 and [number for _, number in report.notes] == [7]
    assert "gripper sign not looked for" in report.notes[0][0].message


def dying_work(number: int) -> ShardResult:
    if number == 1:
        os._exit(9)
    assert validation._reader is not None
    return examine_shard(validation._reader, number)


def test_a_worker_that_dies_costs_its_shard_and_is_an_error(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pool(workers: int, root: Path) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("fork")  # a fresh interpreter per process would take the test long
        return ProcessPoolExecutor(workers, context, validation._start_worker, (root,))

    monkeypatch.setattr(validation, "_pool", pool)
    monkeypatch.setattr(validation, "_work", dying_work)
    report = examine(tiny_dataset, workers=2)
    assert [(f.file, f.severity) for f in report.faults] == [("shard-000001.tar", "error")]
    assert "died" in report.faults[0].message and report.status == 2


def test_the_report_does_not_depend_on_the_number_of_processes(copy: Path) -> None:
    rewrite(copy, frozen)
    assert examine(copy, workers=2) == examine(copy)


def test_exit_status_tells_warnings_errors_and_usage_apart(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(copy, black)
    write_statistics(copy)
    command = ["validate", str(copy), "--workers", "1", "--quiet"]
    assert main(command) == 1
    out = capsys.readouterr().out
    assert f"warning: shard-000000.tar {KEY} rgb.front: " in out and "0 errors, 1 warning\n" in out
    (copy / "shard-000001.tar").unlink()
    assert main([*command, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "errors" and report["faults"][0]["severity"] == "warning"
    assert main(["validate", str(copy / "nowhere")]) == USAGE
    with pytest.raises(SystemExit) as stop:
        main(["validate", str(copy), "--loud"])
    assert stop.value.code == USAGE


def test_whatever_the_arrays_hold_the_rest_is_still_examined(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = ShardReader(tiny_dataset)
    spoil: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "scalar": lambda x: np.ones((), np.float32),
        "text": lambda x: x.astype(str),
        "complex": lambda x: x.astype(np.complex64),
        "no steps": lambda x: x[:0],
        "one column": lambda x: x[..., :1],
        "another axis": lambda x: x[..., None],
        "transposed": lambda x: x.T,
    }
    for field in ("points", "visible", "wrench", "taxels", "proprio", "action"):
        for kind, change in spoil.items():
            if (field, kind) == ("taxels", "one column"):  # a narrower grid is a sound one
                continue
            spoilt = Episode(**vars(reader.read(0)))
            setattr(spoilt, field, change(array(getattr(spoilt, field))))
            spoilt.rgb = {camera: np.zeros_like(pictures) for camera, pictures in spoilt.rgb.items()}
            members = encode(spoilt)
            monkeypatch.setattr(reader, "members", lambda i, members=members: members)
            faults = examine_shard(reader, 4).faults
            fields = {fault.field for fault in faults if fault.severity == "error"}
            assert field in fields and "" not in fields, (field, kind, faults)
            assert sum("are black" in fault.message for fault in faults) == 2, (field, kind, faults)
