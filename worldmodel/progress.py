"""Where a phase stands: saved every few steps and when the run is told to stop, found again when it goes on."""

import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from worldmodel.ranks import mean_over_ranks, world_size
from worldmodel.sharding import Sharded, complete

LAST = "last.ckpt"
"""A file, or with sharded weights the beginning of the names of folders, the newest of which counts."""


class SaveProgress(L.Callback):
    """Saves every few steps and on SIGTERM, by rename, so that a killed save never leaves half a checkpoint."""

    def __init__(self, *, folder: Path, every: int) -> None:
        self.path, self.every = folder / LAST, every
        self.told = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes SIGTERM down as a note where there are several processes, which must stop after the same step."""
        if world_size() > 1:
            # Lightning's own handler talks to the other processes from wherever the signal came.
            signal.signal(signal.SIGTERM, self.note)

    def note(self, signum: int, frame: Any) -> None:
        """Remembers the signal for the end of the step."""
        self.told = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Of one process alone, Lightning raises `SIGTERMException` right after this hook when the signal came."""
        stop = trainer.received_sigterm
        if world_size() > 1:
            stop = bool(mean_over_ranks(torch.tensor(float(self.told), device=pl_module.device)))
        if stop or trainer.global_step % self.every == 0:
            self.save(trainer)
        if stop and isinstance(trainer.strategy, Sharded):
            trainer.strategy.wait()
        if stop and world_size() > 1:
            raise SIGTERMException

    def save(self, trainer: L.Trainer) -> None:
        """Writes the checkpoint, or with sharded weights begins to."""
        if isinstance(trainer.strategy, Sharded):
            trainer.save_checkpoint(self.path)
            return
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(self.path)


def resume_point(folder: Path) -> Path | None:
    """The newest checkpoint of a phase that was written to the end, None if there is none."""
    found = [path for path in sorted(folder.glob(f"{LAST}*")) if path.is_file() or complete(path)]
    return found[-1] if found else None


def forget(folder: Path) -> None:
    """Removes the checkpoints of a phase, which a finished one needs no more."""
    for path in folder.glob(f"{Path(LAST).stem}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
