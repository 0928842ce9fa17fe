"""Given futures: what is given stays, what is absent does not leak, and guidance is the combination it says."""

from typing import Any

import pytest
import torch
from conftest import compose
from test_model import draws, future_of, generator, observation_of

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.conditioning import draw_given, give, guided
from worldmodel.contracts import Batch, Future, Observation, Prediction
from worldmodel.data.transforms import hide
from worldmodel.errors import ConfigError
from worldmodel.geometry import fov_to_intrinsics
from worldmodel.losses import clip_loss
from worldmodel.phases import Phase
from worldmodel.synthesis.conditions import heat_maps


@pytest.fixture
def aware(tiny_model):
    """A tiny model whose conditions are as if trained: none of their ways into the network is zero."""
    for parameter in tiny_model.denoiser.conditions.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tiny_model


def clip_of(model) -> tuple[Observation, Future]:
    """Two observations that know everything, and futures whose cameras move."""
    spec = model.spec
    o, f = observation_of(spec), future_of(spec)
    poses = torch.eye(4).repeat(2, spec.future, len(spec.cameras), 1, 1)
    poses[..., :3, 3] = torch.randn(2, spec.future, len(spec.cameras), 3, generator=generator(8)) * 0.3
    known = {name: torch.ones_like(getattr(o, name)) for name in Observation._fields if name.startswith("has_")}
    return o._replace(**known), f._replace(camera_to_base=poses)


def synthesise(model, o, f, mode="video_prediction", **settings) -> Prediction:
    with torch.inference_mode():
        return model.predict(o, f, mode, generator=generator(), **settings)


def test_what_is_given_comes_back_and_leads_the_rest_of_its_own_row(aware):
    o, f = clip_of(aware)
    one = torch.tensor([True, False])
    slot = torch.tensor([[False, True, False, False], [False] * 4])
    view = torch.tensor([[True, False], [False, False]])
    free = synthesise(aware, o, None)
    camera = synthesise(aware, o, f, given={"camera": one})
    points = synthesise(aware, o, f, given={"points": slot})
    video = synthesise(aware, o, f, given={"video": view})
    torch.testing.assert_close(camera.camera_to_base[0], f.camera_to_base[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(points.points[0, :, 1], f.points[0, :, 1], atol=1e-4, rtol=1e-4)
    assert (points.points[0, :, 0] - f.points[0, :, 0]).abs().max() > 0.01
    for led in (camera, points):
        assert (led.rgb[0] - free.rgb[0]).abs().max() > 1e-4
    assert (video.rgb[0, :, 1] - free.rgb[0, :, 1]).abs().max() > 1e-4  # the other view
    for led in (camera, points, video):
        for ours, theirs in zip(led, free, strict=True):
            torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)


def test_nothing_but_what_is_given_is_read_from_the_future(aware):
    o, f = clip_of(aware)
    other = f._replace(rgb=f.rgb.flip(0), actions=f.actions.flip(0), points=f.points.flip(0), wrench=f.wrench.flip(0))
    ours, theirs = (synthesise(aware, o, x, given={"camera": True}) for x in (f, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_actions_reach_the_video_and_the_embodiment_can_be_denied(aware):
    o, f = clip_of(aware)
    told = synthesise(aware, o, f, "forward_dynamics").rgb
    assert (
        told - synthesise(aware, o, f._replace(actions=f.actions.flip(1)), "forward_dynamics").rgb
    ).abs().max() > 1e-3
    assert (told - synthesise(aware, o, f, "forward_dynamics", given={"embodiment": False}).rgb).abs().max() > 1e-3


def test_untrained_conditions_change_nothing(tiny_model):
    """All their ways start at zero, so a network that knows no conditions can be fine-tuned with them."""
    o, f = clip_of(tiny_model)
    with_them = synthesise(tiny_model, o, f, "forward_dynamics").rgb
    tiny_model.denoiser.conditions = None
    torch.testing.assert_close(with_them, synthesise(tiny_model, o, f, "forward_dynamics").rgb, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"'embodiment' is not given here; given are text"):
        synthesise(tiny_model, o, None, guidance={"embodiment": 2.0})
    with pytest.raises(ConfigError, match=r"'camera' cannot be given .* synthesis.denoiser.conditions"):
        synthesise(tiny_model, o, f, given={"camera": True})


def test_guidance_is_a_sum_over_conditions():
    answers = {None: 5.0, "text": 3.0, "actions": 4.0}
    asked = []

    def velocity(without):
        asked.append(without)
        return {"video": torch.tensor(answers[without])}

    assert guided(velocity, {"text": 1.0, "actions": 1.0})["video"] == 5.0
    assert asked == [None]
    assert guided(velocity, {"text": 3.0, "actions": 2.0})["video"] == 5 + 2 * (5 - 3) + 1 * (5 - 4)
    assert guided(velocity, {"text": 0.0})["video"] == 3.0


@pytest.mark.parametrize("name", ["text", "actions", "camera", "points"])
def test_a_scale_of_nought_is_the_answer_without_the_condition(aware, name):
    """One sampling step: later ones would start from a state in which the given slots differ."""
    o, f = clip_of(aware)
    mode = "forward_dynamics" if name == "actions" else "video_prediction"
    given = {name: True} if name in ("camera", "points") else None
    ours, plain = (
        synthesise(aware, o, f, mode, given=given, guidance={name: scale}, steps=1).rgb for scale in (0.0, 1.0)
    )
    if name == "text":
        expected = synthesise(aware, hide(o, ["text"]), f, mode, steps=1).rgb
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    if name == "actions":
        expected = synthesise(aware, o, None, "video_prediction", steps=1).rgb
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 1e-4


def test_bad_conditions_are_named(aware):
    o, f = clip_of(aware)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"given": {"colour": True}}, r"unknown condition 'colour'; one of video, camera"),
        ({"guidance": {"camera": 2.0}}, r"'camera' is not given here"),
        ({"guidance": {"force": 2.0}}, r"unknown condition 'force'; one of text"),
    ]
    for settings, match in refused:
        with pytest.raises(ConfigError, match=match):
            synthesise(aware, o, f, **settings)
    with pytest.raises(ConfigError, match=r"camera of no future"):
        synthesise(aware, o, None, given={"camera": True})
    with pytest.raises(ConfigError, match=r"mode 'policy' predicts no streams that 'camera' could lead"):
        synthesise(aware, o, f, "policy", given={"camera": True})
    phase: dict[str, Any] = {"name": "p", "objective": "world", "trains": ("denoiser",), "steps": 1, "batch_size": 1}
    refused = [({"given": {"actions": 0.5}}, "given.actions is none of"), ({"absent": 2.0}, "lie in 0 to 1")]
    for settings, match in refused:
        with pytest.raises(ConfigError, match=match):
            Phase(**phase, learning_rate=1.0, mixture=(), **settings)


