"""The doctor finds what is wrong with an artefact on the machine that runs it, and stands alone as the runtime does."""

import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_fakes import ROBOTS, FakeModel, fake_clips, fake_moments

from export.__main__ import main
from export.build import BuildOptions, build_artefact
from export.runtime import doctor, load_manifest
from export.runtime.doctor import examine
from export.runtime.latency import latency_contract, measure

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "fake"
    options = BuildOptions(paths=("policy",), formats=("onnx",), precisions=("bf16",), latency_ticks=5)
    build_artefact(FakeModel(), out, fake_moments(1), fake_clips(), ROBOTS, options)
    return out


def edited(source: Path, target: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> Path:
    """A copy of an artefact with another manifest, which lists the files as they are."""
    if not target.exists():
        shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    change(manifest)
    for name in manifest["files"]:
        content = (target / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return target


def found(folder: Path, check: str, file: str = "policy.onnx") -> doctor.Finding:
    """The first finding of a check of a graph."""
    return next(f for f in examine(folder, ticks=5, warm_up=2) if f.check == check and f.subject == file)


def test_a_sound_artefact_is_healthy(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(artefact), "ticks=40", "warm_up=5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "ok" and report["ticks"] == 40
    for file in ("policy.onnx", "policy.bf16.onnx"):
        rows = {row["check"]: row for row in report["findings"] if row["subject"] == file}
        assert set(rows) == {"schema", "providers", "parity", "latency", "memory"}
        values = rows["latency"]["values"]
        assert 0 < values["p50_ms"] <= values["p99_ms"] <= values["p99_9_ms"] <= values["max_ms"]
    nodes = [row["values"] for row in report["findings"] if row["check"] == "providers"]
    assert any(row["provider"] == doctor.CPU and row["nodes"][doctor.CPU] > 10 for row in nodes)


def test_the_manifest_has_the_contract_and_what_the_build_machine_took(artefact: Path) -> None:
    manifest = load_manifest(artefact)
    latency, fps = manifest["latency"], manifest["spec"]["fps"]
    assert latency["control_period_ms"] == 1000 / fps and latency["replan"] == manifest["spec"]["stride"]
    assert latency["limits"] == {"p99_ms": 1000 / fps, "p99_9_ms": 4 * 1000 / fps} and latency["paths"] == ["policy"]
    assert set(latency["measured"]["graphs"]) == {"policy.onnx", "policy.bf16.onnx"}
    assert all(row["ticks"] == 5 and row["p50_ms"] > 0 for row in latency["measured"]["graphs"].values())


def test_another_function_fails_parity(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artefact, folder)
    with np.load(folder / "golden.npz") as golden:
        arrays = dict(golden)
    arrays["actions"] = arrays["actions"] + np.float32(1e-3)
    np.savez(folder / "golden.npz", allow_pickle=False, **arrays)
    edited(artefact, folder)
    finding = found(folder, "parity")
    assert finding.status == "failure" and "actions differs by 0.001, at most 0.0001" in finding.message
    assert doctor.main([str(folder), "ticks=5"]) == 2


def test_an_altered_file_or_a_graph_of_something_else_fails(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "altered"
    shutil.copytree(artefact, folder)
    (folder / "policy.onnx").write_bytes(b"x")
    (finding,) = examine(folder)
    assert (finding.status, finding.check) == ("failure", "files") and "altered since export" in finding.message
    assert found(edited(folder, folder), "run").status == "failure", "no graph at all"

    def renamed(manifest: dict[str, Any]) -> None:
        manifest["paths"]["policy"]["inputs"][3]["shape"][-1] = 4

    finding = found(edited(artefact, tmp_path / "other", renamed), "schema")
    assert finding.status == "failure" and "input 'points' is tensor(float)" in finding.message


def test_what_the_contract_asks_decides(artefact: Path, tmp_path: Path) -> None:
    def hurry(manifest: dict[str, Any]) -> None:
        manifest["latency"]["limits"] = {"p99_ms": 1e-6, "p99_9_ms": 1e-5}

    folder = edited(artefact, tmp_path / "hurried", hurry)
    finding = found(folder, "latency")
    assert finding.status == "failure" and "the contract asks p99 at most" in finding.message
    limits = latency_contract(20.0, 4, ["policy", "rollout"])
    assert limits["limits"] == {"p99_ms": 50.0, "p99_9_ms": 200.0} and limits["paths"] == ["policy"]
    values = {"ticks": 9, "p50_ms": 20.0, "p99_ms": 60.0, "p99_9_ms": 90.0}
    assert doctor.latency("x", values, limits).status == "warning", "late now and then"
    assert doctor.latency("x", {**values, "p50_ms": 55.0}, limits).status == "failure", "late as a rule"
    assert doctor.latency("x", {**values, "p99_9_ms": 250.0}, limits).status == "failure", "too late to be used"
    assert doctor.latency("x", {**values, "p99_ms": 50.0}, limits).status == "ok"
    assert doctor.latency("x", values, None).status == "ok"


def test_an_older_artefact_and_one_that_failed_its_check_are_warned_of(artefact: Path, tmp_path: Path) -> None:
    def older(manifest: dict[str, Any]) -> None:
        del manifest["latency"]
        manifest["graphs"][0] |= {"accepted": False, "reason": "actions differ"}

    folder = edited(artefact, tmp_path / "older", older)
    assert found(folder, "contract", "manifest.json").status == "warning"
    finding = found(folder, "schema")
    assert finding.status == "warning" and "actions differ" in finding.message
    assert doctor.main([str(folder), "ticks=20"]) == 1


def test_a_loop_that_keeps_what_it_made_is_found() -> None:
    kept: list[bytes] = []
    leaking = measure(lambda: kept.append(bytes(4096)), 4, 40)
    steady = measure(lambda: None, 4, 40)
    assert leaking["python_growth_bytes"] > 40 * 4096 > 4096 > steady["python_growth_bytes"]
    assert doctor.memory("x", leaking).status == "warning" and doctor.memory("x", steady).status == "ok"


@pytest.mark.parametrize("words", [["ticks=0"], ["ticks=many"], ["speed=3"], ["--yaml"], ["one", "two"]])
def test_a_wrong_command_line_says_what_would_be_right(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(words) == 2
    assert "expected" in capsys.readouterr().err


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing to import but numpy and onnxruntime, as on a robot."""
    site = tmp_path_factory.mktemp("site")
    for name in ("numpy", "onnxruntime"):
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        package = Path(spec.origin).parent
        for folder in (package, package.with_name(f"{name}.libs")):
            if folder.is_dir():
                (site / folder.name).symlink_to(folder)
    return site


def test_the_artefact_alone_runs_and_is_checked(artefact: Path, alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "robot"
    shutil.copytree(artefact, folder)
    script = """
        import importlib.util
        import numpy as np
        from runtime import OnnxPolicy
        for name in ("torch", "worldmodel", "export", "onnx", "google", "flatbuffers", "sympy", "yaml"):
            assert importlib.util.find_spec(name) is None, name
        policy = OnnxPolicy(".", instruction="go", mask=("camera", "points", "touch"))
        images = {f"rgb.{name}": np.zeros((8, 8, 3), np.uint8) for name in ("front", "wrist")}
        for _ in range(5):
            policy.observe({**images, "proprio": np.zeros(5)})
            assert np.isfinite(policy.act()).all() and policy.report is not None
    """
    commands = (["-c", textwrap.dedent(script)], ["-m", "runtime.doctor", "ticks=20", "warm_up=2", "--json"])
    answers = []
    for command in commands:
        # Without the site module no installed package is found but those of the given folder.
        done = subprocess.run(
            [sys.executable, "-S", *command],
            cwd=folder,
            env={"PYTHONPATH": str(alone), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    assert json.loads(answers[1])["status"] == "ok"
