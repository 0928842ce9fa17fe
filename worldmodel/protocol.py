"""A whole evaluation from its resolved configuration: offline figures, closed loop if asked for, and the report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from worldmodel import published
from worldmodel.checkpoint import WEIGHTS, load_model, read_description
from worldmodel.closed_loop import SourceScenes
from worldmodel.comparison import Contender, Protocol, compare, own_protocol, result_key, train_baseline
from worldmodel.data.shards import ShardReader
from worldmodel.edit_evaluation import evaluate_edits
from worldmodel.errors import ConfigError
from worldmodel.evaluation import SPLITS, evaluate_offline
from worldmodel.figures import text_table
from worldmodel.holdout import check_unseen
from worldmodel.missing import Absent, Without, absences, compare_success, drop_rootless, evaluate_missing
from worldmodel.model import WorldModel
from worldmodel.model_card import write_card
from worldmodel.report import write_report
from worldmodel.stamp import protocol_stamp


def evaluate(settings: Mapping[str, Any]) -> tuple[Path, Path]:
    """Run what configs/eval/eval.yaml describes, print a short table, and return the paths of JSON and report.

    `settings` may hold interpolations; as they are they go into the stamp. Raises ConfigError for settings that do not
    fit, before anything long runs, and DataError for data that is damaged, was trained on, or is not the protocol's.
    """
    config: Any = OmegaConf.to_container(OmegaConf.create(dict(settings)), resolve=True)
    if unknown := sorted(set(config["splits"]) - set(SPLITS)):
        raise ConfigError(f"splits: unknown {unknown}; valid: {list(SPLITS)}")
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    out, training = Path(config["out"]), read_description(config["checkpoint"])["training"]
    reader = ShardReader(config["data"] or training["data_root"])
    published.check(config, training, reader)
    heldout = {entry.embodiment for entry in reader.entries if entry.split == "heldout_robots"}
    model = load_model(config["checkpoint"], sorted(heldout) if "heldout_robots" in config["splits"] else ())
    missing = absences(config["missing"], model.spec.cameras)
    hidden = published.hidden_senses(config)
    contenders = make_contenders(config["policies"], hidden) if config["closed_loop"] else []
    source, robots = published.driven(config, training, reader) if contenders else (None, [])
    protocol = Protocol(
        tasks=tuple(config["tasks"] or training["tasks"]),
        robots=source.told_apart(robots) if source else (None,),
        trials=config["trials"],
        seed=config["seed"],
        replan=config["replan"],
        ensemble=config["ensemble"],
        delay=config["delay"],
        max_steps=config["max_steps"],
        image_every=math.gcd(model.spec.stride, config["replan"]),
    )
    lesser = lesser_contenders(contenders, missing, config["missing_trials"])
    baseline = out / "bc_mlp"
    for contender in [*contenders, *lesser.values()]:
        own = own_protocol(contender, protocol)
        if contender.weights != baseline:
            result_key(contender, own)
            check_robots(contender, robots)
    for split in config["splits"]:
        check_unseen(model.metadata, reader, split)
    how = {name: config[name] for name in ("clips_per_episode", "batch_size", "seed", "sampler_steps")}
    seeing = Without(model, Absent(senses=hidden)) if hidden else model
    offline = [
        drop_rootless(evaluate_offline(seeing, reader, split, max_clips=config["max_clips"], **how), hidden)
        for split in config["splits"]
    ]
    lost = [
        evaluate_missing(seeing, reader, split, missing, max_clips=config["missing_clips"], **how)
        for split in config["splits"][:1]
        if missing and config["missing_clips"]
    ]
    edits = _edits(model, reader, config)
    tried = []
    if source:
        if any(contender.weights == baseline for contender in contenders):
            train_baseline(reader, model.spec, baseline, steps=config["baseline_steps"], seed=config["seed"])
        scenes = SourceScenes(model.spec.height, model.spec.cameras, source.name)
        everyone = [*contenders, *lesser.values()]
        tried = compare(everyone, protocol, out / "closed_loop", make_scene=scenes, workers=config["workers"])
    stamp = {
        "protocol": published.stamp(config),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "weights_sha256": sha256((Path(config["checkpoint"]) / WEIGHTS).read_bytes()).hexdigest(),
        "trained_on": {
            "tasks": training["tasks"],
            "robots": training.get("robots", []),
            "episodes": len(training["episodes"]),
        },
        **protocol_stamp(model.metadata, reader, settings),
    }
    results = {
        "title": Path(config["checkpoint"]).resolve().name,
        "stamp": stamp,
        "offline": offline,
        "closed_loop": tried[: len(contenders)],
        "missing": lost,
        "missing_closed_loop": compare_success(tried, dict(zip(lesser, tried[len(contenders) :], strict=True)), config),
        "edits": edits,
    }
    paths = write_report(results, out)
    card = write_card(paths[0])
    print("\n" + text_table(offline + ([] if edits is None else [edits])))
    for result in tried:
        print(f"{result['policy']}: {result['mean_success']:.1%} success{' (kept result)' if result['reused'] else ''}")
    print(*paths, card, sep="\n")
    return paths


def _edits(model: WorldModel, reader: ShardReader, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if model.denoiser.source is None or not config["edit_clips"]:
        return None
    return evaluate_edits(
        model,
        reader,
        "heldout_episodes",
        clips=config["edit_clips"],
        batch_size=config["batch_size"],
        seed=config["seed"],
        steps=config["sampler_steps"],
        plane=model.denoiser.source.plane,
    )


def make_contenders(policies: Sequence[Mapping[str, Any]], hidden: Sequence[str] = ()) -> list[Contender]:
    """Build the policies of a comparison from their YAML entries.

    Each has `policy`, `observes` and `factory`, and may have `images`, `realtime`, `reactive`, `trials` and `replan`
    (see `Contender`). A factory is a Hydra `_target_` with a `folder` that holds the weights, unless it says that it is
    `scripted`. One with a `mask` is also denied `hidden`, and what it observes says so; one that `needs` any of them is
    left out, and said to be. Raises ConfigError for a factory that is neither, or that can neither be denied senses nor
    says what it needs.
    """
    contenders = []
    for entry in policies:
        factory = instantiate(entry["factory"], _convert_="all")
        scripted, observes = getattr(factory, "scripted", False), entry["observes"]
        if not scripted and not hasattr(factory, "folder"):
            raise ConfigError(f"policies: {type(factory).__name__} of {entry['policy']!r} has no folder with weights")
        if hidden and hasattr(factory, "mask"):
            factory = replace(factory, mask=tuple(dict.fromkeys([*factory.mask, *hidden])))
            observes = f"{observes}; the protocol hides {', '.join(hidden)}"
        elif hidden and not scripted:
            if not hasattr(factory, "needs"):
                raise ConfigError(
                    f"policies: {type(factory).__name__} of {entry['policy']!r} cannot be denied {', '.join(hidden)}: "
                    "it has neither a `mask` nor `needs`"
                )
            if lacking := [sense for sense in factory.needs if sense in hidden]:
                print(f"{entry['policy']}: left out, it needs {', '.join(lacking)}, which nothing is shown", flush=True)
                continue
        contenders.append(
            Contender(
                policy=entry["policy"],
                observes=observes,
                factory=factory,
                weights=None if scripted else Path(factory.folder),
                images=entry.get("images", True),
                realtime=entry.get("realtime", False),
                reactive=entry.get("reactive", False),
                trials=entry.get("trials"),
                replan=entry.get("replan"),
            )
        )
    return contenders


def check_robots(contender: Contender, robots: Sequence[str]) -> None:
    """Raise ConfigError if a policy that names the `robots` that it knows lacks one of those that it shall drive."""
    known = getattr(contender.factory, "robots", None)
    if known is not None and (unknown := sorted(set(robots) - set(known))):
        raise ConfigError(
            f"{contender.policy}: {contender.weights} knows {list(known)} and not {unknown}; an artefact that drives "
            f"robots which nothing was trained on is built with `python -m export build ... robots=[{unknown[0]}]`"
        )


def lesser_contenders(
    contenders: Sequence[Contender], missing: Mapping[str, Absent], trials: int
) -> dict[str, Contender]:
    """The first of the policies once more without each of `missing`, `trials` per task at most; none for no trials.

    Raises ConfigError if its factory cannot hide senses.
    """
    if not contenders or not missing or not trials:
        return {}
    first = contenders[0]
    factory: Any = first.factory
    if not hasattr(factory, "mask") or not hasattr(factory, "blind"):
        raise ConfigError(
            f"missing_trials: {type(factory).__name__} of {first.policy!r}, the first policy, has no `mask` and `blind`"
        )
    return {
        name: replace(
            first,
            policy=f"{first.policy}, without {name}",
            factory=replace(factory, mask=(*factory.mask, *absent.senses), blind=absent.cameras),
            trials=min(trials, first.trials or trials),
        )
        for name, absent in missing.items()
    }
