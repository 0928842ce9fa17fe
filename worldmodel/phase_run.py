"""One phase of a run, from the weights that it finds to those that it leaves."""

import copy
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from worldmodel.acceleration import accelerated
from worldmodel.adapters import merge, save_adapters
from worldmodel.averaging import MovingAverage
from worldmodel.checkpoint import WEIGHTS, save_model
from worldmodel.contracts import ClipSpec
from worldmodel.curves import write_curves
from worldmodel.data.datamodule import ClipDataModule, MixtureLog
from worldmodel.data.mixture import make_sources
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError
from worldmodel.finetune import FROM_INIT
from worldmodel.fitting import fit_guess
from worldmodel.model import WorldModel
from worldmodel.parallel import make_strategy
from worldmodel.phases import DATA, MIXED, Phase
from worldmodel.prepare import latent_cache, sample_batch, whole_clips
from worldmodel.progress import SaveProgress, forget, resume_point
from worldmodel.ranks import barrier, rank
from worldmodel.samples import log_samples, write_samples
from worldmodel.sharding import gather, make_mesh
from worldmodel.sized import token_counts
from worldmodel.telemetry import Throughput, TrainingLog
from worldmodel.training import PhaseModule
from worldmodel.watch import Watch

log = logging.getLogger(__name__)

EXPECTED_WARNINGS = (
    ".*val_dataloader.*validation_step.*",  # held-out data is the business of eval.py
    ".*in eval mode at the start of training.*",  # frozen parts are
    ".*does not have many workers.*",
    ".*LeafSpec.*",  # Lightning 2.6 on torch 2.13
    ".*Checkpoint directory.*exists and is not empty.*",
    ".*Experiment logs directory.*exists and is not empty.*",
)


def data_settings(config: Mapping[str, Any], phase: Phase) -> dict[str, Any]:
    """`mixture` and `on_error` of a phase: its own, or those of the experiment."""
    return {name: phase.data.get(name, config["data"][name]) for name in DATA}


def other_roots(config: Mapping[str, Any], phases: Sequence[Phase]) -> list[str]:
    """Datasets that phases train on beside `data.root`."""
    mixtures = [data_settings(config, phase)["mixture"] for phase in phases]
    roots = [source.root for mixture in mixtures if mixture is not None for source in make_sources(mixture)]
    return [root for root in dict.fromkeys(roots) if root != config["data"]["root"]]


