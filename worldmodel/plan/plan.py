"""The plan of a run, as plain numbers: what `report.py` prints and JSON keeps."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from worldmodel.acceleration import CHECKPOINTING
from worldmodel.checkpoint import make_spec
from worldmodel.contracts import ClipSpec
from worldmodel.errors import ConfigError
from worldmodel.phases import Phase, make_phases
from worldmodel.plan.count import Counter, Kind
from worldmodel.plan.estimate import GIB, Cluster, Sizes, data, mean_clip, memory, sizes, step_time
from worldmodel.plan.gpus import find_gpu
from worldmodel.plan.step import meta_module

DEFAULTS: dict[str, Any] = {
    "nodes": 1,
    "gpus": 1,
    "gpu": "h100",
    "shard": None,
    "batch": None,
    "accumulate": 1,
    "mfu": 0.2,
    "efficiency": 0.7,
    "network": None,
    "spare": 0.1,
    "phase": None,
    "tokens": None,
    "bits": 1.5,
    "epochs": 1,
    "shard_gb": 1.0,
}
"""Settings of a plan beside those of a run."""


def make_plan(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a resolved training configuration under `settings`, which replace `DEFAULTS`.

    Raises `ConfigError` for settings that do not exist or do not fit together.
    """
    if unknown := sorted(set(settings) - set(DEFAULTS)):
        raise ConfigError(f"unknown setting {unknown[0]!r} of a plan; it has {', '.join(DEFAULTS)}")
    chosen = {**DEFAULTS, **settings}
    gpu, world = find_gpu(chosen["gpu"]), chosen["nodes"] * chosen["gpus"]
    names = ("nodes", "gpus", "mfu", "efficiency", "network", "spare")
    shard = world if chosen["shard"] is None else chosen["shard"]
    cluster = Cluster(gpu=gpu, shard=shard, **{name: chosen[name] for name in names})
    spec, phases = make_spec(config["data"]["spec"]), make_phases(config["phases"])
    known = [phase.name for phase in phases]
    asked = chosen["phase"] or known
    asked = [asked] if isinstance(asked, str) else asked
    if missing := [name for name in asked if name not in known]:
        raise ConfigError(f"phase: no {missing[0]!r}; one of {', '.join(known)}")
    picked = [phase for phase in phases if phase.name in asked]
    half = str(config["trainer"]["precision"]).startswith("bf16")
    counter = Counter(config, spec, half=half)
    rows = [plan_phase(config, counter, spec, phase, cluster, chosen) for phase in picked]
    if chosen["tokens"] is not None:
        budget(rows, chosen["tokens"])
    for row in (row for row in rows if "step" in row):
        total = row["steps"] * row["step"]["samples"]
        row["days"] = row["steps"] * row["step"]["seconds"] / 86400
        row["data"] = data(
            spec,
            row["clip"],
            total,
            row["days"] * 86400,
            chosen["nodes"],
            bits=chosen["bits"],
            epochs=chosen["epochs"],
        )
        row["data"]["shards"] = row["data"]["gigabytes"] / chosen["shard_gb"]
    return {
        "settings": {**chosen, "shard": shard, "checkpointing": config["trainer"]["checkpointing"]},
        "gpu": gpu._asdict(),
        "precision": config["trainer"]["precision"],
        "notes": notes(config, half),
        "days": sum(row.get("days", 0.0) for row in rows),
        "phases": rows,
    }


def plan_phase(
    config: Mapping[str, Any],
    counter: Counter,
    spec: ClipSpec,
    phase: Phase,
    cluster: Cluster,
    chosen: Mapping[str, Any],
) -> dict[str, Any]:
    """Of one phase: sizes, FLOPs, memory, time."""
    checkpointing, batch = config["trainer"]["checkpointing"], chosen["batch"]
    settings = phase.distillation and dataclasses.replace(phase.distillation, teacher=None)
    module = meta_module(config, dataclasses.replace(phase, distillation=settings), spec)
    found = sizes(module)
    row: dict[str, Any] = {"name": phase.name, "objective": phase.objective, "trains": list(phase.trains)}
    row |= {"steps": phase.steps, "batch": batch or phase.batch_size, "parameters": found.parts}
    row |= {"trained": found.trained}
    if phase.objective == "edit":
        return row | {"uncounted": "what an edit costs depends on the data"}
    kinds = counter.kinds(phase, batch=batch)
    row["clip"] = mean_clip(kinds)
    row["step"] = step_time(found, kinds, cluster, chosen["accumulate"], checkpointing)
    row["memory"] = memory(found, kinds, cluster, checkpointing)
    limit = GIB * cluster.gpu.memory * (1 - cluster.spare)
    row["fits"] = row["memory"]["total"] <= limit
    if not row["fits"]:
        row["would_fit"] = would_fit(found, kinds, cluster, limit)
    return row


def would_fit(found: Sizes, kinds: list[Kind], cluster: Cluster, limit: float) -> dict[str, Any] | None:
    """The first checkpointing, and the least sharding with it, that fits at this batch size."""
    for how in CHECKPOINTING:
        for shard in sorted({1, cluster.gpus, cluster.world, cluster.shard}):
            total = memory(found, kinds, dataclasses.replace(cluster, shard=shard), how)["total"]
            if total <= limit:
                return {"checkpointing": how, "shard": shard, "total": total}
    return None


def budget(rows: list[dict[str, Any]], number: float) -> None:
    """Stretches the steps of all phases alike, until their clips hold `number` tokens."""
    total = sum(r["steps"] * r["step"]["samples"] * r["clip"]["tokens"] for r in rows if "step" in r)
    for row in rows:
        row["steps"] = max(round(row["steps"] * number / total), 1) if total else row["steps"]


def notes(config: Mapping[str, Any], half: bool) -> list[str]:
    """What in this configuration the figures leave out or stand for."""
    found = []
    text = config["model"]["encoder"]["text"]
    if "config" in text and text["path"] is None:
        found.append("encoders.text.path is null: its memory is that of a small stand-in, not of a language model")
    if "config" in text and "pixels" in text:
        found.append("encoders.text sees pictures: 2 FLOPs a parameter and token, on top of its weights no memory")
    if not half:
        found.append("trainer.precision is not bfloat16, but the peak is that of bfloat16 products")
    if config["trainer"]["compile"]:
        found.append("trainer.compile: figures are those of uncompiled blocks; compiled ones keep fewer activations")
    if config["model"]["denoiser"].get("delta", {}).get("form") in ("chunked", "recurrent"):
        found.append("the delta rule is taken as fused; other forms keep more")
    if config["data"].get("cache_latents") or config["data"].get("features"):
        found.append("caches (data.cache_latents, data.features) are not taken off what is computed")
    return found
