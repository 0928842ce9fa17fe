"""The published network: its shape, its weights there and back, its outputs, and that it trains."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose
from kairos_reference import kairos
from safetensors.torch import load_file, save_file
from test_model import draws, future_of, generator, observation_of

from worldmodel.checkpoint import build_model, initialise, make_spec
from worldmodel.contracts import Batch, Fused, WorldState
from worldmodel.convert.__main__ import main
from worldmodel.convert.kairos import from_kairos, our_shapes, shapes_of, to_kairos
from worldmodel.convert.names import Layout, Shape, published_layout, published_shapes
from worldmodel.errors import ConfigError, DataError
from worldmodel.losses import world_loss

PUBLISHED = ("experiment=kairos_base", "encoders=published", "synthesis=published", "policy=published")
REDUCED = (
    "data=metaworld",
    "trainer=cpu",
    "encoders.width=48",
    "encoders.heads=4",
    "encoders.hidden=64",
    "encoders.layers=1",
    "encoders.image.channels=[8,8,8,8,8]",
    "synthesis.autoencoder.config.base_dim=8",
    "synthesis.denoiser.width=32",
    "synthesis.denoiser.heads=2",
    "synthesis.denoiser.hidden=48",
    "synthesis.denoiser.delta.head_dim=8",
    "policy.expert.width=24",
    "policy.expert.hidden=32",
)
FOUR_LAYERS = ("synthesis.denoiser.repeats=1", "policy.expert.layers=4")


@pytest.fixture(scope="module")
def public_shapes() -> dict[str, Shape]:
    """Names and shapes of the RoboTwin world-action model."""
    content = json.loads((Path(__file__).parent / "fixtures" / "kairos_shapes.json").read_text())
    shapes: dict[str, Shape] = {}
    for part, held in content["parts"].items():
        shapes |= {f"{part}.{name}": tuple(shape) for name, shape in held["tensors"].items()}
        for kind in held["blocks"]:
            for layer in kind["layers"]:
                shapes |= {f"{part}.blocks.{layer}.{name}": tuple(s) for name, s in kind["tensors"].items()}
    return shapes


def meta_model(*overrides: str) -> Any:
    """A model of any size without its numbers."""
    config = compose(*overrides)
    spec = make_spec(config["data"]["spec"])
    with torch.device("meta"):
        return build_model(config["model"], spec, {"embodiments": {key: {} for key in spec.embodiments}})


def count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def transformers_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: t for n, t in model.state_dict().items() if n.startswith(("denoiser.", "expert."))}


def test_without_our_streams_the_base_is_the_published_network(public_shapes):
    sizes = ("data.spec.cameras=[front]", "data.spec.action=14", "data.spec.proprio=14")
    model = meta_model(*PUBLISHED, *sizes)
    assert len(public_shapes) == 903 + 882
    assert count(model.denoiser) == 4_046_680_960
    assert count(model.expert) == 955_849_742
    assert [block.kind for block in model.denoiser.blocks] == ["swa", "swa", "dswa", "gated"] * 8
    layout = published_layout(public_shapes)
    assert published_shapes(layout) == public_shapes
    assert our_shapes(layout) == shapes_of(transformers_of(model))


def test_sizes_with_our_streams():
    base, small = (meta_model(f"experiment=kairos_{name}") for name in ("base", "small"))
    assert count(base.denoiser) == pytest.approx(4.05e9, rel=0.01)
    assert count(base.expert) == pytest.approx(0.96e9, rel=0.01)
    assert count(small.denoiser) == pytest.approx(300e6, rel=0.1)
    assert count(small.expert) == pytest.approx(60e6, rel=0.1)


@pytest.fixture(scope="module")
def layout(public_shapes) -> Layout:
    """Sizes of the reduced published network."""
    config = compose(*PUBLISHED, *REDUCED, *FOUR_LAYERS)
    assert config["synthesis"]["denoiser"]["pattern"] == ["swa", "swa", "dswa", "gated"]
    full = published_layout(public_shapes)
    assert full.action is not None
    action = full.action.__class__(width=24, attention=32, hidden=32, actions=8, proprio=18)
    sizes = {"width": 32, "text": 48, "hidden": 48, "gated": full.gated[:4], "heads": 2, "keys": 16, "values": 32}
    return full.__class__(**{**vars(full), **sizes, "action": action})


@pytest.fixture
def public(layout) -> dict[str, torch.Tensor]:
    """Random weights of the reduced published network; decays are weak, so that the memory reaches over frames."""
    g = generator(11)
    scale = lambda name: 0.003 if "a_proj" in name else 0.3  # noqa: E731
    weights = {n: scale(n) * torch.randn(shape, generator=g) for n, shape in published_shapes(layout).items()}
    return {name: tensor - 4.0 if name.endswith("dt_bias") else tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("prefix", ["pipe.dit.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_changes_no_bit(public, tmp_path, prefix, dtype, capsys):
    save_file({prefix + name: tensor.to(dtype) for name, tensor in public.items()}, tmp_path / "theirs.safetensors")
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    assert main(["kairos", str(tmp_path / "theirs.safetensors"), str(ours)]) == 0
    assert main(["kairos", str(ours), str(back), "--to-kairos"]) == 0
    first, second = load_file(tmp_path / "theirs.safetensors"), load_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)
    assert main(["kairos", str(ours), str(back), "--to-kairos"]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_file_of_the_video_model_alone_names_no_part(public, tmp_path):
    names = {n.removeprefix("video_dit."): t for n, t in public.items() if n.startswith("video_dit.")}
    theirs, ours, back = (tmp_path / f"{name}.safetensors" for name in ("theirs", "ours", "back"))
    save_file(names, theirs)
    assert main(["kairos", str(theirs), str(ours)]) == 0
    assert not [name for name in load_file(ours) if name.startswith("expert.")]
    assert main(["kairos", str(ours), str(back), "--to-kairos"]) == 0
    again = load_file(back)
    assert again.keys() == names.keys()
    assert all(torch.equal(names[name], again[name]) for name in names)


def test_files_that_are_not_the_network_are_refused_by_name(public, tmp_path):
    short = {name: tensor for name, tensor in public.items() if name != "video_dit.blocks.1.self_attn.q.bias"}
    with pytest.raises(DataError, match=r"1 missing: video_dit\.blocks\.1\.self_attn\.q\.bias \(32,\)"):
        from_kairos(short)
    with pytest.raises(DataError, match=r"1 unexpected: action_dit\.extra \(1,\)"):
        from_kairos({**public, "action_dit.extra": torch.zeros(1)})
    wide = {**public, "video_dit.blocks.2.ffn.2.weight": torch.zeros(32, 7)}
    with pytest.raises(DataError, match=r"blocks\.2\.ffn\.2\.weight \(32, 7\) instead of \(32, 48\)"):
        from_kairos(wide)
    with pytest.raises(DataError, match=r"video_dit\.text_embedding\.0\.weight is missing; sizes are read from it"):
        from_kairos({name: t for name, t in public.items() if name != "video_dit.text_embedding.0.weight"})
    ours = from_kairos(public)
    with pytest.raises(DataError, match=r"1 missing: denoiser\.blocks\.3\.mix\.a_log|has no gated delta layer"):
        to_kairos({name: t for name, t in ours.items() if name != "denoiser.blocks.3.mix.a_log"})
    added = {**ours, "denoiser.embed_rays.weight": torch.zeros(32, 24)}
    with pytest.raises(DataError, match=r"no place in the published network: denoiser\.embed_rays\.weight"):
        to_kairos(added)
    assert to_kairos(added, drop_added=True).keys() == public.keys()
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert main(["kairos", str(tmp_path / "other.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    (tmp_path / "text.safetensors").write_text("no weights")
    assert main(["kairos", str(tmp_path / "text.safetensors"), str(tmp_path / "out.safetensors")]) == 2
    assert not (tmp_path / "out.safetensors").exists()


def reduced(statistics: dict[str, Any], *overrides: str) -> Any:
    torch.manual_seed(0)
    config = compose(*overrides)
    return build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()


def test_converted_weights_give_the_published_outputs(statistics, public, tmp_path):
    """Video and actions after a history of two frames, against the network written out from its description."""
    sizes = ("data.spec.cameras=[front]", "data.spec.history=2", "data.spec.future=4")
    model = reduced(statistics, *PUBLISHED, *REDUCED, *FOUR_LAYERS, *sizes)
    save_file(from_kairos(public), tmp_path / "init.safetensors")
    initialise(model, tmp_path / "init.safetensors")
    assert transformers_of(model).keys() == from_kairos(public).keys()
    g, spec = generator(2), model.spec
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    history, future, actions, text = draw(1, 2, 1, 16, 8, 8), draw(1, 4, 1, 16, 8, 8), draw(1, 8, 8), draw(1, 5, 48)
    s = model.normaliser(observation_of(spec, 1), model.grid)
    present = torch.ones(1, 5, dtype=torch.bool)
    unused = torch.zeros(())
    with torch.no_grad():
        memory = model.remember(s, history, Fused(text, present, text.mean(1), text, present))
        streams, velocity = model.velocity(
            memory,
            state=WorldState(future, unused, unused, unused),
            levels=torch.full((1, 4), 0.7),
            actions=actions,
            action_level=torch.full((1,), 0.4),
        )
        parts = [
            {name.removeprefix(f"{part}."): tensor for name, tensor in public.items() if name.startswith(part)}
            | {"heads": torch.tensor(2)}
            for part in ("video_dit", "action_dit")
        ]
        video, expected = kairos(
            *parts,
            pattern=["swa", "swa", "dswa", "gated"],
            latents=torch.cat([history, future], 1)[0, :, 0].movedim(1, 0),
            history=2,
            t=700.0,
            actions=actions[0],
            t_action=400.0,
            text=text[0],
            proprio=s.proprio[0, -1],
        )
    assert velocity is not None
    torch.testing.assert_close(streams["video"][0, :, 0].movedim(1, 0), video[:, 2:], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(velocity[0], expected, atol=2e-4, rtol=2e-4)


def test_converted_weights_start_the_base_with_our_streams(statistics, public, tmp_path):
    save_file(from_kairos(public), tmp_path / "init.safetensors")
    model = reduced(statistics, "experiment=kairos_base", *REDUCED, *FOUR_LAYERS)
    initialise(model, tmp_path / "init.safetensors")
    own = model.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in from_kairos(public).items())
    assert not own["denoiser.embed_rays.weight"].any()
    assert own["denoiser.embed_in.camera.weight"].any()
    save_file({"denoiser.head_table": torch.zeros(2, 5)}, tmp_path / "wrong.safetensors")
    with pytest.raises(DataError, match=r"denoiser\.head_table \(2, 5\) \(here \(2, 32\)\)"):
        initialise(model, tmp_path / "wrong.safetensors")


def test_streams_that_are_off_are_left_out_everywhere(statistics):
    """The published network has video alone: it answers every mode it has, and a batch without images is refused."""
    model = reduced(statistics, *PUBLISHED, *REDUCED, *FOUR_LAYERS)
    o = observation_of(model.spec)
    with torch.no_grad():
        p = model.predict(o, None, "joint", generator=generator(), steps=1)
    torch.testing.assert_close(p.points[:, -1], o.points[:, -1], atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="the video transformer has the streams video and none of those is left"):
        model.remember(model.normaliser(o, model.grid), None)


SMALL_SIZES = (
    *(item for item in REDUCED if "image.channels" not in item),
    "encoders.image.channels=[8,8,8,8]",
    *(f"data.spec.{name}={size}" for name, size in (("height", 64), ("width", 64), ("future", 2), ("chunk", 8))),
    "data.spec.points=4",
    "data.spec.cameras=[front,wrist]",
)
"""`kairos_small` on the pictures of `kairos_tiny`; `REDUCED` is that for `kairos_base`."""


def brief(experiment: str, *overrides: str, **steps: int) -> list[str]:
    """Every phase of an experiment with one step, or as many as are asked for, of two rows; buckets as few and small
    as may be. With the overrides of the experiment's sizes this runs a whole curriculum in minutes."""
    short = ["data.cache_latents=false", "wandb.mode=disabled", "trainer.threads=1", "synthesis.stream_steps=1"]
    short.append("phases.distill.distillation.teacher_steps=4")
    small = "[{height: 64, width: 64, future: 1}, {height: 32, width: 64, future: 2}]"
    for name, phase in compose(f"experiment={experiment}", "data.root=none")["phases"].items():
        short += [f"phases.{name}.steps={steps.get(name, 1)}", f"phases.{name}.batch_size=2"]
        short += [f"phases.{name}.buckets={small}"] if "buckets" in phase else []
    return [f"experiment={experiment}", *short, *overrides]


