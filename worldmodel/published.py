"""Published protocols: what each demands of checkpoint, data and simulator, and where an evaluation departs from it."""

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.registry import SOURCES, simulated
from worldmodel.data.sources.scene import Source
from worldmodel.data.transforms import PRESENCE, presence_masks
from worldmodel.errors import ConfigError, DataError

SETTINGS = (
    "senses", "splits", "clips_per_episode", "max_clips", "seed", "tasks", "robots", "trials", "max_steps", "replan",
    "ensemble", "delay",
)  # fmt: skip
"""What a protocol settles for `eval.py`; configs/eval/eval.yaml takes each from it."""
DEMANDS = ("generated", "train_tasks", "heldout_tasks", "train_robots", "heldout_robots", "demonstrations")
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
    if "robots" not in training and (protocol["train_robots"] or protocol["heldout_robots"]):
        raise DataError(f"protocol {name}: the checkpoint does not say on which robots it was trained; train it again")
    for kind in ("tasks", "robots"):
        wanted = protocol[f"train_{kind}"]
        if wanted is not None and set(training[kind]) != set(wanted):
            raise DataError(
                f"protocol {name}: the checkpoint must be trained on {sorted(wanted)}, it was on "
                f"{sorted(training[kind])}"
            )
    if known := sorted(set(protocol["heldout_robots"] or ()) & set(training.get("robots", ()))):
        raise DataError(f"protocol {name}: robots {known} must be held out, the checkpoint was trained on them")
    if protocol["demonstrations"] is not None:
        _check_demonstrations(name, protocol["demonstrations"], training["episodes"], reader)
    if config["closed_loop"]:
        source, robots = driven(config, training, reader)
        _check_simulator(name, source, config["tasks"] or training["tasks"], robots)


def driven(config: Mapping[str, Any], training: Mapping[str, Any], reader: ShardReader) -> tuple[Source, list[str]]:
    """The simulator of the closed loop, and the robots there: those of `robots`, or those trained on.

    It is the one that the data were made in or, where they do not say, the first that has such robots. Raises
    ConfigError if there is none.
    """
    seen = sorted({entry.embodiment for entry in reader.entries if entry.split == "train"})
    robots = config["robots"] or training.get("robots") or seen
    made = reader.index.get("generated", {}).get("source")
    if made not in (None, *SOURCES):
        raise ConfigError(f"closed loop: the data were made in {made!r}; simulated here are {', '.join(SOURCES)}")
    source = simulated(robots)[0] if made is None else SOURCES[made]
    return source, list(config["robots"] or [robot for robot in robots if robot in source.robots])


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
    for split, kind in (("heldout_tasks", "task"), ("heldout_robots", "embodiment")):
        held = sorted({getattr(entry, kind) for entry in reader.entries if entry.split == split})
        if protocol[split] is not None and held != sorted(protocol[split]):
            raise DataError(
                f"protocol {name}: split {split} of {reader.root} must hold {sorted(protocol[split])}, it holds {held}"
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


def _check_simulator(name: str | None, source: Source, tasks: list[str], robots: list[str]) -> None:
    named = f"protocol {name}: " if name else ""
    if importlib.util.find_spec(source.package) is None:
        raise ConfigError(f"{named}closed_loop=true needs the simulator: pip install 'worldmodel[{source.extra}]'")
    for kind, asked, known in (("tasks", tasks, source.tasks), ("robots", robots, source.robots)):
        if unknown := sorted(set(asked) - set(known)):
            raise ConfigError(f"{named}closed loop: {kind} {unknown} are not simulated here; {', '.join(known)} are")
    if not robots:
        raise ConfigError(f"{named}closed loop: no robot that was trained on is simulated by {source.name}; set robots")
