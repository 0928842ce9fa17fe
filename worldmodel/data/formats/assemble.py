"""One episode under a source's names, turned into ours by a resolved map."""

import hashlib
import json
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.formats.base import Recording, slug
from worldmodel.data.formats.mapping import Columns, Mapping, Pose
from worldmodel.data.schema import Episode, check_episode
from worldmodel.errors import DataError

NOT_STATED = "not stated by the source"
_TASK_LENGTH = 60
_FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
"""OpenGL camera axes (x right, y up, z back) to OpenCV's, and back."""


def assemble(recording: Recording, mapping: Mapping) -> Episode:
    """The episode of `recording`, whose map `resolve` has completed; `episode_id` and `split` are still to be set.

    Raises:
        DataError: a field that the map needs is missing, of another length or width, or not what its kind requires.
    """
    t, where = recording.length, recording.where
    if t < 1:
        raise DataError(f"{where}: no steps; leave the episode out of the source")
    instruction = mapping.instruction.text or ""
    if mapping.instruction.field is not None:
        instruction = _get(recording.texts, mapping.instruction.field, where)
    task = mapping.task or recording.task or task_name(instruction)
    if not task:
        raise DataError(f"{where}: the instruction is empty and the map gives no task; give one of them in the map")
    meta: dict[str, Any] = {
        **recording.meta,
        "schema_version": SCHEMA_VERSION,
        "embodiment": mapping.embodiment,
        "task": task,
        "instruction": instruction,
        "fps": float(mapping.fps or 0),
        "length": t,
        "success": _success(recording, mapping),
        "licence": mapping.licence or recording.meta.get("licence") or NOT_STATED,
    }
    episode = Episode(meta=meta)
    # What overflows becomes infinite, which the check at the end names.
    with np.errstate(over="ignore", invalid="ignore"):
        _fill(episode, recording, mapping)
    present = {
        "rgb": mapping.cameras,
        "camera": mapping.intrinsics,
        "objects": mapping.points,
        "tactile": mapping.wrench or mapping.tactile,
        "proprio": mapping.proprio,
        "action": mapping.action,
    }
    meta["absent"] = [name for name, entries in present.items() if not entries]
    try:
        json.dumps(meta, ensure_ascii=False).encode()
    except ValueError as error:
        raise DataError(f"{where}: a name or a text cannot be written ({error}); correct it in the source") from error
    check_episode(episode, where)
    return episode


def _fill(episode: Episode, recording: Recording, mapping: Mapping) -> None:
    _pictures(episode, recording, mapping)
    _poses(episode, recording, mapping)
    _touch(episode, recording, mapping)
    _points(episode, recording, mapping)
    for name in ("proprio", "action"):
        if columns := getattr(mapping, name):
            setattr(episode, name, np.concatenate([_columns(recording, entry) for entry in columns], 1))
            episode.meta[f"{name}_names"] = [label for entry in columns for label in entry.names]
            episode.meta[f"{name}_units"] = [unit for entry in columns for unit in entry.units]


def task_name(instruction: str) -> str:
    """A short name for the task that `instruction` asks for; the same sentence always gets the same name."""
    name = slug(instruction)
    if len(name) > _TASK_LENGTH:
        name = name[: _TASK_LENGTH - 9].rstrip("-") + "-" + hashlib.sha256(instruction.encode()).hexdigest()[:8]
    return name


def _get(values: dict[str, Any], name: str, where: str) -> Any:
    if name not in values:
        raise DataError(f"{where}: field {name!r} is missing; this episode has {sorted(values)}")
    return values[name]


def _flat(recording: Recording, name: str) -> np.ndarray:
    """(T, columns) float64 of a field."""
    value = np.asarray(_get(recording.vectors, name, recording.where), np.float64)
    if len(value) != recording.length:
        raise DataError(f"{recording.where}: {name}: {len(value)} steps, the episode has {recording.length}")
    return value.reshape(recording.length, -1)


def _columns(recording: Recording, entry: Any) -> np.ndarray:
    """(T, n) float32 of `Columns`, `Wrench` or `Tactile`."""
    value = _flat(recording, entry.field)
    first, last = entry.slice or (0, value.shape[1])
    if last > value.shape[1]:
        raise DataError(
            f"{recording.where}: {entry.field}: {value.shape[1]} columns, the map takes {first}..{last}; "
            "every episode must have the width that the dataset declares"
        )
    if isinstance(entry, Columns) and not np.isfinite(value[:, first:last]).all():
        step = int(np.argwhere(~np.isfinite(value[:, first:last]))[0][0])
        raise DataError(f"{recording.where}: {entry.field}: NaN or infinity at step {step}; every value must be finite")
    return value[:, first:last].astype(np.float32)


def _success(recording: Recording, mapping: Mapping) -> bool:
    if mapping.success.field is not None:
        return bool(_flat(recording, mapping.success.field)[-1].any())
    if mapping.success.value is not None:
        return mapping.success.value
    return True if recording.success is None else recording.success


def _pictures(episode: Episode, recording: Recording, mapping: Mapping) -> None:
    episode.meta["cameras"] = list(mapping.cameras)
    for ours, camera in mapping.cameras.items():
        images = _get(recording.images, camera.field, recording.where)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"{recording.where}: {camera.field}: {images.shape} {images.dtype}, expected (T, h, w, 3) uint8"
            )
        if len(images) != recording.length:
            raise DataError(f"{recording.where}: {camera.field}: {len(images)} pictures for {recording.length} steps")
        if camera.color == "bgr":
            images = np.ascontiguousarray(images[..., ::-1])
        episode.rgb[ours] = images if camera.size is None else _resized(images, camera.size)


