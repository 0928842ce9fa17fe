"""What LeRobot's policies are given: the same few demonstrations as ours, and nothing of another run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.rivals import arguments, demonstrations, known_state, train, with_task, write_demonstrations
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError


def test_the_few_are_those_of_training(tiny_dataset):
    reader = ShardReader(tiny_dataset)
    few = {e.key for e in ShardReader(tiny_dataset, episodes=1).entries if e.split == "train"}
    assert {e.key for e in demonstrations(reader, 1, 0)} == few
    assert few < {e.key for e in demonstrations(reader, None, 0)}
    with pytest.raises(ConfigError, match="1 or more"):
        demonstrations(reader, 0, 0)
    with pytest.raises(DataError, match="fewer are there"):
        demonstrations(reader, 1000, 0)


def test_arrays_hold_every_step_with_its_task(tiny_dataset, tmp_path):
    reader = ShardReader(tiny_dataset)
    entries = demonstrations(reader, None, 0)
    about = write_demonstrations(reader, entries, tmp_path / "own", None)
    state, episode = np.load(tmp_path / "own" / "state.npy"), np.load(tmp_path / "own" / "episode.npy")
    assert len(state) == len(episode) == about["steps"] and state.shape[1] == 18 + len(about["instructions"])
    assert (state[:, 18:].sum(1) == 1).all()
    wide = write_demonstrations(reader, entries, tmp_path / "wide", state.shape[1] + 3)
    padded = np.load(tmp_path / "wide" / "state.npy")
    assert np.array_equal(padded[:, :-3], state) and not padded[:, -3:].any()
    assert wide["state"] == padded.shape[1] and about == write_demonstrations(reader, entries, tmp_path / "own", None)
    with pytest.raises(ConfigError, match="choose another OUT"):
        write_demonstrations(reader, entries[:1], tmp_path / "own", None)
    with pytest.raises(ConfigError, match="choose another OUT"):
        write_demonstrations(reader, entries, tmp_path / "own", 40)
    with pytest.raises(ConfigError, match=r"states of 18 numbers, \d tasks need"):
        write_demonstrations(reader, entries, tmp_path / "narrow", 18)
    one = with_task(np.zeros((2, 3)), "b", ("a", "b"), 6)
    assert one.tolist() == [[0, 0, 0, 0, 1, 0]] * 2


def settings(tmp_path: Path, *more: str) -> Any:
    words = ["data", str(tmp_path), "--lerobot-python", "python", "--steps", "5", "--policies", "act"]
    return arguments().parse_args([*words, *more])


def test_a_policy_goes_on_from_its_own_kind(tmp_path):
    folder = tmp_path / "act-old"
    with pytest.raises(ConfigError, match=r"rivals\.json is missing"):
        known_state(settings(tmp_path, "--init", str(folder)))
    folder.mkdir()
    known = {"policy": "diffusion", "small": True, "chunk": 8, "state": 28}
    (folder / "rivals.json").write_text(json.dumps(known))
    with pytest.raises(ConfigError, match=r"was trained with {'policy': 'diffusion'}"):
        known_state(settings(tmp_path, "--init", str(folder)))
    (folder / "rivals.json").write_text(json.dumps(known | {"policy": "act"}))
    assert known_state(settings(tmp_path, "--init", str(folder))) == 28
    with pytest.raises(ConfigError, match=r"was trained with {'chunk': 8}"):
        known_state(settings(tmp_path, "--init", str(folder), "--chunk", "4"))
    assert known_state(settings(tmp_path)) is None


def test_what_was_trained_otherwise_is_not_taken_for_it(tmp_path):
    about: dict[str, Any] = {"cameras": ["front"], "pixels": 64, "state": 28, "action": 4, "folder": tmp_path / "demos"}
    folder = tmp_path / "act"
    folder.mkdir()
    done = {
        **{"data": str(tmp_path / "demos"), "init": None, "out": str(folder), "policy": "act", "small": True},
        **{"cameras": ["front"], "pixels": 64, "state": 28, "action": 4, "chunk": 8, "device": "cpu", "seconds": 228.2},
        **{"steps": 437, "clock": "wall", "batch": 8, "threads": 2, "seed": 0, "parameters": 7},
    }
    (folder / "rivals.json").write_text(json.dumps(done))
    assert train(settings(tmp_path), "act", folder, about)["parameters"] == 7
    with pytest.raises(ConfigError, match=r"was trained with {'batch': 8}"):
        train(settings(tmp_path, "--batch", "4"), "act", folder, about)
