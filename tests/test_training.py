"""Phases, moving averages, interruption and resume, on the real data path."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from test_model import future_of, observation_of
from torch.utils.data import DataLoader

from worldmodel.contracts import Batch
from worldmodel.curriculum import train
from worldmodel.curves import read_log
from worldmodel.errors import ConfigError
from worldmodel.phases import Ingredient, Phase, make_phases
from worldmodel.run_folder import claim, differences
from worldmodel.training import PhaseModule

ROOT = Path(__file__).parent.parent
PHASES = ("tokeniser", "understanding", "locate", "compositor", "behaviour", "synthesis", "policy")


def short(dataset: Path, run: Path, *more: str) -> list[str]:
    """Overrides for a run of seconds."""
    steps = dict.fromkeys(PHASES, 2) | {"policy": 6}
    sizes = [
        f"phases.{name}.{key}={value}" for name, n in steps.items() for key, value in (("steps", n), ("batch_size", 3))
    ]
    return [
        "experiment=kairos_tiny",
        f"data.root={dataset}",
        f"run_dir={run}",
        "wandb.mode=disabled",
        "trainer.threads=1",
        "+phases.policy.chunks=2",
        *sizes,
        *more,
    ]


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory) -> Path:
    """A whole, undisturbed run."""
    return train(compose(*short(tiny_dataset, tmp_path_factory.mktemp("runs") / "whole")))


def test_a_run_leaves_a_checkpoint_its_settings_and_its_curves(trained):
    metadata = json.loads((trained / "model.json").read_text())
    assert metadata["training"]["split"] == "train"
    assert set(metadata["training"]["tasks"]) == {"drawer-close-v3", "button-press-topdown-v3"}
    assert len(metadata["training"]["episodes"]) == 4
    phases = sorted(p.name for p in (trained / "phases").iterdir())
    assert phases == [f"{number}-{name}" for number, name in enumerate(PHASES)]
    assert not list(trained.rglob("last.ckpt")), "a finished phase needs no resume point"
    log = read_log(trained)
    assert list(log) == list(PHASES)
    for phase, series in log.items():
        common = {"loss", "gradient_norm", "learning_rate", "ema_decay", "samples_per_s", "mfu", "data_wait"}
        assert common | {"memory_gib"} <= series.keys(), phase
        assert all(value > 0 for name in common - {"data_wait"} for value in series[name].values())
    synthesis = log["synthesis"]
    streams = [sum(synthesis[f"tokens_per_s/{n}"].values()) for n in ("video", "camera", "points", "force")]
    assert 0 < sum(streams) <= sum(synthesis["tokens_per_s"].values())
    assert any(name.startswith("noise/video/") for name in synthesis)
    assert "tokens_per_s" not in log["tokeniser"], "stage 2 reads nothing there"
    assert "policy" in (trained / "curves.html").read_text()


def test_phases_train_what_they_name_and_nothing_else(trained):
    after = {p.name.split("-")[1]: load_file(p / "model.safetensors") for p in (trained / "phases").iterdir()}
    moved = lambda a, b, part: any(  # noqa: E731
        not torch.equal(a[n], b[n]) for n in a if n.startswith(part + ".") and a[n].is_floating_point()
    )
    assert not moved(after["tokeniser"], after["policy"], "autoencoder")
    assert moved(after["tokeniser"], after["understanding"], "encoder")
    assert moved(after["understanding"], after["locate"], "encoder.points_head")
    assert not moved(after["understanding"], after["locate"], "encoder.camera_head")
    assert moved(after["locate"], after["compositor"], "compositor")
    assert not moved(after["tokeniser"], after["compositor"], "denoiser")
    assert not moved(after["compositor"], after["policy"], "compositor")
    assert not moved(after["compositor"], after["behaviour"], "denoiser")
    assert moved(after["compositor"], after["behaviour"], "expert.state")
    assert moved(after["behaviour"], after["synthesis"], "denoiser")
    assert moved(after["behaviour"], after["synthesis"], "expert.blocks")
    assert not moved(after["behaviour"], after["synthesis"], "expert.state")
    assert not moved(after["behaviour"], after["synthesis"], "expert.foresight")
    assert moved(after["synthesis"], after["policy"], "expert")


def test_the_same_seed_gives_the_same_weights_and_a_second_call_does_nothing(trained, tiny_dataset, tmp_path):
    again = train(compose(*short(tiny_dataset, tmp_path / "again")))
    first, second = (load_file(run / "model.safetensors") for run in (trained, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    before = (again / "model.safetensors").stat().st_mtime_ns
    train(compose(*short(tiny_dataset, tmp_path / "again")))
    assert (again / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_ends_where_an_undisturbed_run_does(trained, tiny_dataset, tmp_path):
    """Killed in the middle of the last phase; weights and moving averages after the resume equal those of one go."""
    run = tmp_path / "killed"
    command = [sys.executable, "train.py", *short(tiny_dataset, run, "trainer.save_every=1")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last = run / "phases" / "6-policy" / "last.ckpt"
    deadline = time.monotonic() + 300
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output.decode()[-2000:]
    assert last.exists()
    assert not (run / "model.safetensors").exists()
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 6
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    first, second = (load_file(folder / "model.safetensors") for folder in (trained, run))
    for name in first:
        torch.testing.assert_close(second[name], first[name], msg=name)


@pytest.mark.parametrize("draws", [1, 2])
def test_a_batch_in_pieces_is_the_same_step(tiny_model, draws):
    """Loss and gradients of a batch whose rows have the same elements; pieces need not be of one size."""
    spec = tiny_model.spec
    o, f = observation_of(spec, 3), future_of(spec, 3)
    batch = Batch(o, f, torch.zeros(3, spec.history, dtype=torch.int64), ["a", "b", "c"])
    mixture = [{"mode": "policy" if draws > 1 else "joint", "weight": 1.0, "draws": draws}]
    settings = {"objective": "world", "trains": ["denoiser", "expert"], "steps": 1, "batch_size": 3, "clip": 0.0}
    settings |= {"learning_rate": 1e-3, "mixture": mixture, "insulate": False}
    found = []
    for pieces in (1, 2, 3):
        model = copy.deepcopy(tiny_model).train()
        module = PhaseModule(model=model, phase=make_phases({"p": settings})[0], seed=0, pieces=pieces)
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, DataLoader([batch], batch_size=None))  # pyright: ignore[reportArgumentType]
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((trainer.callback_metrics["loss"], gradients))
    (loss, whole), *others = found
    scale = max(float(g.abs().max()) for g in whole.values())
    for other, gradients in others:
        torch.testing.assert_close(other, loss)
        assert gradients.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    claim(tmp_path, {"seed": 0, "phases": {"a": {"steps": 5}}, "trainer": {"threads": 1}})
    claim(tmp_path, {"seed": 0, "phases": {"a": {"steps": 5}}, "trainer": {"threads": 2}})
    with pytest.raises(ConfigError, match=r"other settings \(phases\.a\.steps\)"):
        claim(tmp_path, {"seed": 0, "phases": {"a": {"steps": 6}}, "trainer": {"threads": 1}})
    assert differences({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == ["a.c"]


def test_ranks_may_change_with_the_batch_sizes(tmp_path):
    def settings(batch_size: int, devices: int, nodes: int = 1) -> dict:
        mixture = [{"mode": "policy", "rows": batch_size // 2}, {"mode": "joint"}]
        phases = {"a": {"batch_size": batch_size, "mixture": mixture}}
        return {"phases": phases, "trainer": {"devices": devices, "num_nodes": nodes}}

    claim(tmp_path, settings(8, 1))
    claim(tmp_path, settings(4, 2))
    claim(tmp_path, settings(2, 4))
    claim(tmp_path, settings(2, 2, nodes=2))
    with pytest.raises(ConfigError, match=r"other settings \(phases\.a\.batch_size, phases\.a\.mixture\)"):
        claim(tmp_path, settings(2, 2))


def test_mistakes_in_a_phase_are_named():
    base = {"objective": "understanding", "trains": ["encoder"], "steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    for change, message in (
        ({"objective": "dreaming"}, "'dreaming' is none of tokeniser"),
        ({"trains": ["brain"]}, "trains 'brain', which is none of autoencoder"),
        ({"mixture": [{"mode": "policy", "weight": 1.0}]}, "belongs to objectives `world`"),
        ({"stepz": 3}, "phase 'p': .*stepz"),
        ({"chunks": 2}, "chunks is 2; .* more than 1 for objective `world` alone"),
        ({"gradients": "half"}, "gradients 'half' is none of truncated, full"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_phases({"p": {**base, **change}})
    with pytest.raises(ConfigError, match="needs a dropout of `points`"):
        Ingredient(mode="understanding", weight=1.0, dropout={"points": 0.5})
    with pytest.raises(ConfigError, match="needs images"):
        Ingredient(mode="joint", weight=1.0, drop=("rgb",))
    assert make_phases({"p": base}) == [Phase(name="p", **{**base, "trains": ("encoder",)})]


@pytest.mark.slow
def test_a_sweep_over_lambda_is_one_run_after_another(tiny_dataset, tmp_path):
    """Each into its own folder, from the same weights and on the same data; lambda is logged and weighs the loss."""
    command = [sys.executable, "train.py", "--multirun", *short(tiny_dataset, tmp_path, "data.cache_latents=false")]
    command += [f"~phases.{name}" for name in PHASES if name != "policy"]
    command = [word for word in command if not word.startswith("phases.") or word.startswith("phases.policy")]
    command += ["phases.policy.steps=1", "phases.policy.mixture=[{mode: joint, weight: 1}]"]
    command += [f"run_dir={tmp_path}/${{phases.policy.weights.actions}}", "phases.policy.weights.actions=0.5,2"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    rows = {}
    for folder in ("0.5", "2"):
        assert (tmp_path / folder / "model.safetensors").is_file()
        names, values = (tmp_path / folder / "csv" / "metrics.csv").read_text().splitlines()[:2]
        rows[folder] = dict(zip(names.split(","), map(float, values.split(",")), strict=True))
    first, second = rows.values()
    assert [row["policy/lambda"] for row in rows.values()] == [0.5, 2.0]
    assert first["policy/joint/actions"] == second["policy/joint/actions"] > 0
    assert second["policy/loss"] - first["policy/loss"] == pytest.approx(1.5 * first["policy/joint/actions"], rel=1e-4)
