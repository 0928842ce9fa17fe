"""Training in several processes is training in one: curves, averages, interruption and resume, on the CPU over gloo."""

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose
from ranks import curves, fork, train_in
from safetensors.torch import load_file
from test_kairos import FOUR_LAYERS, REDUCED

from worldmodel.errors import DataError
from worldmodel.progress import resume_point
from worldmodel.sharding import COMPLETE, check

pytestmark = pytest.mark.slow
SPEC = {"cameras": "[front]", "future": 1, "history": 2, "chunk": 4, "points": 4, "height": 64, "width": 64}
STEPS = {"images": 2, "distill": 2, "world_action": 3, "policy": 3}
"""Of these phases; others have one."""
BUCKETS = [{"height": 64, "width": 64, "future": 2}, {"height": 32, "width": 64, "future": 4}]
"""As many tokens in clips, half as many in pictures, so that batches of 1, 2 and 4 processes hold as many rows."""
ROWS = 8
"""Rows of a batch of all processes together."""


def reduced(experiment: str, root: Path, run: Path, ranks: int, *more: str) -> dict[str, Any]:
    """`kairos_<experiment>` with every phase and little else, for one of `ranks` processes that share its batches."""
    image = "encoders.image.channels=[8,8,8,8]" if experiment == "small" else "encoders.image.channels=[8,8,8,8,8]"
    config = compose(
        f"experiment=kairos_{experiment}",
        *(item for item in REDUCED if "image.channels" not in item),
        *FOUR_LAYERS,
        image,
        *(f"data.spec.{key}={value}" for key, value in SPEC.items()),
        f"data.root={root}",
        f"run_dir={run}",
        *(f"synthesis.autoencoder.config.{size}" for size in ("base_dim=4", "num_res_blocks=1", "dim_mult=[1,1,1,1]")),
        "data.cache_latents=false",
        "synthesis.stream_steps=1",
        "wandb.mode=disabled",
        "trainer.threads=1",
        *more,
    )
    for name, phase in config["phases"].items():
        phase |= {"steps": STEPS.get(name, 1), "batch_size": ROWS // ranks, "learning_rate": 1e-3, "warmup": 1}
        for item in phase.get("mixture", []):
            if "rows" in item:
                item["rows"] = ROWS // 2 // ranks
        if "buckets" in phase:
            phase["buckets"] = BUCKETS
        if "distillation" in phase:
            phase["distillation"]["teacher_steps"] = 4
    return config


@pytest.fixture(scope="module")
def alone(tiny_dataset, tmp_path_factory) -> Any:
    """Curves and weights of one process, made once for each experiment."""
    made: dict[str, tuple[list[dict[str, float]], dict[str, torch.Tensor]]] = {}

    def get(experiment: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        if experiment not in made:
            out = tmp_path_factory.mktemp(experiment)
            assert train_in(1, reduced(experiment, tiny_dataset, out / "run", 1), out) == [0]
            made[experiment] = curves(out), load_file(out / "run" / "model.safetensors")
        return made[experiment]

    return get


def compare(found: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """Largest relative difference of two curves, in any part of the loss at any step."""
    assert [sorted(step) for step in found] == [sorted(step) for step in expected]
    differences = [
        abs(a[name] - b[name]) / max(abs(b[name]), 1e-2) for a, b in zip(found, expected, strict=True) for name in b
    ]
    return max(differences)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Root mean square difference of weights over that of the weights themselves."""
    assert found.keys() == expected.keys()
    pairs = [(found[n].double(), w.double()) for n, w in expected.items() if w.is_floating_point()]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize(
    ("experiment", "ranks", "more"),
    [
        ("base", 2, ["trainer.strategy=fsdp", "trainer.checkpointing=selective"]),
        pytest.param(
            "base", 4, ["trainer.strategy=fsdp", "trainer.checkpointing=selective"], marks=pytest.mark.exhaustive
        ),
        pytest.param("base", 2, ["trainer.strategy=ddp"], marks=pytest.mark.exhaustive),
        pytest.param("base", 4, ["trainer.strategy=fsdp", "trainer.shards=2"], marks=pytest.mark.exhaustive),
        pytest.param("small", 2, ["trainer.strategy=fsdp"], marks=pytest.mark.exhaustive),
        pytest.param("small", 4, ["trainer.strategy=ddp"], marks=pytest.mark.exhaustive),
    ],
)
def test_every_phase_is_the_same_in_any_number_of_processes(alone, tiny_dataset, tmp_path, experiment, ranks, more):
    """Losses of every step and their parts, and the averaged weights at the end.

    Adam's first steps move a weight by the learning rate whatever its gradient's size, so those few whose gradient is
    nothing but rounding differ by as much: of `kairos_small` in 4 processes one in a thousand of the state policy's.
    """
    expected, weights = alone(experiment)
    codes = train_in(ranks, reduced(experiment, tiny_dataset, tmp_path / "run", ranks, *more), tmp_path)
    assert codes == [0] * ranks
    apart = compare(curves(tmp_path), expected)
    away = distance(load_file(tmp_path / "run" / "model.safetensors"), weights)
    print(f"{experiment} {ranks} {more}: losses {apart:.1e}, weights {away:.1e}")
    assert apart < 1e-4 and away < {"base": 1e-5, "small": 2e-5}[experiment]
    assert all(curves(tmp_path, rank) == curves(tmp_path) for rank in range(ranks))


def tiny(root: Path, run: Path, ranks: int, *more: str) -> dict[str, Any]:
    """One phase of `kairos_base`, sharded, saved at every step; without images, which cost most."""
    config = reduced("base", root, run, ranks, "trainer.strategy=fsdp", "trainer.save_every=1", *more)
    mixture = [{"mode": "policy", "weight": 1.0, "draws": 2, "drop": ["rgb"]}]
    config["phases"] = {"world_action": {**config["phases"]["world_action"], "steps": 6, "mixture": mixture}}
    return config


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset, tmp_path_factory) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The curve and weights of one process that nobody disturbs."""
    out = tmp_path_factory.mktemp("undisturbed")
    config = tiny(tiny_dataset, out / "run", 1, "trainer.strategy=auto")
    assert train_in(1, config, out) == [0]
    return curves(out), load_file(out / "run" / "model.safetensors")


def test_sharded_weights_and_replicas_add_up_the_same_pieces(tiny_dataset, tmp_path):
    curve = {}
    for strategy in ("ddp", "fsdp"):
        out = tmp_path / strategy
        more = (f"trainer.strategy={strategy}", "trainer.accumulate=2")
        config = tiny(tiny_dataset, out / "run", 2, *more)
        config["phases"]["world_action"]["steps"] = 3
        assert train_in(2, config, out) == [0, 0]
        curve[strategy] = curves(out)
    assert compare(curve["fsdp"], curve["ddp"]) < 1e-4


def test_replicas_of_shards_are_one_network(undisturbed, tiny_dataset, tmp_path):
    expected, weights = undisturbed
    config = tiny(tiny_dataset, tmp_path / "run", 4, "trainer.shards=2", "trainer.checkpointing=full")
    assert train_in(4, config, tmp_path, measure=True) == [0] * 4
    apart, away = (
        compare(curves(tmp_path), expected),
        distance(load_file(tmp_path / "run" / "model.safetensors"), weights),
    )
    print(f"2 x 2: losses {apart:.1e}, weights {away:.1e}")
    assert apart < 1e-4 and away < 1e-5


def test_blocks_gathered_in_bf16_learn_nearly_the_same(undisturbed, tiny_dataset, tmp_path):
    expected, _ = undisturbed
    config = tiny(tiny_dataset, tmp_path / "run", 2, "trainer.precision=bf16-mixed")
    config["phases"]["world_action"]["steps"] = 2
    assert train_in(2, config, tmp_path) == [0, 0]
    found = curves(tmp_path)
    assert 1e-7 < compare(found, expected[:2]) < 0.1
    assert {w.dtype for w in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}


def until(out: Path, step: int) -> None:
    """Waits for a run to be done with a step; what it saved the step before is then on disk."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if (out / "0.jsonl").is_file() and len((out / "0.jsonl").read_text().splitlines()) > step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def test_killing_one_of_four_and_going_on_with_two_ends_the_same(undisturbed, tiny_dataset, tmp_path):
    """kill -9 at a random step and moment; then SIGTERM to the two, and one process ends it."""
    expected, weights = undisturbed
    chance = random.Random()
    seed = chance.getrandbits(32)
    print(f"seed {seed}")
    chance.seed(seed)
    run, victim, step = tmp_path / "run", chance.randrange(4), chance.randrange(2, 4)

    def kill(group: list[Any]) -> None:
        until(tmp_path / "four", step)
        time.sleep(chance.uniform(0, 0.5))
        os.kill(group[victim].pid, signal.SIGKILL)
        # As torchrun does to those who are left.
        time.sleep(2)
        for process in group:
            process.kill()

    codes = train_in(4, tiny(tiny_dataset, run, 4), tmp_path / "four", disturb=kill)
    assert codes[victim] == -signal.SIGKILL and not (run / "model.safetensors").exists()
    kept = resume_point(run / "phases" / "0-world_action")
    assert kept is not None
    check(kept)
    begun = int(kept.name.rsplit("-", 1)[1])

    def stop(group: list[Any]) -> None:
        until(tmp_path / "two", 0)
        # One alone is enough: all stop after the same step.
        os.kill(group[1].pid, signal.SIGTERM)

    assert train_in(2, tiny(tiny_dataset, run, 2), tmp_path / "two", disturb=stop) == [143, 143]
    assert curves(tmp_path / "two")[0]["step"] == begun
    assert train_in(1, tiny(tiny_dataset, run, 1), tmp_path / "one") == [0]
    found = {s["step"]: s for part in ("four", "two", "one") for s in curves(tmp_path / part)}
    assert sorted(found) == list(range(6))
    apart, away = compare(list(found.values()), expected), distance(load_file(run / "model.safetensors"), weights)
    print(f"killed {victim} after step {step}, resumed at {begun}: losses {apart:.1e}, weights {away:.1e}")
    assert apart < 1e-4 and away < 1e-5
    assert not list(run.rglob("last.ckpt*")), "a finished phase needs no resume point"


def slow_writes(config: dict[str, Any], out: str, seconds: float) -> None:
    """Trains where storage is slow: half of every shard is there for a while before the rest."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    plain = HuggingFaceStorageWriter.write_data

    def write(self: Any, plan: Any, planner: Any) -> Any:
        Path(self.path, "half").touch()
        written = plain(self, plan, planner)
        time.sleep(seconds)
        return written

    HuggingFaceStorageWriter.write_data = write
    from ranks import train_rank

    train_rank(config, out)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stop_during_a_write_leaves_no_half_checkpoint(tiny_dataset, tmp_path, how):
    """SIGTERM waits for what is being written and saves where it stopped; kill -9 leaves what was there before."""
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    folder = run / "phases" / "0-world_action"

    def stop(group: list[Any]) -> None:
        deadline = time.monotonic() + 240
        while not (parts := list(folder.glob("*2.part/half"))) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert parts, "nothing was ever being written"
        for process in group:
            os.kill(process.pid, how)

    config = tiny(tiny_dataset, run, 2)
    config["trainer"]["devices"] = 2
    codes = fork(2, slow_writes, (config, str(out), 1.0), disturb=stop)
    kept = resume_point(folder)
    assert kept is not None
    check(kept)
    if how == signal.SIGTERM:
        assert codes == [143, 143] and not list(folder.glob("*.part"))
        assert int(kept.name.rsplit("-", 1)[1]) == curves(out)[-1]["step"] + 1 >= 2
    else:
        assert codes == [-9, -9] and kept.name.endswith("-000000001")
        half = next(folder.glob("*.part"))
        with pytest.raises(DataError, match=r"is no whole checkpoint: complete\.json is missing"):
            check(half)
    record = json.loads((kept / COMPLETE).read_text())
    name = next(name for name in record["files"] if name.endswith(".safetensors"))
    (kept / name).write_bytes((kept / name).read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} is damaged: \d+ bytes were written, \d+ are there"):
        check(kept)


def average_of_shards() -> None:
    """Follows a sharded network and its whole twin through some steps."""
    from types import SimpleNamespace

    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from worldmodel.averaging import MovingAverage

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    whole, sharded = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    for layer in (*sharded, sharded):
        fully_shard(layer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    averages: list[Any] = [MovingAverage(decay=0.9) for _ in range(2)]
    networks: list[Any] = [whole, sharded]
    for average, network in zip(averages, networks, strict=True):
        average.on_fit_start(None, network)
    optimiser = torch.optim.AdamW(sharded.parameters(), lr=0.1)
    for step in range(5):
        sharded(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimiser.step()
        for own, other in zip(whole.parameters(), sharded.parameters(), strict=True):
            own.data.copy_(other.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]
        for average, network in zip(averages, networks, strict=True):
            average.on_train_batch_end(SimpleNamespace(global_step=step), network, None, None, step)
    for average, network in zip(averages, networks, strict=True):
        average.copy_to(network)
    for own, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(own.data, other.full_tensor())  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_average_of_shards_is_that_of_whole_weights_to_the_last_bit(ranks):
    assert fork(ranks, average_of_shards, ()) == [0] * ranks
