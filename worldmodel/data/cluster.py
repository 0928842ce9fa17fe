"""Tasks over a Ray cluster (extra `ray`): what a dying worker had in hand is done again by another."""

import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from worldmodel.errors import ConfigError, DataError

T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3
"""How often a task is begun again after its worker died."""


def scatter(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    address: str,
    limit: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, R | None]]:
    """Yield the number of every item with its result, as they finish; None where workers died `RETRIES` times over it.

    Args:
        function: picklable, and harmless when it is begun twice on one item.
        items: one task each.
        address: `local` starts a cluster on this machine that ends with the iteration; else as `ray.init` takes it:
            `auto` for the running one, `host:port`, or `ray://host:port`.
        limit: tasks in flight; None is as many as the cluster has cores.
        environment: variables of the workers.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at `address`.
        Exception: what `function` raises.
    """
    try:
        import ray.exceptions
    except ImportError as error:
        raise ConfigError("--ray needs the extra `ray`: pip install 'worldmodel[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        try:
            _check_reachable(address)
            ray.init(
                address=address,
                num_cpus=limit if address == "local" else None,
                include_dashboard=False if address == "local" else None,
                logging_level=logging.WARNING,
                runtime_env={"env_vars": dict(environment or {})},
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"no Ray cluster at {address!r} ({error}); `--ray local` starts one here") from error
    try:
        died = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError)
        task: Any = ray.remote(num_cpus=1, max_retries=RETRIES)(_call)
        shared = ray.put(function)
        width = limit or max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting: dict[Any, int] = {}
        following = iter(enumerate(items))
        while True:
            while len(waiting) < width and (item := next(following, None)) is not None:
                waiting[task.remote(shared, item[1])] = item[0]
            if not waiting:
                return
            for done in ray.wait(list(waiting), timeout=1.0)[0]:
                number = waiting.pop(done)
                try:
                    yield number, ray.get(done)
                except died:
                    yield number, None
    finally:
        if mine:
            ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise `OSError` where nothing listens at host:port, for which Ray itself waits many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=10).close()


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)


def check_shared(root: Path) -> None:
    """Raise `DataError` unless this machine sees the folder that the command was started for."""
    if not root.is_dir():
        raise DataError(
            f"{root}: not seen by the worker on {socket.gethostname()}; over Ray the folder must be on storage that "
            "every machine of the cluster has mounted at the same path"
        )
