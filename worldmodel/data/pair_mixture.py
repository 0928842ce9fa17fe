"""Pairs of clips of several kinds as one stream of training items, each kind as often as it is asked for."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from worldmodel.contracts import ClipSpec, Pair
from worldmodel.data.clip import Skip
from worldmodel.data.dataset import Request
from worldmodel.data.mixture import PERIOD, apportion
from worldmodel.data.pairs import PairDataset, PairItem, collate_pairs
from worldmodel.data.shards import ShardReader


class PairDelivery(NamedTuple):
    """A batch of pairs as it leaves a worker; damaged ones raise instead of being passed over."""

    batch: Pair
    skips: list[Skip]


class PairMixture(Dataset[PairItem]):
    """The training pairs of a dataset, one kind after another, as a `mixture.Mixture` has its clips.

    Args:
        reader: the dataset.
        spec: names and sizes of the clips.
        kinds: weight of each kind, names of `PAIR_KINDS`.
        only_success: leave failed demonstrations out.

    Raises:
        ConfigError: unknown kind.
        DataError: no pair of a kind.
    """

    def __init__(self, reader: ShardReader, spec: ClipSpec, kinds: Mapping[str, float], *, only_success: bool) -> None:
        weights = {kind: weight for kind, weight in kinds.items() if weight > 0}
        self.pairs = [
            PairDataset(reader, spec, split="train", kinds=[kind], only_success=only_success) for kind in weights
        ]
        self.parts = [pairs.clips for pairs in self.pairs]
        self.names = list(weights)
        self.sizes = [len(pairs) for pairs in self.pairs]
        self.shares = apportion(list(weights.values()))
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int | Request) -> PairItem:
        number = index.clip if isinstance(index, Request) else index
        part = self.part(number)
        return self.pairs[part][number - int(self._ends[part] - self.sizes[part])]

    def part(self, index: int) -> int:
        """Number of the kind that pair `index` is of."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def asked(self) -> dict[str, float]:
        """Share of every kind by name."""
        return {name: share / PERIOD for name, share in zip(self.names, self.shares, strict=True)}

    @staticmethod
    def deliver(items: Sequence[PairItem]) -> PairDelivery:
        """A batch of pairs."""
        return PairDelivery(collate_pairs(items), [])
