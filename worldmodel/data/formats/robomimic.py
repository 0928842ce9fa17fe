"""robomimic demonstrations: an HDF5 file of many episodes, as robosuite, MimicGen and LIBERO share them too.

    data                      attributes env_args (JSON: env_name, type, env_kwargs), total; LIBERO: problem_info
    data/demo_N/obs/<key>     (T, ...): pictures are uint8 (T, h, w, 3)
    data/demo_N/actions       (T, D), also action_dict/<key> and other arrays of T rows
    data/demo_N/rewards, dones, states, next_obs        bookkeeping and simulator state: not imported
    mask/<filter key>         names of demonstrations; train, valid and test are taken as splits

The layout is described at https://robomimic.github.io/docs/datasets/overview.html. Text `task` is the language
instruction that file or demonstration carries, otherwise the environment's name.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.formats.assemble import assemble
from worldmodel.data.formats.base import Field, Fields, Recording, Ref, episode_key
from worldmodel.data.formats.hdf5 import (
    dataset,
    datasets,
    hdf5_files,
    numbers_last,
    opened,
    pictures,
    strings,
    subgroup,
    text,
    vector,
)
from worldmodel.data.formats.mapping import Mapping
from worldmodel.data.plain import loads
from worldmodel.data.schema import Episode
from worldmodel.errors import DataError

TASK = "task"
SPLITS = ("train", "valid", "test")
_NOT_IMPORTED = ("next_obs/", "datagen_info/", "rewards", "dones", "states")
_PROPRIO = re.compile(r"obs/robot\d+_(eef_pos|eef_quat|gripper_qpos)")
"""What robomimic's own configurations observe by default, besides the simulator's object state."""
_SENTENCES = ("language_instruction", "lang", "language", "task_description")


class RobomimicSource:
    """Episodes of one file, or of all files of a folder; see the module's text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path.parent if path.is_file() else path
        self.files = hdf5_files(path, "robomimic files")

    def fields(self) -> Fields:
        """What the first demonstration of the first file has; the others are checked when they are read."""
        path = self.files[0]
        with opened(path) as file:
            name = _demos(file, path)[0]
            where = f"{path}: {name}"
            demo, arguments = file["data"][name], _env_args(file, path)
            fields = Fields(
                where=str(self.path),
                fps=_rate(arguments),
                embodiment=_robots(arguments),
                texts=(TASK,) if _task(file, demo, path) else (),
            )
            length = _steps(demo, where)
            for key, item in datasets(demo).items():
                if key.startswith(_NOT_IMPORTED):
                    continue
                if item.ndim == 4 and item.dtype == np.uint8 and item.shape[3] == 3:
                    fields.cameras[key] = item.shape[1:3]
                elif item.dtype.kind in "fiub":
                    if item.shape[:1] == (length,):
                        fields.vectors[key] = Field(item.shape[1:], role=_role(key))
                    else:
                        fields.missing[key] = f"shape {item.shape} in {name}, which has {length} steps"
        splits = {ref.split for ref in self.refs()} - {""}
        return replace(fields, splits=tuple(name for name in SPLITS if name in splits))

    def refs(self) -> list[Ref]:
        """One per demonstration, file by file, in the order of their numbers."""
        refs = []
        for path in self.files:
            place = path.relative_to(self.root)
            with opened(path) as file:
                splits = _splits(file, path)
                for name in _demos(file, path):
                    number = re.fullmatch(r"demo_([0-9]{1,18})", name)
                    last = ("demo", int(number[1])) if number else (name,)
                    key = episode_key(*place.parts[:-1], place.stem, *last)
                    refs.append(Ref(key, (place.as_posix(), name), splits.get(name, "")))
        return refs

    def read(self, ref: Ref, mapping: Mapping) -> Episode:
        """The demonstration that `ref` names.

        Raises:
            DataError: a dataset is missing, damaged or of another length; names file, demonstration and dataset.
        """
        path, name = self.root / str(ref.place[0]), str(ref.place[1])
        where = f"{path}: {name}"
        with opened(path) as file:
            if name not in _demos(file, path):
                raise DataError(f"{where}: no such demonstration; the file was changed after it was listed")
            demo, arguments = file["data"][name], _env_args(file, path)
            length = _steps(demo, where)
            recording = Recording(where, length, texts={TASK: _task(file, demo, path)})
            recording.success = _success(demo, arguments, length, where)
            for key in sorted(mapping.vectors()):
                recording.vectors[key] = vector(demo, key, length, where)
            for key in sorted(mapping.images()):
                recording.images[key] = pictures(demo, key, length, where)
                if text(file["data"].attrs.get("macros_image_convention")) == "opengl":
                    # OpenGL's first row is the lowest one.
                    recording.images[key] = np.ascontiguousarray(recording.images[key][:, ::-1])
            masks = subgroup(file, "mask", str(path)) or {}
            if keys := sorted(k for k in masks if k not in SPLITS and name in strings(masks, k, f"{path}: mask")):
                recording.meta["filter_keys"] = keys
        return assemble(recording, mapping)


