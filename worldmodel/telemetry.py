"""What a run says of itself: losses and gradients as averages between two lines of the log, speed, waiting, memory."""

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from worldmodel.contracts import STREAMS, Batch, Pair
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.flops import Cost, matmul_peak, measure_cost

GIB = 2**30
PRECISIONS = {
    "bf16": torch.bfloat16,
    "transformer-engine": torch.bfloat16,
    "16": torch.float16,
    "32": torch.float32,
    "64": torch.float64,
}
"""Beginning of a `trainer.precision` -> the type of its matrix products."""
KINDS = (*STREAMS, "actions")


class Averages:
    """Means of named scalars over steps, summed where they are: nothing waits for the device until they are taken."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Counts one value of each; those that are NaN are not there."""
        row = torch.stack([value.detach().float().reshape(()) for value in values.values()])
        known = ~row.isnan()
        both = torch.stack([row.nan_to_num(posinf=torch.inf, neginf=-torch.inf), known.float()])
        names = tuple(values)
        self.sums[names] = self.sums[names] + both if names in self.sums else both

    def take(self, trainer: L.Trainer) -> dict[str, float]:
        """The means over steps and ranks since the last call. All ranks must have counted the same names."""
        if not self.sums:
            return {}
        total = torch.cat([self.sums[names] for names in sorted(self.sums)], 1)
        names = [name for group in sorted(self.sums) for name in group]
        self.sums.clear()
        sums: dict[str, list[float]] = {}
        for name, value, count in zip(
            names, *all_ranks(trainer, total.flatten()).sum(0).view(2, -1).tolist(), strict=True
        ):
            before = sums.get(name, [0.0, 0.0])
            sums[name] = [before[0] + value, before[1] + count]
        return {name: value / count for name, (value, count) in sums.items() if count}


def all_ranks(trainer: L.Trainer, values: Tensor) -> Tensor:
    """A vector (N,) of every rank: (ranks, N)."""
    strategy: Any = trainer.strategy
    return strategy.all_gather(values.to(strategy.root_device)).reshape(-1, len(values))


def due(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether this batch ends a step that is logged."""
    every: int = getattr(trainer, "log_every_n_steps")  # noqa: B009 set by a connector, which type checkers do not see
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and trainer.global_step % every == 0


class TrainingLog(L.Callback):
    """Logs the averages of the phase's losses and of the gradient norm before clipping, learning rate and EMA decay.

    `decay` gives the decay of the moving average after a number of steps.
    """

    def __init__(self, *, decay: Callable[[int], float]) -> None:
        self.decay = decay

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs at the trainer's interval."""
        if not due(trainer, batch_idx):
            return
        found = pl_module.averages.take(trainer)
        values = {name if name == "gradient_norm" else f"{pl_module.phase.name}/{name}": v for name, v in found.items()}
        values["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        values["ema_decay"] = self.decay(trainer.global_step)
        pl_module.log_dict(values)


class Throughput(L.Callback):
    """Logs the speed of all ranks together since the last line of the log.

    `samples_per_s` counts clips; `tokens_per_s` what both transformers read, history and future, also by stream; `mfu`
    is the rate of the FLOPs that the model needs (see `flops`) over the peak of as many devices, which is measured at
    the first step; `data_wait` the share of time that the rank that waits the longest waits for batches; `memory_gib`
    the most memory of any rank: of the CUDA allocator since the last line, elsewhere of the process since its start.
    What a step costs is measured once for every kind of batch, on one sample of it, outside the time that counts (for
    pairs on the first batch, whose mix of kinds stands for all).
    """

    def __init__(self) -> None:
        self.costs: dict[tuple[Any, ...], Cost] = {}
        self.samples, self.flops, self.waited, self.since = 0, 0.0, 0.0, time.perf_counter()
        self.tokens: dict[str, float] = {name: 0.0 for name in KINDS}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measures the peak of the device and starts counting."""
        kinds = [kind for start, kind in PRECISIONS.items() if str(trainer.precision).startswith(start)]
        self.peak = matmul_peak(pl_module.device, kinds[0])
        self.restart(trainer)

    def restart(self, trainer: L.Trainer) -> None:
        """Starts counting anew."""
        self.samples, self.flops, self.waited = 0, 0.0, self.total_wait(trainer)
        self.tokens = {name: 0.0 for name in KINDS}
        self.since = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Batch | Pair, batch_idx: int) -> None:
        """Counts what this batch will cost."""
        started, phase = time.perf_counter(), pl_module.phase
        pick = phase.pick(pl_module.seed, trainer.global_step) if phase.mixture else None
        first = batch.source if isinstance(batch, Pair) else batch
        rows = len(batch.key) if isinstance(batch, Pair) else 1 if pick is None else phase.clips(pick)
        shapes = tuple(value.shape[1:] for value in (first.observation.rgb, first.future.rgb, first.observation.text))
        kind = (None if pick is None else phase.mixture.index(pick), *shapes)
        if kind not in self.costs:
            part = head(batch, rows)
            with trainer.precision_plugin.train_step_context():
                cost = measure_cost(pl_module, pl_module.model, lambda: pl_module.losses(part))
            self.costs[kind] = Cost(cost.flops / rows, {name: n / rows for name, n in cost.tokens.items()})
            self.since += time.perf_counter() - started
        cost, count = self.costs[kind], len(batch.key)
        self.samples += count
        self.flops += count * cost.flops
        for name, n in cost.tokens.items():
            self.tokens[name] += count * n

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs at the trainer's interval."""
        if not due(trainer, batch_idx):
            return
        span = time.perf_counter() - self.since
        wait = (self.total_wait(trainer) - self.waited) / span
        counted = [self.samples / span, self.flops / span, *(n / span for n in self.tokens.values())]
        mine = torch.tensor([wait, peak_memory(pl_module.device), *counted])
        ranks = all_ranks(trainer, mine)
        most, total = ranks.amax(0).tolist(), ranks.sum(0).tolist()
        samples, flops, *tokens = total[2:]
        values = {"samples_per_s": samples, "mfu": flops / (len(ranks) * self.peak), "data_wait": most[0]}
        values |= {"memory_gib": most[1]}
        if sum(tokens):
            values |= {f"tokens_per_s/{name}": n for name, n in zip(KINDS, tokens, strict=True) if n}
            values["tokens_per_s"] = sum(tokens)
        pl_module.log_dict(values)
        self.restart(trainer)

    def total_wait(self, trainer: L.Trainer) -> float:
        """Seconds that training has waited for batches so far."""
        data: Any = getattr(trainer, "datamodule", None)
        return data.waited if isinstance(data, ClipDataModule) else 0.0


def head(value: Any, rows: int) -> Any:
    """The first rows of a batch."""
    if isinstance(value, Tensor | list):
        return value[:rows]
    return type(value)(*(head(part, rows) for part in value)) if hasattr(value, "_fields") else value


def peak_memory(device: torch.device) -> float:
    """GiB: the most that the CUDA allocator held since the last call; elsewhere the most that the process ever had."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
