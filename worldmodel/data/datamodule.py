"""The Lightning data module: which clips train, in which order, and how an interrupted run finds its place again."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from worldmodel.contracts import ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset, Needs
from worldmodel.data.embodiments import check_embodiments
from worldmodel.data.mixture import Mixture, Source, make_sources
from worldmodel.data.pair_mixture import PairMixture
from worldmodel.data.sampler import StreamLoader, StreamSampler, Tally
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError


class ClipDataModule(L.LightningDataModule):
    """Training clips of split `train` and evaluation clips of the held-out splits.

    Args:
        root: dataset folder; evaluation clips come from it and, without a mixture, training clips too.
        spec: names and sizes of the clips.
        batch_size: clips per batch and rank.
        seed: of the training order.
        num_workers: loader processes; 0 loads in the training process.
        tasks: only these training tasks of `root`, or weights by task; None is all.
        mixture: what training clips are drawn from and how often (see `mixture`), instead of `root` alone.
        pairs: weights of kinds of pairs (see `pair_mixture`); training batches are then pairs of `root`, not clips.
        only_success: leave failed demonstrations out of training and evaluation.
        images: False leaves all pictures out.
        future: False leaves future pictures out.
        masks: True adds masks to all batches (see `ClipDataset`).
        camera_map: see `ClipDataset`.
        cache_bytes: bound of the decoded pictures kept in memory, per process, shared out among the datasets.
        reader: an open reader of `root` whose cache to share, instead of one of its own.
        complete: whether the training data must have every embodiment of `spec`; False where other phases train on the
            rest.
        on_error: `raise` stops training at a damaged sample, `skip` replaces it (see `ClipDataset`) and counts it in
            `skipped`, in the log and in the checkpoint. Evaluation always raises.
        needs: what training batch number k will use (see `Needs`); None is everything. Rows it leaves out are not made
            up for: that batch is smaller. Whoever changes the number of ranks keeps the share of rows.
        clips: the sizes of batch that `needs` asks for, where they differ from `batch_size`; for a resume, which is
            exact on other ranks only if each of them scales.
        validation_clips: clips of `heldout_episodes` in the validation loader, evenly spread; None is all.

    Raises:
        DataError: the data do not fit `spec`, or training would see a held-out split or task.
        ConfigError: the mixture names what does not exist, or embodiments of data and `spec` differ.
    """

    def __init__(
        self,
        *,
        root: str,
        spec: ClipSpec,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        tasks: Sequence[str] | Mapping[str, float] | None = None,
        mixture: Sequence[Mapping[str, Any] | Source] | None = None,
        pairs: Mapping[str, float] | None = None,
        only_success: bool = True,
        images: bool = True,
        future: bool = True,
        masks: bool = False,
        camera_map: Mapping[str, str | None] | None = None,
        cache_bytes: int = 1 << 30,
        reader: ShardReader | None = None,
        on_error: str = "raise",
        complete: bool = True,
        needs: Callable[[int], Needs] | None = None,
        clips: Sequence[int] = (),
        validation_clips: int | None = 256,
    ) -> None:
        super().__init__()
        self.root, self.spec, self.batch_size, self.seed = root, spec, batch_size, seed
        self.num_workers, self.validation_clips, self.needs = num_workers, validation_clips, needs
        self.clips = list(clips)
        if mixture is not None and tasks is not None:
            raise ConfigError("give either `mixture`, whose sources name their tasks, or `tasks` of `root`, not both")
        if pairs and (mixture is not None or tasks is not None or camera_map is not None or on_error != "raise"):
            raise ConfigError("pairs come from all of `root` with its own names, and a damaged one is an error: leave "
                              "`mixture`, `tasks` and `camera_map` out, and `on_error` at raise")  # fmt: skip
        sources = make_sources([Source(root=root, tasks=tasks)] if mixture is None else mixture)
        roots = list(dict.fromkeys([root, *(source.root for source in sources)]))
        readers = {} if reader is None else {root: reader}
        for name in roots[len(readers) :]:
            # A truncated shard is a fault of the samples that it lost, which `skip` passes over one by one.
            readers[name] = ShardReader(name, cache_bytes=cache_bytes // len(roots), check_sizes=on_error == "raise")
        self.reader = readers[root]
        self._options: dict[str, Any] = {
            "only_success": only_success,
            "images": images,
            "future": future,
            "masks": masks,
            "camera_map": camera_map,
        }
        self.train_clips: Mixture | PairMixture
        if pairs:
            self.train_clips = PairMixture(self.reader, spec, pairs, only_success=only_success)
        else:
            self.train_clips = Mixture(sources, readers, spec, on_error=on_error, **self._options)
        for part in self.train_clips.parts:
            refuse_heldout(part)
        trained = {entry.embodiment for part in self.train_clips.parts for entry in part.entries()}
        check_embodiments(spec, trained, ", ".join(dict.fromkeys(s.root for s in sources)), complete=complete)
        self._loader: StreamLoader | None = None
        self._tally = Tally(len(self.train_clips.parts))
        self._start = 0
        self._counted_by: L.Trainer | None = None
        self._processed_before = 0

    def train_dataloader(self) -> StreamLoader:
        """Endless training batches from where the run is; limit them by steps."""
        self._start = self.batches_done()
        self._tally.settle(self._start, forget=True)
        rank, world_size = self._ranks()
        self._counted_by, self._processed_before = self.trainer, self._processed()
        sampler = StreamSampler(
            self.train_clips.sizes,
            self.batch_size,
            seed=self.seed,
            shares=self.train_clips.shares,
            rank=rank,
            world_size=world_size,
            start=self._start,
            clips=self._size if self.clips else None,
        )
        self._loader = StreamLoader(self.train_clips, sampler, self.num_workers, self.needs, self._tally)
        return self._loader

    def _size(self, number: int) -> int:
        """Clips of batch `number` of each rank."""
        clips = None if self.needs is None else self.needs(number).clips
        return self.batch_size if clips is None else clips

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
    def waited(self) -> float:
        """Seconds that training has waited for batches."""
        return 0.0 if self._loader is None else self._loader.waited

    @property
    def skipped(self) -> dict[str, dict[str, Any]]:
        """Damaged episodes by root and key: `reason`, and how many `clips` of this rank's batches were replaced."""
        self._tally.settle(self.batches_done())
        return self._tally.skipped

    @property
    def realised(self) -> dict[str, float]:
        """Share of every part in this rank's batches so far; `train_clips.asked()` is what it should be."""
        self._tally.settle(self.batches_done())
        total = max(int(self._tally.drawn.sum()), 1)
        return {name: int(n) / total for name, n in zip(self.train_clips.names, self._tally.drawn, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Position in the training stream, what it depends on, and what all ranks drew and passed over up to it.

        Every rank must call it at the same step, as Lightning does when it saves.
        """
        self._tally.settle(self.batches_done())
        drawn, skipped = np.zeros_like(self._tally.drawn), {}
        for report in gather_reports(
            self.trainer, {"drawn": self._tally.drawn.tolist(), "skipped": self._tally.skipped}
        ):
            drawn += np.array(report["drawn"], np.int64)
            for key, record in report["skipped"].items():
                clips = skipped.get(key, {"clips": 0})["clips"] + record["clips"]
                skipped[key] = {"reason": record["reason"], "clips": clips}
        return {"batches": self.batches_done(), **self._order(), "drawn": drawn.tolist(), "skipped": skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of `state_dict`.

        Workers do not matter. Another number of ranks is exact if the batch size changes with it, so that a global
        batch holds the same clips; anything else is refused.

        Raises:
            ConfigError: seed, global batch or data differ, so that the position means something else.
        """
        now = self._order()
        differing = [
            f"{name}: {state_dict.get(name)} then, {now[name]} now"
            for name in ("seed", "parts", "sizes", "shares")
            if state_dict.get(name) != now[name]
        ]
        then = {name: int(state_dict.get(name, 0)) for name in ("batch_size", "ranks")}
        clips = then["batch_size"] * then["ranks"]
        if clips != now["batch_size"] * now["ranks"]:
            differing.append(
                f"batch_size × ranks: {then['batch_size']} × {then['ranks']} then, {now['batch_size']} × "
                f"{now['ranks']} now; their product must stay {clips}"
            )
        before = [n * then["ranks"] for n in state_dict.get("clips", [])]
        if before != (after := [n * now["ranks"] for n in now["clips"]]):
            differing.append(
                f"clips of all ranks in the batches of each bucket: {before} then, {after} now; resume on "
                f"{then['ranks']} ranks"
            )
        if differing:
            raise ConfigError(f"cannot resume the data order of {self.root}: " + "; ".join(differing))
        self._start = int(state_dict["batches"])
        # The checkpoint has the sum over ranks, so one rank goes on from it.
        if self._ranks()[0] == 0:
            self._tally.load(state_dict["drawn"], state_dict["skipped"])

    def _order(self) -> dict[str, Any]:
        """Everything that the order of clips is a function of."""
        mixture = self.train_clips
        ranks = self._ranks()[1]
        order = {"batch_size": self.batch_size, "ranks": ranks, "seed": self.seed, "clips": self.clips}
        return {**order, "parts": mixture.names, "sizes": mixture.sizes, "shares": mixture.shares}

    def _ranks(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _processed(self) -> int:
        # Lightning fetches a batch ahead, so what the loader handed out is not what was trained on.
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed


def gather_reports(trainer: L.Trainer | None, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all ranks, carried as JSON in tensors. Every rank must call it at the same step."""
    if trainer is None or trainer.world_size == 1:
        return [report]
    strategy: Any = trainer.strategy
    data = torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8).to(strategy.root_device)
    sizes = strategy.all_gather(torch.tensor([len(data)], device=data.device)).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=data.device)
    padded[: len(data)] = data
    rows = strategy.all_gather(padded).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def refuse_heldout(clips: ClipDataset) -> None:
    """Raise `DataError` if `clips` hold an entry that training must not see, by the shard index."""
    for entry in clips.entries():
        if entry.split != "train" or entry.task in clips.reader.heldout_tasks:
            raise DataError(
                f"{entry.shard}: key {entry.key}: task {entry.task!r} of split {entry.split!r} must not be trained on; "
                f"held-out tasks: {list(clips.reader.heldout_tasks)}, the only split for training is 'train'"
            )


class MixtureLog(L.Callback):
    """Logs the realised mix and the number of replaced clips every few steps, where there is a mix or a replacement."""

    def __init__(self, *, every: int = 20) -> None:
        self.every = every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hands the figures to the loggers of the run."""
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(data, ClipDataModule) or trainer.global_step % self.every:
            return
        if len(data.realised) > 1:
            pl_module.log_dict({f"mix/{name}": share for name, share in data.realised.items()})
        if data.skipped:
            pl_module.log("skipped_clips", float(sum(record["clips"] for record in data.skipped.values())))
