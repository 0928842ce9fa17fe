"""Processes: how many a run wants, how they are started and find one another, and how they share the training."""

import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from worldmodel.averaging import MovingAverage
from worldmodel.cluster import launched, resolve
from worldmodel.errors import ConfigError
from worldmodel.sharding import Sharded

STRATEGIES = ("auto", "ddp", "fsdp")
"""`ddp`: each process has all weights; `fsdp`: they share them. `auto` is `ddp`, and nothing at all for one process."""


def processes(settings: Mapping[str, Any]) -> int:
    """How many processes a `trainer` wants. Raises `ConfigError` for numbers below 1 and an unknown strategy."""
    for name in ("devices", "num_nodes"):
        if type(settings[name]) is not int or settings[name] < 1:
            raise ConfigError(f"trainer.{name} is {settings[name]!r}; it must be a number, 1 or more")
    if settings["strategy"] not in STRATEGIES:
        raise ConfigError(f"trainer.strategy: unknown {settings['strategy']!r}; one of {', '.join(STRATEGIES)}")
    return settings["devices"] * settings["num_nodes"]


def surroundings() -> ClusterEnvironment | None:
    """How this process finds the others: as torchrun or srun says, None where neither started it."""
    found = launched(os.environ)
    if found is None:
        return None
    # A job that is told to stop is requeued by its script, into the same run folder.
    return TorchElasticEnvironment() if found[0] == "torchrun" else SLURMEnvironment(auto_requeue=False)


def start(settings: Mapping[str, Any]) -> None:
    """Turns this process into a torchrun of as many as the `trainer` wants on this machine, unless it is one of them.

    Raises `ConfigError` where other machines are needed: only what runs on them can start theirs.
    """
    settings = resolve(settings)
    if processes(settings) == 1 or launched(os.environ) is not None:
        return
    how = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings['devices']}"]
    os.execv(sys.executable, [sys.executable, *how, *sys.argv])


def join(settings: Mapping[str, Any]) -> ClusterEnvironment | None:
    """Brings the processes of a run together; None if this is the only one and shares nothing.

    Raises `ConfigError` if there are not as many as the `trainer` wants.
    """
    wanted, environment = processes(settings), surroundings()
    if wanted == 1 and settings["strategy"] != "fsdp":
        return None
    environment = environment or LightningEnvironment()
    found = environment.world_size()
    if found != wanted:
        raise ConfigError(
            f"{found} processes were started, but trainer.devices × trainer.num_nodes is {settings['devices']} × "
            f"{settings['num_nodes']}"
        )
    if not dist.is_initialized():
        gpu = settings["accelerator"] != "cpu"
        os.environ.setdefault("MASTER_ADDR", environment.main_address)
        os.environ.setdefault("MASTER_PORT", str(environment.main_port))
        if gpu:
            torch.cuda.set_device(environment.local_rank())
        dist.init_process_group(
            # Checkpoints are written from the memory of the CPU.
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            rank=environment.global_rank(),
            world_size=wanted,
            timeout=timedelta(minutes=settings["timeout_minutes"]),
        )
    return environment


def make_strategy(settings: Mapping[str, Any], average: MovingAverage) -> str | Strategy:
    """How a phase is shared out."""
    if settings["strategy"] == "fsdp":
        return Sharded(average=average)
    if processes(settings) == 1:
        return "auto"
    # A step of a mixture uses what its mode needs.
    return DDPStrategy(find_unused_parameters=True)
