"""Bring one episode's streams to the names, order and padded sizes of a `ClipSpec`, with presence masks."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from worldmodel.contracts import ClipSpec
from worldmodel.data.schema import Episode
from worldmodel.errors import ConfigError, DataError


class Aligned(NamedTuple):
    """Streams of one episode over T steps, padded; absent ones are zero and masked in `constant`.

    All but wrench and action are views into `steps`, and those into `series`, which clips have of every step: one row
    of each holds all that a time step has, so that a clip is cut with two gathers.
    """

    steps: np.ndarray  # (T, sum of `columns`) float32
    series: np.ndarray  # (T, S * 6 + D) float32
    intrinsics: np.ndarray  # (T, V, 3, 3)
    camera_to_base: np.ndarray  # (T, V, 4, 4)
    points: np.ndarray  # (T, K, 3)
    visible: np.ndarray  # (T, K) 1 or 0
    wrench: np.ndarray  # (T, S, 6)
    taxels: np.ndarray  # (T, S, C, rows, columns)
    proprio: np.ndarray  # (T, P)
    action: np.ndarray  # (T, D)
    constant: np.ndarray  # record of what holds for all steps: text, embodiment, the presence masks of `Observation`,
    # and `action_dims`

    @property
    def nbytes(self) -> int:
        """Bytes of the streams."""
        return self.steps.nbytes + self.series.nbytes


def columns(spec: ClipSpec) -> dict[str, tuple[slice, tuple[int, ...]]]:
    """Where each stream lies in a row of `Aligned.steps`, and its shape."""
    views, places, start = len(spec.cameras), {}, 0
    shapes = {
        "intrinsics": (views, 3, 3),
        "camera_to_base": (views, 4, 4),
        "points": (spec.points, 3),
        "visible": (spec.points,),
        "taxels": (len(spec.sensors), *spec.taxels),
        "proprio": (spec.proprio,),
    }
    for name, shape in shapes.items():
        places[name] = (slice(start, start + math.prod(shape)), shape)
        start += math.prod(shape)
    return places


def align(episode: Episode, spec: ClipSpec, camera_map: Mapping[str, str | None], where: str) -> Aligned:
    """`episode` in the names, order and sizes of `spec`.

    Raises:
        DataError: rate, embodiment or a size does not fit; the message says where and what `spec` has.
    """
    meta, t = episode.meta, episode.length
    if meta["fps"] != spec.fps:
        raise DataError(f"{where}: fps {meta['fps']}, the clips ask for {spec.fps}")
    if meta["embodiment"] not in spec.embodiments:
        raise DataError(f"{where}: embodiment {meta['embodiment']!r} is none of {list(spec.embodiments)}")
    masks: dict[str, np.ndarray] = {}
    places = columns(spec)
    steps = np.zeros((t, max(place.stop for place, _ in places.values())), np.float32)
    sensors = len(spec.sensors)
    series = np.zeros((t, sensors * 6 + spec.action), np.float32)
    view = {name: steps[:, place].reshape(t, *shape) for name, (place, shape) in places.items()}
    view["wrench"], view["action"] = series[:, : sensors * 6].reshape(t, sensors, 6), series[:, sensors * 6 :]

    view["intrinsics"][:], view["camera_to_base"][:] = np.eye(3), np.eye(4)
    names = [None if c in spec.absent_cameras else camera_map.get(c, c) for c in spec.cameras]
    masks["has_rgb"] = np.array(
        [name in meta.get("cameras", ()) and "rgb" not in meta.get("absent", ()) for name in names]
    )
    masks["has_camera"] = np.array([name in episode.camera_to_base for name in names])
    for v, name in enumerate(names):
        if name is not None and name in episode.camera_to_base:
            view["intrinsics"][:, v] = episode.intrinsics[name]
            view["camera_to_base"][:, v] = episode.camera_to_base[name]

    masks["has_points"] = np.zeros(spec.points, bool)
    if episode.points is not None and episode.visible is not None:
        count = _fits(episode.points.shape[1], spec.points, "points", where)
        view["points"][:, :count], view["visible"][:, :count] = episode.points, episode.visible
        masks["has_points"][:count] = True

    masks["has_wrench"], masks["has_taxels"] = np.zeros(sensors, bool), np.zeros(sensors, bool)
    with_wrench, with_taxels = meta.get("sensor_names", []), meta.get("taxel_sensors", [])
    for s, name in enumerate(spec.sensors):
        if episode.wrench is not None and name in with_wrench:
            view["wrench"][:, s], masks["has_wrench"][s] = episode.wrench[:, with_wrench.index(name)], True
        if episode.taxels is not None and name in with_taxels:
            if episode.taxels.shape[2:] != spec.taxels:
                raise DataError(f"{where}: taxels: grid {episode.taxels.shape[2:]}, the clips ask for {spec.taxels}")
            view["taxels"][:, s], masks["has_taxels"][s] = episode.taxels[:, with_taxels.index(name)], True

    masks["action_dims"] = np.zeros(spec.action, bool)
    masks["has_proprio"] = np.array(episode.proprio is not None)
    if episode.proprio is not None:
        count = _fits(episode.proprio.shape[1], spec.proprio, "proprio", where)
        view["proprio"][:, :count] = episode.proprio
    if episode.action is not None:
        count = _fits(episode.action.shape[1], spec.action, "action", where)
        view["action"][:, :count], masks["action_dims"][:count] = episode.action, True

    instruction = meta["instruction"]
    masks["has_text"] = np.array(bool(instruction))
    fields = {
        "text": text_ids(instruction, spec.text),
        "embodiment": np.array(spec.embodiments.index(meta["embodiment"]), np.int64),
        **masks,
    }
    # One record, so that a batch copies no field by itself; aligned, or torch refuses the fields of a batch of one.
    record = np.dtype([(name, value.dtype, value.shape) for name, value in fields.items()], align=True)
    return Aligned(steps=steps, series=series, **view, constant=np.array(tuple(fields.values()), record))


def check_cameras(episode: Episode, spec: ClipSpec, camera_map: Mapping[str, str | None], where: str) -> None:
    """Raise `DataError` with both lists and a suggested map if the data lack a camera of `spec`."""
    if unknown := sorted(set(camera_map) - set(spec.cameras)):
        raise DataError(f"camera_map names {unknown}, which are no cameras of the clips: {list(spec.cameras)}")
    if "rgb" in episode.meta.get("absent", ()):
        return
    data = list(episode.meta["cameras"])
    present = [camera for camera in spec.cameras if camera not in spec.absent_cameras]
    wanted = {camera: camera_map.get(camera, camera) for camera in present}
    if not (missing := [camera for camera, name in wanted.items() if name is not None and name not in data]):
        return
    suggestion = suggest_cameras(missing, [name for name in data if name not in wanted.values()])
    raise DataError(
        f"{where}: cameras {missing} are missing: the data have {data}, the clips ask for "
        f"{list(spec.cameras)}. If they are the same cameras, set camera_map={suggestion} "
        "(None marks a camera as absent)"
    )


def suggest_cameras(missing: Sequence[str], free: Sequence[str]) -> dict[str, str | None]:
    """The free name most like each missing one, each once; None where there is none left."""
    suggestion: dict[str, str | None] = {}
    for camera in missing:
        close = difflib.get_close_matches(camera, free, n=1, cutoff=0.0)
        suggestion[camera] = close[0] if close else None
        free = [name for name in free if name not in close]
    return suggestion


def text_ids(text: str, length: int) -> np.ndarray:
    """(L,) int64: UTF-8 byte + 1, padded with 0.

    Raises:
        ConfigError: the text needs more than `length` bytes.
    """
    data = text.encode()
    if len(data) > length:
        raise ConfigError(f"instruction of {len(data)} bytes does not fit the {length} of ClipSpec.text: {text!r}")
    ids = np.zeros(length, np.int64)
    ids[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int64) + 1
    return ids


def _fits(size: int, limit: int, field: str, where: str) -> int:
    if size > limit:
        raise DataError(f"{where}: {field}: {size} wide, the clips have room for {limit}; raise ClipSpec.{field}")
    return size
