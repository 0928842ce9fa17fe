"""Datasets behind a URL: the same clips, through a bounded cache, with bounded patience."""

import http.server
import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from synthetic import made_up_dataset

from worldmodel.contracts import ClipSpec
from worldmodel.data import remote
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics
from worldmodel.data.validate import validate
from worldmodel.errors import ConfigError, RemoteError, SampleError

SPEC = ClipSpec(cameras=("front",), embodiments=("toy",), height=16, width=16, action=4, proprio=4, future=1)


class Flaky(http.server.SimpleHTTPRequestHandler):
    """Fails the first `failures` requests for every path, and notes all of them."""

    failures = 0
    seen: dict[str, int]

    def do_GET(self) -> None:
        self.seen[self.path] = self.seen.get(self.path, 0) + 1
        if self.seen[self.path] <= self.failures:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return made_up_dataset(tmp_path / "data", {("toy", task): 2 for task in ("lift", "push", "turn")})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORLDMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def server(dataset: Path) -> Iterator[tuple[str, type[Flaky]]]:
    handler = type("Handler", (Flaky,), {"seen": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(dataset))) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_address[1]}", handler
        serving.shutdown()
        thread.join()


def keys(root: str, **settings: Any) -> list[list[str]]:
    data = ClipDataModule(root=root, spec=SPEC, batch_size=4, seed=0, **settings)
    return [batch.key for batch in itertools.islice(data.train_dataloader(), 8)]


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_over_http_are_those_of_the_folder(
    dataset: Path, cache: Path, server: tuple[str, type[Flaky]], workers: int
) -> None:
    url, handler = server
    handler.failures = remote.ATTEMPTS - 1
    assert keys(url, num_workers=workers) == keys(str(dataset))
    shards = [path for path in handler.seen if path.endswith(".tar")]
    assert len(shards) == 3 and all(handler.seen[path] == remote.ATTEMPTS for path in shards)
    reader = ShardReader(url)
    assert load_statistics(reader.root) == load_statistics(dataset)
    assert keys(url) and all(handler.seen[path] == remote.ATTEMPTS for path in shards), "the cache is used again"
    assert not list(cache.rglob("*.part")) and not list(cache.rglob("*.reserved"))


def test_patience_ends_with_url_and_attempts(cache: Path, server: tuple[str, type[Flaky]]) -> None:
    url, handler = server
    reader = ShardReader(url)
    handler.failures = 99
    with pytest.raises(RemoteError, match=rf"{url}/shard-000000.tar: cannot be read, 5 attempts, the last: .*503"):
        reader.read(0)
    with pytest.raises(RemoteError):  # a lost network is no damaged sample
        keys(url, on_error="skip")
    handler.failures = 0
    with pytest.raises(RemoteError, match=rf"{url}/nowhere/index.json: not there .*at attempt 1"):
        ShardReader(f"{url}/nowhere")


def test_an_altered_shard_is_fetched_again_and_then_refused(
    dataset: Path, cache: Path, server: tuple[str, type[Flaky]]
) -> None:
    url, handler = server
    shard = dataset / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    reader = ShardReader(url)
    for _ in range(2):
        with pytest.raises(SampleError, match=rf"{url}/shard-000001.tar: altered, 5 attempts gave sha256 .*index says"):
            reader.read(2)
    assert handler.seen["/shard-000001.tar"] == 5
    assert not any("push" in key for batch in keys(url, on_error="skip") for key in batch)


def test_the_cache_keeps_its_bound_and_the_newest(
    dataset: Path, cache: Path, server: tuple[str, type[Flaky]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = server
    sizes = [(dataset / f"shard-{n:06d}.tar").stat().st_size for n in range(3)]
    monkeypatch.setenv("WORLDMODEL_CACHE_BYTES", str(sum(sorted(sizes)[1:])))
    reader = ShardReader(url, cache_bytes=0)
    for i in (0, 2, 0, 4, 0, 2):
        assert reader.read(i).meta == ShardReader(dataset).read(i).meta
        held = [path.stat().st_size for path in (cache / "shards").glob("*.tar")]
        assert sum(held) <= sum(sorted(sizes)[1:])
    assert [handler.seen[f"/shard-{n:06d}.tar"] for n in range(3)] == [1, 2, 1]
    monkeypatch.setenv("WORLDMODEL_CACHE_BYTES", "1000")
    shutil.rmtree(cache)
    small = ShardReader(url)
    with pytest.raises(
        ConfigError, match=r"shard-000000.tar: \d+ bytes do not fit the cache of 1000; raise WORLDMODEL"
    ):
        small.read(0)
    monkeypatch.setenv("WORLDMODEL_CACHE_BYTES", "ten")
    with pytest.raises(ConfigError, match="WORLDMODEL_CACHE_BYTES is 'ten'"):
        ShardReader(url)


def test_other_kinds_of_urls_and_an_index_that_changed(dataset: Path, cache: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{dataset}/", "/bucket/data/", recursive=True)
    plain = keys(str(dataset))
    assert keys("memory://bucket/data") == keys(f"file://{dataset}") == plain
    assert validate("memory://bucket/data") == []
    index = json.loads((dataset / "index.json").read_text())
    index["shards"] = index["shards"][:2]
    memory.pipe("/bucket/data/index.json", json.dumps(index).encode())
    assert len(ShardReader("memory://bucket/data")) == 4
    with pytest.raises(ConfigError, match=r"no-such-thing://x/index.json: fsspec cannot open this kind of URL"):
        ShardReader("no-such-thing://x")
