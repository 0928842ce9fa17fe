"""Vision transformers as image encoders: what transformers itself computes, frozen or tuned, in tokens of our width."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backbone_fakes import VISION, network, saved
from conftest import compose
from export_fakes import FakeModel, action_path
from hydra.utils import instantiate
from test_model import future_of, generator, observation_of

from export.onnx import OnnxRunner, write_onnx
from export.torchscript import TorchScriptRunner, write_torchscript
from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.contracts import Observation
from worldmodel.data.statistics import statistics_hash
from worldmodel.encoders.vision import VisionEncoder
from worldmodel.errors import ConfigError
from worldmodel.nn import at_grid
from worldmodel.policy.realtime import Decided


def encoder(seed: int = 0, **settings) -> VisionEncoder:
    torch.manual_seed(seed)
    values = {"width": 12, "size": (24, 48), "cells": (2, 4), "path": None, "config": VISION["siglip"], "frozen": True}
    return VisionEncoder(**{**values, **settings})


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=generator(3)).float() / 127.5 - 1.0


@pytest.mark.parametrize("name", sorted(VISION))
def test_features_are_those_of_transformers(name, tmp_path):
    """Of a folder: resized, standardised as its preprocessor says, patches without class and register tokens."""
    net = network(VISION[name])
    own = encoder(path=saved(net, tmp_path), pixels=(32, 32))
    assert own.backbone.pixels == (32, 32)
    rgb = pictures(2, 3, 3, 24, 48)
    x = F.interpolate(rgb.flatten(0, 1) * 0.5 + 0.5, (32, 32), mode="bilinear", antialias=True)
    x = (x - 0.4) / 0.3
    if name == "siglip2":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        patches = torch.stack([torch.as_tensor(convert_image_to_patches(one.numpy(), 8)) for one in x])
        ones, shapes = torch.ones(6, 16, dtype=torch.int64), torch.tensor([[4, 4]]).expand(6, 2)
        hidden = net(patches, pixel_attention_mask=ones, spatial_shapes=shapes).last_hidden_state
    else:
        hidden = net(pixel_values=x).last_hidden_state
    grid = hidden[:, -16:].unflatten(1, (4, 4))
    expected = torch.stack([grid[:, 2 * r : 2 * r + 2, c].mean(1) for r in range(2) for c in range(4)], 1)
    torch.testing.assert_close(own.backbone(rgb.flatten(0, 1)), expected, atol=1e-5, rtol=1e-5)
    tokens = own(rgb)
    assert tokens.shape == (2, 3, 8, 12)
    torch.testing.assert_close(own(rgb[:, 1:2])[:, 0], tokens[:, 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_pictures_of_another_size_have_the_tokens_of_a_network_that_is_built_for_it(name):
    own = encoder(config=VISION[name])
    other = encoder(config=VISION[name], size=(48, 24), cells=(4, 2))
    other.load_state_dict(own.state_dict() | {"position": at_grid(own.position.detach(), (2, 4), (4, 2))})
    rgb = pictures(2, 2, 3, 48, 24)
    assert own(rgb).shape == (2, 2, 8, 12)
    assert torch.equal(own(rgb), other(rgb))


def test_other_pixels_than_it_was_trained_with():
    for name in ("siglip", "siglip2", "dinov3", "dinov2"):
        own = encoder(config=VISION[name], pixels=(24, 48), cells=(3, 6))
        assert own(pictures(1, 1, 3, 24, 48)).shape == (1, 1, 18, 12), name


def test_the_image_half_of_a_model_of_image_and_text(tmp_path):
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(2)
    words = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    seeing = {key: value for key, value in VISION["siglip"].items() if key != "model_type"}
    whole = SiglipModel(SiglipConfig(text_config={**words, "num_attention_heads": 2}, vision_config=seeing)).eval()
    own = encoder(path=saved(whole, tmp_path))
    assert not [name for name in own.backbone.net.state_dict() if "text" in name or "head" in name]
    rgb = pictures(1, 3, 24, 48)
    x = (F.interpolate(rgb * 0.5 + 0.5, (32, 32), mode="bilinear", antialias=True) - 0.4) / 0.3
    expected = whole.vision_model(pixel_values=x).last_hidden_state.mean(1)
    torch.testing.assert_close(own.backbone(rgb).mean(1), expected, atol=1e-5, rtol=1e-5)


def test_frozen_weights_get_no_gradient_and_tuned_ones_do(tmp_path):
    path = saved(network(VISION["dinov3"]), tmp_path)
    for frozen in (True, False):
        own = encoder(path=path, frozen=frozen).train()
        own(pictures(1, 2, 3, 24, 48)).square().sum().backward()
        moved = {name.split(".")[0] for name, p in own.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == {"project", "position"} | (set() if frozen else {"backbone"})
        assert not own.backbone.net.training, "its own randomness is off"
        in_checkpoint = [name for name in own.state_dict() if ".net." in name]
        assert bool(in_checkpoint) != frozen, "frozen weights of a folder stay there"


def test_frozen_networks_run_in_the_precision_they_are_stored_in(tmp_path):
    """Under autocast too, so that features are the same in every run; tuned ones are float32 and follow it."""
    path = saved(network(VISION["siglip"]).to(torch.bfloat16), tmp_path)
    frozen, tuned, exact = encoder(path=path), encoder(path=path, frozen=False), encoder()
    assert {p.dtype for p in frozen.backbone.net.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    rgb = pictures(2, 3, 24, 48)
    with torch.no_grad():
        apart, coarse = [own.backbone(rgb) for own in (frozen, exact)], tuned.backbone(rgb)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            together = [own.backbone(rgb) for own in (frozen, exact)]
            assert not torch.equal(tuned.backbone(rgb), coarse)
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    assert torch.equal(apart[0], apart[0].bfloat16().float()), "nothing is lost by storing them so"


def test_frozen_and_tuned_networks_side_by_side_miss_only_their_own_weights(tmp_path):
    path = saved(network(VISION["siglip"]), tmp_path)
    both = torch.nn.ModuleDict({"a": encoder(path=path), "b": encoder(path=path, frozen=False)})
    state = both.state_dict()
    both.load_state_dict(state)
    del state["b.backbone.net.post_layernorm.weight"]
    with pytest.raises(RuntimeError, match=r"b\.backbone\.net\.post_layernorm\.weight"):
        both.load_state_dict(state)


def test_random_weights_that_are_frozen_are_the_same_in_every_run():
    first, second, tuned = encoder(5), encoder(6), encoder(5, frozen=False)
    assert first.backbone.digest() == second.backbone.digest() != tuned.backbone.digest()
    assert encoder(6, frozen=False).backbone.digest() != tuned.backbone.digest()
    assert encoder(pixels=(24, 48)).backbone.digest() != first.backbone.digest()


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"encoders\.image\.path: .*nothing has no config\.json"):
        encoder(path=str(tmp_path / "nothing"))
    words = {"model_type": "qwen3", "vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    words |= {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 8}
    path = saved(network(words), tmp_path / "words")
    with pytest.raises(ConfigError, match=r"encoders\.image\.path: .*words is a qwen3, which is no vision transformer"):
        encoder(path=path)
    with pytest.raises(ConfigError, match=r"encoders\.image\.config: .*siglop"):
        encoder(config={"model_type": "siglop"})
    with pytest.raises(ConfigError, match=r"pixels: \(30, 32\) is no multiple of 8, the patch of siglip_vision_model"):
        encoder(pixels=(30, 32))
    bare = tmp_path / "bare"
    network(VISION["siglip"]).save_pretrained(bare)
    with pytest.raises(ConfigError, match=r"encoders\.image\.path: .*bare has no image_mean and image_std"):
        encoder(path=str(bare))
    from safetensors.torch import load_file, save_file

    weights = load_file(bare / "model.safetensors")
    save_file(
        {n: t for n, t in weights.items() if "layers.1.mlp" not in n}, bare / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"encoders\.image\.path: the weights in .*bare lack 4 tensors, among them"):
        encoder(path=str(bare))
    (bare / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"encoders\.image\.path: .*bare cannot be loaded"):
        encoder(path=str(bare))


def with_vision(statistics, **overrides: str):
    torch.manual_seed(0)
    settings = [f"{name}={value}" for name, value in overrides.items()]
    config = compose("experiment=kairos_tiny", "encoders/image=vision", *settings)
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics)
    digest = statistics_hash(statistics)
    model.metadata = describe(config["model"], model.spec, statistics, digest, {"tasks": ["reach-v3"]})
    return model.eval()


def test_every_option_of_stage_1_composes_and_builds():
    """Every image and text encoder in every experiment, without its numbers."""
    configs = Path(__file__).parent.parent / "configs"
    names = {group: [p.stem for p in (configs / "encoders" / group).glob("*.yaml")] for group in ("image", "text")}
    assert {"vision", "vision_language"} <= {*names["image"], *names["text"]}
    for experiment in ("kairos_tiny", "kairos_small", "kairos_base"):
        for group, options in names.items():
            for option in options:
                config = compose(f"experiment={experiment}", f"encoders/{group}={option}", "data.root=nowhere")
                with torch.device("meta"):
                    built = instantiate(config["model"]["encoder"], _convert_="all")
                assert config["encoders"][group]["_target_"].endswith(f".{type(getattr(built, group)).__name__}")


def test_a_checkpoint_with_the_weights_of_a_folder(statistics, tmp_path):
    path = saved(network(VISION["dinov3"]), tmp_path / "dinov3")
    model = with_vision(statistics, **{"encoders.image.path": path})
    save_model(model, tmp_path / "run")
    again = load_model(tmp_path / "run")
    assert not [name for name in model.state_dict() if name.startswith("encoder.image.backbone.net.")]
    o, noise = observation_of(model.spec), torch.randn(2, model.spec.chunk, model.spec.action, generator=generator())
    with torch.no_grad():
        torch.testing.assert_close(again.act(o, noise), model.act(o, noise))
        one = again.predict(o, future_of(model.spec), "joint", generator=generator(), steps=1)
        hidden = again.act(o._replace(has_rgb=torch.zeros_like(o.has_rgb), rgb=torch.zeros_like(o.rgb)), noise)
        other = again.act(o._replace(has_rgb=torch.zeros_like(o.has_rgb)), noise)
    assert torch.isfinite(one.rgb).all()
    torch.testing.assert_close(hidden, other, msg="an absent view is masked whatever it holds")


class Seeing(FakeModel):
    """The fake policy beside an image encoder."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.image = encoder(size=(8, 8), cells=(2, 2), config=VISION[name], pixels=(16, 24))

    def act(self, observation: Observation, noise: torch.Tensor, decided: Decided | None = None) -> torch.Tensor:
        """Every token counts."""
        tokens = self.image(observation.rgb[:, -1].float() / 127.5 - 1.0)
        weight = torch.linspace(-1.0, 1.0, tokens[0].numel()).reshape(tokens.shape[1:])
        return super().act(observation, noise, decided) + (tokens * weight).sum((1, 2, 3))[:, None, None]


@pytest.mark.parametrize("name", ["siglip", "siglip2", "dinov3"])
def test_a_policy_that_sees_through_them_exports(name, tmp_path):
    """ONNX and TorchScript give what the eager model gives, for other pictures than it was traced with."""
    path = action_path(Seeing(name))
    inputs, other = path.example(1), path.example(1, seed=4)
    write_torchscript(path, tmp_path / "policy.pt")
    write_onnx(path, tmp_path / "policy.onnx", opset=18, dynamic=False)
    with torch.no_grad():
        expected = path(*other)[0]
        assert (expected - path(*inputs)[0]).abs().max() > 0.1
    for runner in (TorchScriptRunner(tmp_path / "policy.pt"), OnnxRunner(tmp_path / "policy.onnx")):
        torch.testing.assert_close(torch.as_tensor(runner(other)[0]), expected, atol=1e-5, rtol=1e-5)
