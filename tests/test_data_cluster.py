"""Work over a Ray cluster: the same bytes as on one machine, whatever dies on the way."""

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from synthetic import made_up_dataset, made_up_episode

from worldmodel.data import jobs
from worldmodel.data.cluster import scatter
from worldmodel.data.schema import Episode
from worldmodel.data.validate import examine
from worldmodel.errors import ConfigError, DataError

CHUNKS = [jobs.Chunk(f"shard-{n:06d}.tar", 2, {"number": n}) for n in range(3)]


def make(marker: Path | None, chunk: jobs.Chunk) -> Iterator[tuple[str, Episode]]:
    """Two made-up episodes a chunk; the first worker to come to chunk 1 is killed half way through it."""
    for k in range(chunk.count):
        number = chunk.what["number"] * 10 + k
        yield (
            f"e{number:03d}",
            made_up_episode(f"e{number:03d}", "made-up", "move", np.random.default_rng(number), length=5, pixels=16),
        )
        if marker is not None and chunk.what["number"] == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def fill(root: Path, marker: Path | None = None, ray: str | None = None) -> dict[str, bytes]:
    jobs.claim(root, {"made": "up"})
    jobs.fill(
        root, CHUNKS, partial(make, marker), heldout_tasks=lambda e: [], extra={}, workers=1, progress=False, ray=ray
    )
    return {path.name: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    # Workers must find the helpers beside this file.
    env = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": env}, logging_level="error")
    yield "auto"
    ray.shutdown()


def test_a_killed_worker_loses_and_repeats_nothing(tmp_path: Path, cluster: str) -> None:
    alone = fill(tmp_path / "alone")
    marker = tmp_path / "killed"
    assert fill(tmp_path / "cluster", marker, cluster) == alone
    assert marker.exists() and "shard-000001.tar" in alone


def test_validation_says_the_same(tmp_path: Path, cluster: str) -> None:
    root = made_up_dataset(tmp_path / "data", {("made-up", "move"): 3, ("made-up", "wave"): 2})
    shard = next(root.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-2000])
    here, there = examine(root), examine(root, ray=cluster)
    assert here.faults and [str(f) for f in there.faults] == [str(f) for f in here.faults]


def refuse(item: int) -> int:
    if item == 2:
        raise DataError("item 2: unreadable")
    return item


def test_errors_come_as_they_are(cluster: str) -> None:
    with pytest.raises(DataError, match="item 2: unreadable"):
        list(scatter(refuse, range(4), address=cluster))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"worldmodel\[ray\]"):
        list(scatter(refuse, [1], address="local"))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:nine"])
def test_a_cluster_that_is_not_there_is_said_at_once(address: str) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import ray

    ray.shutdown()
    with pytest.raises(ConfigError, match="no Ray cluster"):
        list(scatter(refuse, [1], address=address))
