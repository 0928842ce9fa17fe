"""Images and instruction read together: what transformers itself computes, and nothing for what is not there."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbone_fakes import END, IMAGE, SEEING, START, WORDS, network, saved
from conftest import compose
from test_conditioner import text
from test_model import generator, observation_of

from worldmodel.checkpoint import build_model, describe, load_model, make_spec, save_model
from worldmodel.data.statistics import statistics_hash
from worldmodel.encoders.conditioner import Conditioner
from worldmodel.encoders.vision_language import VisionLanguageConditioner
from worldmodel.errors import ConfigError, ExportError

VIEWS = ["front", "wrist", "side"]


def conditioner(**settings: Any) -> VisionLanguageConditioner:
    values = {"width": 16, "path": None, "config": SEEING["qwen3_vl"], "size": (24, 40), "pixels": (16, 32)}
    return VisionLanguageConditioner(**{**values, "cameras": VIEWS, **settings})


def pictures(batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, 3, 24, 40), generator=generator(3)).float() / 127.5 - 1.0


def all_there(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(batch, dtype=torch.bool), torch.ones(batch, 3, dtype=torch.bool)


@pytest.mark.parametrize("name", sorted(SEEING))
def test_states_are_those_of_transformers(name, tmp_path):
    """With its own image processor, on two views and a sentence."""
    from transformers import ByT5Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    net = network(SEEING[name])
    path = saved(net, tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    own = conditioner(path=path, config=SEEING[name], views=["front", "side"])
    own.tokeniser = ByT5Tokenizer()  # some models bring a class of their own to a folder of any tokeniser
    rgb, (has_text, has_rgb) = pictures(1), all_there(1)
    tokens, mask = own.see(text("push it"), has_text, rgb, has_rgb)
    x = F.interpolate(rgb[0, [0, 2]] * 0.5 + 0.5, (16, 32), mode="bilinear", antialias=True)
    process = Qwen2VLImageProcessorPil(
        image_mean=[0.4] * 3, image_std=[0.3] * 3, patch_size=8, do_resize=False, do_rescale=False
    )
    given = process(
        images=[np.ascontiguousarray(one) for one in x.numpy()], return_tensors="pt", input_data_format="channels_first"
    )
    image = [START, *[IMAGE] * 2, END]
    ids = torch.tensor([[*image, *image, *(byte + 3 for byte in b"push it"), 1]])
    with torch.no_grad():
        expected = net(input_ids=ids, mm_token_type_ids=(ids == IMAGE).long(), **given).last_hidden_state
    assert mask.all()
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(SEEING))
def test_a_row_is_read_alike_alone_and_in_any_batch(name):
    own, rgb, words = conditioner(config=SEEING[name]), pictures(4), text("push", "open the drawer", "", "lift")
    has_text, has_rgb = all_there(4)
    has_rgb[0, 1] = has_rgb[3] = False
    tokens, mask = own.see(words, has_text, rgb, has_rgb)
    assert mask.sum(1).tolist() == [2 * 4 + 4, 3 * 4 + 15, 3 * 4, 4]
    for i in range(4):
        row = slice(i, i + 1)
        alone, there = own.see(words[row], has_text[row], rgb[row], has_rgb[row])
        assert there.all()
        torch.testing.assert_close(tokens[i, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-4)
        assert not tokens[i, alone.shape[1] :].any()


def test_what_is_absent_leaves_no_token():
    """Neither a grey picture nor an empty sentence: the answer is that of a sequence without it."""
    own, rgb, words = conditioner(), pictures(1), text("push")
    has_text, has_rgb = all_there(1)
    whole, _ = own.see(words, has_text, rgb, has_rgb)
    changed = rgb.clone()
    changed[:, 1] = 0.0
    has_rgb[:, 1] = False
    without, mask = own.see(words, has_text, rgb, has_rgb)
    assert mask.sum() == 2 * 4 + 4
    torch.testing.assert_close(own.see(words, has_text, changed, has_rgb)[0], without)
    assert not torch.allclose(whole[:, -1], without[:, -1], atol=1e-3), "the words were read after what is seen"
    silent, mask = own.see(words, ~has_text, rgb, has_rgb)
    assert mask.sum() == 2 * 4
    torch.testing.assert_close(own.see(text("lift"), ~has_text, rgb, has_rgb)[0], silent)
    torch.testing.assert_close(own.see(words, has_text, rgb, ~all_there(1)[1])[0], own(words)[0])
    assert not own.see(words, ~has_text, rgb, ~all_there(1)[1])[1].any()


def test_the_instruction_alone_is_that_of_a_language_conditioner():
    own, rgb = conditioner(), pictures(2)
    tokens, mask = own(text("push", "lift it"))
    assert tokens.shape == (2, 7, 16) and mask.sum(1).tolist() == [4, 7]
    again, _ = Conditioner.forward(own, text("push"))
    torch.testing.assert_close(again[0], tokens[0, :4])
    chosen = conditioner(views=["wrist"])
    seen = chosen.see(text("push"), *(x[:1] for x in (all_there(2)[0], rgb, all_there(2)[1])))[1]
    assert seen.sum() == 4 + 4


def test_a_chat_template_places_the_images(tmp_path):
    from transformers import AutoTokenizer, ByT5Tokenizer

    path = saved(network(SEEING["qwen3_vl"]), tmp_path)
    tokeniser = ByT5Tokenizer()
    tokeniser.add_tokens(["<image>"])
    number = tokeniser.convert_tokens_to_ids("<image>")
    part = "{{ '<image>' if c.type == 'image' else c.text }}"
    content = (
        "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        + part
        + "{% endfor %}{% endif %}"
    )
    template = "{% for m in messages %}<{{ m.role }}>" + content + "{% endfor %}"
    tokeniser.chat_template = template
    tokeniser.save_pretrained(tmp_path)
    config = AutoTokenizer.from_pretrained(path)
    assert config("<image>")["input_ids"][0] == number
    own = conditioner(path=path, system="look", skip=12)
    own.net.config.image_token_id = number
    (scene,) = own.scenes(text("push"), torch.tensor([True]), torch.tensor([[True, False, True]]))
    ids = own.prompt(scene, 2)
    assert ids == [
        *(byte + 3 for byte in b"<system>look<user>"),
        number,
        number,
        number,
        number,
        *(b + 3 for b in b"push"),
        1,
    ]
    own.net.config.image_token_id = 5
    with pytest.raises(ConfigError, match="puts 0 image tokens for 2 images"):
        own.prompt(scene, 2)


def test_frozen_weights_get_no_gradient_and_tuned_ones_do(tmp_path):
    path = saved(network(SEEING["qwen3_vl"]), tmp_path)
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    for frozen in (True, False):
        own = conditioner(path=path, frozen=frozen).train()
        assert bool(own.state_dict()) != frozen
        for answer in (own.see(text("push"), all_there(1)[0], pictures(1), all_there(1)[1]), own(text("push"))):
            assert answer[0].requires_grad != frozen
        if not frozen:
            own.see(text("push"), all_there(1)[0], pictures(1), all_there(1)[1])[0].square().sum().backward()
            moved = {name.split(".")[1] for name, p in own.named_parameters() if p.grad is not None and p.grad.any()}
            assert moved == {"visual", "language_model"}


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"encoders\.text\.config is a qwen3; those that read images as Qwen-VL does"):
        conditioner(config={"model_type": "qwen3", **{k: v for k, v in WORDS.items() if k != "rope_parameters"}})
    with pytest.raises(ConfigError, match=r"encoders\.text\.pixels: \(24, 32\) is no multiple of 16"):
        conditioner(pixels=(24, 32))
    with pytest.raises(ConfigError, match=r"encoders\.text\.views: no camera 'top'; the data have front, wrist, side"):
        conditioner(views=["top"])
    with pytest.raises(ConfigError, match=r"encoders\.text\.path: .*none has no config\.json"):
        conditioner(path=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"encoders\.width is 16, but the hidden states"):
        conditioner(config={"model_type": "qwen3", **WORDS, "hidden_size": 32} | {"rope_parameters": None})


def test_a_model_with_one_answers_and_becomes_no_graph(statistics, tmp_path):
    """Saved and loaded; the state policy hears the instruction alone, the rest what is seen and said together."""
    torch.manual_seed(0)
    config = compose("experiment=kairos_tiny", "encoders/text=vision_language", "encoders.gives=both")
    model = build_model(config["model"], make_spec(config["data"]["spec"]), statistics).eval()
    for layer in [*model.denoiser.embed_out.values(), model.expert.embed_out]:
        torch.nn.init.normal_(layer.weight, std=0.2)
    digest = statistics_hash(statistics)
    model.metadata = describe(config["model"], model.spec, statistics, digest, {"tasks": ["reach-v3"]})
    save_model(model, tmp_path / "run")
    again = load_model(tmp_path / "run")
    o, noise = observation_of(model.spec), torch.randn(2, model.spec.chunk, model.spec.action, generator=generator())
    blind = o._replace(has_rgb=torch.zeros_like(o.has_rgb))
    with torch.no_grad():
        torch.testing.assert_close(again.act(o, noise), model.act(o, noise))
        s, unseen = (model.normaliser(x, model.grid) for x in (o, blind))
        tokens, mask, mean = model.encoder.read_text(s)
        torch.testing.assert_close(mean, model.encoder.read_text(unseen)[2])
        torch.testing.assert_close(mean, model.encoder.instruction(s))
        assert mask.sum(1).min() > model.encoder.read_text(unseen)[1].sum(1).max()
        context = model.encoder.context(s, model.encoder(s))
    torch.testing.assert_close(context.tokens[:, -tokens.shape[1] :], tokens)
    text_encoder: Any = model.encoder.text
    with pytest.raises(ExportError, match="cannot become a graph"):
        torch.jit.trace(lambda rgb: text_encoder.see(s.text, s.has_text, rgb, s.has_rgb)[0], s.rgb)
