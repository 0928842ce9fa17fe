"""One run of `train.py`: the phases of an experiment, in order, in one folder, resumed where they stopped.

Run folder: `config.yaml`; `phases/NN-name/` with the weights after the phase (`model.safetensors`, `model.json`) or,
while it runs, `last.ckpt` (with sharded weights folders, see `sharding`); `latents.safetensors` (frozen tokeniser's
latents of every frame); `csv/`, `wandb/`, `samples/`, `curves.html`; where numbers were not finite `nonfinite.json`;
and at the end the checkpoint itself, `model.safetensors` with `model.json`.
"""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from worldmodel.checkpoint import build_model, describe, initialise, load_model, save_model
from worldmodel.cluster import resolve
from worldmodel.data.embodiments import check_embodiments
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import statistics_hash
from worldmodel.encoders.pretrained import attach_features
from worldmodel.errors import ConfigError
from worldmodel.finetune import inherit, plan_model
from worldmodel.parallel import join
from worldmodel.phase_run import other_roots, run_phase
from worldmodel.phases import PARTS, make_phases
from worldmodel.policy.interpolate import INITIALISE, begin_from
from worldmodel.progress import forget
from worldmodel.ranks import barrier, rank
from worldmodel.run_folder import claim, keep_log, training_record

log = logging.getLogger(__name__)


def train(config: Mapping[str, Any]) -> Path:
    """Runs or resumes an experiment from its resolved configuration; returns the run folder, which is a checkpoint.

    Raises `ConfigError` if the folder holds a run of another configuration.
    """
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    L.seed_everything(config["seed"], verbose=False)
    config = {**config, "trainer": resolve(config["trainer"])}
    torch.set_num_threads(config["trainer"]["threads"])
    environment = join(config["trainer"])
    if rank() > 0:
        log.setLevel(logging.WARNING)
    run = Path(config["run_dir"])
    if (run / "model.safetensors").is_file():
        if rank() == 0:
            claim(run, config)
        log.info("%s is already trained; another run_dir or an empty one trains again", run)
        return run
    phases = make_phases(config["phases"])
    strict = config["data"]["on_error"] == "raise"
    reader = ShardReader(
        config["data"]["root"],
        cache_bytes=config["data"]["cache_bytes"],
        check_sizes=strict,
        episodes=config["data"]["episodes"],
        seed=config["seed"],
    )
    others = other_roots(config, phases)
    readers = [reader, *(ShardReader(root, cache_bytes=0, check_sizes=strict) for root in others)]
    trained = {entry.embodiment for r in readers for entry in r.entries if entry.split == "train"}
    plan = plan_model(config, readers)
    spec, statistics = plan.spec, plan.statistics
    check_embodiments(spec, trained, ", ".join(str(r.root) for r in readers), complete=not plan.adapted)
    # Not before the data are known to fit: what was mended must not be refused as other settings.
    if rank() == 0:
        claim(run, config)
    barrier()
    model = build_model(plan.model, spec, statistics)
    record, begun = training_record(config, readers), set[str]()
    if config["init"] is not None:
        begun = initialise(model, config["init"], grow=plan.adapted)
        record = inherit(record, config["init"])
    model.metadata = describe(plan.model, spec, statistics, statistics_hash(statistics), record)
    fresh = not any(name.startswith("expert.") for name in begun)
    if (way := (config.get("policy") or {}).get("initialise")) not in INITIALISE:
        raise ConfigError(f"policy.initialise: {way!r} is none of {', '.join(map(str, INITIALISE))}")
    if config["data"]["features"] is not None:
        seen = model.metadata["training"]
        datasets = {seen["data_root"]: seen["index_sha256"], **seen["other_data"]}
        attach_features(model.encoder, Path(config["data"]["features"]), datasets)
    for part in (name for name in PARTS if getattr(model, name) is not None):
        count = sum(p.numel() for p in getattr(model, part).parameters())
        log.info("%-12s %10s parameters", part, f"{count:,}")
    loggers = make_loggers(config, run)
    for number, phase in enumerate(phases):
        folder = run / "phases" / f"{number}-{phase.name}"
        if (folder / "model.safetensors").is_file():
            log.info("phase %s is done", phase.name)
            if rank() == 0:
                forget(folder)
            model.load_state_dict(load_model(folder).state_dict())
            fresh &= not phase.trains_actions
            continue
        if fresh and phase.trains_actions:
            if way == "interpolate":
                begin_from(model.expert, model.denoiser)
            fresh = False
        started = time.perf_counter()
        run_phase(model, phase, config, spec, reader, folder, loggers, run, environment)
        log.info("phase %s took %.0f s", phase.name, time.perf_counter() - started)
    if rank() == 0:
        save_model(model, run)
    barrier()
    for logger in loggers:
        logger.finalize("success")
    return run


def make_loggers(config: Mapping[str, Any], run: Path) -> list[Logger]:
    """CSV always; wandb unless its mode is `disabled` (offline by default: nothing leaves the machine)."""
    keep_log(run / "csv")
    loggers: list[Logger] = [CSVLogger(run, name="csv", version="")]
    if config["wandb"]["mode"] != "disabled":
        settings = config["wandb"]
        loggers.append(
            WandbLogger(
                project=settings["project"],
                name=run.name,
                save_dir=str(run),
                offline=settings["mode"] == "offline",
                config={k: v for k, v in config.items() if k in ("data", "model", "phases", "seed")},
            )
        )
    return loggers
