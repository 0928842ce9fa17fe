"""Published protocols: what each demands of checkpoint, data and simulator, and where an evaluation departs from it."""

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.registry import SOURCES
from worldmodel.data.transforms import PRESENCE, presence_masks
from worldmodel.errors import ConfigError, DataError

SETTINGS = (
    "senses", "splits", "clips_per_episode", "max_clips", "seed", "tasks", "trials", "max_steps", "replan", "delay",
)  # fmt: skip
"""What a protocol settles for `eval.py`; configs/eval/eval.yaml takes each from it."""
DEMANDS = ("generated", "train_tasks", "heldout_tasks", "demonstrations")
"""What a protocol demands of the data and of what was trained on them."""


def stamp(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name and digest of the protocol of a resolved configuration, and the settings that depart from it."""
    protocol = config["protocol"]
    content = json.dumps(protocol, sort_keys=True).encode()
    changed = {name: config[name] for name in SETTINGS if protocol["name"] and config[name] != protocol[name]}
    return {
        "name": protocol["name"] or "free",
        "sha256": sha256(content).hexdigest(),
        "departures": {name: f"{value}, not {protocol[name]}" for name, value in changed.items()},
    }


def check(config: Mapping[str, Any], training: Mapping[str, Any], reader: ShardReader) -> None:
    """Hold checkpoint, data and simulator against the protocol of a resolved configuration.

    Raises ConfigError where settings are incomplete or the simulator lacks something, DataError where checkpoint or
    data are not what the protocol is about.
    """
    protocol = config["protocol"]
    if wrong := sorted({"name", *SETTINGS, *DEMANDS} ^ set(protocol)):
        raise ConfigError(f"protocol: {wrong} must not be missing or added; configs/eval/protocol/free.yaml has all")
    for sense in config["senses"]:
        presence_masks(sense)
    name = protocol["name"]
    _check_data(name, protocol, reader)
    if protocol["train_tasks"] is not None and set(training["tasks"]) != set(protocol["train_tasks"]):
        raise DataError(
            f"protocol {name}: the checkpoint must be trained on {sorted(protocol['train_tasks'])}, it was on "
            f"{sorted(training['tasks'])}"
        )
    if protocol["demonstrations"] is not None:
        _check_demonstrations(name, protocol["demonstrations"], training["episodes"], reader)
    if config["closed_loop"]:
        _check_simulator(name, protocol["generated"].get("source", "metaworld"), config["tasks"] or training["tasks"])


def hidden_senses(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The senses that a resolved configuration leaves out."""
    return tuple(sense for sense in PRESENCE if sense not in config["senses"])


def _check_data(name: str, protocol: Mapping[str, Any], reader: ShardReader) -> None:
    said = reader.index.get("generated", {})
    if wrong := _unlike(protocol["generated"], said):
        source, benchmark = (protocol["generated"].get(key) for key in ("source", "benchmark"))
        command = f"generate {source or 'SOURCE'} DIR" + (f" --benchmark {benchmark}" if benchmark else "")
        raise DataError(
            f"protocol {name}: {reader.root} is not its data: {'; '.join(wrong)}. They are made by `python -m "
            f"worldmodel.data {command}`"
        )
    held = sorted({entry.task for entry in reader.entries if entry.split == "heldout_tasks"})
    if protocol["heldout_tasks"] is not None and held != sorted(protocol["heldout_tasks"]):
        raise DataError(
            f"protocol {name}: split heldout_tasks of {reader.root} must hold {sorted(protocol['heldout_tasks'])}, it "
            f"holds {held}"
        )


def _unlike(wanted: Mapping[str, Any], said: Mapping[str, Any]) -> list[str]:
    """One phrase for each wanted value that is not the one said."""
    wrong = []
    for key, value in wanted.items():
        found = said.get(key)
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            wrong += [f"{key}.{phrase}" for phrase in _unlike(value, found)]
        elif found != value:
            wrong.append(f"{key} is {found!r}, not {value!r}")
    return wrong


def _check_demonstrations(name: str, most: int, trained: list[str], reader: ShardReader) -> None:
    known = {entry.key: entry for entry in reader.entries}
    if strange := [key for key in trained if key not in known]:
        raise DataError(
            f"protocol {name}: demonstrations cannot be counted: {len(strange)} training episodes, {strange[0]} the "
            f"first, are not in {reader.root}"
        )
    counts = Counter((known[key].task, known[key].embodiment) for key in trained if known[key].variant_of is None)
    if over := {f"{task} by {robot}": n for (task, robot), n in sorted(counts.items()) if n > most}:
        raise DataError(
            f"protocol {name}: the checkpoint may have seen {most} demonstrations per task, it was trained on {over}; "
            f"train with data.episodes={most}"
        )


def _check_simulator(name: str | None, source: str, tasks: list[str]) -> None:
    named = f"protocol {name}: " if name else ""
    if source != "metaworld":
        raise ConfigError(f"{named}closed_loop=true drives Meta-World's arm only; {source} is evaluated offline")
    if importlib.util.find_spec("metaworld") is None:
        raise ConfigError(f"{named}closed_loop=true needs the simulator: pip install 'worldmodel[sim]'")
    if unknown := sorted(set(tasks) - set(SOURCES[source].tasks)):
        raise ConfigError(
            f"{named}closed loop: tasks {unknown} are not simulated here; {', '.join(SOURCES[source].tasks)} are"
        )
