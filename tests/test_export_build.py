"""The artefact folder: complete, equal to the model, and all or nothing."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from export_fakes import ROBOTS, SPEC, FakeModel, action_path, fake_clips, fake_moments
from torch import Tensor

from export import build
from export.__main__ import main
from export.build import BuildOptions, build_artefact
from export.evidence import VARIANTS
from export.manifest import RobotNames
from export.onnx import OnnxRunner, write_onnx
from export.parity import check_parity, eager_answers, make_examples
from export.tensors import TensorSpec
from export.torchscript import TorchScriptRunner
from export.wrappers import Path as ExportedPath
from worldmodel.contracts import Observation
from worldmodel.errors import ConfigError, ExportError
from worldmodel.guess import Decision
from worldmodel.policy.realtime import Decided

torch.set_num_threads(1)


POLICY = BuildOptions(paths=("policy",))
ONNX = BuildOptions(paths=("policy",), formats=("onnx",))


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "fake"
    graphs = build_artefact(FakeModel(), out, fake_moments(), fake_clips(), ROBOTS, POLICY)
    assert set(graphs) == {"policy.onnx", "policy.pt"}
    assert max(max(graph["parity"]["max_error"].values()) for graph in graphs.values()) <= 1e-5
    return out


def test_manifest_describes_every_input_and_file(artefact: Path) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    path = manifest["paths"]["policy"]
    assert [entry["name"] for entry in path["inputs"]] == [
        *Observation._fields,
        "noise",
        "previous",
        "has_previous",
        "decided",
        "is_decided",
    ]
    assert path["inputs"][0]["shape"] == ["batch", 3, 2, 3, 8, 8] and path["cache"] is None
    answers = {entry["name"]: entry["shape"][1:] for entry in path["outputs"]}
    assert answers["actions"] == [SPEC.chunk, SPEC.action]
    assert answers["limited"] == [SPEC.chunk, len(manifest["limits"])]
    assert answers["confidence"] == answers["out_of_distribution"] == []
    (robot,) = manifest["embodiments"]
    assert (robot["name"], robot["index"], robot["proprio_dims"]) == ("sawyer", 0, 5)
    assert robot["action_names"] == ["x", "y", "z", "grip"]
    assert robot["envelope"]["joints"]["delta_x"]["velocity"] == 0.8 and "bounds" in robot["envelope"]["source"]
    assert manifest["control"]["history_steps"] == [-8, -4, 0]
    assert manifest["flow_steps"] == 2
    assert {graph["file"] for graph in manifest["graphs"]} == {"policy.onnx", "policy.pt"}
    for graph in manifest["graphs"]:
        assert graph["accepted"] and graph["precision"] == "fp32" and graph["batch"] == 1
        assert graph["parity"]["examples"] == 2 * len(VARIANTS)
        assert set(graph["parity"]["max_error"]) == {"actions", "confidence", "novelty"}
    assert manifest["trust"]["clips"] == 12 and manifest["trust"]["flagged"].keys() == {
        "heldout_episodes",
        "heldout_tasks",
    }
    found = {str(path.relative_to(artefact)) for path in artefact.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == found - {"manifest.json"}
    for name, entry in manifest["files"].items():
        content = (artefact / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_golden_observations_reproduce_on_both_artefacts(artefact: Path) -> None:
    path = json.loads((artefact / "manifest.json").read_text())["paths"]["policy"]
    with np.load(artefact / "golden.npz", allow_pickle=False) as golden:
        inputs = [torch.from_numpy(golden[entry["name"]]) for entry in path["inputs"]]
        expected, odd = golden["actions"], golden["out_of_distribution"]
    assert len(expected) == 4
    for runner in (OnnxRunner(artefact / "policy.onnx"), TorchScriptRunner(artefact / "policy.pt")):
        for row in range(len(expected)):
            answer = runner([tensor[row : row + 1] for tensor in inputs])
            np.testing.assert_allclose(answer[0], expected[row : row + 1], atol=1e-5)
            assert answer[4] == odd[row : row + 1]


def test_masks_reach_the_exported_graph(artefact: Path) -> None:
    runner = OnnxRunner(artefact / "policy.onnx")
    examples = make_examples(action_path(FakeModel()), fake_moments(1))
    rest = examples[0].ticks[0][17:]
    answers = [runner([*example.ticks[0][:17], *rest])[0] for example in examples]
    for answer in answers[1:]:
        assert np.abs(answer - answers[0]).max() > 1e-3


def test_the_graph_clamps_to_the_robots_limits(artefact: Path) -> None:
    runner, path = OnnxRunner(artefact / "policy.onnx"), action_path(FakeModel())
    inputs = list(path.example(1))
    inputs[17] = inputs[17] * 100  # the noise
    actions, limited = runner(inputs)[:2]
    assert np.abs(actions[0, :, :4]).max() <= 1 and limited[0].any()
    assert np.abs(actions[0, :, 4:]).max() > 1, "padding is left alone"


def test_dynamic_batch_runs_any_batch(tmp_path: Path) -> None:
    path = action_path(FakeModel())
    write_onnx(path, tmp_path / "policy.onnx", opset=18, dynamic=True)
    runner = OnnxRunner(tmp_path / "policy.onnx")
    examples = make_examples(path, fake_moments(2))
    result = check_parity(path, {"policy.onnx": runner}, examples, batches=(1, 3, 5))["policy.onnx"]
    assert result.examples == 12 + 4 + 2 and max(result.max_error.values()) < 1e-5


def test_unused_inputs_stay_in_the_graph(tmp_path: Path) -> None:
    class Deaf(FakeModel):
        def decide(self, observation: Observation, noise: Tensor, decided: Decided | None = None) -> Decision:
            heard = super().decide(observation, noise, decided)
            return heard._replace(actions=noise + 1, doubt=noise, features=noise[:, 0].repeat(1, 2)[:, :8])

    deaf = action_path(Deaf())
    write_onnx(deaf, tmp_path / "policy.onnx", opset=18, dynamic=False)
    # The graph keeps inputs that it does not use, so the runtime can feed every artefact alike.
    answer = OnnxRunner(tmp_path / "policy.onnx")(deaf.example(1))
    assert answer[0].shape == (1, SPEC.chunk, SPEC.action)


def test_parity_failure_names_the_artefact_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(OnnxRunner):
        def __call__(self, inputs: object) -> list[np.ndarray]:
            actions, *rest = super().__call__(inputs)  # type: ignore[arg-type]
            return [actions + 1e-3, *rest]

    monkeypatch.setattr(build, "OnnxRunner", Wrong)
    with pytest.raises(ExportError, match=r"policy\.onnx: output 'actions' differs .* 0\.001 on episode0@0"):
        build_artefact(FakeModel(), tmp_path / "out", fake_moments(), fake_clips(), ROBOTS, ONNX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parity_fails_on_non_finite_answers(bad: float) -> None:
    path = action_path(FakeModel())
    examples = make_examples(path, fake_moments(1))
    answers = iter([eager_answers(path, example)[0] for example in examples])

    def broken(inputs: object) -> list[np.ndarray]:
        actions, *rest = next(answers)
        return [actions + bad, *rest]

    with pytest.raises(ExportError, match=r"policy\.pt"):
        check_parity(path, {"policy.pt": broken}, examples)
    lost = FakeModel()
    torch.nn.init.constant_(lost.velocity.bias, np.nan)
    with pytest.raises(ExportError, match="eager model answers non-finite"):
        check_parity(action_path(lost), {}, examples)
    with pytest.raises(ExportError, match="no held-out observations"):
        check_parity(path, {}, [])


def test_parity_fails_on_flags() -> None:
    path = action_path(FakeModel())
    examples = make_examples(path, fake_moments(1))
    answers = iter([eager_answers(path, example)[0] for example in examples])

    def silent(inputs: object) -> list[np.ndarray]:
        return [~x if x.dtype == bool else x for x in next(answers)]

    with pytest.raises(ExportError, match=r"policy\.pt: 246 of 246 flags differ"):
        check_parity(path, {"policy.pt": silent}, examples)


def test_existing_folders_are_respected(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="force=true"):
        build_artefact(FakeModel(), artefact, fake_moments(1), fake_clips(), ROBOTS, ONNX)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match=r"no manifest\.json"):
        build_artefact(FakeModel(), tmp_path, fake_moments(1), fake_clips(), ROBOTS, replace(ONNX, force=True))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_force_replaces_an_artefact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("{}")
    (out / "stale.bin").write_text("old")
    build_artefact(FakeModel(), out, fake_moments(1), fake_clips(), ROBOTS, replace(ONNX, force=True))
    assert not (out / "stale.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_must_fit_the_statistics(tmp_path: Path) -> None:
    robots = {"sawyer": RobotNames(action_names=("x", "y"), proprio_names=tuple("abcde"))}
    with pytest.raises(ExportError, match=r"'sawyer': 2 action names \['x', 'y'\], but its statistics have 4"):
        build_artefact(FakeModel(), tmp_path / "out", fake_moments(1), fake_clips(), robots, ONNX)
    assert list(tmp_path.iterdir()) == []


def test_options_name_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="tflite"):
        BuildOptions(formats=("onnx", "tflite"))
    with pytest.raises(ConfigError, match="onnx among them"):
        BuildOptions(formats=("torchscript",))
    with pytest.raises(ConfigError, match=r"paths: .*policy among them"):
        BuildOptions(paths=("rollout",))
    with pytest.raises(ConfigError, match=r"precisions: .*int4"):
        BuildOptions(precisions=("int4",))


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--help"], 0, "drive DIR"),
        (["build", "--help"], 0, "tolerance: 1.0e-4"),
        (["drive", "--help"], 0, "trials: 20"),
        (["fly"], 2, "expected build, doctor, drive, serve or replay"),
        (["build", "checkpoint=x"], 2, "missing out=... data=..."),
        (["build", "chekpoint=x"], 2, "key of checkpoint, out"),
        (["drive", "nowhere"], 1, "no manifest.json"),
    ],
)
def test_command_line(words: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == status
    captured = capsys.readouterr()
    assert text in captured.out + captured.err


def test_outputs_that_are_always_equal_keep_their_names(tmp_path: Path) -> None:
    class Twice(ExportedPath):
        name = "twice"
        inputs = [TensorSpec("x", (3,), torch.float32, "", "", "")]  # noqa: RUF012
        outputs = [TensorSpec(name, (3,), torch.bool, "", "", "") for name in ("first", "second")]  # noqa: RUF012

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x > 0, x > 0

    write_onnx(Twice(FakeModel()).eval(), tmp_path / "twice.onnx", opset=18, dynamic=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "twice.onnx"), providers=["CPUExecutionProvider"])
    x = np.array([[1.0, -1.0, 0.0]], np.float32)
    assert [row.name for row in session.get_outputs()] == ["first", "second"]
    assert [np.asarray(answer).tolist() for answer in session.run(["first", "second"], {"x": x})] == [
        [[True, False, False]]
    ] * 2
