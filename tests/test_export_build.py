"""The artefact folder: complete, equal to the model, and all or nothing."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export_fakes import ROBOTS, SPEC, FakeModel, fake_observations
from torch import Tensor

from export import build
from export.__main__ import main
from export.build import BuildOptions, build_artefact
from export.manifest import RobotNames
from export.onnx import OnnxRunner, write_onnx
from export.parity import VARIANTS, check_parity, make_examples
from export.torchscript import TorchScriptRunner
from export.wrappers import INPUT_NAMES, ActionPath, random_inputs
from worldmodel.contracts import Observation
from worldmodel.errors import ConfigError, ExportError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "fake"
    errors = build_artefact(FakeModel(), out, fake_observations(), ROBOTS, BuildOptions())
    assert set(errors) == {"policy.onnx", "policy.pt"}
    assert max(errors.values()) <= 1e-5
    return out


def test_manifest_describes_every_input_and_file(artefact: Path) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["inputs"]] == list(INPUT_NAMES)
    assert manifest["inputs"][0]["shape"] == [1, 3, 2, 3, 8, 8]
    assert manifest["output"]["shape"] == [1, SPEC.chunk, SPEC.action]
    (robot,) = manifest["embodiments"]
    assert (robot["name"], robot["index"], robot["proprio_dims"]) == ("sawyer", 0, 5)
    assert robot["action_names"] == ["x", "y", "z", "grip"]
    assert manifest["control"]["history_steps"] == [-8, -4, 0]
    assert manifest["flow_steps"] == 2
    assert manifest["parity"]["comparisons"] == 2 * len(VARIANTS)
    assert set(manifest["parity"]["max_abs_error"]) == {"policy.onnx", "policy.pt"}
    assert set(manifest["files"]) == {path.name for path in artefact.iterdir()} - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (artefact / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_golden_observations_reproduce_on_both_artefacts(artefact: Path) -> None:
    with np.load(artefact / "golden.npz", allow_pickle=False) as golden:
        inputs = [torch.from_numpy(golden[name]) for name in INPUT_NAMES]
        expected = golden["actions"]
    assert len(expected) == 4
    for runner in (OnnxRunner(artefact / "policy.onnx"), TorchScriptRunner(artefact / "policy.pt")):
        for row in range(len(expected)):
            actions = runner([tensor[row : row + 1] for tensor in inputs])
            np.testing.assert_allclose(actions, expected[row : row + 1], atol=1e-5)


def test_masks_reach_the_exported_graph(artefact: Path) -> None:
    runner = OnnxRunner(artefact / "policy.onnx")
    examples = make_examples(fake_observations(1), (SPEC.chunk, SPEC.action))
    noise = examples[0].inputs[-1]
    answers = [runner([*example.inputs[:-1], noise]) for example in examples]
    for answer in answers[1:]:
        assert np.abs(answer - answers[0]).max() > 1e-3


def test_dynamic_batch_runs_any_batch(tmp_path: Path) -> None:
    path_module = ActionPath(FakeModel()).eval()
    write_onnx(path_module, random_inputs(SPEC, 2), tmp_path / "policy.onnx", opset=18, dynamic=True)
    runner = OnnxRunner(tmp_path / "policy.onnx")
    for batch in (1, 3):
        inputs = random_inputs(SPEC, batch, seed=batch)
        np.testing.assert_allclose(runner(inputs), path_module(*inputs).detach().numpy(), atol=1e-5)


def test_unused_inputs_stay_in_the_graph(tmp_path: Path) -> None:
    class Deaf(FakeModel):
        def act(self, observation: Observation, noise: Tensor) -> Tensor:
            return noise + 1

    deaf = ActionPath(Deaf()).eval()
    write = tmp_path / "policy.onnx"
    write_onnx(deaf, random_inputs(SPEC, 1), write, opset=18, dynamic=False)
    # The graph keeps inputs that it does not use, so the runtime can feed every artefact alike.
    assert OnnxRunner(write)(random_inputs(SPEC, 1)).shape == (1, SPEC.chunk, SPEC.action)


def test_parity_failure_names_the_artefact_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(OnnxRunner):
        def __call__(self, inputs: object) -> np.ndarray:
            return super().__call__(inputs) + 1e-3  # type: ignore[arg-type]

    monkeypatch.setattr(build, "OnnxRunner", Wrong)
    with pytest.raises(ExportError, match=r"policy\.onnx: output 'actions' differs .* 0\.001 on episode0@0"):
        build_artefact(FakeModel(), tmp_path / "out", fake_observations(), ROBOTS, BuildOptions(formats=("onnx",)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parity_fails_on_non_finite_answers(bad: float) -> None:
    examples = make_examples(fake_observations(1), (SPEC.chunk, SPEC.action))
    good = np.zeros((1, SPEC.chunk, SPEC.action))
    with pytest.raises(ExportError, match=r"policy\.pt"):
        check_parity(lambda inputs: good, {"policy.pt": lambda inputs: good + bad}, examples)
    with pytest.raises(ExportError, match="eager model answers non-finite"):
        check_parity(lambda inputs: good + bad, {}, examples)
    with pytest.raises(ExportError, match="no held-out observations"):
        check_parity(lambda inputs: good, {}, [])


def test_existing_folders_are_respected(artefact: Path, tmp_path: Path) -> None:
    options = BuildOptions(formats=("onnx",))
    with pytest.raises(ExportError, match="force=true"):
        build_artefact(FakeModel(), artefact, fake_observations(1), ROBOTS, options)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match=r"no manifest\.json"):
        build_artefact(FakeModel(), tmp_path, fake_observations(1), ROBOTS, BuildOptions(force=True))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_force_replaces_an_artefact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    (out / "stale.bin").write_text("old")
    build_artefact(FakeModel(), out, fake_observations(1), ROBOTS, BuildOptions(formats=("onnx",), force=True))
    assert not (out / "stale.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_must_fit_the_statistics(tmp_path: Path) -> None:
    robots = {"sawyer": RobotNames(action_names=("x", "y"), proprio_names=tuple("abcde"))}
    with pytest.raises(ExportError, match=r"'sawyer': 2 action names \['x', 'y'\], but its statistics have 4"):
        build_artefact(FakeModel(), tmp_path / "out", fake_observations(1), robots, BuildOptions(formats=("onnx",)))
    assert list(tmp_path.iterdir()) == []


def test_options_name_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="tflite"):
        BuildOptions(formats=("onnx", "tflite"))
    with pytest.raises(ConfigError, match="onnx among them"):
        BuildOptions(formats=("torchscript",))


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--help"], 0, "drive DIR"),
        (["build", "--help"], 0, "tolerance: 1.0e-4"),
        (["drive", "--help"], 0, "trials: 20"),
        (["serve"], 2, "expected build or drive"),
        (["build", "checkpoint=x"], 2, "missing out=... data=..."),
        (["build", "chekpoint=x"], 2, "key of checkpoint, out"),
        (["drive", "nowhere"], 1, "no manifest.json"),
    ],
)
def test_command_line(words: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == status
    captured = capsys.readouterr()
    assert text in captured.out + captured.err
