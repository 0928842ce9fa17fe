"""From a checkpoint to new data (`model: from_init`): what is kept of it, what the data bring, and what must agree.

Sizes, names and rates are the checkpoint's. Robots that it does not know are added to its embodiments, with the data's
statistics and the mean of the known embeddings; of robots that it knows it keeps the statistics, so that its numbers
go on meaning what they meant. Cameras may have other names or be absent, sensors that the data lack are absent.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from worldmodel.checkpoint import DESCRIPTION, make_spec, read_description, resize
from worldmodel.contracts import ClipSpec
from worldmodel.data.align import suggest_cameras
from worldmodel.data.schema import Episode
from worldmodel.data.shards import ShardReader
from worldmodel.data.statistics import load_statistics, merge_instructions, merge_statistics
from worldmodel.errors import ConfigError, DataError

log = logging.getLogger(__name__)

FROM_INIT = "from_init"
STATISTICS = ("checkpoint", "data")
"""Whose statistics hold for robots that both checkpoint and data have."""


class Plan(NamedTuple):
    """What a run builds: configuration of the model, names and sizes, statistics."""

    model: dict[str, Any]
    spec: ClipSpec
    statistics: dict[str, Any]
    adapted: bool  # whether all of it comes from a checkpoint


def plan_model(config: Mapping[str, Any], readers: Sequence[ShardReader]) -> Plan:
    """What the configuration describes, for the data; or, with `model: from_init`, what its checkpoint describes.

    Raises:
        ConfigError: there is no checkpoint to take it from, or cameras or sizes of the data do not fit it.
    """
    found = merge_statistics([load_statistics(reader.root) for reader in readers])
    if FROM_INIT not in config["model"]:
        return Plan(dict(config["model"]), make_spec(config["data"]["spec"]), found, adapted=False)
    settings, folder = config["model"][FROM_INIT], config["init"]
    if settings["statistics"] not in STATISTICS:
        raise ConfigError(f"model.from_init.statistics {settings['statistics']!r} is none of {', '.join(STATISTICS)}")
    if folder is None:
        raise ConfigError("model: from_init takes the model from a run folder: set init=RUN_FOLDER")
    metadata = read_description(folder)
    old = make_spec(metadata["spec"])
    firsts = first_episodes(readers)
    new = [name for name in firsts if name not in old.embodiments]
    spec = rename_cameras(replace(old, embodiments=(*old.embodiments, *new)), settings["cameras"] or {})
    known = metadata["statistics"]["embodiments"]
    statistics = dict(known)
    for name, (reader, number) in firsts.items():
        episode = reader.read(number, images=False)
        where = f"{reader.root}: embodiment {name!r}"
        fields = in_order_of(spec, episode, found["embodiments"][name])
        check_sizes(spec, fields, known.get(name), where)
        check_pictures(spec, episode, reader, number, where)
        if name in new or settings["statistics"] == "data":
            statistics[name] = fields
    if new:
        log.info("robots new to %s: %s", folder, ", ".join(new))
    model = resize(metadata["config"], len(spec.embodiments))
    merged = {"instructions": merge_instructions([metadata["statistics"], found]), "embodiments": statistics}
    return Plan(model, spec, {**metadata["statistics"], **merged}, adapted=True)


def inherit(training: Mapping[str, Any], init: str | Path) -> dict[str, Any]:
    """The record of what a model has seen, with all that the run folder it started from had seen.

    A file of bare weights says nothing of it, and then the record stays as it is.
    """
    if not (Path(init) / DESCRIPTION).is_file():
        return dict(training)
    description = read_description(init)
    before = description["training"]
    # A run that does not say may have been trained on every robot that it knows.
    known = {"robots": description["spec"]["embodiments"], **before}
    union = {name: sorted({*training[name], *known.get(name, ())}) for name in ("tasks", "robots", "episodes")}
    return {**training, **union, "started_from": {**before, "folder": str(init), "episodes": len(before["episodes"])}}


def first_episodes(readers: Sequence[ShardReader]) -> dict[str, tuple[ShardReader, int]]:
    """The first training episode of every robot, in the order in which they come."""
    firsts: dict[str, tuple[ShardReader, int]] = {}
    for reader in readers:
        for number, entry in enumerate(reader.entries):
            if entry.split == "train":
                firsts.setdefault(entry.embodiment, (reader, number))
    return firsts


def rename_cameras(spec: ClipSpec, names: Mapping[str, str | None]) -> ClipSpec:
    """The spec with its cameras under new names; those that are to be None keep theirs and are absent."""
    if unknown := sorted(set(names) - set(spec.cameras)):
        raise ConfigError(f"model.from_init.cameras names {unknown}, which are none of init's: {list(spec.cameras)}")
    renamed = [names.get(camera) or camera for camera in spec.cameras]
    if len(set(renamed)) < len(renamed):
        raise ConfigError(f"model.from_init.cameras gives two cameras one name: {renamed}")
    absent = {camera for camera in spec.cameras if camera in names and names[camera] is None}
    kept = {names.get(camera) or camera for camera in spec.absent_cameras if camera not in names}
    return replace(spec, cameras=tuple(renamed), absent_cameras=tuple(c for c in renamed if c in absent | kept))


def check_sizes(spec: ClipSpec, fields: Mapping[str, Any], known: Mapping[str, Any] | None, where: str) -> None:
    """Raises `ConfigError` if the numbers of a robot do not fit into the padded space, or are not those it had."""
    room = {"proprio": spec.proprio, "action": spec.action, "taxels": spec.taxels[0]}
    for name, most in room.items():
        size = len(fields[name]["mean"]) if name in fields else 0
        if size > most:
            raise ConfigError(
                f"{where}: {name} is {size} wide, but init has room for {most}; start from a checkpoint with more, or "
                "leave dimensions out of the data"
            )
        before = len(known[name]["mean"]) if known and name in known else size
        if size and size != before:
            raise ConfigError(
                f"{where}: {name} is {size} wide, init knows this robot with {before}; a robot that is driven or "
                "measured in another way needs another name"
            )


def check_pictures(spec: ClipSpec, episode: Episode, reader: ShardReader, number: int, where: str) -> None:
    """Raises if cameras have other names than the model's, and if rate or size of the pictures are others."""
    if episode.meta["fps"] != spec.fps:
        raise ConfigError(f"{where}: fps {episode.meta['fps']}, init was trained at {spec.fps}")
    if "rgb" in episode.meta.get("absent", ()):
        return
    have = list(episode.meta["cameras"])
    wanted = [camera for camera in spec.cameras if camera not in spec.absent_cameras]
    if missing := [camera for camera in wanted if camera not in have]:
        suggestion = suggest_cameras(missing, [name for name in have if name not in wanted])
        words = ", ".join(f"{old}: {'null' if name is None else name}" for old, name in suggestion.items())
        raise DataError(
            f"{where}: cameras {missing} are missing: the data have {have}, init has {list(spec.cameras)}. If they are "
            f"the same cameras, set 'model.from_init.cameras={{{words}}}' (null: absent)"
        )
    for camera in wanted:
        size = reader.pictures(number, camera, [0]).shape[2:]
        if size != (spec.height, spec.width):
            raise ConfigError(
                f"{where}: pictures of {camera} have {size[0]} × {size[1]} pixels, init reads {spec.height} × "
                f"{spec.width}; generate or import them in that size"
            )


def in_order_of(spec: ClipSpec, episode: Episode, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of a robot with the touch sensors in the order of the spec; one that it lacks changes nothing."""
    names = list(episode.meta.get("sensor_names", []))
    if "wrench" not in fields or names == list(spec.sensors):
        return dict(fields)
    neutral = {"std": 1.0, "floored": False}
    wrench = dict(fields["wrench"])
    for measure, rows in fields["wrench"].items():
        if isinstance(rows, list):
            empty = [neutral.get(measure, 0.0)] * len(rows[0])
            wrench[measure] = [rows[names.index(s)] if s in names else empty for s in spec.sensors]
    return {**fields, "wrench": wrench}
