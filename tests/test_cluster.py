"""The launchers: what torchrun and srun say of a job, the SLURM template without SLURM, and every trainer's file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file
from test_training import ROOT, short

from worldmodel.cluster import resolve
from worldmodel.curriculum import train
from worldmodel.curves import read_log
from worldmodel.errors import ConfigError

TEMPLATE = ROOT / "configs" / "slurm" / "train.sbatch"
CPU = {"accelerator": "cpu", "devices": "auto", "num_nodes": "auto"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SRUN = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NUM_NODES": "16", "SLURM_PROCID": "3", "SLURM_NTASKS": "128"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (1, 1)),
        (TORCHRUN, (4, 2)),
        (SRUN, (8, 16)),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, (1, 1)),
        ({"SLURM_NTASKS_PER_NODE": "8", "SLURM_PROCID": "0"}, (1, 1)),  # the shell of a batch script
    ],
)
def test_auto_is_what_the_launcher_started(environment, expected):
    found = resolve(CPU, environment)
    assert (found["devices"], found["num_nodes"]) == expected
    assert found["accelerator"] == "cpu"


def test_numbers_that_are_not_the_launchers_are_refused():
    assert resolve(CPU | {"devices": 4, "num_nodes": 2}, TORCHRUN)["devices"] == 4
    with pytest.raises(ConfigError, match=r"trainer\.devices is 1, but torchrun started 4; leave it at auto"):
        resolve(CPU | {"devices": 1}, TORCHRUN)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes is 2, but srun started 16"):
        resolve(CPU | {"num_nodes": 2}, SRUN)
    with pytest.raises(ConfigError, match=r"trainer\.num_nodes is 2, but neither torchrun nor srun"):
        resolve(CPU | {"num_nodes": 2}, {})


def test_all_gpus_of_a_node_are_counted(monkeypatch):
    settings = CPU | {"accelerator": "gpu"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert resolve(settings, {})["devices"] == 6
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="torch finds none here; trainer=cpu"):
        resolve(settings, {})


def test_every_trainer_composes_with_the_same_names():
    files = sorted(path.stem for path in (ROOT / "configs" / "trainer").glob("*.yaml"))
    assert files == ["cluster", "cpu", "gpu", "node"]
    found = {name: compose("experiment=kairos_tiny", f"trainer={name}")["trainer"] for name in files}
    assert all(settings.keys() == found["cpu"].keys() for settings in found.values())
    assert found["cluster"]["devices"] == found["node"]["devices"] == "auto"
    assert found["cluster"]["precision"] == found["gpu"]["precision"]


def test_the_launcher_of_submitit_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra `slurm` is not installed")
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        settings = ["experiment=kairos_tiny", "hydra/launcher=slurm", "hydra.launcher.nodes=2"]
        launcher = hydra_compose("train", settings, return_hydra_config=True).hydra.launcher
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
    assert launcher._target_.endswith("SlurmLauncher")


# As far as the template goes: srun gives its tasks their variables and a process group of their own and ends with their
# status, scancel with a signal reaches the tasks alone, scontrol is told to queue the job again.
FAKES = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_NODES=1 SLURM_NTASKS=1
setsid "$@" &
echo $! > "$FAKE/task"
wait $!
""",
    "scancel": '[[ "$*" == "--signal=TERM 4711" ]] && kill -TERM -- "-$(cat "$FAKE/task")"',
    "scontrol": 'echo "$*" >> "$FAKE/requeued"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch script, with stand-ins for SLURM's commands."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, body in FAKES.items():
        (fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "FAKE": str(fakes)}
    path = f"{fakes}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **slurm, "PATH": path, "PYTHON": sys.executable, "TRAINER": "cpu", "OMP_NUM_THREADS": "1"}


def submit(slurm: dict[str, str], *settings: str) -> subprocess.Popen[bytes]:
    command = ["bash", str(TEMPLATE), *settings]
    return subprocess.Popen(command, cwd=ROOT, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_job_at_its_time_limit_is_queued_again_and_ends_where_one_without_a_limit_does(slurm, tiny_dataset, tmp_path):
    """Its loader processes are told to stop with it, and must outlive the save."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    kept = ("phases.tokeniser", "phases.behaviour")
    command = [s for s in short(tiny_dataset, run) if not s.lstrip("+").startswith("phases.") or s.startswith(kept)]
    command += [f"~phases.{name}" for name in ("understanding", "locate", "compositor", "synthesis", "policy")]
    command += ["trainer.devices=auto", "trainer.num_nodes=auto", "trainer.save_every=1000", "trainer.workers=1"]
    command += ["phases.behaviour.steps=600"]
    job = submit(slurm, *command)
    log = run / "csv" / "metrics.csv"
    deadline = time.monotonic() + 300
    while not (log.is_file() and "behaviour/loss" in log.read_text()) and time.monotonic() < deadline:
        assert job.poll() is None, job.communicate()[0].decode()[-2000:]
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=120)[0].decode()
    fakes = Path(slurm["FAKE"])
    assert job.returncode == 0, output[-2000:]
    assert (fakes / "requeued").read_text() == "requeue 4711\n"
    step = torch.load(run / "phases" / "1-behaviour" / "last.ckpt", weights_only=True)["global_step"]
    assert 20 <= step < 600 and not (run / "model.safetensors").exists()
    again = submit(slurm, *command)
    output = again.communicate(timeout=300)[0].decode()
    assert again.returncode == 0, output[-2000:]
    assert (fakes / "requeued").read_text() == "requeue 4711\n", "a run that is done is not queued again"
    train(compose(*[setting.replace(str(run), str(whole)) for setting in command]))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, run))
    for name in first:
        torch.testing.assert_close(second[name], first[name], msg=name)
    assert (run / "csv" / "metrics.0.csv").is_file(), "the log of the first attempt is kept"
    found, expected = (read_log(folder)["behaviour"]["loss"] for folder in (run, whole))
    assert found.keys() == expected.keys() == set(range(20, 601, 20))
    # The line of the log in whose steps it stopped has the later ones alone.
    assert sum(found[n] != pytest.approx(expected[n], rel=1e-4) for n in expected) <= 1


@pytest.mark.parametrize(("status", "told"), [(1, True), (143, False), (0, True)])
def test_only_a_job_that_saved_for_its_limit_is_queued_again(slurm, tmp_path, status, told):
    """Neither one that fails, nor one that was cancelled, nor one that ended by itself."""
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/bash\ntrap 'exit {status}' TERM\ntouch $FAKE/on\nfor i in {{1..200}}; do sleep 0.05; done\n"
    )
    program.chmod(0o755)
    job = submit(slurm | {"PYTHON": str(program)})
    while not (Path(slurm["FAKE"]) / "on").exists():
        time.sleep(0.02)
    if told:
        job.send_signal(signal.SIGUSR1)
    else:
        task = int((Path(slurm["FAKE"]) / "task").read_text())
        os.killpg(task, signal.SIGTERM)
    job.communicate(timeout=30)
    assert job.returncode == status
    assert not (Path(slurm["FAKE"]) / "requeued").exists()
