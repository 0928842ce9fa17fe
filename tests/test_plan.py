"""A plan's figures beside those of real steps, and beside arithmetic by hand."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from worldmodel.acceleration import CHECKPOINTING, accelerated
from worldmodel.averaging import MovingAverage
from worldmodel.checkpoint import build_model, make_spec
from worldmodel.config import register_resolvers
from worldmodel.errors import ConfigError
from worldmodel.flops import measure_cost
from worldmodel.phases import make_phases
from worldmodel.plan.__main__ import main
from worldmodel.plan.batch import random_batch
from worldmodel.plan.count import Clip, Counter, Kind
from worldmodel.plan.estimate import Cluster, memory, sizes, step_time, traffic
from worldmodel.plan.gpus import GPUS, find_gpu
from worldmodel.plan.meter import Meter
from worldmodel.plan.pictures import remembered
from worldmodel.plan.step import Count, count_step, materialise, meta_module, own_loss
from worldmodel.sized import token_counts
from worldmodel.training import PhaseModule

ROOT = Path(__file__).parent.parent
SIZES = {
    "narrow": ["synthesis.denoiser.width=64", "synthesis.denoiser.hidden=256", "encoders.width=64"],
    "plain": [],
    "long": ["data.spec.future=4", "data.spec.history=4"],
}
SMALL = ["synthesis.denoiser.pattern=[swa,gated]", "policy.expert.layers=2", *SIZES["narrow"]]


def composed(*overrides: str) -> dict[str, Any]:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config: Any = compose("train", ["experiment=kairos_tiny", "data.root=none", *overrides])
        return OmegaConf.to_container(config, resolve=True)  # pyright: ignore[reportReturnType]


def phase_of(config: dict[str, Any], mode: str = "joint", **extra: Any) -> Any:
    values = config["phases"]["synthesis"]
    fixed = {"mixture": [{"mode": mode, "weight": 1.0}], "given": {}, "dropout": {}}
    return make_phases({"synthesis": {**values, **fixed, **extra}})[0]


def planned(config: dict[str, Any], **settings: Any) -> Count:
    return count_step(meta_module(config, phase_of(config), make_spec(config["data"]["spec"])), **settings)


def real_module(config: dict[str, Any], phase: Any = None) -> PhaseModule:
    torch.manual_seed(0)
    spec = make_spec(config["data"]["spec"])
    model = build_model(
        config["model"], spec, {"instructions": [], "embodiments": {name: {} for name in spec.embodiments}}
    )
    return PhaseModule(model=model, phase=phase or phase_of(config), seed=0)


def convolution_backward(out: Any, x: Any, w: Any, *rest: Any, **_: Any) -> int:
    """A forward pass for each of input and weight; torch's own formula takes all channels of all groups together."""
    transposed, wanted = rest[4], rest[7]
    return 2 * math.prod(x if transposed else out) * math.prod(w[1:]) * sum(wanted[:2])


