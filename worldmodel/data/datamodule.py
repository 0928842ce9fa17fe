"""The Lightning data module: which clips train, in which order, and how an interrupted run finds its place again.

The order of training batches is one endless stream: the permutations of all epochs, one after another, cut into global
batches. Batch k of rank r is a pure function of (seed, k, r), so a run that resumes at batch k repeats and drops
nothing; workers take batches round robin and do not change the order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Sampler, Subset

from worldmodel.contracts import Batch, ClipSpec
from worldmodel.data.dataset import ClipDataset, Needs, Request, collate
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError


class StreamSampler(Sampler[list[int]]):
    """Endless batches of indices below `size` for one rank; starts at batch `start`.

    Args:
        size: number of items.
        batch_size: items per batch and rank.
        seed: of the order.
        rank: this process.
        world_size: processes that share the stream; their batches are disjoint parts of it.
        start: first batch, as a resumed run needs it.

    Raises:
        ConfigError: no items, or rank not below world_size.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        if size < 1 or batch_size < 1:
            raise ConfigError(f"sampler needs items and a batch size of at least 1, got {size} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} must be in 0..{world_size - 1}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._orders: dict[int, np.ndarray] = {}

    def __iter__(self) -> Iterator[list[int]]:
        number = self.start
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> list[int]:
        """Indices of batch `number` of this rank."""
        first = (number * self.world_size + self.rank) * self.batch_size
        return [int(self._order(p // self.size)[p % self.size]) for p in range(first, first + self.batch_size)]

    def epoch(self, number: int) -> float:
        """Epochs of the data that lie before batch `number`."""
        return number * self.world_size * self.batch_size / self.size

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(self.size)
            # A batch may straddle two epochs; older orders are not needed again.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1} | {epoch: order}
        return self._orders[epoch]


class StreamLoader:
    """Iterable over training batches that counts what it has handed out.

    Plain and without length, so that Lightning leaves its sampler alone; `position` survives prefetching by workers
    because it counts batches that left the loader, not batches that were asked of it. `needs` says of each batch number
    what it will use.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        sampler: StreamSampler,
        num_workers: int,
        needs: Callable[[int], Needs] | None = None,
    ) -> None:
        self.sampler, self.position, self.needs = sampler, sampler.start, needs
        self._dataset, self._num_workers = dataset, num_workers

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.start = self.position
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._requests(),
            collate_fn=collate,
            num_workers=self._num_workers,
            persistent_workers=False,
        )
        for batch in loader:
            self.position += 1
            yield batch

    def _requests(self) -> Iterator[list[Request]]:
        for number, indices in enumerate(self.sampler, self.position):
            rows, images, future = Needs() if self.needs is None else self.needs(number)
            yield [Request(index, images, future) for index in indices[:rows]]


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
        needs: Callable[[int], Needs] | None = None,
        validation_clips: int | None = 256,
    ) -> None:
        super().__init__()
        self.root, self.spec, self.batch_size, self.seed = root, spec, batch_size, seed
        self.num_workers, self.validation_clips, self.needs = num_workers, validation_clips, needs
        self.reader = reader or ShardReader(root, cache_bytes=cache_bytes)
        self._options: dict[str, Any] = {
            "only_success": only_success,
            "images": images,
            "future": future,
            "camera_map": camera_map,
        }
        self.train_clips = ClipDataset(self.reader, spec, split="train", tasks=tasks, **self._options)
        refuse_heldout(self.train_clips)
        self._loader: StreamLoader | None = None
        self._start = 0
        self._processed_before = 0

    def train_dataloader(self) -> StreamLoader:
        """Endless training batches from where the run stopped; limit them by steps."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self._processed_before = self._processed()
        sampler = StreamSampler(
            len(self.train_clips), self.batch_size, seed=self.seed, rank=rank, world_size=world_size, start=self._start
        )
        self._loader = StreamLoader(self.train_clips, sampler, self.num_workers, self.needs)
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
        if self._loader is None:
            return self._start
        if self.trainer is None:
            return self._loader.position
        return self._start + self._processed() - self._processed_before

    def state_dict(self) -> dict[str, Any]:
        """Position in the training stream and what it depends on."""
        return {
            "batches": self.batches_done(),
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
