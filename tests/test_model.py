"""The joined model: modes, coupling, presence masks, units, checkpoints."""

import copy
import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from conftest import compose
from safetensors.torch import load_file, save_file

from export.tensors import observation_specs, random_tensors
from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.contracts import MODES, STREAMS, ClipSpec, Future, Observation, WorldState
from worldmodel.data.statistics import statistics_hash
from worldmodel.data.transforms import hide, modality_dropout
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError, DataError
from worldmodel.fitting import fit_guess
from worldmodel.policy.state_policy import measure
from worldmodel.synthesis.flow import add_noise, clean_to_velocity, shift_sigma, velocity_target
from worldmodel.synthesis.sampler import integrate, sampling_sigmas


def observation_of(spec: ClipSpec, batch: int = 2) -> Observation:
    return Observation(*random_tensors(observation_specs(spec), spec, batch))


def future_of(spec: ClipSpec, batch: int = 2) -> Future:
    g = torch.Generator().manual_seed(3)
    v, k, s, f = len(spec.cameras), spec.points, len(spec.sensors), spec.future
    ones = lambda *shape: torch.ones(batch, *shape, dtype=torch.bool)  # noqa: E731
    return Future(
        rgb=torch.randint(0, 256, (batch, spec.window, v, 3, spec.height, spec.width), generator=g, dtype=torch.uint8),
        camera_to_base=torch.eye(4).expand(batch, f, v, 4, 4).clone(),
        points=torch.randn(batch, f, k, 3, generator=g),
        visible=ones(f, k),
        wrench=torch.randn(batch, f, s, 6, generator=g),
        actions=torch.randn(batch, spec.chunk, spec.action, generator=g),
        proprio=torch.randn(batch, spec.chunk, spec.proprio, generator=g),
        valid=ones(f),
        action_valid=ones(spec.chunk),
        action_dims=ones(spec.action),
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(rows: int = 2, seed: int = 0) -> Draws:
    return Draws(seed, range(rows))


def test_every_experiment_composes_and_builds(statistics):
    """Whatever its size: nothing is allocated. Every part is trained, but for what is loaded."""
    from pathlib import Path

    from worldmodel.phases import make_phases

    names = sorted(p.stem for p in (Path(__file__).parent.parent / "configs" / "experiment").glob("*.yaml"))
    assert {"kairos_tiny", "kairos_small", "kairos_base"} <= set(names)
    for name in names:
        configs = [compose(f"experiment={name}", f"trainer={trainer}") for trainer in ("cpu", "gpu")]
        assert configs[0]["model"] == configs[1]["model"]
        if "from_init" in configs[0]["model"]:
            continue  # test_finetune builds these from a checkpoint
        spec = make_spec(configs[0]["data"]["spec"])
        fields = dict.fromkeys(spec.embodiments, statistics["embodiments"]["sawyer"])
        with torch.device("meta"):
            model = build_model(configs[0]["model"], spec, {**statistics, "embodiments": fields})
        words = [word for phase in make_phases(configs[0]["phases"]) for word in phase.trains]
        trained = {word.partition(".")[0] for word in words}
        loaded = {"autoencoder"} - trained if "path" in configs[0]["model"]["autoencoder"] else set()
        parts = {name for name, _ in model.named_children() if name != "normaliser"} - loaded
        assert trained == parts or (trained < parts and configs[0]["init"])


def test_tiny_has_the_size_it_promises(tiny_model):
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert 1e6 < count(tiny_model.denoiser) < 3e6
    assert count(tiny_model.expert) < 2e6


@pytest.mark.parametrize("mode", MODES)
def test_modes_answer_in_physical_shapes(tiny_model, mode):
    spec = tiny_model.spec
    o, f = observation_of(spec), future_of(spec)
    with torch.no_grad():
        p = tiny_model.predict(o, f, mode, generator=generator(), steps=2)
    assert p.rgb.shape == f.rgb.shape
    assert p.rgb.min() >= 0 and p.rgb.max() <= 1
    assert p.camera_to_base.shape == f.camera_to_base.shape
    rotation = p.camera_to_base[..., :3, :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-4, rtol=0)
    assert p.points.shape == f.points.shape
    assert p.wrench.shape == f.wrench.shape
    assert p.actions.shape == f.actions.shape
    assert all(torch.isfinite(x).all() for x in p)
    if mode == "forward_dynamics":
        torch.testing.assert_close(p.actions, f.actions, atol=1e-5, rtol=1e-5)
    if mode == "inverse_dynamics":
        torch.testing.assert_close(p.points, f.points, atol=1e-4, rtol=1e-4)


def step_both(model, memory, coupling, actions, state=True):
    spec = model.spec
    shapes = {"video": (2, spec.future, 2, 16, 8, 8), "camera": (2, spec.future, 2, 9)}
    shapes |= {"points": (2, spec.future, spec.points, 3), "force": (2, spec.future, 3, 6)}
    g = generator(5)
    streams = WorldState(*(torch.randn(shapes[name], generator=g) for name in STREAMS))
    return model.velocity(
        memory,
        state=streams if state else None,
        levels=torch.full((2, 4), 0.7) if state else None,
        actions=actions,
        action_level=None if actions is None else torch.full((2,), 0.4),
        coupling=coupling,
    )


def test_history_only_actions_are_the_same_with_and_without_video(tiny_model):
    model = tiny_model
    o = observation_of(model.spec)
    with torch.no_grad():
        memory = model.remember(model.normaliser(o, model.grid), model.history_latents(o))
        actions = torch.randn(2, model.spec.chunk, model.spec.action, generator=generator())
        _, alone = step_both(model, memory, "history_only", actions, state=False)
        streams, beside = step_both(model, memory, "history_only", actions)
        quiet, _ = step_both(model, memory, "history_only", None)
        _, joint = step_both(model, memory, "joint", actions)
        coupled, _ = step_both(model, memory, "joint", actions)
    assert torch.equal(alone, beside)
    for name in STREAMS:
        torch.testing.assert_close(streams[name], quiet[name])
    assert (joint - alone).abs().max() > 1e-3
    assert (coupled["video"] - quiet["video"]).abs().max() > 1e-4


def test_full_inference_gives_the_same_actions_as_action_only(tiny_model):
    """Whole sampling runs: `joint` mode under `history_only` against the cached-history path of the robot."""
    model = tiny_model
    model.stream_shift = model.action_shift
    o = observation_of(model.spec)
    with torch.no_grad():
        joint = model.predict(
            o, None, "joint", generator=generator(7), steps=model.action_steps, coupling="history_only"
        )
        noise = torch.randn(2, model.spec.chunk, model.spec.action, generator=generator(7))
        torch.testing.assert_close(joint.actions, model.act(o, noise), atol=1e-5, rtol=1e-5)


def test_forward_dynamics_follows_the_actions(tiny_model):
    o, f = observation_of(tiny_model.spec), future_of(tiny_model.spec)
    other = f._replace(actions=-2 * f.actions)
    run = lambda future: tiny_model.predict(o, future, "forward_dynamics", generator=generator(), steps=1)  # noqa: E731
    with torch.no_grad():
        assert (run(f).points - run(other).points).abs().max() > 1e-4


CONTENT: dict[str, Sequence[str]] = {
    "rgb": ("rgb",),
    "camera": ("camera_to_base",),
    "points": ("points", "visible"),
    "touch": ("wrench", "taxels"),
    "proprio": ("proprio",),
    "text": ("text",),
}


@pytest.mark.parametrize("sense", CONTENT)
def test_hidden_senses_never_reach_the_actions(tiny_model, sense):
    a = observation_of(tiny_model.spec)
    b = a._replace(**{name: getattr(a, name).flip(0) for name in CONTENT[sense]})
    noise = torch.randn(2, tiny_model.spec.chunk, tiny_model.spec.action, generator=generator())
    with torch.no_grad():
        assert (tiny_model.act(a, noise) - tiny_model.act(b, noise)).abs().max() > 1e-5, "the sense is never used"
        hidden = tiny_model.act(hide(a, [sense]), noise)
        torch.testing.assert_close(hidden, tiny_model.act(hide(b, [sense]), noise), atol=1e-6, rtol=1e-6)
    assert torch.isfinite(hidden).all()


def test_leaving_images_out_equals_hiding_them(tiny_model):
    """Batches without pictures skip the video tokens instead of masking them; the action must not tell."""
    model = tiny_model
    o = hide(observation_of(model.spec), ["rgb"])
    s = model.normaliser(o, model.grid)
    noise = torch.randn(2, model.spec.chunk, model.spec.action, generator=generator())
    with torch.no_grad():
        masked = model.denoise_actions(model.remember(s, model.history_latents(o)), noise)
        skipped = model.denoise_actions(model.remember(s, None), noise)
    torch.testing.assert_close(masked, skipped, atol=2e-4, rtol=1e-4)


def test_what_stage_1_sees_stands_in_for_points_that_nothing_tracks(tiny_model):
    model, o = copy.deepcopy(tiny_model), observation_of(tiny_model.spec)
    propose = lambda o: model.remember(model.normaliser(o, model.grid), model.history_latents(o)).proposal  # noqa: E731
    with torch.no_grad():
        tracked, unaided = propose(o), propose(hide(o, ["points"]))
        torch.nn.init.constant_(model.encoder.points_head.out[-1].bias, 1.0)
        assert torch.equal(propose(o), tracked)
        assert (propose(hide(o, ["points"])) - unaided).abs().max() > 1e-3


def test_draws_share_one_memory(tiny_model):
    model = tiny_model
    o = observation_of(model.spec)
    actions = torch.randn(6, model.spec.chunk, model.spec.action, generator=generator())
    level = torch.rand(6, generator=generator())
    with torch.no_grad():
        memory = model.remember(model.normaliser(o, model.grid), model.history_latents(o))
        _, shared = model.velocity(memory, actions=actions, action_level=level)
        for row in range(2):
            one = Observation(*(x[row : row + 1] for x in o))
            memory = model.remember(model.normaliser(one, model.grid), model.history_latents(one))
            rows = slice(3 * row, 3 * row + 3)
            _, own = model.velocity(memory, actions=actions[rows], action_level=level[rows])
            torch.testing.assert_close(shared[rows], own, atol=1e-5, rtol=1e-4)


def test_single_frames_are_the_first_latent_of_a_clip(tiny_model):
    o, f = observation_of(tiny_model.spec), future_of(tiny_model.spec)
    clip = torch.cat([o.rgb[:, -1:], f.rgb], 1)[:, :, 0].transpose(1, 2).float() / 127.5 - 1
    with torch.no_grad():
        alone = tiny_model.autoencoder.encode_frames(clip[:, :, 0])
        whole = tiny_model.autoencoder.standardise(tiny_model.autoencoder.encode_raw(clip))
    torch.testing.assert_close(alone, whole[:, 0], atol=1e-4, rtol=1e-4)
    assert whole.shape[1] == 1 + tiny_model.spec.future


def test_units_round_trip(tiny_model):
    o, f, n = observation_of(tiny_model.spec), future_of(tiny_model.spec), tiny_model.normaliser
    e = o.embodiment
    torch.testing.assert_close(n.restore_wrench(n.compress_wrench(50 * f.wrench, e), e), 50 * f.wrench)
    torch.testing.assert_close(n.decode_camera(n.encode_camera(o.camera_to_base, e), e), o.camera_to_base)
    torch.testing.assert_close(n.restore("action", n.standardise("action", f.actions, e), e), f.actions)


def test_dynamics_need_a_future_and_coupling(tiny_model):
    o, f = observation_of(tiny_model.spec), future_of(tiny_model.spec)
    with pytest.raises(ConfigError, match="needs a future"):
        tiny_model.predict(o, None, "forward_dynamics", generator=generator())
    with pytest.raises(ConfigError, match="coupling=joint"):
        tiny_model.predict(o, f, "inverse_dynamics", generator=generator(), coupling="history_only")
    with pytest.raises(ConfigError, match="one of policy"):
        tiny_model.predict(o, f, "plan", generator=generator())


def test_flow_recovers_the_clean_sample():
    clean, noise = torch.randn(3, 4, generator=generator(1)), torch.randn(3, 4, generator=generator(2))
    torch.testing.assert_close(add_noise(clean, noise, torch.zeros(3)), clean)
    done = integrate(lambda _, __: {"x": velocity_target(clean, noise)}, {"x": noise}, sampling_sigmas(4, 3.0))
    torch.testing.assert_close(done["x"], clean)
    levels = sampling_sigmas(4, 3.0)
    assert levels[0] == 1 and levels[-1] == 0
    assert all(a - b > 0.05 for a, b in pairwise(levels)), "no step is wasted"
    assert torch.equal(shift_sigma(torch.tensor([0.0, 1.0]), 5.0), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_known_clean_value_is_reached_in_any_number_of_steps(steps):
    clean, noise = (torch.randn(2, 3, 4, generator=generator(seed)) for seed in (1, 2))

    def velocity(now, sigma):
        return {"x": clean_to_velocity(clean, now["x"], torch.full((2,), sigma))}

    done = integrate(velocity, {"x": noise}, sampling_sigmas(steps, 3.0))
    torch.testing.assert_close(done["x"], clean)
    level = torch.tensor([0.3, 0.9])
    aimed = clean_to_velocity(clean, add_noise(clean, noise, level), level)
    torch.testing.assert_close(aimed, velocity_target(clean, noise))
    assert clean_to_velocity(clean, clean + 1, torch.zeros(2)).isfinite().all()


def test_an_untrained_model_says_that_nothing_moves(tiny_model):
    """What a network that predicts `clean` adds its answer to: a still picture, still things, the state's proposal."""
    spec = tiny_model.spec
    for layer in [*tiny_model.denoiser.embed_out.values(), tiny_model.expert.embed_out]:
        torch.nn.init.zeros_(layer.weight)
    o, future = observation_of(spec, 16), future_of(spec, 16)
    coarse = torch.rand(16, 1, len(spec.cameras), 3, 4, 4, generator=generator()) * 255
    picture = coarse.repeat_interleave(16, -1).repeat_interleave(16, -2).to(torch.uint8)
    o = o._replace(rgb=picture.expand_as(o.rgb))
    still = future._replace(rgb=picture.expand_as(future.rgb))
    tiny_model.autoencoder.shortcut.fit(
        torch.cat([o.rgb[:, :1], still.rgb], 1).movedim(1, 3).flatten(0, 1).float() / 127.5 - 1
    )
    fit_guess(tiny_model, o, still)
    with torch.no_grad():
        target = tiny_model.future_latents(o, still)
        guess = tiny_model.still_latents(tiny_model.history_latents(o)[:, -1:])
        assert (guess - target).square().mean() < 0.1 * target.var()
        p = tiny_model.predict(o, None, "joint", generator=generator())
        torch.testing.assert_close(p.points[:, -1], o.points[:, -1], atol=1e-4, rtol=0)
        senses = tiny_model.normaliser(o, tiny_model.grid)
        state, words = tiny_model.expert.state, tiny_model.encoder.instruction(senses)
        _, proposal = state(measure(senses), words, senses.embodiment)
        torch.testing.assert_close(p.actions, tiny_model.normaliser.restore("action", proposal, o.embodiment))


def test_shortcut_starts_as_the_principal_components_of_the_data(tiny_model):
    """A fresh tokeniser reconstructs data of few degrees of freedom exactly, and no data worse than their mean."""
    ae = tiny_model.autoencoder
    basis = torch.randn(5, 3, 1, 8, 8, generator=generator(1)).tile(8, 8) * 0.1
    weight = torch.randn(40, 5, 1, 1, 1, 1, generator=generator(2))
    still = (basis * weight).sum(1).expand(-1, -1, 1 + tiny_model.spec.window, -1, -1)
    noisy = still + 0.3 * torch.randn(still.shape, generator=generator(3))
    for video, bound in ((still, 1e-2), (noisy, 1.0)):
        ae.shortcut.fit(video)
        with torch.no_grad():
            error = (ae.decode_raw(ae.encode_raw(video)) - video).square().mean()
        assert error < bound * (video - video.mean(0)).square().mean()


def test_modality_dropout_is_seeded_and_hits_the_asked_share(tiny_model):
    o = observation_of(tiny_model.spec, 2)
    o = Observation(*(x.repeat_interleave(500, 0) for x in o))
    first, dropped = modality_dropout(o, {"points": 0.3, "touch": 0.0}, draws(1000))
    second, _ = modality_dropout(o, {"points": 0.3, "touch": 0.0}, draws(1000))
    assert torch.equal(first.has_points, second.has_points)
    assert abs(dropped["points"].float().mean() - 0.3) < 0.06
    assert torch.equal(first.has_points, ~dropped["points"][:, None] & o.has_points)
    assert first.has_wrench.all()
    with pytest.raises(ConfigError, match="unknown sense 'smell'; one of rgb"):
        hide(o, ["smell"])


@pytest.fixture
def saved(tiny_model, statistics, tmp_path):
    config = compose("experiment=kairos_tiny", "model.normaliser.known_text_only=false")
    spec = make_spec(config["data"]["spec"])
    metadata = describe(config["model"], spec, statistics, statistics_hash(statistics), {"seed": 0})
    return save_model(tiny_model, tmp_path / "run", metadata)


def test_checkpoint_round_trip(saved, tiny_model):
    loaded = load_model(saved)
    noise = torch.zeros(2, loaded.spec.chunk, loaded.spec.action)
    o = observation_of(loaded.spec)
    with torch.no_grad():
        assert torch.equal(loaded.act(o, noise), tiny_model.act(o, noise))


def edit(folder, change):
    path = folder / "model.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_checkpoint_of_another_schema_is_refused(saved):
    edit(saved, lambda c: c.update(schema_version=99))
    with pytest.raises(DataError, match=r"model\.json: schema_version is 99, this version reads 1"):
        load_model(saved)


def test_changed_statistics_are_noticed(saved):
    edit(saved, lambda c: c["statistics"]["embodiments"]["sawyer"]["action"].update(mean=[9.0] * 4))
    with pytest.raises(DataError, match="statistics hash to"):
        load_model(saved)


@pytest.mark.parametrize("target", ["os.system", "worldmodel.checkpoint.os.system", "worldmodel.checkpoint.load_model"])
def test_hostile_checkpoint_builds_nothing(saved, target):
    edit(saved, lambda c: c["config"]["encoder"].update(_target_=target))
    with pytest.raises(ConfigError, match=rf"model\.encoder\._target_ is '{target}'"):
        load_model(saved)


def test_only_autoencoders_are_built_from_diffusers(saved):
    edit(saved, lambda c: c["config"]["autoencoder"].update(name="DiffusionPipeline"))
    with pytest.raises(Exception, match="no autoencoder 'DiffusionPipeline'; it has AutoencoderKL"):
        load_model(saved)


def test_checkpoint_with_missing_parts_is_named(saved, tmp_path):
    weights = load_file(saved / "model.safetensors")
    weights.pop("expert.embed_in.weight")
    save_file(weights, saved / "model.safetensors")
    with pytest.raises(DataError, match=r"expert\.embed_in\.weight"):
        load_model(saved)
    with pytest.raises(DataError, match=r"model\.safetensors is missing"):
        load_model(tmp_path)