@pytest.mark.slow
def test_the_reduced_base_trains(tiny_dataset, tmp_path):
    """All 32 layers, every stream, every phase of the curriculum; twenty steps of the joint one."""
    from worldmodel.curriculum import train

    run = [f"data.root={tiny_dataset}", f"run_dir={tmp_path / 'run'}"]
    rate = ["phases.world_action.learning_rate=3e-3", "phases.world_action.warmup=1"]
    out = train(compose(*brief("kairos_base", *REDUCED, *run, *rate, world_action=20)))
    phases = [next((out / "phases").glob(f"*-{name}")) for name in ("target", "world_action")]
    before, after = (load_file(phase / "model.safetensors") for phase in phases)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in moved} == {"denoiser", "expert"}
    assert {f"{part}.blocks.{i}.table" for part in ("denoiser", "expert") for i in range(32)} <= moved


@pytest.mark.slow
def test_the_reduced_small_goes_through_its_curriculum(tiny_dataset, tmp_path):
    """Stages I and II move the video transformer alone; the action transformer then begins from it."""
    from worldmodel.curriculum import train

    run = [f"data.root={tiny_dataset}", f"run_dir={tmp_path / 'run'}"]
    # Every phase fits its guess to the latents of many clips, so the autoencoder is the smallest there is.
    run += [f"synthesis.autoencoder.config.{name}" for name in ("base_dim=4", "num_res_blocks=1", "dim_mult=[1,1,1,1]")]
    out = train(compose(*brief("kairos_small", *SMALL_SIZES, *FOUR_LAYERS, *run)))
    folders = sorted((out / "phases").iterdir(), key=lambda folder: int(folder.name.split("-")[0]))
    names = [
        "understanding",
        "behaviour",
        "images",
        "physical",
        "long",
        "human",
        "robot",
        "target",
        "policy",
        "distill",
    ]
    assert [folder.name.split("-")[1] for folder in folders] == names
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    for name, before, after in zip(names[1:], weights, weights[1:], strict=False):
        moved = {n.split(".")[0] for n in after if not torch.equal(before[n], after[n])}
        moved -= {"stream_scale", "still", "carried"}
        own = {"behaviour": {"expert"}}.get(name, {"denoiser"})
        # One step of the last two may be of a mode that teaches only one of the transformers.
        assert moved <= {"denoiser", "expert"} if name in ("policy", "distill") else moved == own, name
    before, after = weights[7:9]
    blocks = [n for n in after if n.startswith("expert.blocks.") and n.endswith("feed_forward.0.weight")]
    assert all(torch.equal(weights[0][n], before[n]) for n in blocks), "behaviour trains the state policy alone"
    # A step moves a weight by the learning rate at most.
    drawn = [n for n in blocks if (before[n] - after[n]).abs().max() > 0.01]
    assert drawn == blocks, "these were drawn from the video transformer"


