"""The order of training batches, and the loader that hands them out and knows where it is.

The order is one endless stream of clips, cut into global batches and those into the batches of ranks. Batch k of
rank r is a pure function of (seed, k, r), so a run that resumes at batch k repeats and drops nothing; workers take
batches round robin and do not change the order.
"""

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler

from worldmodel.contracts import Batch, Pair
from worldmodel.data.clip import Skip
from worldmodel.data.dataset import Needs, Request
from worldmodel.data.mixture import PERIOD, Mixture
from worldmodel.data.pair_mixture import PairMixture
from worldmodel.errors import ConfigError

log = logging.getLogger(__name__)


class StreamSampler(Sampler[list[int]]):
    """Endless batches of clip numbers for one rank; starts at batch `start`.

    The stream is cut into blocks that hold each part of a mixture exactly as often as its share says, in an order that
    is drawn for the block. Inside a part, the n-th clip drawn is the n-th of its own stream of epochs, so every clip of
    the part comes once before any comes again.

    Args:
        sizes: clips of each part; clips are numbered over all parts.
        batch_size: clips per batch and rank.
        seed: of the order.
        shares: clips of each part in a block.
        rank: this process.
        world_size: processes that share the stream; their batches are disjoint parts of it.
        start: first batch, as a resumed run needs it.
        clips: size of batch number k of each rank, where batches differ; None is `batch_size` for all.

    Raises:
        ConfigError: no clips, or rank not below world_size.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        shares: Sequence[int] = (PERIOD,),
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        clips: Callable[[int], int] | None = None,
    ) -> None:
        if min(sizes) < 1 or batch_size < 1:
            raise ConfigError(f"sampler needs clips and a batch size of at least 1, got {list(sizes)} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} must be in 0..{world_size - 1}")
        self.sizes, self.shares, self.batch_size, self.seed = tuple(sizes), tuple(shares), batch_size, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._block = sum(shares)
        self._clips, self._before = clips, [0]
        self._firsts = np.cumsum([0, *sizes]).tolist()
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._patterns: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __iter__(self) -> Iterator[list[int]]:
        number = self.start
        while True:
            yield self.batch(number)
            number += 1

    def batch(self, number: int) -> list[int]:
        """Clips of batch `number` of this rank."""
        if self._clips is None:
            before, size = number * self.batch_size, self.batch_size
        else:
            while len(self._before) < number + 2:
                self._before.append(self._before[-1] + self._clips(len(self._before) - 1))
            before, size = self._before[number], self._before[number + 1] - self._before[number]
        first = before * self.world_size + self.rank * size
        return [self._clip(place) for place in range(first, first + size)]

    def _clip(self, place: int) -> int:
        block, within = divmod(place, self._block)
        parts, earlier = self._pattern(block)
        part = int(parts[within])
        epoch, number = divmod(block * self.shares[part] + int(earlier[within]), self.sizes[part])
        return self._firsts[part] + int(self._order(part, epoch)[number])

    def _pattern(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Part of every place in a block, and how often that part came before in the block."""
        if block not in self._patterns:
            parts = np.repeat(np.arange(len(self.shares)), self.shares)
            np.random.default_rng(np.random.SeedSequence([self.seed, block, 0, 0, 1])).shuffle(parts)
            earlier = np.empty_like(parts)
            for part, share in enumerate(self.shares):
                earlier[parts == part] = np.arange(share)
            # A batch may straddle two blocks, and two epochs; older ones are not needed again.
            self._patterns = {b: p for b, p in self._patterns.items() if b == block - 1} | {block: (parts, earlier)}
        return self._patterns[block]

    def _order(self, part: int, epoch: int) -> np.ndarray:
        if (part, epoch) not in self._orders:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, part])).permutation(
                self.sizes[part]
            )
            self._orders.pop((part, epoch - 2), None)
            self._orders[part, epoch] = order
        return self._orders[part, epoch]


class Tally:
    """What the batches of a run held, exact at any batch: reports of batches still in flight are kept apart."""

    def __init__(self, parts: int) -> None:
        self.drawn = np.zeros(parts, np.int64)
        """Clips of each part of the mixture, of the batches that count as done."""
        self.skipped: dict[str, dict[str, Any]] = {}
        """Damaged episode -> `reason` and number of `clips` replaced, of the batches that count as done."""
        self._flying: deque[tuple[int, np.ndarray, list[Skip]]] = deque()
        self._known: dict[str, int] = {}

    def add(self, number: int, drawn: np.ndarray, skips: list[Skip]) -> None:
        """Note what batch `number` held and passed over; the first time an episode comes up it is logged."""
        self._flying.append((number, drawn, skips))
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

    def settle(self, number: int, *, forget: bool = False) -> None:
        """Count the batches before `number` as done, and forget the later ones if they are to come again."""
        while self._flying and self._flying[0][0] < number:
            _, drawn, skips = self._flying.popleft()
            self.drawn += drawn
            for skip in skips:
                record = self.skipped.setdefault(skip.key, {"reason": skip.reason, "clips": 0})
                record["clips"] += 1
        if forget:
            self._flying.clear()

    def load(self, drawn: Sequence[int], skipped: dict[str, dict[str, Any]]) -> None:
        """Go on counting from a checkpoint."""
        self.drawn[:] = drawn
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
        dataset: Mixture | PairMixture,
        sampler: StreamSampler,
        num_workers: int,
        needs: Callable[[int], Needs] | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.sampler, self.position, self.needs = sampler, sampler.start, needs
        self.waited = 0.0
        """Seconds that whoever iterates has waited for batches."""
        self.tally = Tally(len(dataset.parts)) if tally is None else tally
        self._asked: deque[np.ndarray] = deque()
        self._dataset, self._num_workers = dataset, num_workers

    def __iter__(self) -> Iterator[Batch | Pair]:
        self.sampler.start = self.position
        self._asked.clear()
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._requests(),
            collate_fn=self._dataset.deliver,
            num_workers=self._num_workers,
            persistent_workers=False,
            worker_init_fn=ignore_signals,
        )
        batches = iter(loader)
        while True:
            since = time.perf_counter()
            delivery = next(batches, None)
            self.waited += time.perf_counter() - since
            if delivery is None:
                return
            self.tally.add(self.position, self._asked.popleft(), delivery.skips)
            self.position += 1
            yield delivery.batch

    def _requests(self) -> Iterator[list[Request]]:
        for number, indices in enumerate(self.sampler, self.position):
            needs = Needs() if self.needs is None else self.needs(number)
            chosen = indices if needs.rows is None else spread(indices, needs.rows)
            parts = [self._dataset.part(index) for index in chosen]
            self._asked.append(np.bincount(parts, minlength=len(self._dataset.parts)))
            yield [
                Request(index, needs.history, needs.future, ahead, needs.bucket)
                for index in chosen
                for ahead in range(needs.chunks)
            ]


def ignore_signals(worker: int) -> None:
    """Keeps a loader process alive when a whole job is told to stop: what trains needs it until it has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def spread(items: Sequence[int], count: int) -> list[int]:
    """`count` of some items, evenly spread, so that the parts of a whole together give what the whole would."""
    size = len(items)
    if count >= size:
        return list(items)
    return [item for i, item in enumerate(items) if (i + 1) * count // size > i * count // size]
