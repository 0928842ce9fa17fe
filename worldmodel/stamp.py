"""What it takes to run a result again: revision, data, versions, machine, settings."""

import os
import platform
import subprocess
from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import worldmodel
from worldmodel.data.index import INDEX
from worldmodel.data.shards import ShardReader

PACKAGES = ("torch", "numpy", "onnxruntime", "metaworld", "robosuite", "mujoco", "gym-pusht", "pymunk")


def protocol_stamp(metadata: Mapping[str, Any], reader: ShardReader, config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the stamp of an evaluation of the checkpoint with `metadata` on the data of `reader`."""
    import torch

    training = metadata.get("training", {})
    index = sha256((reader.root / INDEX).read_bytes()).hexdigest()
    return {
        "git_revision": git_revision(),
        "data": str(reader.root),
        "data_index_sha256": index,
        "trained_on_the_same_index": training.get("index_sha256") == index,
        "statistics_sha256": metadata.get("statistics_hash", "unknown"),
        "training_seed": training.get("seed", "unknown"),
        "training_steps": training.get("phases", {}),
        "versions": {"worldmodel": worldmodel.__version__, "python": platform.python_version(), **package_versions()},
        "threads": torch.get_num_threads(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}",
        "config": dict(config),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers depend on, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """Revision of this source tree, marked if files differ from it; `unknown` outside a repository."""
    folder = Path(__file__).resolve().parent.parent
    try:
        run = {"cwd": folder, "capture_output": True, "text": True, "timeout": 10}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], check=True, **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], check=True, **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head} with local changes" if changed else head


def processor() -> str:
    """Name of the processor, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