def _demos(file: Any, path: Path) -> list[str]:
    import h5py

    data = subgroup(file, "data", str(path))
    names = [name for name, item in data.items() if isinstance(item, h5py.Group)] if data is not None else []
    if not names:
        raise DataError(f"{path}: no group data/demo_N; it has {sorted(file)}; is this a robomimic file?")
    return sorted(names, key=numbers_last)


def _steps(demo: Any, where: str) -> int:
    item = dataset(demo, "actions", where)
    if not item.shape or not item.shape[0]:
        raise DataError(f"{where}: actions: shape {item.shape}; must be (T, D) with at least one step")
    stated = demo.attrs.get("num_samples")
    # LIBERO writes the number as text.
    if stated is not None and (text(stated) or str(stated)) != str(item.shape[0]):
        raise DataError(f"{where}: actions: {item.shape[0]} rows, attribute num_samples says {stated}")
    return int(item.shape[0])


def _json(value: Any, name: str, path: Path) -> dict[str, Any]:
    """The JSON object in an attribute; empty if there is none."""
    try:
        found = loads(text(value) or "{}")
    except ValueError as error:
        raise DataError(f"{path}: data: attribute {name} is not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: data: attribute {name} must be a JSON object, got {type(found).__name__}")
    return found


def _env_args(file: Any, path: Path) -> dict[str, Any]:
    arguments = _json(file["data"].attrs.get("env_args"), "env_args", path)
    if not isinstance(arguments.setdefault("env_kwargs", {}), dict):
        raise DataError(f"{path}: data: attribute env_args: env_kwargs must be an object")
    return arguments


def _rate(arguments: dict[str, Any]) -> float | None:
    rate = arguments["env_kwargs"].get("control_freq")
    return float(rate) if isinstance(rate, int | float) and 0 < rate < 1e6 else None


def _robots(arguments: dict[str, Any]) -> str:
    robots = arguments["env_kwargs"].get("robots", "")
    return "-".join(map(str, robots)) if isinstance(robots, list) else str(robots)


def _task(file: Any, demo: Any, path: Path) -> str:
    """The sentence of the demonstration or of its file, otherwise the environment's name."""
    data = file["data"].attrs
    sentences = [text(demo.attrs.get(name)) for name in _SENTENCES]
    sentences.append(text(_json(data.get("problem_info"), "problem_info", path).get("language_instruction")))
    sentences += [text(_env_args(file, path).get("env_name")), text(data.get("env_name"))]
    return next((sentence for sentence in sentences if sentence), "")


def _role(key: str) -> str:
    return "action" if key == "actions" else "proprio" if _PROPRIO.fullmatch(key) else ""


def _success(demo: Any, arguments: dict[str, Any], length: int, where: str) -> bool | None:
    """With sparse rewards, whether one was ever given; None where rewards are shaped or missing."""
    if arguments["env_kwargs"].get("reward_shaping") is not False or "rewards" not in demo:
        return None
    return bool((vector(demo, "rewards", length, where) > 0).any())


def _splits(file: Any, path: Path) -> dict[str, str]:
    """Split of each demonstration by the filter keys of that name."""
    masks, found = subgroup(file, "mask", str(path)) or {}, {}
    for split in SPLITS:
        for name in sorted(set(strings(masks, split, f"{path}: mask"))) if split in masks else ():
            if name in found:
                raise DataError(
                    f"{path}: mask: {name} is in {found[name]!r} and in {split!r}; splits must not share demonstrations"
                )
            found[name] = split
    return found
