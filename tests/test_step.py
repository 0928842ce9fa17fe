"""The step benchmark runs reduced on a CPU, and counts the FLOPs that the model needs."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

FOLDER = Path(__file__).parent.parent / "benchmarks"
CPU = ["experiment=kairos_tiny", "--device", "cpu", "--threads", "1", "--product", "64"]


@pytest.fixture
def script(monkeypatch) -> dict[str, Any]:
    """What `step.py` defines."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return runpy.run_path(str(FOLDER / "step.py"))


def test_rows_compute_the_same_step(script, tmp_path, capsys):
    rows = [
        "folded,chunked,eager,none",
        "dense,chunked,eager,full",
        "folded,fused,eager,none",
        "folded,chunked,eager,none,1",
    ]
    out, profile = tmp_path / "step.json", tmp_path / "kernels.txt"
    sizes = ["--batch", "2", "--steps", "1", "--warmup", "1", "synthesis.denoiser.window=2"]
    script["main"]([*CPU, *sizes, "--json", str(out), "--profile", str(profile), "--rows", *rows])
    report = json.loads(out.read_text())
    plain, dense, fused, single = report["rows"]
    # Two images of 16 patches, two cameras, four points and three sensors in each of five frames, and eight actions.
    assert report["tokens_per_sample"] == 5 * (32 + 2 + 4 + 3) + 8
    assert dense["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert single["loss"] != plain["loss"] and single["batch"] == 1
    assert "works on a GPU" in fused["failed"]
    assert "aten::addmm" in profile.read_text()
    table = capsys.readouterr().out
    assert table.count("| eager |") == 4 and "works on a GPU" in table


def test_flops_are_those_of_the_windows(script):
    """Where every frame sees every other, torch's counter finds the same in the dense form."""
    given = script["arguments"]().parse_args([*CPU, "--forward"])
    counted = {}
    for window in (2, 16):
        layers = ["synthesis.denoiser.pattern=[swa]", "policy.expert.layers=1", f"synthesis.denoiser.window={window}"]
        bench = script["Bench"](script["compose"]([CPU[0], *layers]), given)
        counted[window] = bench.flops()
    bench.model.denoiser.blocks[0].mix.attention = "dense"
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        bench.loss(*bench.batch(1))
    assert counted[16] == counter.get_total_flops() > counted[2]


def test_training_takes_three_times_the_forward_pass_of_what_is_trained(script):
    flops = {}
    for forward in (True, False):
        given = script["arguments"]().parse_args([*CPU, *["--forward"] * forward])
        flops[forward] = script["Bench"](script["compose"]([CPU[0]]), given).flops()
    assert 2 * flops[True] < flops[False] < 3 * flops[True]  # stage 1 is frozen in that phase


def test_unknown_rows_are_refused(script):
    with pytest.raises(SystemExit, match=r"row 'folded,fast,eager,none': expected folded\|flex"):
        script["main"]([*CPU, "--rows", "folded,fast,eager,none"])
