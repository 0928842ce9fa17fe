"""Random numbers and settings that several processes share, without starting any."""

import os
import sys
from typing import Any

import pytest
import torch
from conftest import compose

from worldmodel.contracts import Batch, rows_of
from worldmodel.data.sampler import spread
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.parallel import join, processes, start
from worldmodel.progress import forget, resume_point


def settings(**more: Any) -> dict[str, Any]:
    return {**compose("experiment=kairos_tiny")["trainer"], **more}


def test_a_row_draws_the_same_whoever_has_it():
    """Whole, in parts, picked; several numbers of a row stand together."""

    def drawn(d: Draws) -> list[torch.Tensor]:
        n = len(d.rows)
        weights = torch.tensor([0.2, 0.5, 0.3])
        return [d.rand(n), d.randn(2 * n, 3), d.randint(9, n, 2), d.categorical(weights, 3 * n), d.randn(n)]

    whole = drawn(Draws(7, range(6)))
    first, second = drawn(Draws(7, range(2))), drawn(Draws(7, range(2, 6)))
    assert all(torch.equal(torch.cat([a, b]), c) for a, b, c in zip(first, second, whole, strict=True))
    picked = drawn(Draws(7, range(6)).pick([4, 1]))
    assert torch.equal(picked[0], whole[0][[4, 1]]) and torch.equal(picked[1], whole[1][[8, 9, 2, 3]])
    assert whole[0].unique().numel() == 6 and not torch.equal(whole[1], drawn(Draws(8, range(6)))[1])


def test_draws_have_their_distributions():
    d = Draws("a", range(4000))
    assert abs(float(d.rand(4000).mean()) - 0.5) < 0.02
    normal = d.randn(4000)
    assert abs(float(normal.mean())) < 0.05 and abs(float(normal.std()) - 1) < 0.05
    counts = d.categorical(torch.tensor([1.0, 3.0]), 8000).bincount()
    assert float(counts[1] / 8000) == pytest.approx(0.75, abs=0.02)
    own = torch.eye(3)[torch.arange(4000) % 3]
    assert torch.equal(d.categorical(own), torch.arange(4000) % 3)


@pytest.mark.parametrize(("size", "count"), [(8, 4), (6, 4), (5, 3), (4, 9)])
def test_parts_of_a_batch_are_spread_alike_in_parts_of_it(size, count):
    whole = spread(range(2 * size), 2 * count)
    assert len(whole) == min(2 * size, 2 * count)
    assert whole == spread(range(size), count) + spread(range(size, 2 * size), count)


def test_rows_of_a_batch(tiny_model):
    from test_model import future_of, observation_of

    o, f = observation_of(tiny_model.spec), future_of(tiny_model.spec)
    batch = Batch(o, f, torch.arange(6).reshape(2, 3), ["a", "b"])
    part = rows_of(batch, 1, 2)
    assert part.key == ["b"] and torch.equal(part.frame, batch.frame[1:]) and part.masks is None
    assert all(torch.equal(x, y[1:]) for x, y in zip(part.observation, o, strict=True))


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ConfigError, match=r"trainer\.devices is 0; it must be a number, 1 or more"):
        processes(settings(devices=0))
    with pytest.raises(ConfigError, match=r"trainer\.strategy: unknown 'zero'; one of auto, ddp, fsdp"):
        processes(settings(strategy="zero"))
    with pytest.raises(ConfigError, match=r"num_nodes is 2, but neither torchrun nor srun started this process"):
        start(settings(num_nodes=2, devices=4))
    with pytest.raises(ConfigError, match=r"1 processes were started, but .* is 2 × 1"):
        join(settings(devices=2))
    assert join(settings()) is None


def test_several_processes_are_started_by_torchrun(monkeypatch):
    started: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    monkeypatch.setattr(sys, "argv", ["train.py", "trainer.devices=3"])
    start(settings())
    start(settings(devices=3))
    assert len(started) == 1
    assert started[0][1][1:] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", *sys.argv]


def test_the_newest_whole_checkpoint_counts(tmp_path):
    assert resume_point(tmp_path) is None
    for name, whole in (("000000002", True), ("000000010", True), ("000000011", False), ("000000012.part", True)):
        folder = tmp_path / f"last.ckpt-{name}"
        folder.mkdir()
        if whole:
            (folder / "complete.json").write_text("{}")
    found = resume_point(tmp_path)
    assert found is not None and found.name == "last.ckpt-000000010"
    forget(tmp_path)
    assert not list(tmp_path.iterdir())
