"""Single pictures beside clips: what the network may see of them, that it learns them, and noise by shape."""

import math
from typing import Any

import pytest
import torch
from conftest import compose
from test_kairos import FOUR_LAYERS, REDUCED, reduced
from test_model import draws, future_of, generator, observation_of

from worldmodel.checkpoint import build_model, make_spec
from worldmodel.contracts import STREAMS, Batch, WorldState
from worldmodel.errors import ConfigError
from worldmodel.losses import world_loss
from worldmodel.picture_loss import picture_loss
from worldmodel.synthesis.flow import flow_shift
from worldmodel.synthesis.sampler import integrate, sampling_sigmas

PLAIN: dict[str, Any] = {"dropout": {}, "weights": {}, "huber": None}


def batch_of(model: Any, **changes: torch.Tensor) -> Batch:
    o = observation_of(model.spec)._replace(**changes)
    return Batch(o, future_of(model.spec), torch.zeros(2, 3, dtype=torch.int64), ["a", "b"])


def latents_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.history_latents(batch.observation)


@pytest.fixture(params=["tiny", "base"])
def model(request: pytest.FixtureRequest, statistics: dict[str, Any], tiny_model: Any) -> Any:
    """A network that predicts clean values from a guess, and one as published that predicts velocities."""
    if request.param == "tiny":
        return tiny_model
    base = reduced(statistics, "experiment=kairos_base", *REDUCED, *FOUR_LAYERS)
    for layer in base.denoiser.embed_out.values():
        torch.nn.init.normal_(layer.weight, std=0.2)
    return base


def test_a_picture_is_told_by_its_caption_alone(model: Any) -> None:
    """No other sense, no earlier frame, no future changes the loss; the instruction and the picture do."""
    batch = batch_of(model)
    latents = latents_of(model, batch)

    def loss(batch: Batch, latents: torch.Tensor) -> float:
        with torch.no_grad():
            return float(picture_loss(model, batch, latents, draws(), **PLAIN)["loss"])

    own = loss(batch, latents)
    changed = {
        name: (torch.randn(value.shape, generator=generator(4)).to(value.dtype))
        for name, value in batch.observation._asdict().items()
        if value.dtype == torch.float32 and name != "intrinsics"
    }
    changed["camera_to_base"] = batch.observation.camera_to_base
    other = batch_of(model, **changed, rgb=batch.observation.rgb.flip(0))
    other = other._replace(future=future_of(model.spec)._replace(points=torch.zeros_like(batch.future.points)))
    assert loss(other, torch.cat([latents[:, :-1].flip(0), latents[:, -1:]], 1)) == own
    assert loss(batch_of(model, text=batch.observation.text.flip(1)), latents) != own
    assert loss(batch, latents.flip(0)) != own


def test_an_absent_view_counts_for_nothing(model: Any) -> None:
    has = torch.ones(2, len(model.spec.cameras), dtype=torch.bool)
    has[:, 1:] = False
    batch = batch_of(model, has_rgb=has)
    latents = latents_of(model, batch)
    other = latents.clone()
    other[:, :, 1:] = 7.0
    losses = [picture_loss(model, batch, x, draws(), **PLAIN)["loss"] for x in (latents, other)]
    assert torch.equal(*losses)


def test_the_guess_of_a_picture_is_not_the_picture(tiny_model: Any) -> None:
    """An answer of zero is the mean picture: its error is the picture's own spread, whatever the noise."""
    for layer in tiny_model.denoiser.embed_out.values():
        torch.nn.init.zeros_(layer.weight)
    tiny_model.get_buffer("stream_scale").fill_(0.1)
    batch = batch_of(tiny_model)
    latents = latents_of(tiny_model, batch)
    loss = picture_loss(tiny_model, batch, latents, draws(), **PLAIN)["loss"]
    torch.testing.assert_close(loss, latents[:, -1].square().mean(), rtol=1e-4, atol=1e-5)


def sample(model: Any, batch: Batch) -> torch.Tensor:
    s = model.normaliser(batch.observation, model.grid)
    memory = model.remember_nothing(s, batch.observation.has_rgb)
    shape = (2, 1, len(model.spec.cameras), model.autoencoder.channels, *model.grid)

    def step(now: dict[str, torch.Tensor], sigma: float) -> dict[str, torch.Tensor]:
        level = torch.full((2, len(STREAMS)), sigma)
        return model.velocity(memory, state=WorldState(*(now["video"] for _ in STREAMS)), levels=level)[0]

    noise = torch.randn(shape, generator=generator(8))
    with torch.no_grad():
        return integrate(step, {"video": noise}, sampling_sigmas(4, model.shift(1)))["video"]


