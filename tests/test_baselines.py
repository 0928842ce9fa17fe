"""The behaviour-cloning baseline: learns, saves, and answers only what it knows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from worldmodel.baselines import BCMLPFactory, BCMLPPolicy, gather_samples, load_bc_mlp, train_bc_mlp
from worldmodel.contracts import ClipSpec
from worldmodel.data.schema import Episode
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ContractError, DataError

torch.set_num_threads(1)

SPEC = ClipSpec(points=3, chunk=4)
LENGTH = 20


def episode(number: int, task: str, count: int, success: bool = True) -> Episode:
    """An arm that always moves towards its first point; cameras and touch are absent."""
    rng = np.random.default_rng(number)
    points = np.broadcast_to(rng.uniform(-1, 1, (count, 3)), (LENGTH, count, 3)).astype(np.float32)
    proprio = rng.uniform(-1, 1, (LENGTH, 3)).astype(np.float32)
    names = [f"point{i}" for i in range(count)]
    meta = {
        "schema_version": 1, "episode_id": f"e{number}", "embodiment": "gantry", "task": task, "instruction": task,
        "split": "train", "fps": 20.0, "length": LENGTH, "success": success, "absent": ["rgb", "camera", "tactile"],
        "point_names": names, "proprio_names": ["x", "y", "z"], "action_names": ["x", "y", "z"],
    }  # fmt: skip
    action = np.clip(points[:, 0] - proprio, -1, 1)
    visible = np.ones((LENGTH, count), bool)
    return Episode(meta=meta, points=points, visible=visible, proprio=proprio, action=action)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    root = tmp_path_factory.mktemp("shards")
    samples = [(f"e{i}", episode(i, "lift" if i % 2 else "push", 1 + i % 2, success=i != 9)) for i in range(10)]
    write_index(root, [write_shard(root / "shard-000000.tar", samples)], [], {})
    return ShardReader(root)


def test_samples_are_padded_and_failures_left_out(reader: ShardReader) -> None:
    samples, instructions, robots = gather_samples(reader, SPEC)
    assert robots == {"gantry": 3} and instructions == ("push", "lift") and len(samples.state) == 9 * LENGTH
    assert samples.state.shape[1] == 3 + 3 * SPEC.points
    push = samples.task == 0
    assert samples.present[push].sum(0).tolist() == [5 * LENGTH, 0, 0]
    assert samples.valid[:LENGTH].sum(0).tolist() == [LENGTH - ahead for ahead in range(SPEC.chunk)]
    with pytest.raises(DataError, match="2 points, expected at most 1"):
        gather_samples(reader, ClipSpec(points=1))


def test_baseline_learns_and_survives_saving(reader: ShardReader, tmp_path: Path) -> None:
    before = train_bc_mlp(reader, SPEC, steps=1, batch=64, progress=False)
    model = train_bc_mlp(reader, SPEC, steps=150, batch=64, progress=False)
    samples, *_ = gather_samples(reader, SPEC)

    def error(one: torch.nn.Module) -> float:
        with torch.inference_mode():
            return (one(*samples[:4]) - samples.actions)[:, 0].abs().mean().item()

    assert error(model) < 0.5 * error(before)
    model.save(tmp_path / "bc")
    policy = BCMLPFactory(tmp_path / "bc")()
    policy.observe({"points": np.ones((2, 3)), "proprio": np.zeros(3), "instruction": "lift"})
    first = np.asarray(policy.act())
    assert first.shape == (SPEC.chunk, 3)
    same = BCMLPPolicy(model)
    same.observe({"points": np.ones((2, 3)), "proprio": np.zeros(3), "instruction": "lift"})
    np.testing.assert_array_equal(same.act(), first)


def test_bad_observations_and_files_are_named(reader: ShardReader, tmp_path: Path) -> None:
    policy = BCMLPPolicy(train_bc_mlp(reader, SPEC, steps=1, batch=8, progress=False))
    with pytest.raises(ContractError, match="points, proprio, instruction not observed yet"):
        policy.act()
    policy.observe({"points": np.zeros((4, 3)), "proprio": np.zeros(3), "instruction": "lift"})
    with pytest.raises(ContractError, match=r"points: got \[4, 3\], expected \[at most 3, 3\]"):
        policy.act()
    policy.observe({"instruction": "dance"})
    with pytest.raises(ContractError, match=r"'dance' was not in training, expected one of \['push', 'lift'\]"):
        policy.act()
    with pytest.raises(DataError, match="no readable behaviour-cloning baseline"):
        load_bc_mlp(tmp_path)
    policy.model.save(tmp_path)
    description = tmp_path / "bc_mlp.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"schema_version": 0}))
    with pytest.raises(DataError, match="schema_version 0, expected 1"):
        load_bc_mlp(tmp_path)