@pytest.mark.parametrize("mode", ["policy", "forward_dynamics", "joint"])
def test_the_reduced_small_learns_in_every_direction(statistics, mode):
    """Residual guesses and a state policy beside the conditioner: gradients reach both transformers, it gets none."""
    model = reduced(statistics, "experiment=kairos_small", *SMALL_SIZES, *FOUR_LAYERS).train()
    for layer in [
        *model.denoiser.embed_out.values(),
        model.expert.embed_out,
    ]:  # zero at first, so nothing before learns
        torch.nn.init.normal_(layer.weight, std=0.2)
    o, f = observation_of(model.spec), future_of(model.spec)
    with torch.no_grad():
        latents = model.history_latents(o)
    settings: dict[str, Any] = {"drop": (), "dropout": {}, "draws": 2, "weights": {}, "insulate": False, "huber": 0.1}
    settings |= {"given": {"camera": 0.5, "points": 0.5}, "absent": 0.1}
    batch = Batch(o, f, torch.zeros(2, 3, dtype=torch.int64), ["a", "b"])
    losses = world_loss(model, batch, latents, draws(), mode=mode, **settings)
    losses["loss"].backward()
    assert torch.isfinite(losses["loss"])
    named = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not [name for name in named if name.startswith("encoder.text.")]
    assert {name.split(".")[0] for name in named} >= {"denoiser", "expert", "encoder"}
