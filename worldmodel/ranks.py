"""The processes that train together; one process alone needs no process group."""

from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all processes, for a day if one has much to prepare for the others."""
    if world_size() > 1:
        dist.barrier(_patient())


def leave() -> None:
    """Takes this process out of the group once all have come; else a thread of gloo's may abort it on its way out."""
    if world_size() > 1:
        barrier()
        _patient.cache_clear()
        dist.destroy_process_group()


@cache
def _patient() -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean over all processes of a number that each has, without gradients; every process must ask for it."""
    if world_size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()
