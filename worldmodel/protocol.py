"""A whole evaluation from its resolved configuration: offline figures, closed loop if asked for, and the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from worldmodel.checkpoint import load_model
from worldmodel.closed_loop import MetaworldScenes
from worldmodel.comparison import Contender, Protocol, compare, result_key, train_baseline
from worldmodel.data.shards import ShardReader
from worldmodel.edit_evaluation import evaluate_edits
from worldmodel.errors import ConfigError
from worldmodel.evaluation import SPLITS, evaluate_offline
from worldmodel.figures import text_table
from worldmodel.report import write_report
from worldmodel.stamp import protocol_stamp


def evaluate(config: Mapping[str, Any]) -> tuple[Path, Path]:
    """Run what configs/eval/eval.yaml describes, print a short table, and return the paths of report and JSON.

    Raises ConfigError for settings that do not fit, before anything long runs, and DataError for data that is damaged
    or was trained on.
    """
    if unknown := sorted(set(config["splits"]) - set(SPLITS)):
        raise ConfigError(f"splits: unknown {unknown}; valid: {list(SPLITS)}")
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    model, out = load_model(config["checkpoint"]), Path(config["out"])
    training = model.metadata["training"]
    reader = ShardReader(config["data"] or training["data_root"])
    protocol = Protocol(
        tasks=tuple(config["tasks"] or training["tasks"]),
        trials=config["trials"],
        seed=config["seed"],
        replan=config["replan"],
        delay=config["delay"],
        image_every=model.spec.stride,
    )
    contenders = make_contenders(config["policies"]) if config["closed_loop"] else []
    baseline = out / "bc_mlp"
    for contender in contenders:
        if contender.weights != baseline:
            result_key(contender, protocol)
    offline = [
        evaluate_offline(
            model,
            reader,
            split,
            clips_per_episode=config["clips_per_episode"],
            batch_size=config["batch_size"],
            seed=config["seed"],
            sampler_steps=config["sampler_steps"],
            max_clips=config["max_clips"],
        )
        for split in config["splits"]
    ]
    edits = None
    if model.denoiser.source is not None and config["edit_clips"]:
        edits = evaluate_edits(
            model,
            reader,
            "heldout_episodes",
            clips=config["edit_clips"],
            batch_size=config["batch_size"],
            seed=config["seed"],
            steps=config["sampler_steps"],
            plane=model.denoiser.source.plane,
        )
    closed = []
    if contenders:
        if any(contender.weights == baseline for contender in contenders):
            train_baseline(reader, model.spec, baseline, steps=config["baseline_steps"], seed=config["seed"])
        scenes = MetaworldScenes(model.spec.height, model.spec.cameras)
        closed = compare(contenders, protocol, out / "closed_loop", make_scene=scenes, workers=config["workers"])
    parameters = sum(p.numel() for p in model.parameters())
    stamp = {"parameters": f"{parameters:,}", **protocol_stamp(model.metadata, reader, config)}
    title = Path(config["checkpoint"]).resolve().name
    results = {"title": title, "stamp": stamp, "offline": offline, "closed_loop": closed, "edits": edits}
    paths = write_report(results, out)
    print("\n" + text_table(offline + ([] if edits is None else [edits])))
    for result in closed:
        print(f"{result['policy']}: {result['mean_success']:.1%} success{' (kept result)' if result['reused'] else ''}")
    print(*paths, sep="\n")
    return paths


def make_contenders(policies: list[dict[str, Any]]) -> list[Contender]:
    """Build the policies of a comparison from their YAML entries.

    Each has `policy`, `observes` and `factory`, and may have `images`, `realtime` and `trials` (see `Contender`). A
    factory is a Hydra `_target_` with a `folder` that holds the weights.
    """
    contenders = []
    for entry in policies:
        factory = instantiate(entry["factory"], _convert_="all")
        contenders.append(
            Contender(
                policy=entry["policy"],
                observes=entry["observes"],
                factory=factory,
                weights=Path(factory.folder),
                images=entry.get("images", True),
                realtime=entry.get("realtime", False),
                trials=entry.get("trials"),
            )
        )
    return contenders
