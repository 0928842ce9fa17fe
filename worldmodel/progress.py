"""Where a phase stands: saved every few steps and when the run is told to stop, found again when it goes on."""

import shutil
from pathlib import Path
from typing import Any

import lightning as L

from worldmodel.sharding import Sharded, complete

LAST = "last.ckpt"
"""A file, or with sharded weights the beginning of the names of folders, the newest of which counts."""


class SaveProgress(L.Callback):
    """Saves every few steps and on SIGTERM, by rename, so that a killed save never leaves half a checkpoint."""

    def __init__(self, *, folder: Path, every: int) -> None:
        self.path, self.every = folder / LAST, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning raises `SIGTERMException` right after this hook when `Watch` has told it that a signal came."""
        if trainer.received_sigterm or trainer.global_step % self.every == 0:
            self.save(trainer)
        if trainer.received_sigterm and isinstance(trainer.strategy, Sharded):
            trainer.strategy.wait()

    def save(self, trainer: L.Trainer) -> None:
        """Writes the checkpoint, or with sharded weights begins to."""
        if isinstance(trainer.strategy, Sharded):
            trainer.save_checkpoint(self.path)
            return
        part = self.path.with_suffix(".part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(self.path)
        trainer.strategy.barrier()  # a rank that ends sooner may have the launcher end the others


def resume_point(folder: Path) -> Path | None:
    """The newest checkpoint of a phase that was written to the end, None if there is none."""
    found = [path for path in sorted(folder.glob(f"{LAST}*")) if path.is_file() or complete(path)]
    return found[-1] if found else None


def forget(folder: Path) -> None:
    """Removes the checkpoints of a phase, which a finished one needs no more."""
    for path in folder.glob(f"{Path(LAST).stem}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
