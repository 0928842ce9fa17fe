"""Stops all ranks of a run together, where a number is not finite or where one of them was told to stop."""

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from worldmodel.data.datamodule import gather_reports
from worldmodel.telemetry import all_ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to save and stop."""


class Report(NamedTuple):
    """What the ranks said of one batch."""

    phase: str
    step: int
    keys: list[str]  # of this rank's batch
    read: Callable[[], list[list[float]]]  # loss, gradient norm and whether it was told to stop, of every rank


class Watch(L.Callback):
    """Lets every rank know of every other's loss, gradient norm and signals, and acts on all of them at the same step.

    A loss or norm that is not finite raises `FloatingPointError` everywhere; its rank and batch keys are in the message
    and in the file `path`. A rank that gets SIGTERM or SIGUSR1 makes all save and stop: Lightning's own handlers send
    to other ranks whatever these are doing, which can leave them waiting for each other, so they are replaced while a
    phase trains. What is said of a batch is read when the next one is done, so that the device need not wait for the
    host, or before anything is saved: a checkpoint never has weights from after such a step.
    """

    asked = False
    """Whether this process was told to stop, be it in the last moments of the phase before."""

    def __init__(self, *, path: Path) -> None:
        self.path = path
        self.last: Report | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listens; Lightning puts the handlers back that were there before the phase."""
        for number in SIGNALS:
            signal.signal(number, self.ask)

    def ask(self, number: int, frame: Any) -> None:
        """Notes a signal."""
        Watch.asked = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tells the others about this batch and acts on what they said of the last."""
        self.settle(trainer)
        loss = outputs["loss"].detach().float()
        asked = torch.full_like(loss, float(self.asked))
        flags = torch.stack([loss, pl_module.gradient_norm.to(loss), asked])
        self.last = Report(pl_module.phase.name, trainer.global_step, batch.key, on_host(all_ranks(trainer, flags)))
        if trainer.global_step >= trainer.max_steps:
            self.settle(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Acts before anything is saved."""
        self.settle(trainer)

    def settle(self, trainer: L.Trainer) -> None:
        """Acts on what was said of the last batch."""
        if self.last is None:
            return
        report, self.last = self.last, None
        said = report.read()
        if not all(math.isfinite(value) for row in said for value in row):
            self.fail(trainer, report, said)
        if any(asked for *_, asked in said):
            Watch.asked = False
            connector: Any = trainer._signal_connector
            connector.received_sigterm = True  # Lightning ends the run after this batch

    def fail(self, trainer: L.Trainer, report: Report, said: list[list[float]]) -> None:
        """Writes down whose numbers are not finite and raises; gradients are those of all ranks together."""
        keys = [found["keys"] for found in gather_reports(trainer, {"keys": report.keys})]
        losses, norms = [row[0] for row in said], [row[1] for row in said]
        guilty = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        what, ranks = ("loss", guilty) if guilty else ("gradient norm", list(range(len(said))))
        record = {"phase": report.phase, "step": report.step, "what": what}
        record["ranks"] = [
            {"rank": r, "loss": str(losses[r]), "gradient_norm": str(norms[r]), "keys": keys[r]} for r in ranks
        ]
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(record, indent=1))
        named = "; ".join(f"rank {r}: batch keys {keys[r][:8]}" for r in ranks)
        raise FloatingPointError(
            f"phase {report.phase!r}, step {report.step}: the {what} is not finite; {named}; all keys in {self.path}"
        )


def on_host(values: Tensor) -> Callable[[], list[list[float]]]:
    """Copies values from the device without waiting for it; the result waits for the copy alone."""
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[list[float]]:
        done.synchronize()
        return copy.tolist()

    return read
