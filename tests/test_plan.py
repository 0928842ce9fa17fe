"""A plan's figures beside those of real steps, and beside arithmetic by hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.config import register_resolvers
from worldmodel.errors import ConfigError
from worldmodel.phases import make_phases
from worldmodel.plan.__main__ import main
from worldmodel.plan.batch import random_batch
from worldmodel.plan.count import Counter
from worldmodel.plan.estimate import Cluster, memory, sizes, step_time, traffic
from worldmodel.plan.gpus import GPUS, find_gpu
from worldmodel.plan.step import count_step, meta_module
from worldmodel.training import MovingAverage, PhaseModule

ROOT = Path(__file__).parent.parent
LAYERS = ["synthesis.denoiser.pattern=[swa,dswa]", "policy.expert.layers=2", "synthesis.denoiser.window=16"]
"""Windows that see everything, so that torch's own counter finds no more in them than there is."""
SIZES = {
    "narrow": ["synthesis.denoiser.width=64", "synthesis.denoiser.hidden=256", "encoders.width=64"],
    "plain": [],
    "long": ["data.spec.future=4", "data.spec.history=4"],
}


def composed(*overrides: str) -> dict[str, Any]:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config: Any = compose("train", ["experiment=kairos_tiny", "data.root=none", *overrides])
        return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]


def joint_phase(config: dict[str, Any]) -> Any:
    values = config["phases"]["synthesis"]
    extra = {"mixture": [{"mode": "joint", "weight": 1.0}], "given": {}, "dropout": {}}
    return make_phases({"synthesis": {**values, **extra}})[0]


def real_module(config: dict[str, Any], phase: Any) -> PhaseModule:
    torch.manual_seed(0)
    spec = make_spec(config["data"]["spec"])
    model = build_model(config["model"], spec, {"embodiments": {name: {} for name in spec.embodiments}})
    for layer in [*model.denoiser.embed_out.values(), model.expert.embed_out]:
        torch.nn.init.normal_(layer.weight, std=0.02)
    return PhaseModule(model=model, phase=phase, seed=0)


def real_loss(module: PhaseModule, rows: int) -> torch.Tensor:
    return module.losses(random_batch(module.model.spec, rows), torch.Generator().manual_seed(1))["loss"]


def saved_bytes(module: PhaseModule, rows: int) -> int:
    """Distinct storages that the graph of a real step still holds after it, without parameters and buffers."""
    states = {x.untyped_storage()._cdata for x in [*module.parameters(), *module.buffers()]}
    found: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in states:
            found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = real_loss(module, rows)
    assert loss.requires_grad
    return sum(size for reference, size in found.values() if not reference.expired())


