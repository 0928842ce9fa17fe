"""How many processes train together, as the launcher that started this one says: torchrun, srun, or none."""

import os
from collections.abc import Mapping
from typing import Any

from worldmodel.errors import ConfigError

TORCHRUN, SRUN = "TORCHELASTIC_RUN_ID", "SLURM_NTASKS_PER_NODE"
"""Variables that the processes of either launcher have."""


def launched(environment: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Launcher, processes of each node and nodes; None where nothing launched this process."""
    if TORCHRUN in environment:
        local = int(environment["LOCAL_WORLD_SIZE"])
        return "torchrun", local, int(environment["WORLD_SIZE"]) // local
    # A shell inside an allocation has some of these variables too, but is no task of a step of its own.
    shell = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if SRUN in environment and "SLURM_STEP_NUM_NODES" in environment and not shell:
        return "srun", int(environment[SRUN]), int(environment["SLURM_STEP_NUM_NODES"])
    return None


def resolve(settings: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The settings of a trainer with numbers for `devices` and `num_nodes`.

    `auto` is what the launcher started or, without one, all GPUs of this node (one process where there is none) and one
    node. Raises `ConfigError` for numbers that differ from the launcher's, and for several nodes without one.
    """
    found = launched(environment)
    devices, nodes = settings["devices"], settings["num_nodes"]
    if found is None:
        if devices == "auto":
            devices = gpus() if settings["accelerator"] == "gpu" else 1
        nodes = 1 if nodes == "auto" else nodes
        if nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes is {nodes}, but neither torchrun nor srun started this process; start it on every "
                "node by one of them (configs/slurm/train.sbatch does)"
            )
    else:
        launcher, *started = found
        for name, asked, own in zip(("devices", "num_nodes"), (devices, nodes), started, strict=True):
            if asked not in ("auto", own):
                raise ConfigError(f"trainer.{name} is {asked}, but {launcher} started {own}; leave it at auto")
        devices, nodes = started
    return {**settings, "devices": devices, "num_nodes": nodes}


def gpus() -> int:
    """GPUs of this node. Raises `ConfigError` if there is none."""
    import torch

    if not torch.cuda.device_count():
        raise ConfigError("trainer.devices is auto on GPUs, but torch finds none here; trainer=cpu trains without")
    return torch.cuda.device_count()
