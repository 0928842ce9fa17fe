"""The Lightning data module: which clips train, in which order, and how an interrupted run finds its place again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Subset

from worldmodel.contracts import ClipSpec
from worldmodel.data.dataset import ClipDataset, Needs, collate
from worldmodel.data.embodiments import check_embodiments
from worldmodel.data.sampler import StreamLoader, StreamSampler, Tally
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError


class ClipDataModule(L.LightningDataModule):
    """Training clips of split `train` and evaluation clips of the held-out splits.

    Args:
        root: dataset folder.
        spec: names and sizes of the clips.
        batch_size: clips per batch and rank.
        seed: of the training order.
        num_workers: loader processes; 0 loads in the training process.
        tasks: only these training tasks; None is all.
        only_success: leave failed demonstrations out of training and evaluation.
        images: False leaves all pictures out.
        future: False leaves future pictures out.
        camera_map: see `ClipDataset`.
        cache_bytes: bound of the decoded pictures kept in memory, per process.
        reader: an open reader of `root` whose cache to share, instead of one of its own.
        on_error: `raise` stops training at a damaged sample, `skip` replaces it (see `ClipDataset`) and counts it in
            `skipped`, in the log and in the checkpoint. Evaluation always raises.
        needs: what training batch number k will use (see `Needs`); None is everything. Rows it leaves out are not made
            up for: that batch is smaller.
        validation_clips: clips of `heldout_episodes` in the validation loader, evenly spread; None is all.

    Raises:
        DataError: the data do not fit `spec`, or training would see a held-out split or task.
    """

    def __init__(
        self,
        *,
        root: str,
        spec: ClipSpec,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        tasks: Sequence[str] | None = None,
        only_success: bool = True,
        images: bool = True,
        future: bool = True,
        camera_map: Mapping[str, str | None] | None = None,
        cache_bytes: int = 1 << 30,
        reader: ShardReader | None = None,
        on_error: str = "raise",
        needs: Callable[[int], Needs] | None = None,
        validation_clips: int | None = 256,
    ) -> None:
        super().__init__()
        self.root, self.spec, self.batch_size, self.seed = root, spec, batch_size, seed
        self.num_workers, self.validation_clips, self.needs = num_workers, validation_clips, needs
        # A truncated shard is a fault of the samples that it lost, which `skip` passes over one by one.
        self.reader = reader or ShardReader(root, cache_bytes=cache_bytes, check_sizes=on_error == "raise")
        self._options: dict[str, Any] = {
            "only_success": only_success,
            "images": images,
            "future": future,
            "camera_map": camera_map,
        }
        self.train_clips = ClipDataset(
            self.reader, spec, split="train", tasks=tasks, on_error=on_error, **self._options
        )
        refuse_heldout(self.train_clips)
        check_embodiments(spec, {entry.embodiment for entry in self.train_clips.entries()}, root)
        self._loader: StreamLoader | None = None
        self._tally = Tally()
        self._start = 0
        self._counted_by: L.Trainer | None = None
        self._processed_before = 0

    def train_dataloader(self) -> StreamLoader:
        """Endless training batches from where the run is; limit them by steps."""
        self._start = self.batches_done()
        self._tally.settle(self._start)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self._counted_by, self._processed_before = self.trainer, self._processed()
        sampler = StreamSampler(
            len(self.train_clips), self.batch_size, seed=self.seed, rank=rank, world_size=world_size, start=self._start
        )
        self._loader = StreamLoader(self.train_clips, sampler, self.num_workers, self.needs, self._tally)
        return self._loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Clips of `heldout_episodes` in a fixed order."""
        return self.evaluation_loader("heldout_episodes", clips=self.validation_clips)

    def evaluation_loader(
        self, split: str, *, clips: int | None = None, batch_size: int | None = None
    ) -> DataLoader[Any]:
        """Clips of `split` in order, `clips` of them evenly spread (None is all)."""
        dataset = ClipDataset(self.reader, self.spec, split=split, **self._options)
        count = len(dataset) if clips is None else min(clips, len(dataset))
        chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
        return DataLoader(
            Subset(dataset, chosen),
            batch_size=batch_size or self.batch_size,
            collate_fn=collate,
            num_workers=self.num_workers,
        )

    def batches_done(self) -> int:
        """Training batches of this rank that are used up, earlier runs included."""
        if self._loader is None or self.trainer is not self._counted_by:
            return self._start
        if self.trainer is None:
            return self._loader.position
        return self._start + self._processed() - self._processed_before

    @property
    def skipped(self) -> dict[str, dict[str, Any]]:
        """Damaged episodes by key: `reason`, and how many `clips` of the batches done were replaced."""
        self._tally.settle(self.batches_done())
        return self._tally.skipped

    def state_dict(self) -> dict[str, Any]:
        """Position in the training stream, what it depends on, and what was passed over up to it."""
        return {
            "batches": self.batches_done(),
            "skipped": self.skipped,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "size": len(self.train_clips),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of `state_dict`.

        Raises:
            ConfigError: seed, batch size or data differ, so that the position means something else.
        """
        now = self.state_dict()
        differing = [
            f"{name}: {state_dict[name]} then, {now[name]} now"
            for name in ("batch_size", "seed", "size")
            if state_dict[name] != now[name]
        ]
        if differing:
            raise ConfigError(f"cannot resume the data order of {self.root}: " + "; ".join(differing))
        self._start = int(state_dict["batches"])
        self._tally.load(state_dict.get("skipped", {}))

    def _processed(self) -> int:
        # Lightning fetches a batch ahead, so what the loader handed out is not what was trained on.
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed


def refuse_heldout(clips: ClipDataset) -> None:
    """Raise `DataError` if `clips` hold an entry that training must not see, by the shard index."""
    for entry in clips.entries():
        if entry.split != "train" or entry.task in clips.reader.heldout_tasks:
            raise DataError(
                f"{entry.shard}: key {entry.key}: task {entry.task!r} of split {entry.split!r} must not be trained on; "
                f"held-out tasks: {list(clips.reader.heldout_tasks)}, the only split for training is 'train'"
            )
