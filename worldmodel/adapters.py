"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft: what a phase with `lora` trains, and their file.

While such a phase runs, linear layers are wrapped; when it is done they are merged into the weights, so that its
checkpoint is one like any other, and lie beside it as `adapters.safetensors`: a few megabytes that make the checkpoint
out of the one that the phase started from.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from worldmodel.config import with_tuples
from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.errors import ConfigError, DataError

log = logging.getLogger(__name__)

ADAPTERS = "adapters.safetensors"
TARGETS = (
    "q",
    "k",
    "v",
    "qkv",
    "out",
    "feed_forward.0",
    "feed_forward.2",
    "state.layers.embed",
    "foresight.robot.layers.embed",
    "foresight.contact.layers.embed",
)
"""Linear layers of attention and feed-forward, and of what acts on the state, where a model has them."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is adapted within the parts that a phase trains, and how.

    A linear layer is adapted if its dotted name ends in one of `targets`; to W it adds `alpha / rank` B A of rank
    `rank`. `dropout` is that of what A reads. Parameters whose dotted name ends in or lies under one of `whole` train
    as they are, such as the embeddings of a robot that is new.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"lora: rank {self.rank} must be 1 or more, alpha {self.alpha} above 0 and dropout {self.dropout} 0 or "
                "more and below 1"
            )


def require_peft() -> None:
    """Raises `ConfigError` where the library is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError("lora: needs peft; install the extra: pip install -e '.[finetune]'") from error


def named(name: str, word: str) -> bool:
    """Whether a dotted name ends in the parts of `word`."""
    return name == word or name.endswith(f".{word}")


def linear_layers(model: nn.Module, trains: Sequence[str]) -> list[str]:
    """Dotted names of the linear layers of the parts that are trained."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f"{name}.".startswith(f"{part}.") for part in trains)
    ]


def inject(model: nn.Module, trains: Sequence[str], lora: Lora, seed: int) -> None:
    """Wraps the target layers of the parts in `trains` and lets only their adapters, and what is `whole`, train.

    Nothing that the model computes changes yet: B starts at zero. A follows from the seed. Raises `ConfigError` for a
    target or a whole name that is nowhere in these parts.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    layers = linear_layers(model, trains)
    targets = [name for name in layers if any(named(name, word) for word in lora.targets)]
    unknown = [w for w in lora.targets if w not in TARGETS and not any(named(name, w) for name in layers)]
    if unknown or not targets:
        kinds = sorted({".".join(name.split(".")[-2:]) for name in layers})
        raise ConfigError(
            f"lora.targets: {unknown or list(lora.targets)} are no linear layers of {list(trains)}, whose names end in "
            f"{kinds}"
        )
    alpha: Any = lora.alpha  # a number, though peft's annotation says a whole one
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws A from the global generator
        inject_adapter_in_model(config, model)
    assert {name for name, _ in wrapped_layers(model)} == set(targets), "peft wrapped other layers than asked for"
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or is_whole(name, lora):
            parameter.requires_grad_(True)
    lost = [
        word for word in lora.whole if not any(is_whole(n, Lora(whole=(word,))) for n, _ in model.named_parameters())
    ]
    if lost:
        raise ConfigError(f"lora.whole: {lost} are no parameters of this model")


def is_whole(name: str, lora: Lora) -> bool:
    """Whether a parameter trains as it is."""
    owner = name.rpartition(".")[0]
    return any(named(name, word) or named(owner, word) for word in lora.whole)


def wrapped_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Dotted name and wrapper of every adapted layer."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in list(model.named_modules()) if isinstance(module, LoraLayer))


def base_hash(model: nn.Module) -> str:
    """sha256 of the weights that the adapters add to."""
    digest = hashlib.sha256()
    for name, layer in wrapped_layers(model):
        weight = layer.get_base_layer().weight.detach().float().cpu().contiguous()
        digest.update(name.encode() + weight.numpy().tobytes())
    return digest.hexdigest()


def merge(model: nn.Module) -> None:
    """Adds the adapters to the weights and unwraps the layers: the model has its own names again.

    Raises `FloatingPointError` if a merged weight is not finite.
    """
    for name, layer in wrapped_layers(model):
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise FloatingPointError(f"adapters of {name}: {error}") from error
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        delattr(model, "peft_config")


def save_adapters(model: nn.Module, lora: Lora, trains: Sequence[str], folder: Path) -> Path:
    """Writes what the phase trained, and nothing else, to `folder`; the model is not merged yet."""
    own = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if ".lora_" in n or is_whole(n, lora)}
    header = {
        "schema_version": str(SCHEMA_VERSION),
        "lora": json.dumps(asdict(lora)),
        "trains": json.dumps(list(trains)),
        "base_sha256": base_hash(model),
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{ADAPTERS}.part"
    save_file({name.replace(".default.", "."): value for name, value in own.items()}, part, metadata=header)
    return part.replace(folder / ADAPTERS)


def apply_adapters(model: nn.Module, path: str | Path) -> None:
    """Turns the model that a phase with `lora` started from into the one that it ended with.

    Raises `DataError` for a file of another schema version or of other base weights.
    """
    with safe_open(path, "pt") as file:
        header = file.metadata() or {}
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if (version := header.get("schema_version")) != str(SCHEMA_VERSION):
        raise DataError(f"{path}: schema_version is {version!r}, this version reads adapters of {SCHEMA_VERSION}")
    lora = Lora(**with_tuples(json.loads(header["lora"])))
    inject(model, json.loads(header["trains"]), lora, seed=0)
    try:
        if base_hash(model) != header["base_sha256"]:
            raise DataError(f"{path}: these adapters belong to other weights than this model has")
        own = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
        if own.keys() != tensors.keys() or any(own[n].shape != tensors[n].shape for n in own):
            raise DataError(f"{path}: its tensors do not fit the model; expected {len(own)}, among them {min(own)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
    finally:
        merge(model)
    model.requires_grad_(True)
