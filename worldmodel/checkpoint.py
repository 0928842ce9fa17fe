"""Checkpoints that evaluation and export load: `model.safetensors` (weights) and `model.json` (everything else)."""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from worldmodel.config import with_tuples
from worldmodel.contracts import SCHEMA_VERSION, ClipSpec
from worldmodel.data.embodiments import load_embodiments
from worldmodel.errors import ConfigError, DataError
from worldmodel.model import WorldModel

log = logging.getLogger(__name__)
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
ADDENDS = ("denoiser.embed_rays", "denoiser.embed_anchor.video", "denoiser.slot.video", "expert.position")
ADDENDS += ("expert.embodiment",)
"""What is added to tokens that a network without it has too."""


def make_spec(values: Mapping[str, Any]) -> ClipSpec:
    """A `ClipSpec` from plain lists and numbers. Raises `ConfigError` for a field it does not have."""
    known = ClipSpec.__dataclass_fields__
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown field {unknown[0]!r} of spec; it has {', '.join(known)}")
    return ClipSpec(**with_tuples(values))


def check_targets(config: Any, where: str = "model") -> None:
    """Refuses a configuration that would build anything but classes of this package (a checkpoint may be hostile)."""
    if isinstance(config, Mapping):
        target = config.get("_target_")
        # The prefix alone is not enough: `worldmodel.checkpoint.os.system` would be found too.
        if target is not None and not (str(target).startswith("worldmodel.") and is_own_class(str(target))):
            raise ConfigError(f"{where}._target_ is {target!r}; only classes of worldmodel are built from a checkpoint")
        for key, value in config.items():
            check_targets(value, f"{where}.{key}")
    elif isinstance(config, list):
        for i, value in enumerate(config):
            check_targets(value, f"{where}[{i}]")


def is_own_class(target: str) -> bool:
    """Whether a dotted path names a class that this package defines, not something its modules import."""
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:  # whatever looking up a wrong path raises, it is no class of ours
        return False
    return isinstance(found, type) and found.__module__.startswith("worldmodel.")


def build_model(config: Mapping[str, Any], spec: ClipSpec, statistics: Mapping[str, Any]) -> WorldModel:
    """Instantiates the model of a resolved `model` configuration for the data's spec and statistics."""
    from hydra.utils import instantiate

    check_targets(config)
    # Objects of this run are handed over as they are: Hydra would turn a dataclass into a dictionary.
    partial = {"_partial_": True, "_convert_": "all"}
    normaliser = instantiate({**config["normaliser"], **partial})(
        spec=spec, statistics=statistics["embodiments"], instructions=statistics.get("instructions")
    )
    rest = {k: v for k, v in config.items() if k != "normaliser"}
    return instantiate({**rest, **partial})(spec=spec, normaliser=normaliser)


