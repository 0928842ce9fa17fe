"""Mixtures: what was asked is what is drawn, and nothing of a source repeats before all of it was seen."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from synthetic import made_up_dataset

from worldmodel.contracts import Batch, ClipSpec
from worldmodel.data.datamodule import ClipDataModule, MixtureLog
from worldmodel.data.mixture import PERIOD, Source, apportion, make_sources
from worldmodel.data.sampler import StreamSampler
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, merge_statistics
from worldmodel.errors import ConfigError, DataError

SPEC = ClipSpec(
    cameras=("front",), embodiments=("robot_a", "robot_b"), height=16, width=16, fps=20.0, action=4, proprio=4, future=1
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("mixture")
    groups = {("robot_a", "lift"): 2, ("robot_a", "push"): 1, ("robot_b", "lift"): 3}
    one = made_up_dataset(folder / "one", groups)
    return str(one), str(made_up_dataset(folder / "two", {("robot_b", "lift"): 4}))


def module(root: str, mixture: Any = None, **settings: Any) -> ClipDataModule:
    given = {"root": root, "spec": SPEC, "mixture": mixture, "batch_size": 16, "seed": 5, "images": False, **settings}
    return ClipDataModule(**given)


def test_shares_add_up_and_are_never_nothing() -> None:
    assert apportion([1.0]) == [PERIOD]
    assert apportion([0.7, 0.3]) == [7000, 3000]
    assert apportion([1, 1, 1]) == [3334, 3333, 3333]
    for seed in range(50):
        rng = np.random.default_rng(seed)
        weights = rng.exponential(1.0, rng.integers(1, 40)) ** 4
        shares = np.array(apportion(weights.tolist()))
        assert shares.sum() == PERIOD and shares.min() >= 1
        assert np.abs(shares - weights / weights.sum() * PERIOD).max() <= max(1, len(weights))


@pytest.mark.parametrize("seed", range(8))
def test_each_block_has_the_shares_and_each_part_its_epochs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = int(rng.integers(1, 5))
    sizes, shares = rng.integers(1, 30, parts).tolist(), rng.integers(1, 20, parts).tolist()
    ranks, batch, block = int(rng.integers(1, 4)), int(rng.integers(1, 6)), sum(shares)
    readers = [
        StreamSampler(sizes, batch, seed=seed, shares=shares, rank=rank, world_size=ranks) for rank in range(ranks)
    ]
    stream = [clip for k in range(12 * block // (batch * ranks) + 1) for reader in readers for clip in reader.batch(k)]
    ends = np.cumsum(sizes)
    drawn = np.searchsorted(ends, stream, side="right")
    for first in range(0, 12 * block, block):
        assert np.bincount(drawn[first : first + block], minlength=parts).tolist() == shares
    for part, size in enumerate(sizes):
        own = [clip for clip, p in zip(stream, drawn, strict=True) if p == part]
        for first in range(0, len(own) - size, size):
            assert sorted(own[first : first + size]) == list(range(ends[part] - size, ends[part]))
    # Any batch can be had without those before it, and after those behind it.
    k = int(rng.integers(0, 12 * block // (batch * ranks)))
    fresh = StreamSampler(sizes, batch, seed=seed, shares=shares, rank=ranks - 1, world_size=ranks)
    assert fresh.batch(k) == readers[-1].batch(k) == next(iter(_started(fresh, k)))


def _started(sampler: StreamSampler, number: int) -> StreamSampler:
    sampler.start = number
    return sampler


def test_one_dataset_is_a_mixture_of_one(roots: tuple[str, str]) -> None:
    plain, mixed = module(roots[0]), module(roots[0], [{"root": roots[0], "weight": 3}])
    batches = [[b.key for b in itertools.islice(data.train_dataloader(), 12)] for data in (plain, mixed)]
    assert batches[0] == batches[1] and plain.train_clips.asked() == {"one": 1.0}
    keys = [key for batch in batches[0] for key in batch]
    size = len(plain.train_clips)
    assert len(set(keys[:size])) == size and len(set(keys[size : 2 * size])) == size


def test_the_realised_mix_is_the_asked_one(roots: tuple[str, str]) -> None:
    mixture = [
        {"root": roots[0], "weight": 3, "embodiments": {"robot_a": 2, "robot_b": 1}, "tasks": {"lift": 1, "push": 4}},
        {"root": roots[1], "weight": 1},
    ]
    data = module(roots[0], mixture, batch_size=50, num_workers=0)
    asked = data.train_clips.asked()
    assert asked == {"one/robot_a/lift": 0.1, "one/robot_a/push": 0.4, "one/robot_b/lift": 0.25, "two": 0.25}
    counts: Counter[str] = Counter()
    frames: dict[str, set[int]] = {"one": set(), "two": set()}
    for batch in itertools.islice(data.train_dataloader(), 40):
        assert isinstance(batch, Batch)
        for key, frame in zip(batch.key, batch.frame.tolist(), strict=True):
            root, robot, task = key.split("-")[:3]
            counts["two" if root == "two" else f"{root}/{robot}/{task}"] += 1
            frames[root].update(frame)
    realised = data.realised
    assert {name: counts[name] / 2000 for name in asked} == pytest.approx(realised)
    # A binomial of 2000 draws would be within 0.03 but for one run in many thousands; blocks are tighter.
    assert all(abs(realised[name] - asked[name]) < 0.03 for name in asked)
    assert max(frames["one"]) < data.reader.frames <= min(frames["two"])
    state = data.state_dict()
    assert sum(state["drawn"]) == 2000
    again = module(roots[0], mixture, batch_size=50)
    again.load_state_dict(state)
    assert again.realised == realised
    with pytest.raises(ConfigError, match=r"cannot resume the data order .*parts: \['one/robot_a/lift'.*\['one'\] now"):
        module(roots[0], batch_size=50).load_state_dict(state)


def test_a_list_takes_only_these_in_proportion(roots: tuple[str, str]) -> None:
    data = module(roots[0], [{"root": roots[0], "embodiments": ["robot_a"]}], complete=False)
    assert data.train_clips.asked() == {"one": 1.0}
    assert all("robot_a" in key for batch in itertools.islice(data.train_dataloader(), 5) for key in batch.key)
    only = module(roots[0], tasks={"push": 1, "lift": 0}, complete=False)
    assert only.train_clips.asked() == {"one/push": 1.0}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "field": ({"wieght": 2}, "unknown field 'wieght' of a source; it has"),
    "negative": ({"weight": -1}, "weight -1 must be 0 or more"),
    "nothing": ({"weight": 0}, "no source with a weight above 0"),
    "task": ({"tasks": {"stack": 1}}, r"no tasks \['stack'\] to train on; it has \['lift', 'push'\]"),
    "embodiment": ({"embodiments": ["robot_z"]}, r"no embodiments \['robot_z'\] to train on"),
    "empty": ({"embodiments": {"robot_b": 1}, "tasks": {"push": 1}}, r"'robot_b' has no weighted task; .*\['lift'\]"),
    "all zero": ({"tasks": {"push": 0}}, "not all 0"),
    "text": ({"tasks": "push"}, "weights by name or a list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_mixture_is_refused_by_name(roots: tuple[str, str], case: str) -> None:
    values, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        module(roots[0], [{"root": roots[0], **values}], complete=False)


def test_sources_need_a_root_and_tasks_are_named_once(roots: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="has no root"):
        make_sources([{"weight": 1}])
    with pytest.raises(ConfigError, match="not both"):
        module(roots[0], [Source(root=roots[0])], tasks=["lift"])


def test_statistics_of_several_datasets_are_those_of_the_union(tmp_path: Path) -> None:
    one = made_up_dataset(tmp_path / "one", {("robot_a", "lift"): 2, ("robot_b", "lift"): 1})
    two = made_up_dataset(tmp_path / "two", {("human", "lift"): 1, ("robot_a", "push"): 3}, length=9)
    parts = [load_statistics(root) for root in (one, two)]
    assert merge_statistics([{**parts[0], "instructions": ["b", "a"]}, {**parts[1], "instructions": ["c", "a"]}])[
        "instructions"
    ] == ["a", "b", "c"]
    merged = merge_statistics(parts)["embodiments"]
    assert set(merged) == {"robot_a", "robot_b", "human"} and merge_statistics(parts[:1]) is parts[0]
    readers = [ShardReader(root) for root in (one, two)]
    values = [r.read(i).action for r in readers for i, e in enumerate(r.entries) if e.embodiment == "robot_a"]
    action = np.concatenate([value for value in values if value is not None])
    found = merged["robot_a"]["action"]
    assert found["count"] == len(action) and "action" not in merged["human"]
    np.testing.assert_allclose(found["mean"], action.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["std"], action.std(0), atol=1e-6)
    np.testing.assert_allclose(found["max"], action.max(0), atol=1e-6)
    parts[1]["embodiments"]["robot_a"]["action"]["mean"] = [0.0]
    with pytest.raises(DataError, match=r"embodiment 'robot_a': field 'action' has the shapes \[\(1,\), \(4,\)\]"):
        merge_statistics(parts)


def test_a_phase_names_its_own_mixture() -> None:
    from worldmodel.phase_run import data_settings, other_roots
    from worldmodel.phases import make_phases

    own = [{"root": "b", "weight": 1}, {"root": "a", "weight": 2}, {"root": "c", "weight": 0}]
    phase = {"objective": "tokeniser", "trains": [], "steps": 1, "batch_size": 1, "learning_rate": 0.1}
    phases = make_phases({"first": phase, "second": {**phase, "data": {"mixture": own}}})
    config = {"data": {"root": "a", "mixture": None, "on_error": "skip"}}
    assert [data_settings(config, p)["mixture"] for p in phases] == [None, own]
    assert other_roots(config, phases) == ["b"] and other_roots(config, phases[:1]) == []
    with pytest.raises(ConfigError, match=r"phase 'first': data\.roots is none of mixture, on_error"):
        make_phases({"first": {**phase, "data": {"roots": []}}})


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*", "ignore:.*does not have many workers.*")
def test_the_realised_mix_is_in_the_csv_of_a_run(roots: tuple[str, str], tmp_path: Path) -> None:
    data = module(roots[0], [{"root": roots[0]}, {"root": roots[1], "weight": 3}], batch_size=8)
    trainer = L.Trainer(
        max_steps=10,
        logger=CSVLogger(tmp_path, name="", version=""),
        log_every_n_steps=1,
        callbacks=[MixtureLog(every=5)],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(BoringClips(), data)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    last = [line.split(",") for line in lines[1:] if line.split(",")[header.index("mix/two")]][-1]
    assert float(last[header.index("mix/two")]) == pytest.approx(0.75, abs=0.2)
    assert data.batches_done() == 10 and sum(data.realised.values()) == pytest.approx(1)


class BoringClips(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, _: int) -> None:
        """Present because a data module has a validation loader."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)
