"""The order of training batches, and the loader that hands them out and knows where it is.

The order is one endless stream: the permutations of all epochs, one after another, cut into global batches. Batch k of
rank r is a pure function of (seed, k, r), so a run that resumes at batch k repeats and drops nothing; workers take
batches round robin and do not change the order.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from worldmodel.contracts import Batch
from worldmodel.data.dataset import ClipDataset, Needs, Request, Skip, deliver
from worldmodel.errors import ConfigError

log = logging.getLogger(__name__)


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


class Tally:
    """What the batches of a run held, exact at any batch: reports of batches still in flight are kept apart."""

    def __init__(self) -> None:
        self.skipped: dict[str, dict[str, Any]] = {}
        """Damaged episode -> `reason` and number of `clips` replaced, of the batches that count as done."""
        self._flying: deque[tuple[int, list[Skip]]] = deque()
        self._known: dict[str, int] = {}

    def add(self, number: int, skips: list[Skip]) -> None:
        """Note what batch `number` passed over; the first time an episode comes up it is logged."""
        self._flying.append((number, skips))
        for skip in skips:
            first = skip.key not in self._known
            self._known[skip.key] = self._known.get(skip.key, 0) + 1
            if first:
                log.warning(
                    "damaged episode skipped: %s; so far %d clips of %d episodes replaced",
                    skip.reason,
                    sum(self._known.values()),
                    len(self._known),
                )

    def settle(self, number: int) -> None:
        """Count the batches before `number` as done."""
        while self._flying and self._flying[0][0] < number:
            for skip in self._flying.popleft()[1]:
                record = self.skipped.setdefault(skip.key, {"reason": skip.reason, "clips": 0})
                record["clips"] += 1

    def load(self, skipped: dict[str, dict[str, Any]]) -> None:
        """Go on counting from a checkpoint."""
        self.skipped = {key: dict(record) for key, record in skipped.items()}
        self._known = {key: record["clips"] for key, record in skipped.items()}


class StreamLoader:
    """Iterable over training batches that counts what it has handed out.

    Plain and without length, so that Lightning leaves its sampler alone; `position` survives prefetching by workers
    because it counts batches that left the loader, not batches that were asked of it. `needs` says of each batch number
    what it will use; `tally` takes the reports that come with the batches.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        sampler: StreamSampler,
        num_workers: int,
        needs: Callable[[int], Needs] | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.sampler, self.position, self.needs = sampler, sampler.start, needs
        self.tally = Tally() if tally is None else tally
        self._dataset, self._num_workers = dataset, num_workers

    def __iter__(self) -> Iterator[Batch]:
        self.sampler.start = self.position
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._requests(),
            collate_fn=deliver,
            num_workers=self._num_workers,
            persistent_workers=False,
        )
        for delivery in loader:
            self.tally.add(self.position, delivery.skips)
            self.position += 1
            yield delivery.batch

    def _requests(self) -> Iterator[list[Request]]:
        for number, indices in enumerate(self.sampler, self.position):
            rows, images, future = Needs() if self.needs is None else self.needs(number)
            yield [Request(index, images, future) for index in indices[:rows]]
