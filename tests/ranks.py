"""Runs of `train` in several processes on the CPU, for tests; all are forked from one that has imported everything."""

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["ranks", "conftest", "worldmodel.curriculum", "lightning.pytorch", "torch.distributed.checkpoint"]


def train_in(
    ranks: int,
    config: dict[str, Any],
    out: Path,
    *,
    disturb: Callable[[list[Any]], None] | None = None,
    timeout: float = 300,
) -> list[int | None]:
    """Trains `config` in `ranks` processes as torchrun would start them; returns their exit codes.

    Each leaves `<out>/<rank>.json`: what was logged at every step, and the error if there was one. `disturb` is given
    the processes while they run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.mkdir(parents=True, exist_ok=True)
    settings = {**config, "trainer": {**config["trainer"], "devices": ranks}}
    group = [context.Process(target=one_rank, args=(rank, ranks, port, settings, str(out))) for rank in range(ranks)]
    for process in group:
        process.start()
    if disturb is not None:
        disturb(group)
    deadline = time.monotonic() + timeout
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in group:
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    return [process.exitcode for process in group]


def one_rank(rank: int, ranks: int, port: int, config: dict[str, Any], out: str) -> None:
    """One process of a run."""
    import warnings

    import torch

    from worldmodel.training import PhaseModule

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    logged: list[dict[str, float]] = []
    plain = PhaseModule.log_dict

    def note(self: Any, values: Any, *args: Any, **kwargs: Any) -> None:
        if any(name.endswith("/loss") for name in values):
            step = {"step": self.global_step, **{name: float(value) for name, value in values.items()}}
            logged.append(step)
            with open(f"{out}/{rank}.jsonl", "a") as file:
                file.write(json.dumps(step) + "\n")
        plain(self, values, *args, **kwargs)

    PhaseModule.log_dict = note  # pyright: ignore[reportAttributeAccessIssue]
    from worldmodel.curriculum import train

    train(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def curves(out: Path, rank: int = 0) -> list[dict[str, float]]:
    """What was logged at every step, all phases one after the other."""
    return [json.loads(line) for line in (out / f"{rank}.jsonl").read_text().splitlines()]