def test_training_learns_conditions_and_asks_only_for_what_is_not_given(aware):
    o, f = clip_of(aware)
    batch = Batch(o, f, torch.zeros(2, aware.spec.history, dtype=torch.long), ["a", "b"])
    settings = {"drop": (), "dropout": {}, "draws": 1, "weights": {}, "insulate": True, "huber": None}
    latents = aware.history_latents(o)

    def losses(mode, given, absent=0.0):
        return clip_loss(aware, batch, latents, draws(), mode=mode, given=given, absent=absent, **settings)[0]

    open_ended = losses("video_prediction", {})
    told = losses("video_prediction", {"camera": 1.0, "points": 0.0})
    assert open_ended["video_prediction/camera"] > 0
    assert told["video_prediction/camera"] == 0
    assert losses("video_prediction", {}, absent=1.0)["video_prediction/points"] == 0
    losses("forward_dynamics", {"points": 1.0, "camera": 1.0})["loss"].backward()
    for name, parameter in aware.denoiser.conditions.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_rates_are_what_rows_are_given_at(aware):
    flags, lacks = draw_given({"camera": 0.3, "points": 0.5, "video": 0.4}, 0.2, aware.spec, 4000, draws(4000))
    rate = lambda mask: mask.float().mean().item()  # noqa: E731
    assert rate(flags["camera"]) == pytest.approx(0.3, abs=0.03)
    assert rate(flags["points"].all(1)) == pytest.approx(0.25, abs=0.04)
    assert rate(flags["video"].sum(1) == 1) == pytest.approx(0.4, abs=0.03)
    assert flags["video"].sum(1).max() == 1
    assert rate(lacks["points"]) == pytest.approx(0.2, abs=0.03)
    a, b = (draw_given({"camera": 0.3}, 0.0, aware.spec, 50, draws(50, 4))[0]["camera"] for _ in range(2))
    assert torch.equal(a, b)


def test_heat_lies_where_the_camera_sees_the_point():
    lens = fov_to_intrinsics(torch.tensor(1.0), 64, 64)
    # A pixel of cell (row 2, column 5) at a depth of two metres, and a point behind the camera.
    pixel = torch.tensor([5.5 * 8, 2.5 * 8, 1.0])
    points = torch.stack([2.0 * torch.linalg.solve(lens, pixel), torch.tensor([0.0, 0.0, -1.0])])
    heat = heat_maps(points, lens, torch.eye(4), (64, 64), (8, 8))
    assert heat.shape == (2, 8, 8)
    assert divmod(int(heat[0].argmax()), 8) == (2, 5)
    torch.testing.assert_close(heat[0].max(), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert not heat[1].any()


def test_a_point_that_was_never_seen_cannot_be_given(aware):
    o, f = clip_of(aware)
    o = hide(o, ["points"], torch.tensor([True, False]))
    given = give(aware, o, aware.normaliser(o, aware.grid), f, {"points": True})
    assert given is not None and given.has_points.tolist() == [[False] * 4, [True] * 4]
    assert not given.heat[0].any() and given.heat[1].any()


def test_streams_that_a_model_lacks_are_no_obstacle(statistics):
    config = compose("experiment=kairos_tiny", "+synthesis.denoiser.streams=[video,points]",
                     "synthesis.denoiser.anchored=[video,points]")  # fmt: skip
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()
    o, f = clip_of(model)
    answer = synthesise(model, o, f, given={"camera": True, "points": True})
    torch.testing.assert_close(answer.points, f.points, atol=1e-4, rtol=1e-4)