def describe(
    config: Mapping[str, Any], spec: ClipSpec, statistics: Mapping[str, Any], digest: str, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `model.json`: schema, spec, model configuration, statistics with hash, and what was trained on."""
    return {
        "schema_version": SCHEMA_VERSION,
        "spec": asdict(spec),
        "config": dict(config),
        "statistics": dict(statistics),
        "statistics_hash": digest,
        "training": dict(training),
    }


def instructions_read(metadata: Mapping[str, Any]) -> list[str] | None:
    """The only instructions that a model reads, by its description; None if it reads any (see `Normaliser`)."""
    only_known = metadata.get("config", {}).get("normaliser", {}).get("known_text_only", False)
    return metadata["statistics"]["instructions"] if only_known else None


def save_model(model: WorldModel, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes weights and description, each by rename, the weights last: where they are, the checkpoint is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, folder / f"{WEIGHTS}.part")
    (folder / f"{DESCRIPTION}.part").write_text(json.dumps(dict(metadata or model.metadata), indent=1))
    for name in (DESCRIPTION, WEIGHTS):
        os.replace(folder / f"{name}.part", folder / name)
    return folder


def initialise(model: WorldModel, path: str | Path, *, grow: bool = False) -> set[str]:
    """Starts from the weights of a file, `python -m worldmodel.convert` makes such, or of a run folder.

    Parts of the model that the file does not know stay as they are, but what is only added to known tokens starts at
    zero, so that the known network is not disturbed. With `grow`, tables of robots may have more rows here; the new
    start as the mean of the known. Returns the names of the tensors. Raises `DataError` for one that the model has not,
    or has in another shape.
    """
    weights = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    if not weights.is_file():
        raise DataError(f"init: {weights} is missing")
    # Statistics belong to the data, and those of this run are what its description will say.
    found = {name: tensor for name, tensor in load_file(weights).items() if not name.startswith("normaliser.")}
    own = model.state_dict()
    if grow:
        for name in [n for n in found if n.endswith("embodiment.weight") and n in own]:
            rows = len(own[name]) - len(found[name])
            found[name] = torch.cat([found[name], found[name].mean(0, keepdim=True).expand(max(rows, 0), -1)])
    wrong = [
        f"{name} {tuple(tensor.shape)} ({f'here {tuple(own[name].shape)}' if name in own else 'not here'})"
        for name, tensor in found.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if wrong:
        raise DataError(
            f"init: {len(wrong)} tensors of {weights} do not fit the model: {', '.join(wrong[:8])}"
            f"{', ...' if len(wrong) > 8 else ''}; sizes follow from data.spec, encoders, synthesis and policy"
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(ADDENDS) and name not in found:
                parameter.zero_()
    model.load_state_dict(found, strict=False)
    log.info("started from %s: %d of %d tensors", weights, len(found), len(own))
    return set(found)


def read_description(folder: str | Path) -> dict[str, Any]:
    """The content of `model.json` of a checkpoint folder.

    Raises `DataError` for missing files, another schema version, or statistics that are not those the weights were
    trained with.
    """
    from worldmodel.data.statistics import statistics_hash

    folder = Path(folder)
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise DataError(f"{folder} is no checkpoint: {name} is missing (a run folder of train.py has it)")
    metadata = json.loads((folder / DESCRIPTION).read_text())
    version = metadata.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(f"{folder / DESCRIPTION}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}")
    digest = statistics_hash(metadata["statistics"])
    if digest != metadata["statistics_hash"]:
        raise DataError(
            f"{folder / DESCRIPTION}: statistics hash to {digest[:12]}, but the weights were trained with "
            f"{metadata['statistics_hash'][:12]}; the statistics were changed after training"
        )
    return metadata


def load_model(folder: str | Path, robots: Sequence[str] = ()) -> WorldModel:
    """Loads a checkpoint folder, in evaluation mode; those of `robots` that it does not know are added (`add_robots`).

    Raises `DataError` for missing files, another schema version, statistics that are not those the weights were
    trained with, or tensors that do not fit.
    """
    folder = Path(folder)
    metadata = read_description(folder)
    weights = load_file(folder / WEIGHTS)
    new = [robot for robot in dict.fromkeys(robots) if robot not in metadata["spec"]["embodiments"]]
    if new:
        metadata, weights = add_robots(metadata, weights, new)
    model = build_model(metadata["config"], make_spec(metadata["spec"]), metadata["statistics"])
    if new:
        weights |= {name: value for name, value in model.state_dict().items() if name.startswith("normaliser.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{folder / WEIGHTS} does not fit the model that {DESCRIPTION} describes: {error}") from error
    model.metadata = metadata
    return model.eval()


def add_robots(
    metadata: Mapping[str, Any], weights: Mapping[str, Tensor], new: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and weights of a checkpoint that knows also robots which nothing was trained on.

    Each gets the statistics of the union of the known robots alike, whose state and action have the same names in the
    registry of embodiments, and in every table of robots the mean of their rows.

    Raises:
        ConfigError: no known robot is alike.
    """
    from worldmodel.data.statistics import merge_statistics, statistics_hash

    def channels(robot: str) -> Any:
        entry = load_embodiments().get(robot)
        return None if entry is None else (entry.action, entry.proprio)

    known, weights = list(metadata["spec"]["embodiments"]), dict(weights)
    fields = dict(metadata["statistics"]["embodiments"])
    for robot in new:
        alike = [i for i, name in enumerate(known) if channels(robot) is not None and channels(name) == channels(robot)]
        if not alike:
            raise ConfigError(
                f"robot {robot!r}: the checkpoint was trained on {known}, and by configs/embodiments none of them has "
                "its state and its actions"
            )
        each = [{"embodiments": {robot: fields[known[i]]}} for i in alike]
        fields[robot] = merge_statistics(each)["embodiments"][robot]
        for name in [name for name in weights if name.endswith("embodiment.weight")]:
            weights[name] = torch.cat([weights[name], weights[name][alike].mean(0, keepdim=True)])
    statistics = {**metadata["statistics"], "embodiments": fields}
    added = {
        "spec": {**metadata["spec"], "embodiments": [*known, *new]},
        "config": resize(metadata["config"], len(known) + len(new)),
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
    }
    return {**metadata, **added}, weights


def resize(config: Any, embodiments: int) -> Any:
    """A configuration of a model with tables for so many robots."""
    if isinstance(config, Mapping):
        return {k: embodiments if k == "embodiments" else resize(v, embodiments) for k, v in config.items()}
    return [resize(value, embodiments) for value in config] if isinstance(config, list) else config