def _resized(images: np.ndarray, size: list[int]) -> np.ndarray:
    from PIL import Image

    shape = (size[1], size[0])
    return np.stack([np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC)) for image in images])


def _poses(episode: Episode, recording: Recording, mapping: Mapping) -> None:
    t = recording.length
    for camera, pose in mapping.camera_to_base.items():
        episode.camera_to_base[camera] = _pose(recording, pose).astype(np.float32)
    for camera, entry in mapping.intrinsics.items():
        if entry.field is None:
            matrix = np.broadcast_to(np.array(entry.matrix, np.float64), (t, 3, 3)).copy()
        else:
            matrix = _camera_matrix(_flat(recording, entry.field))
        source, ours = mapping.cameras[camera], episode.rgb[camera]
        height, width = recording.images[source.field].shape[1:3]
        matrix[:, 0] *= ours.shape[2] / width
        matrix[:, 1] *= ours.shape[1] / height
        episode.intrinsics[camera] = matrix.astype(np.float32)


def _camera_matrix(flat: np.ndarray) -> np.ndarray:
    """(T, 3, 3) from nine columns or from fx, fy, cx, cy."""
    if flat.shape[1] == 9:
        return flat.reshape(-1, 3, 3).copy()
    matrix = np.zeros((len(flat), 3, 3))
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 0, 2], matrix[:, 1, 2] = flat.T
    matrix[:, 2, 2] = 1
    return matrix


def _pose(recording: Recording, pose: Pose) -> np.ndarray:
    """(T, 4, 4) float64 camera-to-base with OpenCV axes."""
    if pose.field is None:
        matrix = np.broadcast_to(np.array(pose.matrix, np.float64), (recording.length, 4, 4)).copy()
    else:
        flat = _flat(recording, pose.field)
        matrix = np.broadcast_to(np.eye(4), (len(flat), 4, 4)).copy()
        if pose.layout == "matrix":
            rows = flat.shape[1] // 4
            matrix[:, :rows] = flat.reshape(-1, rows, 4)
        else:
            order = [0, 1, 2, 3] if pose.layout.endswith("xyzw") else [1, 2, 3, 0]
            matrix[:, :3, :3] = _rotation(flat[:, 3:][:, order], f"{recording.where}: {pose.field}")
            matrix[:, :3, 3] = flat[:, :3]
    if pose.maps == "base_to_camera":
        rotation = matrix[:, :3, :3].transpose(0, 2, 1).copy()
        matrix[:, :3, 3] = -(rotation @ matrix[:, :3, 3, None])[..., 0]
        matrix[:, :3, :3] = rotation
    return matrix @ _FLIP if pose.axes == "opengl" else matrix


def _rotation(quaternion_xyzw: np.ndarray, where: str) -> np.ndarray:
    """(T, 3, 3) of quaternions (T, 4) xyzw of about unit length."""
    import torch

    from worldmodel.geometry import quaternion_to_matrix

    lengths = np.linalg.norm(quaternion_xyzw, axis=1)
    if not np.allclose(lengths, 1, atol=1e-2):
        step = int(np.argmax(np.abs(lengths - 1)))
        raise DataError(f"{where}: quaternion of length {lengths[step]:.3g} at step {step}; it must have length 1")
    return quaternion_to_matrix(torch.from_numpy(quaternion_xyzw.copy())).numpy()


def _touch(episode: Episode, recording: Recording, mapping: Mapping) -> None:
    t, meta = recording.length, episode.meta
    if not mapping.wrench and not mapping.tactile:
        return
    wrenches = [_columns(recording, wrench) for wrench in mapping.wrench.values()]
    episode.wrench = np.stack(wrenches, 1) if wrenches else np.zeros((t, 0, 6), np.float32)
    meta["sensor_names"] = list(mapping.wrench)
    meta["sensor_frames"] = {name: wrench.frame for name, wrench in mapping.wrench.items()}
    if signs := [f"{name}: {wrench.sign}" for name, wrench in mapping.wrench.items() if wrench.sign]:
        meta["wrench_sign"] = "; ".join(signs)
    meta.setdefault("wrench_sign", NOT_STATED)
    meta["wrench_units"] = ["N"] * 3 + ["N·m"] * 3
    if mapping.tactile:
        grids = [_columns(recording, entry).reshape(t, *entry.shape) for entry in mapping.tactile.values()]
        episode.taxels = np.stack(grids, 1)
        meta["taxel_sensors"] = list(mapping.tactile)
        meta["taxel_channels"] = next(iter(mapping.tactile.values())).channels


def _points(episode: Episode, recording: Recording, mapping: Mapping) -> None:
    if (points := mapping.points) is None:
        return
    # Our exporter keeps the names of each episode, which may have fewer points than the dataset has room for.
    own = recording.meta.get("point_names")
    names = own if isinstance(own, list) and 0 < len(own) <= len(points.names) else points.names
    values = _flat(recording, points.field).reshape(recording.length, -1, 3)
    visible = np.ones(values.shape[:2]) if points.visible is None else _flat(recording, points.visible)
    episode.points, episode.visible = values[:, : len(names)].astype(np.float32), visible[:, : len(names)] > 0.5
    episode.meta["point_names"] = names