def run_phase(
    model: WorldModel,
    phase: Phase,
    config: Mapping[str, Any],
    spec: ClipSpec,
    reader: ShardReader,
    folder: Path,
    loggers: list[Logger],
    run: Path,
    environment: ClusterEnvironment | None,
) -> None:
    """Trains one phase, resuming where it was saved if it was, and leaves its averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    last = resume_point(folder)
    # Nobody writes before all have looked.
    barrier()
    chosen = data_settings(config, phase)
    # The cache holds the frames of one dataset whose every sample can be read.
    sound = chosen["on_error"] == "raise" and not other_roots(config, [phase])
    cached = phase.objective in MIXED and config["data"]["cache_latents"] and sound and not phase.buckets
    latents = None
    if cached:
        # The others wait for the first, and find its file.
        latents = latent_cache(model, reader, spec, run) if rank() == 0 else None
        barrier()
        latents = latent_cache(model, reader, spec, run) if latents is None else latents
    resumed = last is not None
    if not resumed and phase.objective == "tokeniser" and model.autoencoder.shortcut is not None:
        model.autoencoder.shortcut.fit(whole_clips(sample_batch(reader, spec, on_error=chosen["on_error"])))
    foretells = phase.objective == "world" and "denoiser" in phase.trains and phase.foretells
    # A network that was taken over whole answers in the units that it learned.
    own = FROM_INIT not in config["model"] and phase.lora is None
    if not resumed and own and foretells and model.predicts == "clean":
        # Rows of the fit are cells of images: where images are large, few clips are enough.
        count = max(64 * 64 // math.prod(model.grid), 8)
        sample = sample_batch(reader, spec, count=count, on_error=chosen["on_error"])
        fit_guess(model, sample.observation, sample.future)
    sizes = phase.batch_sizes(token_counts(model))
    settings, mesh = config["trainer"], None
    if settings["strategy"] == "fsdp":
        if phase.lora is not None:
            raise ConfigError(f"phase {phase.name!r}: adapters are not sharded; train them with trainer.strategy=ddp")
        mesh = make_mesh(
            "cpu" if settings["accelerator"] == "cpu" else "cuda",
            settings["shards"] if settings["shards"] != "node" else settings["devices"],
        )
    module = PhaseModule(
        # A model that was sharded stays so; the whole one waits for what its shards have learned.
        model=model if mesh is None else copy.deepcopy(model),
        phase=phase,
        seed=config["seed"],
        latents=latents,
        pieces=settings["accumulate"],
        mesh=mesh,
        dtype=torch.bfloat16 if settings["precision"].startswith("bf16") else torch.float32,
    )
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or every) for every in (False, True)]
    log.info("phase %s trains %s of %s parameters", phase.name, *(f"{count:,}" for count in counts))
    average = MovingAverage(decay=phase.ema)
    data = ClipDataModule(
        root=config["data"]["root"],
        spec=spec,
        batch_size=phase.batch_size,
        seed=config["seed"],
        num_workers=settings["workers"],
        reader=reader,
        needs=partial(phase.needs, config["seed"], cached=latents is not None, sizes=sizes),
        clips=list(sizes.values()),
        masks=phase.objective == "motion",
        complete=False,
        pairs=phase.pairs,
        **chosen,
    )
    interval = max(1, min(20, phase.steps // 2))
    trainer = L.Trainer(
        max_steps=phase.steps,
        accelerator=settings["accelerator"],
        devices=settings["devices"],
        num_nodes=settings["num_nodes"],
        strategy=make_strategy(settings, average),
        plugins=[] if environment is None else [environment],
        use_distributed_sampler=False,
        precision=settings["precision"],
        gradient_clip_val=phase.clip,
        logger=loggers,
        log_every_n_steps=interval,
        callbacks=[
            average,
            Throughput(),
            TrainingLog(decay=average.rate),
            MixtureLog(),
            Watch(path=run / "nonfinite.json"),
            SaveProgress(folder=folder, every=settings["save_every"]),
            TQDMProgressBar(refresh_rate=interval),
        ],
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=run,
    )
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        try:
            with accelerated(module.model, compiled=settings["compile"], checkpointing=settings["checkpointing"]):
                trainer.fit(module, datamodule=data, ckpt_path=last if resumed else None, weights_only=True)
        except SIGTERMException:
            log.warning("stopped by SIGTERM in phase %s, saved; the same command continues from here", phase.name)
            raise SystemExit(143) from None
    average.copy_to(module)
    if mesh is not None:
        learned = gather(module.model)
        if rank() == 0:
            model.load_state_dict(learned)
    if phase.lora is not None:
        if rank() == 0:
            save_adapters(model, phase.lora, phase.trains, folder)
        merge(model)
    if rank() == 0:
        conclude(model, phase, reader, folder, loggers, run, seed=config["seed"], on_error=chosen["on_error"])
    barrier()
    if rank() > 0:
        model.load_state_dict(load_file(folder / WEIGHTS))


def conclude(
    model: WorldModel,
    phase: Phase,
    reader: ShardReader,
    folder: Path,
    loggers: list[Logger],
    run: Path,
    *,
    seed: int,
    on_error: str,
) -> None:
    """What follows the last step of a phase: the tokeniser's scale, samples, weights, and curves."""
    spec = model.spec
    if phase.objective == "tokeniser":
        with torch.no_grad():
            clips = whole_clips(sample_batch(reader, spec, on_error=on_error))
            model.autoencoder.set_scale(torch.cat([model.autoencoder.encode_raw(c) for c in clips.split(16)]))
    if phase.objective == "world" and "denoiser" in phase.trains and phase.foretells:
        log_samples(write_samples(model, reader, run / "samples" / phase.name, seed=seed), loggers, phase.name)
    save_model(model, folder)
    forget(folder)
    write_curves([run], run / "curves.html")
