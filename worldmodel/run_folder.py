"""What a run folder notes: the configuration that it was begun with, and the data that its model will have seen."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from worldmodel.data.index import INDEX
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError


def claim(run: Path, config: Mapping[str, Any]) -> None:
    """Notes the configuration in a new run folder, or checks that an old one was made with the same.

    Ranks may change where the batch sizes change with them, so that global batches stay; see `ClipDataModule`.
    """
    run.mkdir(parents=True, exist_ok=True)
    noted = run / "config.json"
    ranks = math.prod(config["trainer"].get(name, 1) for name in ("devices", "num_nodes"))
    own = json.loads(json.dumps({k: v for k, v in config.items() if k != "trainer"} | {"ranks": ranks}))
    if noted.is_file():
        before = json.loads(noted.read_text())
        if changed := sorted(set(differences(with_global_batches(before), with_global_batches(own)))):
            raise ConfigError(
                f"{run} holds a run with other settings ({', '.join(changed[:6])}); choose another run_dir, or delete "
                "the folder to train anew"
            )
    part = noted.with_suffix(f".{os.getpid()}.part")  # every rank claims
    part.write_text(json.dumps(own, indent=1))
    part.replace(noted)


@rank_zero_only
def keep_log(folder: Path) -> None:
    """Gives the log that a resumed run would overwrite a number: `metrics.csv` becomes `metrics.0.csv`, and so on."""
    log = folder / "metrics.csv"
    if log.is_file():
        log.rename(folder / f"metrics.{len(list(folder.glob('metrics.*.csv')))}.csv")


def with_global_batches(noted: Mapping[str, Any]) -> dict[str, Any]:
    """A noted configuration in which the batch sizes of phases, and `rows` of them, are those of all ranks together."""
    ranks = noted.get("ranks", 1)

    def of_all(values: Mapping[str, Any]) -> dict[str, Any]:
        scaled = {k: v * ranks for k, v in values.items() if k in ("batch_size", "rows") and v is not None}
        mixture = {"mixture": [of_all(item) for item in values["mixture"]]} if "mixture" in values else {}
        return {**values, **scaled, **mixture}

    phases = {name: of_all(values) for name, values in noted["phases"].items()}
    return {k: v for k, v in noted.items() if k != "ranks"} | {"phases": phases}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Dotted names of the settings in which two configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}.{k}" if where else k)]
    return [] if a == b else [where]


def training_record(config: Mapping[str, Any], readers: Sequence[ShardReader]) -> dict[str, Any]:
    """What this model will have seen, so that an evaluation can refuse to call it held out."""
    entries = [e for reader in readers for e in reader.entries if e.split == "train"]
    return {
        "seed": config["seed"],
        "phases": {name: values["steps"] for name, values in config["phases"].items()},
        "data_root": str(config["data"]["root"]),
        "index_sha256": hashlib.sha256((readers[0].root / INDEX).read_bytes()).hexdigest(),
        "other_data": {str(r.root): hashlib.sha256((r.root / INDEX).read_bytes()).hexdigest() for r in readers[1:]},
        "split": "train",
        "tasks": sorted({e.task for e in entries}),
        "robots": sorted({e.embodiment for e in entries}),
        "episodes": [e.key for e in entries],
    }
