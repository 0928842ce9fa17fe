"""The instruction through a language or vision-language model of transformers: its last hidden states."""

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel.encoders.feature_store import key_of
from worldmodel.encoders.pretrained import Pretrained
from worldmodel.errors import ConfigError, ExportError

REMEMBERED = 1024
"""Sentences whose hidden states a frozen model keeps: a dataset has few instructions."""


def sentence(text: Tensor) -> str:
    """Row (L,) of UTF-8 bytes + 1, 0 pads -> the string."""
    return bytes((text[text > 0] - 1).tolist()).decode("utf-8", errors="replace")


def stack(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (M_i, W) -> (B, M, W), padded with zeros to the longest, and presence (B, M)."""
    sizes = torch.tensor([len(row) for row in rows], device=rows[0].device)
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) < sizes.unsqueeze(-1)


class Conditioner(Pretrained):
    """UTF-8 bytes + 1 (0 pads) -> last hidden states of a model.

    `path` is a folder with weights (safetensors), configuration and tokeniser, as transformers saves them. Without a
    path a model is built from `config`, with random weights and bytes for tokens, so that everything runs where nothing
    can be loaded. `system` is said before the instruction where the tokeniser has a chat template; the first `skip`
    tokens (the template and that message) are left out. `frozen` models keep their weights, others train with stage 1.
    """

    def __init__(
        self,
        *,
        width: int,
        path: str | None,
        config: Mapping[str, Any],
        length: int = 1024,
        system: str = "",
        skip: int = 0,
        frozen: bool = True,
    ) -> None:
        super().__init__(option="encoders.text", path=path, config=config, frozen=frozen)
        self.length, self.system, self.skip = length, system, skip if path else 0
        self.tokeniser: Any = None
        if path is not None:
            from transformers import AutoTokenizer

            self.tokeniser = AutoTokenizer.from_pretrained(path, local_files_only=True)
        found = self.net.config.get_text_config().hidden_size
        if found != width:
            raise ConfigError(f"encoders.width is {width}, but the hidden states of the conditioner have {found}")
        self.known: dict[str, Tensor] = {}

    def settings(self) -> dict[str, Any]:
        """What features depend on beside the weights."""
        return {"length": self.length, "system": self.system, "skip": self.skip}

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, L) -> hidden states (B, M, W) and presence (B, M); M is that of the longest sentence of the batch.

        Raises `ExportError` when traced: a graph would keep the one sentence it was traced with.
        """
        refuse_graphs()
        words = [sentence(row) for row in text.cpu()]
        states = {one: self.encode(one, text.device) for one in dict.fromkeys(words)}
        return stack([states[one] for one in words])

    def encode(self, words: str, device: torch.device) -> Tensor:
        """Hidden states (M, W) of one sentence, at least one."""
        if not self.frozen:
            return self.run(words, device).float()
        if words not in self.known:
            key = key_of(words.encode())
            (states,) = self.recall([key], device, lambda _: [self.run(words, device)])
            if len(self.known) >= REMEMBERED:
                self.known.pop(next(iter(self.known)))
            self.known[words] = states
        return self.known[words].to(device)

    def examples(
        self, text: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor, *, known: Container[int], silent: bool
    ) -> dict[int, Tensor]:
        """Hidden states of the sentences, and of none, which rows without an instruction have."""
        distinct = dict.fromkeys(["", *(sentence(row) for row in text.cpu())])
        new = {words: key_of(words.encode()) for words in distinct}
        return {key: self.run(words, text.device) for words, key in new.items() if key not in known}

    def run(self, words: str, device: torch.device) -> Tensor:
        """The network itself; its answer has its own precision."""
        ids = torch.tensor([self.tokens(words)[: self.length]], device=device)
        gradients, precision = self.running(device)
        with gradients, precision:
            return self.told(self.net(input_ids=ids).last_hidden_state[0])

    def told(self, hidden: Tensor) -> Tensor:
        """States (M, W) without those of the template, at least one."""
        return hidden[self.skip :] if len(hidden) > self.skip else hidden[-1:]

    def tokens(self, words: str) -> list[int]:
        """Numbers of the tokens of a sentence."""
        if self.tokeniser is None:
            return [byte + 1 for byte in words.encode()] or [0]
        if self.tokeniser.chat_template is None:
            return self.tokeniser(words)["input_ids"] or [self.tokeniser.eos_token_id]
        return self.tokeniser(self.chat(words))["input_ids"]

    def chat(self, content: Any) -> str:
        """What the model is told, in the words of its template."""
        said = [{"role": "system", "content": self.system}] if self.system else []
        chat = [*said, {"role": "user", "content": content}]
        return self.tokeniser.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def refuse_graphs() -> None:
    """Raises `ExportError` when a model is traced that reads sentences."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # pyright: ignore[reportPrivateImportUsage]
        raise ExportError("the conditioner reads sentences, not tensors: a model with one cannot become a graph")
