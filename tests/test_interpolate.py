"""The action transformer begun from the video transformer."""

from typing import Any

import pytest
import torch
from conftest import compose
from test_kairos import FOUR_LAYERS, REDUCED, reduced
from test_model import generator

from worldmodel.policy.interpolate import begin_from, interpolated, narrowed, resample


def test_what_is_constant_stays_so() -> None:
    assert torch.equal(resample(torch.full((6, 2560), 0.3), (6, 1024)), torch.full((6, 1024), 0.3))
    ramp = torch.linspace(0, 1, 2560)
    drawn = resample(ramp, (1024,))
    assert (
        (drawn.diff() > 0).all() and drawn[0] == pytest.approx(0, abs=1e-3) and drawn[-1] == pytest.approx(1, abs=1e-3)
    )
    vectors = torch.arange(6.0).repeat_interleave(40)
    assert torch.equal(narrowed(vectors, (96,), vectors=6), torch.arange(6.0).repeat_interleave(16))
    weight = torch.randn(8, 8, generator=generator())
    assert torch.equal(narrowed(weight, (8, 8)), weight)


@pytest.mark.parametrize(
    ("wide", "narrow"), [((2560, 2560), (2560, 1024)), ((2560, 2560), (1024, 2560)), ((1024, 256), (410, 102))]
)
def test_outputs_of_white_inputs_keep_their_variance(wide: tuple[int, int], narrow: tuple[int, int]) -> None:
    g = generator(1)
    weight = torch.randn(wide, generator=g) * 0.02 + 0.01
    drawn = narrowed(weight, narrow)
    assert drawn.shape == narrow
    outputs = [torch.randn(512, w.shape[1], generator=g) @ w.T for w in (weight, drawn)]
    assert float(outputs[1].var() / outputs[0].var()) == pytest.approx(1, abs=0.05)
    assert not narrowed(torch.zeros(wide), narrow).any()


def test_every_layer_that_both_have_is_taken_and_nothing_else(statistics: dict[str, Any]) -> None:
    model = reduced(statistics, "experiment=kairos_base", *REDUCED, *FOUR_LAYERS)
    video, action = model.denoiser.state_dict(), model.expert.state_dict()
    drawn = interpolated(video, action)
    assert all(tensor.shape == action[name].shape for name, tensor in drawn.items())
    own = {name for name in action if name not in drawn}
    assert {name.split(".")[0] for name in own} == {"embed_in", "embed_out", "token", "position", "embodiment"}
    # Attention has the same channels in both; only the width of the model is narrowed.
    assert torch.equal(drawn["blocks.2.q_norm.weight"], video["blocks.2.mix.q_norm.weight"])
    assert torch.equal(drawn["blocks.2.v.bias"], video["blocks.2.mix.v.bias"])
    torch.testing.assert_close(drawn["blocks.1.k.weight"], narrowed(video["blocks.1.mix.k.weight"], (32, 24)))
    # Beside a gated delta layer stands the attention of the block before it, but its own feed-forward.
    assert torch.equal(drawn["blocks.3.q.weight"], drawn["blocks.2.q.weight"])
    assert not torch.equal(drawn["blocks.3.feed_forward.0.weight"], drawn["blocks.2.feed_forward.0.weight"])
    begin_from(model.expert, model.denoiser)
    after = model.expert.state_dict()
    assert all(torch.equal(after[name], drawn[name] if name in drawn else action[name]) for name in action)


def test_a_network_of_the_same_widths_is_copied(statistics: dict[str, Any]) -> None:
    same = ("policy.expert.width=32", "policy.expert.hidden=48")
    model = reduced(statistics, "experiment=kairos_base", *REDUCED, *same, *FOUR_LAYERS)
    video, drawn = model.denoiser.state_dict(), interpolated(model.denoiser.state_dict(), model.expert.state_dict())
    for name in ("blocks.0.table", "blocks.3.feed_forward.2.weight", "time.project.1.weight", "embed_context.0.bias"):
        assert torch.equal(drawn[name], video[name])
    assert torch.equal(drawn["blocks.1.out.weight"], video["blocks.1.mix.out.weight"])


@pytest.fixture(scope="module")
def settings(tiny_dataset, tmp_path_factory) -> list[str]:
    """Overrides for a run of two phases, of which the second trains the action transformer first."""
    steps = {"understanding": 1, "synthesis": 2, "policy": 1}
    sizes = [f"phases.{n}.{k}={v}" for n, s in steps.items() for k, v in (("steps", s), ("batch_size", 2))]
    mixture = "phases.synthesis.mixture=[{mode: video_prediction, weight: 1}]"
    run = [f"data.root={tiny_dataset}", "wandb.mode=disabled", "trainer.threads=1"]
    less = [f"~phases.{name}" for name in ("tokeniser", "locate", "compositor", "behaviour")]
    less += ["phases.synthesis.trains=[denoiser]"]
    return ["experiment=kairos_tiny", *run, *less, *sizes, mixture, "phases.policy.learning_rate=0.0"]


@pytest.mark.slow
def test_a_run_begins_the_action_transformer_where_it_first_trains(settings: list[str], tmp_path) -> None:
    """Learning rate 0 in that phase, so that what it began with is what it leaves."""
    from safetensors.torch import load_file

    from worldmodel.curriculum import train

    runs = {}
    for way in ("null", "interpolate"):
        out = train(compose(*settings, f"run_dir={tmp_path / way}", f"policy.initialise={way}"))
        runs[way] = [load_file(folder / "model.safetensors") for folder in sorted((out / "phases").iterdir())]
    parts = lambda weights, name: {  # noqa: E731
        n.removeprefix(f"{name}."): t for n, t in weights.items() if n.startswith(f"{name}.")
    }
    built, before, after = (parts(w, "expert") for w in (runs["null"][-1], *runs["interpolate"][-2:]))
    assert all(torch.equal(before[name], built[name]) for name in built)
    drawn = interpolated(parts(runs["interpolate"][-2], "denoiser"), before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, drawn.get(name, before[name]), msg=name)
    seeded = ["~phases.synthesis", "policy.initialise=interpolate", f"run_dir={tmp_path / 'seeded'}"]
    again = train(compose(*settings[:-2], *seeded, settings[-1], f"init={tmp_path / 'null'}"))
    kept = parts(load_file(again / "model.safetensors"), "expert")
    assert all(torch.equal(kept[name], built[name]) for name in built), "weights that a run is begun with stay"
