"""Runs of `train` in several processes on the CPU, for tests; all are forked from one that has imported everything."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
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
    measure: bool = False,
    timeout: float = 300,
) -> list[int | None]:
    """Trains `config` in `ranks` processes as torchrun would start them; returns their exit codes.

    Each leaves what it logged at every step in `<out>/<rank>.jsonl`. `disturb` is given the processes while they run.
    What steps cost, which takes longer than most of them here, is measured if `measure` says so.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = {**config, "trainer": {**config["trainer"], "devices": ranks}}
    return fork(ranks, train_rank, (settings, str(out), measure), disturb=disturb, timeout=timeout)


def fork(
    ranks: int,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    disturb: Callable[[list[Any]], None] | None = None,
    timeout: float = 300,
) -> list[int | None]:
    """Runs a function in `ranks` processes that find one another as those of torchrun do; tells what each said last."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as said:
        for rank in range(ranks):
            Path(said, f"{rank}.txt").touch()
        group = [
            context.Process(target=one_rank, args=(rank, ranks, port, said, function, arguments))
            for rank in range(ranks)
        ]
        for process in group:
            process.start()
        try:
            if disturb is not None:
                disturb(group)
            deadline = time.monotonic() + timeout
            for process in group:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            # An abort leaves the stacks of those that hang; who ignores it is killed.
            for end in (signal.SIGABRT, signal.SIGKILL):
                for process in (one for one in group if one.is_alive()):
                    os.kill(process.pid or 0, end)
                    process.join(10)
            for rank, process in enumerate(group):
                lines = Path(said, f"{rank}.txt").read_text(errors="replace").splitlines()
                words = [line for line in lines if line.strip() and "it/s" not in line]
                print(f"rank {rank} ended with {process.exitcode}:", *words[-60:], sep="\n  ")
    return [process.exitcode for process in group]


def one_rank(
    rank: int, ranks: int, port: int, said: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """One of the processes; what it prints, and where it crashes, goes to a file of its own in `said`."""
    import faulthandler
    import warnings

    import torch

    with open(Path(said, f"{rank}.txt"), "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    function(*arguments)
    from worldmodel.ranks import leave

    leave()


def train_rank(config: dict[str, Any], out: str, measure: bool = False) -> None:
    """Trains and notes every step; draws no samples at the end of a phase."""
    import worldmodel.curriculum
    import worldmodel.phase_run
    import worldmodel.telemetry
    from worldmodel.flops import Cost
    from worldmodel.ranks import rank
    from worldmodel.training import PhaseModule

    plain = PhaseModule.log_dict

    def note(self: Any, values: Any, *args: Any, **kwargs: Any) -> None:
        if any(name.endswith("/loss") for name in values):
            step = {"step": self.global_step - 1, **{name: float(value) for name, value in values.items()}}
            with open(f"{out}/{rank()}.jsonl", "a") as file:
                file.write(json.dumps(step) + "\n")
        plain(self, values, *args, **kwargs)

    PhaseModule.log_dict = note  # pyright: ignore[reportAttributeAccessIssue]
    worldmodel.telemetry.due = lambda *_: True
    if not measure:
        worldmodel.telemetry.measure_cost = lambda *_: Cost(1.0, {})
        worldmodel.telemetry.matmul_peak = lambda *_: 1.0
    worldmodel.phase_run.log_samples = lambda *_: None
    worldmodel.phase_run.write_samples = lambda *_, **__: Path(out)
    worldmodel.curriculum.train(config)


def curves(out: Path, rank: int = 0) -> list[dict[str, float]]:
    """What was logged at every step, all phases one after the other."""
    return [json.loads(line) for line in (out / f"{rank}.jsonl").read_text().splitlines()]
