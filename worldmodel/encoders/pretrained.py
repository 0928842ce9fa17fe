"""Networks of transformers inside stage 1: from a folder or from a configuration, frozen or tuned."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from worldmodel.encoders.feature_store import FeatureStore, open_store
from worldmodel.errors import ConfigError

log = logging.getLogger(__name__)

UNUSED = ("head.", "pooler.", "vision_model.head.", "vision_model.pooler.", "text_model.", "logit_")
"""Weights that a folder may lack, since only hidden states of patches and tokens are read."""


class Pretrained(nn.Module, ABC):
    """Holds a network of transformers as `net`.

    Frozen, it stays in evaluation mode, gets no gradient, and the weights of a folder are not copied into checkpoints;
    what it answers may come from a `store` of features. Tuned, it trains with the part of the model that it belongs to.
    Its own randomness (dropout, jitter of positions) is off in either case: all that is random follows from the seed.
    `option` is the name of its settings, for messages.
    """

    def __init__(self, *, option: str, path: str | None, config: Mapping[str, Any], frozen: bool) -> None:
        super().__init__()
        self.option, self.path, self.frozen = option, path, frozen
        self.net: Any = load(option, path, config, frozen=frozen)
        self.store: FeatureStore | None = None
        if frozen:
            self.net.requires_grad_(False)
            if path is not None:
                self.register_state_dict_post_hook(drop_weights)
                self.register_load_state_dict_pre_hook(keep_weights)
        self.net.eval()

    def train(self, mode: bool = True) -> Self:
        """The network stays in evaluation mode."""
        super().train(mode)
        self.net.eval()
        return self

    @property
    def kind(self) -> str:
        """The type of the network, as transformers names it."""
        return self.net.config.model_type

    def settings(self) -> dict[str, Any]:
        """What features depend on beside the weights."""
        return {}

    def digest(self) -> str:
        """Of weights and settings: features are those of this network where it is the same."""
        digest = hashlib.sha256(json.dumps([self.kind, self.settings()], sort_keys=True).encode())
        for name, value in self.net.state_dict().items():
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + raw.numpy().tobytes())
        return digest.hexdigest()[:16]

    def recall(
        self, keys: Sequence[int], device: torch.device, compute: Callable[[list[int]], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Features (M, D) of every key; `compute` gives those at some places that are not in the store."""
        found = [None if self.store is None else self.store.find(key) for key in keys]
        missing = [place for place, features in enumerate(found) if features is None]
        for place, features in zip(missing, compute(missing) if missing else (), strict=True):
            found[place] = features
        return [features.to(device=device, dtype=torch.float32) for features in found if features is not None]

    @abstractmethod
    def examples(
        self, text: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor, *, known: Container[int], silent: bool
    ) -> dict[int, Tensor]:
        """Features to store of text (B, L) and images (B, V, 3, h, w) in [-1, 1], but for those whose key is `known`.

        `silent` rows are shown without their instruction too, which matters to what reads both.
        """

    def running(self, device: torch.device) -> tuple[Any, Any]:
        """Contexts to run the network in: frozen without gradients, and in its own precision."""
        precise = self.frozen and torch.is_autocast_enabled(device.type)
        return (
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen),
            torch.autocast(device.type, enabled=False) if precise else nullcontext(),
        )


def frozen_parts(encoder: nn.Module) -> dict[str, Pretrained]:
    """The frozen networks of stage 1 by the name of their settings: `image`, `text`.

    Raises `ConfigError` if there is none.
    """
    parts = [part for part in encoder.modules() if isinstance(part, Pretrained) and part.frozen]
    if not parts:
        raise ConfigError(
            "data.features: no network of stage 1 is frozen, so there are no features to keep; encoders/image=vision "
            "and encoders/text=language or vision_language have one"
        )
    return {part.option.removeprefix("encoders."): part for part in parts}


def attach_features(encoder: nn.Module, root: Path, datasets: Mapping[str, str]) -> None:
    """Lets the frozen networks of stage 1 read their features of some datasets (root -> sha256 of the index).

    Raises `ConfigError` if the features are of another network or other data, or unfinished.
    """
    for name, part in frozen_parts(encoder).items():
        part.store = open_store(root, name, part.kind, part.digest(), datasets)
        log.info("encoders.%s reads %d features from %s", name, len(part.store), root)


def load(option: str, path: str | None, config: Mapping[str, Any], *, frozen: bool) -> Any:
    """The network in a folder, or one of a configuration with random weights.

    Frozen random weights are the same in every run, so that their features are. Tuned weights are float32, frozen ones
    have the precision that they are stored in. Raises `ConfigError` naming the option that is wrong.
    """
    from transformers import AutoConfig, AutoModel

    if path is None:
        values = dict(config)
        try:
            found = AutoConfig.for_model(values.pop("model_type", ""), **values)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{option}.config: {error}") from error
        log.warning("%s has random weights: %s.path names a folder with trained ones", option, option)
        with torch.random.fork_rng(devices=[], enabled=frozen):
            if frozen:
                torch.default_generator.manual_seed(0)
            return AutoModel.from_config(found)
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{option}.path: {path} has no config.json; transformers saves such a folder")
    kinds: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        net, report = AutoModel.from_pretrained(path, dtype="auto" if frozen else torch.float32, **kinds)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}.path: {path} cannot be loaded: {error}") from error
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(UNUSED)):
        raise ConfigError(f"{option}.path: the weights in {path} lack {len(missing)} tensors, among them {missing[0]}")
    return net


def drop_weights(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leaves weights that have a file of their own out of checkpoints."""
    for name in [name for name in state if name.startswith(f"{prefix}net.")]:
        del state[name]


def keep_weights(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Puts what `drop_weights` left out of a checkpoint into it again, so that loading misses nothing."""
    for name, value in module.get_submodule("net").state_dict().items():
        state.setdefault(f"{prefix}net.{name}", value)
