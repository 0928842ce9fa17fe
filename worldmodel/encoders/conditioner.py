"""The instruction through a frozen language or vision-language model of transformers: its last hidden states."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel.errors import ConfigError, ExportError

log = logging.getLogger(__name__)

REMEMBERED = 1024
"""Sentences whose hidden states are kept: a dataset has few instructions, and the model never changes."""


def sentence(text: Tensor) -> str:
    """Row (L,) of UTF-8 bytes + 1, 0 pads -> the string."""
    return bytes((text[text > 0] - 1).tolist()).decode("utf-8", errors="replace")


class Conditioner(nn.Module):
    """UTF-8 bytes + 1 (0 pads) -> last hidden states of a frozen model.

    `path` is a folder with weights (safetensors), configuration and tokeniser, as transformers saves them; its weights
    stay there and are not copied into checkpoints. Without a path a model is built from `config`, with random weights
    and bytes for tokens, so that everything runs where nothing can be loaded. `system` is said before the instruction
    where the tokeniser has a chat template; the first `skip` tokens (the template and that message) are left out.
    """

    frozen = True

    def __init__(
        self,
        *,
        width: int,
        path: str | None,
        config: Mapping[str, Any],
        length: int = 1024,
        system: str = "",
        skip: int = 0,
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        self.length, self.system, self.skip = length, system, skip if path else 0
        self.tokeniser: Any = None
        if path is None:
            log.warning("the conditioner has random weights: encoders.text.path names a folder with trained ones")
            values = dict(config)
            self.net = AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        else:
            if not (Path(path) / "config.json").is_file():
                raise ConfigError(f"encoders.text.path: {path} has no config.json; transformers saves such a folder")
            self.tokeniser = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.net = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True)
            self.register_state_dict_post_hook(drop_weights)
            self.register_load_state_dict_post_hook(miss_no_weights)
        found = self.net.config.get_text_config().hidden_size
        if found != width:
            raise ConfigError(f"encoders.width is {width}, but the hidden states of the conditioner have {found}")
        self.net.requires_grad_(False).eval()
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "Conditioner":
        """Stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text (B, L) -> hidden states (B, M, W) and presence (B, M); M is that of the longest sentence of the batch.

        Raises `ExportError` when traced: a graph would keep the one sentence it was traced with.
        """
        if torch.jit.is_tracing() or torch.compiler.is_exporting():  # pyright: ignore[reportPrivateImportUsage]
            raise ExportError("the conditioner reads sentences, not tensors: a model with one cannot become a graph")
        rows = [self.encode(sentence(row), text.device) for row in text.cpu()]
        longest = max(len(row) for row in rows)
        tokens = torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
        sizes = torch.tensor([len(row) for row in rows], device=text.device)
        return tokens, torch.arange(longest, device=text.device) < sizes.unsqueeze(-1)

    @torch.no_grad()
    def encode(self, words: str, device: torch.device) -> Tensor:
        """Hidden states (M, W) of one sentence, at least one."""
        if words not in self.known:
            ids = torch.tensor([self.tokens(words)[: self.length]], device=device)
            with torch.autocast(device.type, enabled=False):
                hidden = self.net(input_ids=ids).last_hidden_state[0].float()
            if len(self.known) >= REMEMBERED:
                self.known.pop(next(iter(self.known)))
            self.known[words] = hidden[self.skip :] if len(hidden) > self.skip else hidden[-1:]
        return self.known[words].to(device)

    def tokens(self, words: str) -> list[int]:
        """Numbers of the tokens of a sentence."""
        if self.tokeniser is None:
            return [byte + 1 for byte in words.encode()] or [0]
        if self.tokeniser.chat_template is None:
            return self.tokeniser(words)["input_ids"] or [self.tokeniser.eos_token_id]
        said = [{"role": "system", "content": self.system}] if self.system else []
        chat = [*said, {"role": "user", "content": words}]
        text = self.tokeniser.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.tokeniser(text)["input_ids"]


def drop_weights(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leaves weights that have a file of their own out of checkpoints."""
    for name in [name for name in state if name.startswith(f"{prefix}net.")]:
        del state[name]


def miss_no_weights(module: nn.Module, incompatible: Any) -> None:
    """Does not miss in a checkpoint what `drop_weights` left out."""
    missing = incompatible.missing_keys
    own = {name for name in missing if any(name.endswith(f"net.{own}") for own in module.net.state_dict())}  # pyright: ignore
    missing[:] = [name for name in missing if name not in own]
