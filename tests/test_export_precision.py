"""Other precisions: accepted within their bound, and otherwise left out or marked and refused by the runtime."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from export_fakes import ROBOTS, FakeModel, action_path, fake_clips, fake_moments

from export import program
from export.build import BuildOptions, build_artefact, drive_reduced, write_reduced
from export.drive import DrivenCheck
from export.envelope import Envelope
from export.onnx import OnnxRunner
from export.parity import check_parity, make_examples
from export.program import ProgramRunner, write_program
from export.runtime import OnnxPolicy, RuntimeContractError
from worldmodel.errors import ConfigError, ExportError

torch.set_num_threads(1)

BOUNDS = {"fp16": 0.02, "bf16": 0.05, "int8_dynamic": 1e-9, "int8_static": 0.5}


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "fake"
    options = BuildOptions(
        paths=("policy",), formats=("onnx",), precisions=tuple(BOUNDS), bounds=BOUNDS, keep_failed=True
    )
    build_artefact(FakeModel(), out, fake_moments(1), fake_clips(), ROBOTS, options)
    return out


def test_every_precision_is_measured_and_a_failed_one_is_marked(artefact: Path) -> None:
    manifest = json.loads((artefact / "manifest.json").read_text())
    graphs = {graph["precision"]: graph for graph in manifest["graphs"]}
    assert set(graphs) == {"fp32", *BOUNDS} and manifest["refused"] == []
    for name, bound in BOUNDS.items():
        graph, check = graphs[name], graphs[name]["check"]
        assert check["bound"] == bound and check["mean_difference"]["actions"] > 0
        assert check["eager_action_error"] > 0 and graph["accepted"] == (name != "int8_dynamic")
    assert "at most 1e-09 is allowed" in graphs["int8_dynamic"]["reason"]
    sizes = {name: (artefact / graph["file"]).stat().st_size for name, graph in graphs.items()}
    assert sizes["bf16"] < 0.8 * sizes["fp32"]
    kinds = {node.op_type for node in onnx.load(str(artefact / "policy.int8_dynamic.onnx")).graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul"}


def test_the_runtime_refuses_what_failed_and_names_what_there_is(artefact: Path) -> None:
    with pytest.raises(RuntimeContractError, match=r"int8_dynamic\.onnx: failed its check .*\(unproven=True\)"):
        OnnxPolicy(artefact, precision="int8_dynamic")
    with pytest.raises(RuntimeContractError, match=r"policy in int4: no such ONNX graph; .* policy in bf16"):
        OnnxPolicy(artefact, precision="int4")
    assert OnnxPolicy(artefact, precision="int8_dynamic", unproven=True).horizon == 8
    assert OnnxPolicy(artefact, precision="bf16").horizon == 8


def test_half_precision_leaves_the_envelope_in_single(artefact: Path) -> None:
    path = action_path(FakeModel())
    inputs = list(path.example(1))
    inputs[17] = inputs[17] * 300  # the noise
    actions = OnnxRunner(artefact / "policy.fp16.onnx")(inputs)[0]
    assert np.abs(actions[..., :4]).max() == 1.0


def test_a_failed_precision_is_not_written_unless_asked_for(artefact: Path, tmp_path: Path) -> None:
    shutil.copyfile(artefact / "policy.onnx", tmp_path / "policy.onnx")
    path = action_path(FakeModel())
    path.envelope = Envelope(path.spec, path.model.statistics)
    examples = make_examples(path, fake_moments(1))
    entry = write_reduced(path, tmp_path, "bf16", examples, fake_clips(), 1e-9, BuildOptions())
    assert not entry["written"] and not entry["accepted"] and "differs by" in entry["reason"]
    assert [file.name for file in tmp_path.iterdir()] == ["policy.onnx"]


def test_closed_loop_success_counts_too(tmp_path: Path) -> None:
    class Drive:
        drop = 0.1

        def __call__(self, folder: Path, precision: str) -> dict[str, int]:
            # As the runtime does, which refuses an artefact that lacks a file of its manifest.
            assert len(list(folder.iterdir())) == 3
            return {"successes": {"fp32": 18, "bf16": 17, "fp16": 12}[precision], "trials": 20}

    def entry(precision: str) -> dict[str, Any]:
        file = f"policy.{precision}.onnx"
        (tmp_path / file).write_bytes(b"")
        base = {"path": "policy", "precision": precision, "file": file, "written": True}
        return base | {"accepted": True, "reason": None, "check": {}}

    graphs = [entry("fp32"), entry("fp16"), entry("bf16")]
    drive_reduced(graphs, tmp_path, cast(DrivenCheck, Drive()), keep_failed=False)
    assert graphs[2]["accepted"] and graphs[2]["check"]["closed_loop"]["fp32"] == {"successes": 18, "trials": 20}
    assert not graphs[1]["accepted"] and "12 of 20 trials, fp32 in 18" in graphs[1]["reason"]
    assert not (tmp_path / "policy.fp16.onnx").exists()
    drive_reduced(graphs[:1], tmp_path, cast(DrivenCheck, None), keep_failed=False)  # fp32 alone is not driven


def test_a_torch_export_program_is_the_model(tmp_path: Path) -> None:
    path = action_path(FakeModel())
    write_program(path, tmp_path / "policy.pt2", dynamic=True, compiled=False)
    runner = ProgramRunner(tmp_path / "policy.pt2", compiled=False)
    examples = make_examples(path, fake_moments(2))
    result = check_parity(path, {"policy.pt2": runner}, examples, batches=(1, 3))["policy.pt2"]
    assert max(result.max_error.values()) < 1e-5


def test_machine_code_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"aotinductor needs a C\+\+ compiler"):
        BuildOptions(formats=("onnx", "aotinductor"))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler"):
        write_program(action_path(FakeModel()), tmp_path / "x.pt2", dynamic=False, compiled=True)


def test_bounds_are_needed() -> None:
    options = BuildOptions(precisions=("fp16",), bounds={})
    with pytest.raises(ExportError, match=r"bounds: none for \['fp16'\]"):
        build_artefact(FakeModel(), "nowhere", fake_moments(1), fake_clips(), ROBOTS, options)
