"""The frozen conditioner: built from a configuration or loaded from a folder, never trained, never copied."""

import pytest
import torch

from worldmodel.encoders.conditioner import Conditioner
from worldmodel.errors import ConfigError, ExportError

TINY = {
    "model_type": "qwen3",
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def text(*words: str, length: int = 24) -> torch.Tensor:
    rows = [[byte + 1 for byte in word.encode()] for word in words]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


@pytest.fixture
def folder(tmp_path):
    from transformers import AutoConfig, AutoModel, ByT5Tokenizer

    torch.manual_seed(1)
    values = dict(TINY)
    AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).save_pretrained(tmp_path / "lm")
    ByT5Tokenizer().save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def test_states_belong_to_the_sentence_and_not_to_its_batch():
    torch.manual_seed(0)
    conditioner = Conditioner(width=16, path=None, config=TINY, skip=97).train()
    tokens, mask = conditioner(text("open the drawer", "push"))
    assert tokens.shape == (2, 15, 16)
    assert mask.sum(1).tolist() == [15, 4]
    assert not tokens[1, 4:].any()
    alone, _ = Conditioner.forward(conditioner, text("push"))
    torch.testing.assert_close(alone[0], tokens[1, :4])
    assert not any(p.requires_grad for p in conditioner.parameters())
    assert not conditioner.net.training
    assert conditioner(text(""))[0].shape == (1, 1, 16)
    assert any(name.startswith("net.") for name in conditioner.state_dict()), "nothing else has its weights"


def test_weights_of_a_folder_stay_there(folder):
    conditioner = Conditioner(width=16, path=str(folder), config=TINY, skip=2)
    parent = torch.nn.ModuleDict({"text": conditioner, "other": torch.nn.Linear(2, 2)})
    assert set(parent.state_dict()) == {"other.weight", "other.bias"}
    parent.load_state_dict(parent.state_dict())
    with pytest.raises(RuntimeError, match=r"other\.bias"):
        parent.load_state_dict({"other.weight": torch.zeros(2, 2)})
    again = Conditioner(width=16, path=str(folder), config=TINY)
    skipped, whole = conditioner(text("push"))[0], again(text("push"))[0]
    assert whole.shape[1] == 5, "four bytes and the end of the sentence"
    torch.testing.assert_close(skipped, whole[:, 2:])


def test_a_chat_template_says_the_system_message_first(folder):
    from transformers import AutoTokenizer

    tokeniser = AutoTokenizer.from_pretrained(folder)
    tokeniser.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokeniser.save_pretrained(folder)
    build = lambda **settings: Conditioner(width=16, path=str(folder), config=TINY, **settings)  # noqa: E731
    assert build(system="look").tokens("push")[:-1] == [byte + 3 for byte in b"<system>look<user>push"]
    whole, rest = build(system="look")(text("push"))[0], build(system="look", skip=12)(text("push"))[0]
    torch.testing.assert_close(rest, whole[:, 12:])


def test_what_does_not_fit_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"encoders\.text\.path: .*nothing has no config\.json"):
        Conditioner(width=16, path=str(tmp_path / "nothing"), config=TINY)
    conditioner = Conditioner(width=16, path=str(folder), config=TINY)
    with pytest.raises(ExportError, match="cannot become a graph"):
        torch.jit.trace(lambda words: conditioner(words)[0], text("push"))
    with pytest.raises(ConfigError, match=r"encoders\.width is 32, but the hidden states of the conditioner have 16"):
        Conditioner(width=32, path=str(folder), config=TINY)
