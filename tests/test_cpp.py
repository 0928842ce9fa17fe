"""The controller in C++: built with the libtorch of the installed torch, it answers what the model answers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_fakes import ROBOTS, FakeModel, action_path, fake_clips, fake_moments

from export.build import BuildOptions, build_artefact
from export.manifest import path_entry
from export.parity import eager_answers, make_examples, write_golden
from export.program import compiler
from export.runtime.golden import Golden
from export.torchscript import write_golden_tensors

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cpp"
"""Kept between runs: compiling against libtorch's headers takes longer than all tests of this file."""

torch.set_num_threads(1)


def cmake() -> str | None:
    """cmake of this environment or of the system."""
    own = Path(sys.executable).with_name("cmake")
    return str(own) if own.is_file() else shutil.which("cmake")


@pytest.fixture(scope="module")
def controller() -> Path:
    tool = cmake()
    if tool is None or compiler() is None:
        pytest.skip("needs cmake and a C++ compiler (CXX, g++ or clang++); this machine lacks one of them")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configure = ["-S", str(ROOT / "export" / "cpp"), "-B", str(BUILD), "-DCMAKE_BUILD_TYPE=Release", prefix]
    for words in (configure, ["--build", str(BUILD)]):
        done = subprocess.run([tool, *words], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "controller"


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "fake"
    build_artefact(FakeModel(), out, fake_moments(1), fake_clips(), ROBOTS, BuildOptions(paths=("policy",)))
    return out


def run(controller: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([controller, *words], capture_output=True, text=True, timeout=120, env=environment)


def figures(text: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(p50|p99|p99\.9|max|difference|late) ([\d.e+-]+)", text)}


def test_it_answers_what_the_model_answers_at_a_fixed_rate(controller: Path, artefact: Path) -> None:
    done = run(controller, str(artefact / "policy.pt"), str(artefact / "golden.pt"), "--rate", "100", "--ticks", "60")
    assert done.returncode == 0, done.stderr
    found = figures(done.stdout)
    assert 0 < found["p50"] <= found["p99"] <= found["p99.9"] <= found["max"]
    assert 0 <= found["difference"] <= 1e-5 and "ticks 60 at 100 Hz" in done.stdout


def test_another_answer_is_found(controller: Path, artefact: Path, tmp_path: Path) -> None:
    path = action_path(FakeModel())
    with torch.no_grad():
        path.model.read.bias += 0.01
    write_golden(tmp_path / "golden.npz", path, make_examples(path, fake_moments(1))[:2])
    write_golden_tensors(tmp_path / "golden.pt", Golden(tmp_path / "golden.npz", path_entry(path)))
    done = run(controller, str(artefact / "policy.pt"), str(tmp_path / "golden.pt"), "--rate", "500", "--ticks", "4")
    assert done.returncode == 1 and "at most 0.0001 is allowed" in done.stderr
    assert figures(done.stdout)["difference"] > 1e-4


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "expected GRAPH.pt GOLDEN.pt"),
        (["a.pt", "b.pt", "--rate", "0"], 2, "--rate: got 0, expected a number above 0"),
        (["a.pt", "b.pt", "--speed", "1"], 2, "--speed: expected --rate"),
        (["a.pt", "b.pt"], 1, "b.pt"),
    ],
)
def test_wrong_use_is_said(controller: Path, words: list[str], code: int, said: str) -> None:
    done = run(controller, *words)
    assert done.returncode == code and said in done.stderr


def test_golden_tensors_are_the_golden_observations(artefact: Path) -> None:
    inputs, expected, starts, cache = torch.jit.load(str(artefact / "golden.pt"))()
    assert len(inputs) == len(expected) == len(starts) == 4 and all(starts) and not cache
    examples = make_examples(action_path(FakeModel()), fake_moments(1))
    for number in range(4):
        for given, right in zip(inputs[number], examples[number].ticks[0], strict=True):
            torch.testing.assert_close(given, right)
    assert expected[0][0].shape == eager_answers(action_path(FakeModel()), examples[0])[0][0].shape