@pytest.mark.parametrize("size", SIZES)
def test_figures_are_within_a_tenth_of_real_steps(size):
    config = composed(*LAYERS, *SIZES[size])
    phase, spec = joint_phase(config), make_spec(config["data"]["spec"])
    planned = count_step(meta_module(config, phase, spec), rows=2, half=False)
    module = real_module(config, phase)
    kept = saved_bytes(module, 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        real_loss(module, 2).backward()
    flops = sum(planned.flops.values())
    print(f"{size}: FLOPs {flops:,.0f} of {counter.get_total_flops():,}; kept {planned.kept} of {kept:,}")
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert planned.kept["activations"] == pytest.approx(kept, rel=0.1)

    optimiser = module.configure_optimizers()["optimizer"]
    optimiser.step()
    average = MovingAverage(decay=0.9)
    average.on_fit_start(None, module)  # pyright: ignore[reportArgumentType]
    measured = {
        "parameters": sum(x.nbytes for x in [*module.parameters(), *module.buffers()]),
        "gradients": sum(p.grad.nbytes for p in module.parameters() if p.grad is not None),
        "optimiser": sum(x.nbytes for s in optimiser.state.values() for x in s.values() if x.dim()),
        "moving average": sum(x.nbytes for x in average.shadow.values()),
    }
    found = sizes(meta_module(config, phase, spec))
    kinds = Counter(config, spec, half=False).kinds(phase, batch=2)
    alone = memory(found, kinds, Cluster(nodes=1, gpus=1, gpu=GPUS["h100"], shard=1))
    for name, value in measured.items():
        assert alone[name] == pytest.approx(value, rel=0.1), name


def test_flops_of_a_window_layer_by_hand():
    """Adds up a layer from its shape: projections, window, cross-attention, feed-forward, and twice that backward."""

    def flops(repeats: int) -> float:
        layers = [
            "synthesis.denoiser.pattern=[swa]",
            f"synthesis.denoiser.repeats={repeats}",
            "synthesis.denoiser.window=2",
        ]
        config = composed(*layers, f"policy.expert.layers={repeats}")
        spec, values = make_spec(config["data"]["spec"]), config["phases"]["synthesis"]
        extra = {"mixture": [{"mode": "video_prediction", "weight": 1.0}], "given": {}, "trains": ["denoiser"]}
        phase = make_phases({"synthesis": {**values, **extra}})[0]
        count = count_step(meta_module(config, phase, spec), rows=1, half=False)
        return sum(f for (part, _), f in count.flops.items() if part == "denoiser")

    width, hidden, context = 128, 512, 128
    frames, tokens = 3 + 2, 2 * 16 + 2 + 4 + 3
    n = frames * tokens
    linear = 2 * n * (4 * width**2 + 2 * width**2 + 2 * width * hidden)
    pairs = (2 + 3 + 2) + (
        3 + 2
    )  # each history frame sees its neighbours, each future frame those and the last of history
    window = 4 * width * pairs * tokens**2
    # Keys, values and scores of the context are read by history and future; it has about thirty tokens.
    rest = flops(2) - flops(1) - 3 * (linear + window)
    cross = 3 * 2 * (2 * 2 * 40 * context * width + 2 * n * 40 * width)
    assert 0 < rest < cross


def test_a_deep_network_is_two_shallow_ones_continued():
    layers = ["synthesis.denoiser.pattern=[swa,gated]", "synthesis.denoiser.repeats=3", "policy.expert.layers=6"]
    config = composed(*layers)
    phase, spec = joint_phase(config), make_spec(config["data"]["spec"])
    straight = count_step(meta_module(config, phase, spec), rows=1)
    continued = Counter(config, spec, half=True).kinds(phase, batch=1)[0].count
    assert continued.flops == pytest.approx(straight.flops, rel=1e-6)
    assert continued.kept["activations"] == pytest.approx(straight.kept["activations"], rel=0.01)
    assert continued.peak["gradients"] == pytest.approx(straight.peak["gradients"], rel=0.05)


def test_checkpointing_keeps_less_and_computes_again():
    config = composed(*LAYERS)
    phase, spec = joint_phase(config), make_spec(config["data"]["spec"])
    counts = [count_step(meta_module(config, phase, spec), rows=1, checkpointing=c) for c in ("none", "full")]
    needed = [sum(f for (_, way), f in c.flops.items() if way != "again") for c in counts]
    assert needed[0] == needed[1] == sum(counts[0].flops.values()) < sum(counts[1].flops.values())
    assert counts[1].kept["activations"] < counts[0].kept["activations"] / 2


def test_sharding_divides_states_and_adds_traffic():
    config = composed(*LAYERS)
    phase, spec = joint_phase(config), make_spec(config["data"]["spec"])
    kinds = Counter(config, spec, half=True).kinds(phase, batch=1)
    found = sizes(meta_module(config, phase, spec))
    layout = {"nodes": 2, "gpus": 4, "gpu": GPUS["h100"]}
    plain, hybrid, full = (Cluster(shard=s, **layout) for s in (1, 4, 8))
    held = [memory(found, kinds, c) for c in (plain, hybrid, full)]
    for name in ("gradients", "optimiser", "moving average"):
        assert held[0][name] == pytest.approx(4 * held[1][name]) == pytest.approx(8 * held[2][name])
    assert held[0]["gathered blocks"] == held[1]["bfloat16 copies"] == 0
    talk = [traffic(found, 2, c, 1) for c in (plain, hybrid, full)]
    assert talk[0]["gather"] == 0 < talk[1]["gather"] < talk[2]["gather"]  # the net is slower than a node's links
    assert talk[2]["all-reduce"] == 0 < talk[1]["all-reduce"] < talk[0]["all-reduce"]
    one, two = (step_time(found, kinds, full, n) for n in (1, 2))
    assert two["flops"] == 2 * one["flops"] and two["samples"] == 2 * one["samples"] == 16


def test_command(tmp_path, capsys):
    out, page = tmp_path / "plan.json", tmp_path / "plan.html"
    words = ["experiment=kairos_tiny", "phase=behaviour", "nodes=2", "gpus=4", "gpu=rtx4090", "tokens=1e9"]
    assert main([*words, f"out={out}", f"page={page}"]) == 0
    plan = json.loads(out.read_text())
    (row,) = plan["phases"]
    assert row["steps"] * row["step"]["samples"] * row["tokens_per_sample"] == pytest.approx(1e9, rel=0.01)
    text = capsys.readouterr().out
    assert "| behaviour |" in text and "NVIDIA Ada" in text and "<table>" in page.read_text()
    assert main([*words, "spare=0.9999"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=h1000"], "a100, h100, h200, b200"),
        (["shard=3"], "3 does not divide the 8"),
        (["phase=nothing"], "no 'nothing'; one of tokeniser"),
        (["mfu=30"], "mfu is a share"),
        (["page=plan.pdf"], "neither with .html"),
    ],
)
def test_wrong_settings_are_named(words, message, capsys):
    assert main(["experiment=kairos_tiny", "gpus=8", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys, worldmodel.plan.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, cwd=ROOT).returncode == 0


def test_gpu_table():
    assert find_gpu("h200").memory == 141
    with pytest.raises(ConfigError, match="rtx5090"):
        find_gpu("tpu")
    assert SimpleNamespace(**GPUS["h100"]._asdict()).tflops == 989
