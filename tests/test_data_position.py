"""The place in the training stream: after a stop anywhere, what comes next is what would have come."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import made_up_dataset

from worldmodel.contracts import ClipSpec
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.dataset import Needs
from worldmodel.errors import ConfigError

SPEC = ClipSpec(
    cameras=("front",), embodiments=("robot_a", "robot_b"), height=16, width=16, fps=20.0, action=4, proprio=4, future=1
)
BATCHES = 14


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    groups = {("robot_a", "lift"): 2, ("robot_b", "lift"): 1}
    return str(made_up_dataset(tmp_path_factory.mktemp("position") / "data", groups, length=5))


class FakeTrainer:
    """As much of a trainer as the data module asks: ranks, and how many batches were trained on."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.global_rank, self.world_size = rank, ranks
        total = SimpleNamespace(processed=0)
        self.progress = total
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=total)))
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=lambda x: torch.stack([x] * ranks))


def module(root: str, *, rank: int = 0, ranks: int = 1, **settings: Any) -> ClipDataModule:
    mixture = [{"root": root, "embodiments": {"robot_a": 1, "robot_b": 2}}]
    given = {"root": root, "spec": SPEC, "mixture": mixture, "batch_size": 3, "seed": 11, "images": False, **settings}
    data = ClipDataModule(**given)
    data.trainer = FakeTrainer(rank, ranks)  # type: ignore[assignment]
    return data


def run(data: ClipDataModule, count: int, *, ahead: int = 0) -> list[list[str]]:
    """Keys of `count` batches trained on, of which the loader handed out `ahead` more."""
    keys = []
    for number, batch in enumerate(itertools.islice(data.train_dataloader(), count + ahead)):
        if number < count:
            keys.append(batch.key)
            data.trainer.progress.processed += 1  # type: ignore[union-attr]
    return keys


def chain(root: str, stops: list[int], **settings: Any) -> tuple[list[list[str]], dict[str, Any]]:
    """Keys of a run that stops at every one of `stops` and resumes from its state in a new process."""
    state, keys = None, []
    for first, last in itertools.pairwise([0, *stops]):
        data = module(root, **settings)
        if state is not None:
            data.load_state_dict(state)
        keys += run(data, last - first, ahead=first % 2)
        state = data.state_dict()
    assert state is not None
    return keys, state


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_a_stop_anywhere_twice_in_one_epoch_too(root: str, ranks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stops = sorted(rng.choice(np.arange(1, BATCHES), int(rng.integers(1, 5)), replace=False).tolist())
    for rank in range(ranks):
        whole, after = chain(root, [BATCHES], rank=rank, ranks=ranks)
        parts, state = chain(root, [*stops, BATCHES], rank=rank, ranks=ranks)
        assert parts == whole
        assert state["batches"] == after["batches"] == BATCHES


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_change_nothing_and_may_change_on_resume(root: str, ranks: int) -> None:
    rank = ranks - 1
    whole, after = chain(root, [BATCHES], rank=rank, ranks=ranks)
    first = module(root, rank=rank, ranks=ranks, num_workers=2)
    keys = run(first, 5, ahead=1)
    second = module(root, rank=rank, ranks=ranks)
    second.load_state_dict(first.state_dict())
    keys += run(second, 3)
    third = module(root, rank=rank, ranks=ranks, num_workers=2)
    third.load_state_dict(second.state_dict())
    assert keys + run(third, BATCHES - 8) == whole
    if ranks == 1:
        assert third.state_dict() == after


def test_another_loader_in_the_same_run_goes_on(root: str) -> None:
    data = module(root)
    assert run(data, 4, ahead=1) + run(data, BATCHES - 4) == chain(root, [BATCHES])[0]
    assert sum(data.state_dict()["drawn"]) == 3 * BATCHES


def test_ranks_may_change_where_the_global_batch_stays(root: str) -> None:
    two = [module(root, rank=rank, ranks=2, batch_size=3) for rank in (0, 1)]
    begun = [run(data, 4) for data in two]
    state = two[0].state_dict()
    one = module(root, batch_size=6)
    one.load_state_dict(state)
    whole = chain(root, [BATCHES], batch_size=6)[0]
    assert [a + b for a, b in zip(*begun, strict=True)] + run(one, BATCHES - 4) == whole


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_parts_of_batches_are_the_same_on_any_number_of_ranks(root: str, rows: int) -> None:
    def needs(share: int) -> dict[str, Any]:
        return {"needs": lambda number: Needs(future=number % 2 == 0, rows=share)}

    two = [module(root, rank=rank, ranks=2, **needs(rows)) for rank in (0, 1)]
    begun = [run(data, 4) for data in two]
    one = module(root, batch_size=6, **needs(2 * rows))
    one.load_state_dict(two[0].state_dict())
    whole = chain(root, [BATCHES], batch_size=6, **needs(2 * rows))[0]
    assert {len(batch) for batch in whole} == {2 * rows}
    assert [a + b for a, b in zip(*begun, strict=True)] + run(one, BATCHES - 4) == whole


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({"batch_size": 4}, "3 × 2 then, 4 × 2 now; their product must stay 6"),
    "ranks": ({"ranks": 3}, "3 × 2 then, 3 × 3 now; their product must stay 6"),
    "seed": ({"seed": 12}, "seed: 11 then, 12 now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_that_cannot_be_exact_is_refused(root: str, change: str) -> None:
    data = module(root, ranks=2)
    run(data, 2)
    settings, message = CHANGES[change]
    with pytest.raises(ConfigError, match=message):
        module(root, **{"ranks": 2, **settings}).load_state_dict(data.state_dict())


def test_other_data_of_the_same_name_are_refused(root: str, tmp_path: Path) -> None:
    state = module(root).state_dict()
    groups = {("robot_a", "lift"): 2, ("robot_b", "lift"): 2}
    other = made_up_dataset(tmp_path / "data", groups, length=5)
    with pytest.raises(ConfigError, match=r"sizes: \[11, 5\] then, \[11, 11\] now"):
        module(str(other)).load_state_dict(state)


def test_a_checkpoint_counts_all_ranks_once(root: str) -> None:
    two = [module(root, rank=rank, ranks=2) for rank in (0, 1)]
    for data in two:
        run(data, 4)
    # The fake gathers what its own rank says from both.
    state = two[0].state_dict()
    assert sum(state["drawn"]) == 2 * 4 * 3
    resumed = [module(root, rank=rank, ranks=2) for rank in (0, 1)]
    for data in resumed:
        data.load_state_dict(state)
    assert [int(data._tally.drawn.sum()) for data in resumed] == [24, 0]
