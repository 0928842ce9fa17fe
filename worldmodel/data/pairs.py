"""Pairs of clips: the same motion as it was recorded and with an element or the view changed.

Shape legend: see `worldmodel.contracts`. Items are numpy until `collate_pairs` makes a batch of tensors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from worldmodel.contracts import PAIR_KINDS, ClipSpec, Pair
from worldmodel.data.align import text_ids
from worldmodel.data.clip import Clip, collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError

_KIND_OF = {"element": "element", "objects": "element", "surfaces": "element", "view": "view"}
"""Kind of pair that a variant makes whose `vary` names this; one of several kinds, or with other lights, makes none."""


SEEN_THROUGH = 24
"""Levels of 255 by which a pixel of another element must differ to count as changed: glass shows what is behind it.
More than what JPEG spoils beside an edge."""


class PairItem(NamedTuple):
    """One pair before it is part of a batch."""

    source: Clip
    target: Clip
    mask: np.ndarray  # (H + F*R, V, h, w) bool
    text: np.ndarray  # (L,) int64
    kind: int


class Link(NamedTuple):
    """A variant, its original, and what it changes."""

    source: int  # number in the reader
    target: int
    kind: str
    changed: tuple[str, ...]
    edit: str


class PairDataset(Dataset[PairItem]):
    """Every time step of every variant that changes looks or the view alone, beside the same step of its original.

    Variants of an episode are those that `python -m worldmodel.data generate ... --vary` made.

    Args:
        reader: the dataset.
        spec: names and sizes of the clips.
        split: which split to take.
        kinds: which of `PAIR_KINDS`.
        tasks: only these tasks; None is all of the split.
        only_success: leave failed demonstrations out.
        seed: of the order of the items; None is that of the dataset, step by step.

    Raises:
        ConfigError: unknown kind.
        DataError: no such pair, an original without masks, or what `ClipDataset` raises.
    """

    def __init__(
        self,
        reader: ShardReader,
        spec: ClipSpec,
        *,
        split: str,
        kinds: Sequence[str] = PAIR_KINDS,
        tasks: Sequence[str] | None = None,
        only_success: bool = True,
        seed: int | None = None,
    ) -> None:
        if unknown := sorted(set(kinds) - set(PAIR_KINDS)):
            raise ConfigError(f"kinds of pairs: unknown {unknown}; known: {', '.join(PAIR_KINDS)}")
        self.reader, self.spec = reader, spec
        self.clips = ClipDataset(reader, spec, split=split, tasks=tasks, only_success=only_success, masks=True)
        self.links = [link for i in self.clips.episodes for link in self._links(i) if link.kind in kinds]
        if not self.links:
            raise DataError(
                f"{reader.root}: split {split!r} has no variant that changes {' or '.join(kinds)} alone; generate with "
                "--vary element --vary surfaces --vary view"
            )
        self._ends = np.cumsum([reader.entries[link.source].length for link in self.links])
        self._order = np.arange(len(self)) if seed is None else np.random.default_rng(seed).permutation(len(self))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[Link, int]:
        """The variant and the time step of pair `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        place = int(self._order[index])
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self.links[number], place - (int(self._ends[number - 1]) if number else 0)

    def __getitem__(self, index: int) -> PairItem:
        link, step = self.locate(index)
        source, target = self.clips.at(link.source, step), self.clips.at(link.target, step)
        assert source.masks is not None
        shown = np.concatenate(source.masks[:2])
        if link.kind == "element":
            places = [self.clips.elements.index(name) for name in link.changed]
            mask = np.isin(shown, places) | (_change(source, target) > SEEN_THROUGH)
        else:
            mask = np.ones(shown.shape, bool)
        mask &= source.data.constant["has_rgb"][:, None, None]
        return PairItem(source, target, mask, text_ids(link.edit, self.spec.text), PAIR_KINDS.index(link.kind))

    def _links(self, i: int) -> list[Link]:
        """The variants of episode `i` that are any use as pairs; none of one that is a variant itself."""
        entry, found = self.reader.entries[i], []
        for j in self.reader.variants(entry.episode_id):
            meta = self.reader.read(j, images=False).meta
            kinds = {_KIND_OF.get(name, "") for name in meta.get("vary", ())}
            if len(kinds) != 1 or "" in kinds:
                continue
            other = self.reader.entries[j]
            if other.length != entry.length:
                raise DataError(
                    f"{other.shard}: key {other.key}: {other.length} steps, its original {entry.key} has "
                    f"{entry.length}; `python -m worldmodel.data validate` lists every fault"
                )
            found.append(Link(i, j, kinds.pop(), tuple(meta["changed"]), meta["edit"]))
        return found


def _change(source: Clip, target: Clip) -> np.ndarray:
    """(H + F*R, V, h, w) levels of 255 by which the channels of a pixel differ at most."""
    before, after = (np.concatenate(clip.pictures) for clip in (source, target))
    return (np.maximum(before, after) - np.minimum(before, after)).max(2)


def collate_pairs(items: Sequence[PairItem]) -> Pair:
    """One batch of tensors from pairs of one dataset."""
    return Pair(
        source=collate([item.source for item in items]),
        target=collate([item.target for item in items]),
        mask=torch.from_numpy(np.stack([item.mask for item in items])),
        text=torch.from_numpy(np.stack([item.text for item in items])),
        kind=torch.tensor([item.kind for item in items]),
    )