def allocated(module: PhaseModule, rows: int, *, half: bool, checkpointing: str) -> tuple[int, int]:
    """What the allocator held between both passes of a real step and at most, by its own events; no gradients."""
    batch = random_batch(module.model.spec, rows)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with (
        accelerated(module.model, compiled=False, checkpointing=checkpointing),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run,
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = own_loss(module, batch)
        with record_function("between"):
            pass
        loss.backward()
        del loss
    profiler: Any = run.profiler
    events = profiler.kineto_results.events()
    (between,) = (e.start_ns() for e in events if e.name() == "between")
    now = kept = peak = 0
    for start, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        peak = max(peak, now)
        kept = now if start < between else kept
    assert now == 0  # it has seen all that comes and goes
    return kept, peak


@pytest.mark.filterwarnings("ignore")  # the profiler's own
@pytest.mark.parametrize("size", SIZES)
def test_figures_are_within_a_tenth_of_real_steps(size):
    # Foresight learns in other modes than the one that is measured, and would be planned here and never touched.
    config, half = composed("policy.expert.foresight=null", *SIZES[size]), size == "narrow"
    count, module = planned(config, rows=2, half=half, gpu=False), real_module(config)
    formulas = {torch.ops.aten.convolution_backward: convolution_backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        own_loss(module, random_batch(module.model.spec, 2)).backward()
    optimiser = module.configure_optimizers()["optimizer"]
    optimiser.step()
    average = MovingAverage(decay=0.9)
    average.on_fit_start(None, module)  # pyright: ignore[reportArgumentType]
    states = {
        "parameters": sum(x.nbytes for x in [*module.parameters(), *module.buffers()]),
        "gradients": sum(p.grad.nbytes for p in module.parameters() if p.grad is not None),
        "optimiser": sum(x.nbytes for s in optimiser.state.values() for x in s.values() if x.dim()),
        "moving average": sum(x.nbytes for x in average.shadow.values()),
    }
    module.zero_grad()
    kept, peak = allocated(module, 2, half=half, checkpointing="none")
    flops = count.forward + count.backward
    print(
        f"{size}: FLOPs {flops:,} of {counter.get_total_flops():,}; kept {count.kept[0] + count.copies[0]:,} of ",
        end="",
    )
    print(f"{kept:,}; peak {count.peak[0] + count.copies[0]:,} of {peak:,}")
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert count.kept[0] + count.copies[0] == pytest.approx(kept, rel=0.02)
    assert count.peak[0] + count.copies[0] == pytest.approx(peak, rel=0.1)
    found = sizes(meta_module(config, phase_of(config), make_spec(config["data"]["spec"])))
    kind = Kind("joint", 1.0, 2, count, 0.0, 0.0, Clip(0, 0, 0, 0))
    alone = memory(found, [kind], Cluster(nodes=1, gpus=1, gpu=GPUS["h100"], shard=1), "none")
    for name, value in states.items():
        assert alone[name] == pytest.approx(value, rel=0.02), name


@pytest.mark.filterwarnings("ignore")
def test_checkpointing_is_what_it_is_in_a_real_step():
    config = composed()
    count, module = planned(config, rows=2, half=False, gpu=False), real_module(config)
    for number, how in enumerate(CHECKPOINTING[1:], 1):
        kept, peak = allocated(module, 2, half=False, checkpointing=how)
        print(f"{how}: kept {count.kept[number]:,} of {kept:,}; peak {count.peak[number]:,} of {peak:,}")
        assert count.kept[number] == pytest.approx(kept, rel=0.02)
        assert count.peak[number] == pytest.approx(peak, rel=0.1)
    none, selective, full = count.kept
    assert full < selective < none
    assert count.again[0] == 0 < count.again[1] < count.again[2] < count.forward


def test_a_deep_network_is_two_shallow_ones_continued():
    config = composed(*SMALL, "synthesis.denoiser.repeats=3", "policy.expert.layers=6")
    counter = Counter(config, make_spec(config["data"]["spec"]), half=True)
    phase = phase_of(config, "policy", insulate=False)
    continued, straight = counter.count(phase, 1), counter.repeated(phase, 1, 3)
    assert continued.forward + continued.backward == pytest.approx(straight.forward + straight.backward, rel=1e-6)
    for name in ("kept", "again", "copies"):
        assert getattr(continued, name) == pytest.approx(getattr(straight, name), rel=0.03), name
    assert continued.peak == pytest.approx(
        straight.peak, rel=0.2
    )  # the fullest moment is another one in so small a net


@pytest.mark.parametrize("mode", ["joint", "image"])
def test_telemetry_counts_what_is_planned_for_every_bucket(mode):
    config = composed(*SMALL)
    sizes = [{"height": 64, "width": 64, "future": 1}, {"height": 32, "width": 64, "future": 2, "weight": 3.0}]
    phase = phase_of(config, mode, buckets=sizes, batch_size=2)
    counter = Counter(config, make_spec(config["data"]["spec"]), half=False)
    kinds = counter.kinds(phase)
    module = real_module(config, phase)
    rows = phase.batch_sizes(token_counts(module.model))
    assert [kind.share for kind in kinds] == [0.25, 0.75]
    for kind, bucket in zip(kinds, phase.buckets, strict=True):
        assert kind.rows == rows[bucket, mode == "image"]
        spec = dataclasses.replace(counter.spec, height=bucket.height, width=bucket.width, future=bucket.future)
        batch = random_batch(spec, kind.rows, history=1 if mode == "image" else None)
        cost = measure_cost(module, module.model, lambda batch=batch: module.losses(batch))
        print(f"{mode} {bucket}: {kind.step.forward + kind.step.backward:,} planned, {cost.flops:,} by telemetry")
        assert kind.step.forward + kind.step.backward == pytest.approx(cost.flops, rel=0.01)
        assert kind.rows * kind.clip.tokens == sum(cost.tokens.values())


def test_a_film_that_moves_along_a_path_is_encoded_once_more():
    config = composed(*SMALL, "synthesis.compositor=null", "data.spec.points=2")
    counter = Counter(config, make_spec(config["data"]["spec"]), half=False)
    still, half, whole = (
        counter.count(phase_of(config, "video_prediction", given={"camera": rate}), 2) for rate in (0.0, 0.5, 1.0)
    )
    assert 0 < whole.forward - still.forward == pytest.approx(2 * (half.forward - still.forward), rel=1e-3)
    assert whole.encoding == half.encoding > still.encoding  # a batch may have all its rows moved
    assert whole.backward == still.backward


def test_a_long_film_goes_on_from_short_ones():
    config = composed("data.spec.future=8")
    module = meta_module(config, phase_of(config), make_spec(config["data"]["spec"]))
    with FakeTensorMode(allow_non_fake_inputs=True), Meter([], []) as meter:
        materialise(module)
        coder, film = module.model.autoencoder, torch.zeros(2, 3, 1 + 8 * module.model.spec.stride, 64, 64)
        out = coder.encode_raw(film)
        straight = sum(meter.flops.values())
        assert remembered(coder.encode_raw, coder.temporal, meter, {})(film).shape == out.shape
        assert sum(meter.flops.values()) == pytest.approx(2 * straight, rel=0.01)


def test_windows_and_the_delta_rule_count_as_needed_on_a_gpu():
    config = composed(*SMALL, "synthesis.denoiser.window=2")
    cpu, gpu = (planned(config, rows=1, half=False, gpu=gpu) for gpu in (False, True))
    assert gpu.forward < cpu.forward and gpu.kept[0] < cpu.kept[0]
    flex = planned(
        composed(*SMALL, "synthesis.denoiser.window=2", "+synthesis.denoiser.attention=flex"), rows=1, half=False
    )
    assert flex.forward == pytest.approx(gpu.forward, rel=1e-3) and flex.kept[0] < gpu.kept[0]


def test_a_teacher_is_passes_of_its_student():
    config = composed(*SMALL)
    spec, values = make_spec(config["data"]["spec"]), config["phases"]["synthesis"]
    extra = {"objective": "distill", "trains": ["denoiser", "expert"], "given": {}}
    extra["mixture"] = [{"mode": "video_prediction", "weight": 1.0}]

    def teacher(**settings: Any) -> tuple[float, Count]:
        phase = make_phases(
            {"p": {**values, **extra, "absent": 0.0, "distillation": {"student_steps": [1], **settings}}}
        )[0]
        (kind,) = counter.kinds(phase, batch=1)
        return kind.teacher, kind.step

    counter = Counter(config, spec, half=False)
    four, count = teacher(teacher_steps=4)
    assert four == count.remember + 4 * count.velocity
    assert teacher(teacher_steps=4, guidance={"text": 2.0})[0] == 2 * four
    assert len(counter.known) == 1


def test_sharding_divides_states_and_adds_traffic():
    config = composed(*SMALL)
    counter = Counter(config, make_spec(config["data"]["spec"]), half=True)
    kinds = counter.kinds(phase_of(config), batch=1)
    found = sizes(meta_module(config, phase_of(config), counter.spec))
    layout = {"nodes": 2, "gpus": 4, "gpu": GPUS["h100"]}
    plain, hybrid, full = (Cluster(shard=s, **layout) for s in (1, 4, 8))
    held = [memory(found, kinds, c, "none") for c in (plain, hybrid, full)]
    for name in ("gradients", "optimiser", "moving average"):
        assert held[0][name] == pytest.approx(4 * held[1][name]) == pytest.approx(8 * held[2][name])
    assert held[0]["gathered blocks"] == held[1]["bfloat16 copies"] == 0 < held[0]["bfloat16 copies"]
    talk = [traffic(found, 4, c, 1) for c in (plain, hybrid, full)]
    assert talk[0]["gather"] == 0 < talk[1]["gather"] < talk[2]["gather"]  # the net is slower than a node's links
    assert talk[2]["all-reduce"] == 0 < talk[1]["all-reduce"] < talk[0]["all-reduce"]
    one, two = (step_time(found, kinds, full, n, "none") for n in (1, 2))
    assert two["forward"] == 2 * one["forward"] and two["samples"] == 2 * one["samples"] == 16
    assert step_time(found, kinds, full, 1, "full")["compute"] > one["compute"]


def test_command(tmp_path, capsys):
    out = tmp_path / "plan.json"
    words = ["experiment=kairos_tiny", "phase=behaviour", "nodes=2", "gpus=4", "gpu=rtx4090", "tokens=1e9"]
    assert main([*words, f"out={out}"]) == 0
    plan = json.loads(out.read_text())
    (row,) = plan["phases"]
    assert row["steps"] * row["step"]["samples"] * row["clip"]["tokens"] == pytest.approx(1e9, rel=0.01)
    text = capsys.readouterr().out
    assert "| behaviour |" in text and "NVIDIA Ada" in text
    assert main([*words, "spare=0.9999"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=h1000"], "a100, h100, h200, b200"),
        (["shard=3"], "3 does not divide the 8"),
        (["phase=nothing"], "no 'nothing'; one of tokeniser"),
        (["mfu=30"], "mfu is a share"),
        (["out=plan.pdf"], "neither with .json"),
    ],
)
def test_wrong_settings_are_named(words, message, capsys):
    assert main(["experiment=kairos_tiny", "gpus=8", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys, worldmodel.plan.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, cwd=ROOT).returncode == 0


def test_unknown_gpus_are_refused():
    with pytest.raises(ConfigError, match="rtx5090"):
        find_gpu("tpu")
