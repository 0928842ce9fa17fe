"""Damaged samples: refused by default, replaced and counted under policy `skip`, never silent."""

import copy
import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from worldmodel.contracts import ClipSpec
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError, SampleError

SPEC = ClipSpec()


def damage(root: Path, key: str) -> None:
    entry = next(e for e in ShardReader(root, check_sizes=False).entries if e.key == key)
    data = bytearray((root / entry.shard).read_bytes())
    data[entry.offset + entry.size // 2] ^= 1
    (root / entry.shard).write_bytes(data)


@pytest.fixture
def damaged(tiny_dataset: Path, tmp_path: Path) -> Path:
    root = shutil.copytree(tiny_dataset, tmp_path / "copy")
    damage(root, "metaworld-drawer-close-v3-train-000001")
    return root


def module(root: Path, **settings: Any) -> ClipDataModule:
    return ClipDataModule(
        **{"root": str(root), "spec": SPEC, "batch_size": 8, "seed": 3, "images": False, "on_error": "skip", **settings}
    )


def keys(data: ClipDataModule, count: int) -> list[list[str]]:
    return [batch.key for batch in itertools.islice(data.train_dataloader(), count)]


def test_a_damaged_sample_stops_training_by_default(damaged: Path) -> None:
    with pytest.raises(SampleError, match=r"shard-000000.tar: key metaworld-drawer-close-v3-train-000001: altered"):
        keys(module(damaged, on_error="raise"), 30)
    with pytest.raises(ConfigError, match="on_error 'ignore' is none of raise, skip"):
        module(damaged, on_error="ignore")


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_clips_are_replaced_counted_logged_and_kept_in_the_checkpoint(
    damaged: Path, tiny_dataset: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    sound = [key for batch in keys(module(tiny_dataset), 20) for key in batch]
    data = module(damaged, num_workers=workers)
    with caplog.at_level(logging.WARNING):
        found = [key for batch in keys(data, 20) for key in batch]
    lost = [key for key in sound if "drawer-close-v3-train-000001" in key]
    assert lost and not any("drawer-close-v3-train-000001" in key for key in found)
    assert [a for a in sound if a not in lost] == [b for a, b in zip(sound, found, strict=True) if a not in lost]
    state = copy.deepcopy(data.state_dict())
    record = state["skipped"][f"{damaged}: metaworld-drawer-close-v3-train-000001"]
    assert record["clips"] == len(lost) and "altered" in record["reason"]
    messages = [r.getMessage() for r in caplog.records if "damaged episode skipped" in r.getMessage()]
    assert len(messages) == 1 and "so far 1 clips of 1 episodes replaced" in messages[0]
    # Resumed, it goes on counting, and what comes is what would have come.
    again = module(damaged, num_workers=workers)
    again.load_state_dict(state)
    assert keys(again, 10) == keys(data, 10)
    assert again.state_dict() == data.state_dict() and again.skipped != state["skipped"]


def test_batches_in_flight_are_not_counted(damaged: Path) -> None:
    data = module(damaged)
    keys(data, 12)
    data.batches_done = lambda: 5  # type: ignore[method-assign]  # what a trainer that fetched ahead would say
    early = copy.deepcopy(data.skipped)
    other = module(damaged)
    keys(other, 5)
    assert early == other.skipped


def test_evaluation_and_a_dataset_without_a_good_sample_raise(damaged: Path) -> None:
    damage(damaged, "metaworld-drawer-close-v3-heldout_episodes-000000")
    with pytest.raises(SampleError, match="altered"):
        list(module(damaged).val_dataloader())
    (damaged / "shard-000000.tar").write_bytes(b"")
    reader = ShardReader(damaged, check_sizes=False)
    with pytest.raises(DataError, match=r"every episode of embodiment 'sawyer' is damaged"):
        ClipDataset(reader, SPEC, split="train", tasks=["drawer-close-v3"], on_error="skip")
    assert all("drawer" not in key for batch in keys(module(damaged), 5) for key in batch)


def test_datasets_that_share_keys_are_counted_apart(damaged: Path, tmp_path: Path) -> None:
    other = shutil.copytree(damaged, tmp_path / "other")
    data = module(damaged, mixture=[{"root": str(damaged)}, {"root": str(other)}])
    keys(data, 30)
    state = data.state_dict()["skipped"]
    assert set(state) == {f"{root}: metaworld-drawer-close-v3-train-000001" for root in (damaged, other)}
