"""The rollout command on a small dataset: figures, references, films and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from conftest import compose

from worldmodel.checkpoint import build_model, describe, make_spec, save_model
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, statistics_hash
from worldmodel.drift import ANEW, HELD, MEASURES, choose_episodes, shuffled
from worldmodel.errors import ConfigError, DataError
from worldmodel.rollout import rollout


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset, tmp_path_factory) -> Path:
    """Random weights that say they were trained on the train split."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny")
    spec, statistics = make_spec(config["data"]["spec"]), load_statistics(tiny_dataset)
    model = build_model(config["model"], spec, statistics)
    trained = [e for e in ShardReader(tiny_dataset).entries if e.split == "train"]
    record = {"episodes": [e.key for e in trained], "tasks": sorted({e.task for e in trained})}
    record["data_root"] = str(tiny_dataset)  # pyright: ignore[reportArgumentType]
    metadata = describe(config["model"], spec, statistics, statistics_hash(statistics), record)
    return save_model(model, tmp_path_factory.mktemp("runs") / "random", metadata)


def settings(checkpoint: Path, out: Path, **changes):
    defaults = {
        "checkpoint": str(checkpoint), "data": None, "out": str(out), "split": "heldout_episodes", "tasks": None,
        "episodes": 2, "start": 0, "chunks": None, "actions": ["given", "other", "policy", "camera"],
        "sampler_steps": 1, "guidance": {"actions": 1.5}, "films": 1, "seed": 0, "threads": 1,
    }  # fmt: skip
    return defaults | changes


def test_the_command_writes_figures_films_and_a_page(checkpoint, tmp_path, capsys):
    page = rollout(settings(checkpoint, tmp_path))
    result = json.loads((tmp_path / "rollout.json").read_text())
    chunks = len(result["episodes"])
    assert chunks >= 2 and result["episodes"][0] == 2 and result["memory_bytes_per_episode"] > 0
    assert set(result["figures"]) == set(MEASURES)
    for kinds in result["figures"].values():
        assert list(kinds) == ["given", "other", "policy", "camera", ANEW, HELD]
        assert all(len(values) == chunks for values in kinds.values())
    psnr = result["figures"]["psnr"]
    # Untrained output layers answer nothing, so the first chunk stands still like the reference.
    assert psnr["given"][0] == pytest.approx(psnr[ANEW][0], abs=1e-3)
    assert len(list((tmp_path / "films").glob("*.mp4"))) == 4
    html = page.read_text()
    assert html.count("<video") == 4 and "last frame held" in html
    assert "| Video, PSNR [dB] | given |" in capsys.readouterr().out


def test_what_does_not_fit_is_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="actions: unknown 'random'; some of given"):
        rollout(settings(checkpoint, tmp_path, actions=["random"]))
    with pytest.raises(ConfigError, match="'text' cannot lead a rollout; actions, camera"):
        rollout(settings(checkpoint, tmp_path, guidance={"text": 2.0}))
    with pytest.raises(ConfigError, match="there is only one"):
        rollout(settings(checkpoint, tmp_path, episodes=1))
    with pytest.raises(ConfigError, match="chunks is 0; expected 1 or more"):
        rollout(settings(checkpoint, tmp_path, chunks=0))
    with pytest.raises(DataError, match="was trained on"):
        rollout(settings(checkpoint, tmp_path, split="train"))
    with pytest.raises(DataError, match="no episode of 'heldout_episodes' has 8 steps after step 999"):
        rollout(settings(checkpoint, tmp_path, start=999))


def test_the_longest_episodes_come_first_and_tasks_take_turns(tiny_dataset):
    dataset = ClipDataset(
        ShardReader(tiny_dataset), make_spec(compose("experiment=kairos_tiny")["data"]["spec"]), split="train"
    )
    clips = choose_episodes(dataset, 3, start=0)
    length = {entry.key: entry.length for entry in dataset.entries()}
    assert len({clip.task for clip in clips[:2]}) == 2
    assert length[clips[0].episode] >= length[clips[2].episode] and clips[0].task == clips[2].task
    assert all(clip.step == 0 for clip in clips)


def test_shuffled_actions_are_the_same_actions():
    actions = torch.arange(2 * 8 * 3.0).reshape(2, 8, 3)
    mixed = shuffled(actions, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(1).values, actions) and not torch.equal(mixed, actions)