def test_pictures_train_and_then_come_out_of_noise(tiny_model: Any) -> None:
    """Two captions, two pictures: after some steps each caption gives its own."""
    model = tiny_model
    words = torch.zeros(2, model.spec.text, dtype=torch.int64)
    words[0, :4], words[1, :4] = 3, 90
    batch = batch_of(model, text=words, has_text=torch.ones(2, dtype=torch.bool))
    latents = torch.randn(2, 1, len(model.spec.cameras), 16, 1, 1, generator=generator(2)).expand(-1, -1, -1, -1, 8, 8)
    optimiser = torch.optim.AdamW([*model.denoiser.parameters(), *model.encoder.parameters()], lr=3e-3)
    for number in range(100):
        optimiser.zero_grad()
        picture_loss(model, batch, latents, draws(seed=number), **PLAIN)["loss"].backward()
        optimiser.step()
    made = sample(model, batch)
    own, other = ((made - x).square().mean() for x in (latents, latents.flip(0)))
    assert own < 0.2 * other


def test_pictures_and_clips_train_the_same_network(model: Any) -> None:
    batch = batch_of(model)
    latents = latents_of(model, batch)
    settings: dict[str, Any] = {"drop": (), "draws": 1, "insulate": False, "given": {}, "absent": 0.0, **PLAIN}
    touched = []
    for losses in (
        picture_loss(model, batch, latents, draws(), **PLAIN),
        world_loss(model, batch, latents, draws(), mode="video_prediction", **settings),
    ):
        model.zero_grad()
        losses["loss"].backward()
        touched.append({name for name, p in model.denoiser.named_parameters() if p.grad is not None and p.grad.any()})
    assert {f"blocks.{i}.{part}" for i in range(4) for part in ("table", "feed_forward.0.weight")} <= touched[0]
    assert {"embed_in.video.weight", "embed_out.video.weight"} <= touched[0]
    assert touched[0] - touched[1] == {"no_rays"}, "of a picture no camera is known"


def test_the_shift_of_noise_follows_tokens_and_frames() -> None:
    """Logarithm 0.5 for a frame of 256 tokens, 0.9 for one of 8192, halfway between them in between; times sqrt(F)."""
    assert flow_shift("shape", 256, 1) == pytest.approx(math.exp(0.5))
    assert flow_shift("shape", 8192, 1) == pytest.approx(math.exp(0.9))
    assert flow_shift("shape", (256 + 8192) // 2, 1) == pytest.approx(math.exp(0.7))
    assert flow_shift("shape", 1200, 20) == pytest.approx(math.sqrt(20) * flow_shift("shape", 1200, 1))
    assert flow_shift(5.0, 1200, 20) == 5.0
    for wrong in ("shapes", 0.0, -1.0):
        with pytest.raises(ConfigError, match="shift of noise levels"):
            flow_shift(wrong, 1200, 20)


def test_training_and_sampling_share_the_shift_and_actions_have_their_own(
    statistics: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", "synthesis.stream_shift=shape", "policy.action_shift=5.0")
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()
    expected = flow_shift("shape", 2 * 16, 2)
    assert model.shift() == expected and model.shift(1) == pytest.approx(expected / math.sqrt(2))
    seen: dict[str, list[float]] = {"train": [], "sample": []}
    import worldmodel.losses
    import worldmodel.model

    train, path = worldmodel.losses.sample_sigma, worldmodel.model.sampling_sigmas
    monkeypatch.setattr(worldmodel.losses, "sample_sigma", lambda n, s, g: seen["train"].append(s) or train(n, s, g))
    monkeypatch.setattr(worldmodel.model, "sampling_sigmas", lambda n, s: seen["sample"].append(s) or path(n, s))
    batch = batch_of(model)
    settings: dict[str, Any] = {"drop": (), "draws": 1, "insulate": False, "given": {}, "absent": 0.0, **PLAIN}
    world_loss(model, batch, latents_of(model, batch), draws(), mode="joint", **settings)
    with torch.no_grad():
        model.predict(batch.observation, None, "video_prediction", generator=generator(), steps=1)
        model.act(batch.observation, torch.randn(2, model.spec.chunk, model.spec.action, generator=generator()))
    assert seen == {"train": [expected] * 4 + [5.0], "sample": [expected, 5.0]}
    config["model"]["stream_shift"] = "form"
    with pytest.raises(ConfigError, match="neither a number above 0 nor 'shape'"):
        build_model(config["model"], make_spec(config["data"]["spec"]), statistics)
