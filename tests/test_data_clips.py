"""Clips, their order, and what training may see."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from synthetic import one

from worldmodel.contracts import Batch, ClipSpec
from worldmodel.data.align import text_ids
from worldmodel.data.cache import ByteCache
from worldmodel.data.clip import collate
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.dataset import ClipDataset, Request
from worldmodel.data.live import observation_from_history
from worldmodel.data.sampler import StreamSampler
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, ContractError, DataError

SPEC = ClipSpec()


@pytest.fixture(scope="module")
def reader(tiny_dataset: Path) -> ShardReader:
    return ShardReader(tiny_dataset)


@pytest.fixture(scope="module")
def clips(reader: ShardReader) -> ClipDataset:
    return ClipDataset(reader, SPEC, split="train")


def test_clip_in_the_middle_holds_the_promised_steps(reader: ShardReader, clips: ClipDataset) -> None:
    step, episode = 10, reader.read(0)
    clip = clips[step]
    history, last = [step - 8, step - 4, step], step + np.arange(1, 9)
    np.testing.assert_array_equal(one(clip).observation.rgb[:, 0], episode.rgb["front"][history].transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(one(clip).future.rgb[:, 1], episode.rgb["wrist"][last].transpose(0, 3, 1, 2))
    assert episode.wrench is not None and episode.action is not None and episode.points is not None
    np.testing.assert_array_equal(one(clip).observation.wrench[1], episode.wrench[step - 7 : step - 3])
    np.testing.assert_allclose(one(clip).future.wrench[0], episode.wrench[step + 1 : step + 5].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(one(clip).future.camera_to_base[:, 1], episode.camera_to_base["wrist"][[14, 18]])
    np.testing.assert_array_equal(one(clip).future.actions[:, :4], episode.action[step : step + 8])
    np.testing.assert_array_equal(one(clip).future.points[:, :2], episode.points[[14, 18]])
    assert one(clip).future.valid.all() and one(clip).future.action_valid.all()
    assert one(clip).future.action_dims.tolist() == [True] * 4 + [False] * 4
    assert one(clip).observation.has_points.tolist() == [True, True, False, False]
    assert one(clip).observation.has_taxels.tolist() == [False, True, True]
    assert one(clip).frame.tolist() == history
    assert clip.key == "metaworld-drawer-close-v3-train-000000@10"
    text = bytes(int(n) - 1 for n in one(clip).observation.text if n).decode()
    assert text == episode.meta["instruction"]


def test_clips_are_clamped_at_both_ends_and_say_so(reader: ShardReader, clips: ClipDataset) -> None:
    first, length = clips[0], reader.entries[0].length
    assert one(first).frame.tolist() == [0, 0, 0]
    wrench = one(first).observation.wrench.reshape(-1, 3, 6)
    np.testing.assert_array_equal(wrench, np.broadcast_to(wrench[0], wrench.shape))
    last = clips[length - 1]
    assert last.key.endswith(f"@{length - 1}")
    assert not one(last).future.valid.any()
    assert one(last).future.action_valid.tolist() == [True] + [False] * 7
    almost = clips[length - 1 - 4]
    assert one(almost).future.valid.tolist() == [True, False]
    assert one(almost).future.action_valid.tolist() == [True] * 5 + [False] * 3
    np.testing.assert_array_equal(one(last).future.rgb[-1], one(last).observation.rgb[-1])
    assert clips[length].key.endswith("000001@0") and one(clips[length]).frame[0] == length


def test_frame_numbers_count_over_all_splits(reader: ShardReader) -> None:
    heldout = ClipDataset(reader, SPEC, split="heldout_tasks", images=False)
    assert one(heldout[0]).frame[0] == sum(entry.length for entry in reader.entries[:-1])
    assert one(heldout[len(heldout) - 1]).frame[-1] == reader.frames - 1


def test_collate_makes_the_contract(clips: ClipDataset) -> None:
    batch = collate([clips[3], clips[40]])
    assert batch.observation.rgb.shape == (2, 3, 2, 3, 64, 64) and batch.observation.rgb.dtype == torch.uint8
    assert batch.observation.wrench.shape == (2, 3, 4, 3, 6)
    assert batch.observation.taxels.shape == (2, 3, 3, 3, 4, 4)
    assert batch.observation.text.dtype == batch.observation.embodiment.dtype == batch.frame.dtype == torch.int64
    assert batch.future.actions.shape == (2, 8, 8) and batch.future.actions.dtype == torch.float32
    assert batch.future.camera_to_base.shape == (2, 2, 2, 4, 4)
    masks = [value for name, value in batch.observation._asdict().items() if name.startswith("has_")]
    assert all(mask.dtype == torch.bool for mask in masks)
    assert batch.observation.has_text.shape == (2,)


def test_pictures_can_be_left_out(reader: ShardReader) -> None:
    clip = ClipDataset(reader, SPEC, split="train", future=False)[5]
    assert one(clip).observation.rgb.shape[-1] == 64 and one(clip).future.rgb.shape == (8, 2, 3, 0, 0)
    assert one(ClipDataset(reader, SPEC, split="train", images=False)[5]).observation.rgb.size == 0


def test_only_the_newest_pictures_come_where_no_others_are_used(clips: ClipDataset) -> None:
    whole, newest, none = (collate([clips[Request(i, history=n)] for i in (9, 0)]) for n in (None, 1, 0))
    assert torch.equal(newest.observation.rgb, whole.observation.rgb[:, -1:])
    assert none.observation.rgb.shape == (2, 3, 2, 3, 0, 0)
    for name, value in whole.observation._replace(rgb=whole.frame)._asdict().items():
        assert torch.equal(getattr(newest.observation._replace(rgb=newest.frame), name), value), name


def test_a_shard_has_one_header_a_member(reader: ShardReader) -> None:
    data, places = reader.path("shard-000000.tar").read_bytes(), reader.members(0)
    entry = reader.entries[0]
    assert entry.size == sum(512 + -(-len(member) // 512) * 512 for member in places.values()) < len(data)


def test_failed_demonstrations_are_counted_and_left_out(tiny_dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0]["entries"][0]["success"] = False
    (copy / "index.json").write_text(json.dumps(index))
    clips = ClipDataset(ShardReader(copy), SPEC, split="train", images=False)
    assert clips.left_out == 1 and len(clips.episodes) == 3
    assert len(clips) == sum(entry.length for entry in clips.entries())


def test_names_and_sizes_that_do_not_fit_are_refused_at_the_start(reader: ShardReader) -> None:
    with pytest.raises(DataError) as error:
        ClipDataset(reader, replace(SPEC, cameras=("front", "hand_eye")), split="train")
    message = str(error.value)
    for part in ("['hand_eye'] are missing", "['front', 'wrist']", "['front', 'hand_eye']", "{'hand_eye': 'wrist'}"):
        assert part in message
    mapped = ClipDataset(
        reader, replace(SPEC, cameras=("front", "hand_eye")), split="train", camera_map={"hand_eye": "wrist"}
    )
    np.testing.assert_array_equal(
        one(mapped[3]).observation.rgb[0, 1], reader.read(0).rgb["wrist"][0].transpose(2, 0, 1)
    )
    absent = ClipDataset(
        reader, replace(SPEC, cameras=("front", "side")), split="train", camera_map={"side": None}, images=False
    )
    assert (
        one(absent[0]).observation.has_rgb.tolist() == one(absent[0]).observation.has_camera.tolist() == [True, False]
    )
    with pytest.raises(DataError, match=r"fps 20.0, the clips ask for 10"):
        ClipDataset(reader, replace(SPEC, fps=10.0), split="train")
    with pytest.raises(DataError, match=r"proprio: 18 wide.*room for 9"):
        ClipDataset(reader, replace(SPEC, proprio=9), split="train")
    with pytest.raises(DataError, match=r"no split 'test'.*heldout_episodes"):
        ClipDataset(reader, SPEC, split="test")
    with pytest.raises(DataError, match=r"pictures of \(64, 64\), the clips ask for \(32, 32\)"):
        ClipDataset(reader, replace(SPEC, height=32, width=32), split="train")[0]
    with pytest.raises(ConfigError, match="does not fit the 4"):
        text_ids("Open.", 4)


def test_live_observation_equals_the_recorded_one(reader: ShardReader, clips: ClipDataset) -> None:
    episode = reader.read(0)
    assert episode.taxels is not None and episode.wrench is not None

    def flat(step: int) -> dict:
        observation = {f"rgb.{camera}": episode.rgb[camera][step] for camera in SPEC.cameras}
        for name in ("intrinsics", "camera_to_base"):
            observation |= {f"{name}.{camera}": getattr(episode, name)[camera][step] for camera in SPEC.cameras}
        for name in ("points", "visible", "wrench", "proprio"):
            observation[name] = getattr(episode, name)[step]
        taxels = np.zeros((3, 3, 4, 4), np.float32)
        taxels[1:] = episode.taxels[step]  # type: ignore[index]
        return observation | {
            "taxels": taxels,
            "has_taxels": np.array([False, True, True]),
            "instruction": episode.meta["instruction"],
        }

    for step in (0, 5, 15):
        live = observation_from_history([flat(i) for i in range(step + 1)], SPEC)
        recorded = collate([clips[step]]).observation
        for name, value in live._asdict().items():
            torch.testing.assert_close(value, getattr(recorded, name), rtol=0, atol=0, msg=name)
    with pytest.raises(ContractError, match=r"proprio: shape \(17,\), expected \(18,\)"):
        observation_from_history([flat(0) | {"proprio": np.zeros(17)}], SPEC)
    with pytest.raises(ContractError, match="history is empty"):
        observation_from_history([], SPEC)
    blind = flat(0)
    del blind["rgb.wrist"], blind["wrench"]
    masked = observation_from_history([blind], SPEC)
    assert masked.has_rgb.tolist() == [[True, False]] and not masked.has_wrench.any()


def test_cache_is_bounded_in_bytes() -> None:
    cache, made = ByteCache(100), []

    def get(key: int) -> bytes:
        return cache.get(key, lambda: made.append(key) or bytes(40), len)

    for key in (0, 1, 0, 2, 0, 1):
        get(key)
    assert made == [0, 1, 2, 1] and cache.used == 80


def test_sampler_covers_every_epoch_exactly_once_over_two_ranks() -> None:
    ranks = [StreamSampler([23], 3, seed=7, rank=rank, world_size=2) for rank in (0, 1)]
    stream = [index for k in range(23) for rank in ranks for index in rank.batch(k)]
    for epoch in range(6):
        assert sorted(stream[23 * epoch : 23 * (epoch + 1)]) == list(range(23))
    assert stream[:23] != stream[23:46]
    assert stream[:6] != [
        i for k in (0,) for rank in (0, 1) for i in StreamSampler([23], 3, seed=8, rank=rank, world_size=2).batch(k)
    ]
    with pytest.raises(ConfigError, match="rank 2"):
        StreamSampler([23], 3, seed=7, rank=2, world_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_twice_in_one_epoch_repeats_and_drops_nothing(tiny_dataset: Path, workers: int) -> None:
    def module() -> ClipDataModule:
        return ClipDataModule(
            root=str(tiny_dataset), spec=SPEC, batch_size=4, seed=3, images=False, num_workers=workers
        )

    whole = [batch.key for batch in itertools.islice(module().train_dataloader(), 9)]
    state, keys = module().state_dict(), []
    for count in (2, 4, 3):
        part = module()
        part.load_state_dict(state)
        keys += [batch.key for batch in itertools.islice(part.train_dataloader(), count)]
        state = part.state_dict()
    assert keys == whole and state["batches"] == 9
    other = ClipDataModule(root=str(tiny_dataset), spec=SPEC, batch_size=5, seed=3, images=False)
    with pytest.raises(ConfigError, match="4 × 1 then, 5 × 1 now; their product must stay 4"):
        other.load_state_dict(state)


class Recorder(L.LightningModule):
    """Learns nothing and remembers which clips it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.keys: list[list[str]] = []

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        self.keys.append(batch.key)
        return self.weight.sum()

    def validation_step(self, batch: Batch, _: int) -> None:
        """Present because a data module with a validation loader without it is warned about."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # Lightning 2.6 on torch 2.13
def test_a_lightning_checkpoint_resumes_the_order(tiny_dataset: Path, tmp_path: Path) -> None:
    def fit(steps: int, checkpoint: Path | None, save: Path | None) -> list[list[str]]:
        module, data = Recorder(), ClipDataModule(root=str(tiny_dataset), spec=SPEC, batch_size=4, seed=3, images=False)
        trainer = L.Trainer(
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=tmp_path,
        )
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        if save:
            trainer.save_checkpoint(save)
        return module.keys

    whole = fit(9, None, None)
    parts = fit(2, None, tmp_path / "a.ckpt") + fit(6, tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    assert parts + fit(9, tmp_path / "b.ckpt", None) == whole


def test_training_on_heldout_tasks_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    index["heldout_tasks"].append("button-press-topdown-v3")
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"shard-000001.tar: key .*'button-press-topdown-v3'.*must not be trained on"):
        ClipDataModule(root=str(copy), spec=SPEC, batch_size=4, seed=0)


def test_evaluation_loader_spreads_its_clips(tiny_dataset: Path) -> None:
    data = ClipDataModule(root=str(tiny_dataset), spec=SPEC, batch_size=4, seed=0, images=False, validation_clips=6)
    keys = [key for batch in data.val_dataloader() for key in batch.key]
    assert len(keys) == 6 and {key.split("-000000")[0] for key in keys} == {
        "metaworld-drawer-close-v3-heldout_episodes",
        "metaworld-button-press-topdown-v3-heldout_episodes",
    }
