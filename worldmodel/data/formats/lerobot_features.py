"""One episode in LeRobot's names: its values, their description in info.json, and the map that undoes the naming.

Names without a standard: `observation.wrench.<sensor>` (6,), `observation.tactile.<sensor>` (C, rows, columns),
`observation.extrinsics.<camera>` (4, 4) camera-to-base with OpenCV axes, `observation.intrinsics.<camera>` (3, 3),
`observation.points` (K, 3) in the base frame and `observation.visible` (K,). K is that of the episode with the most
points: a LeRobot dataset has one shape for all its tasks, and what a task lacks is zero and never visible.
"""

import re
from typing import Any

import numpy as np

from worldmodel.data.formats.lerobot_files import pixel_format
from worldmodel.data.formats.mapping import Camera, Columns, Intrinsics, Mapping, Points, Pose, Tactile, Text, Wrench
from worldmodel.data.schema import Episode
from worldmodel.errors import DataError

_WRENCH_NAMES = ["fx", "fy", "fz", "tx", "ty", "tz"]


def lerobot_values(episode: Episode, where: str, points: int) -> dict[str, np.ndarray]:
    """Per-step arrays by LeRobot name; object points are filled up to `points`."""
    meta, values = episode.meta, dict[str, np.ndarray]()
    for name, value in (("observation.state", episode.proprio), ("action", episode.action)):
        if value is not None:
            values[name] = value
    if episode.wrench is not None:
        for s, sensor in enumerate(meta["sensor_names"]):
            values[f"observation.wrench.{sensor}"] = episode.wrench[:, s]
    if episode.taxels is not None:
        for s, sensor in enumerate(meta["taxel_sensors"]):
            values[f"observation.tactile.{sensor}"] = episode.taxels[:, s]
    for camera, pose in episode.camera_to_base.items():
        values[f"observation.extrinsics.{camera}"] = pose
    for camera, matrix in episode.intrinsics.items():
        values[f"observation.intrinsics.{camera}"] = np.ascontiguousarray(matrix)
    if episode.points is not None and episode.visible is not None:
        spare = ((0, 0), (0, points - episode.points.shape[1]))
        values["observation.points"] = np.pad(episode.points, (*spare, (0, 0)))
        values["observation.visible"] = np.pad(episode.visible, spare)
    # These names become folders.
    if bad := [n for n in (*values, *episode.rgb) if not re.fullmatch(r"[\w.-]+", n) or ".." in n]:
        raise DataError(f"{where}: names {bad} must hold letters, digits, _ and - only")
    if lonely := sorted(episode.intrinsics.keys() - episode.rgb.keys()):
        raise DataError(f"{where}: cameras {lonely} have poses but no pictures; LeRobot has no camera without pictures")
    return values


def lerobot_features(
    values: dict[str, np.ndarray], pictures: dict[str, np.ndarray], episode: Episode, lossless: bool
) -> dict[str, dict[str, Any]]:
    """The entries of info.json."""
    names: dict[str, Any] = {
        "observation.state": episode.meta.get("proprio_names"),
        "action": episode.meta.get("action_names"),
    }
    features: dict[str, dict[str, Any]] = {}
    for key, images in pictures.items():
        height, width = images.shape[1:3]
        features[key] = {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channels"]}
        if not lossless:
            features[key]["dtype"] = "video"
            features[key]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": pixel_format(height, width),
                "video.is_depth_map": False,
                "video.fps": episode.meta["fps"],
                "video.channels": 3,
                "has_audio": False,
            }
    for name, value in values.items():
        own = _WRENCH_NAMES if name.startswith("observation.wrench.") else names.get(name)
        features[name] = {"dtype": str(value.dtype), "shape": list(value.shape[1:]), "names": own}
    return features


def lerobot_mapping(episode: Episode, point_names: list[str]) -> Mapping:
    """The map that undoes `lerobot_values`, with names for all the points there are."""
    meta = episode.meta
    mapping = Mapping(embodiment=meta["embodiment"], fps=meta["fps"], instruction=Text(field="task"))
    mapping.cameras = {camera: Camera(f"observation.images.{camera}") for camera in episode.rgb}
    for name, field in (("proprio", "observation.state"), ("action", "action")):
        if getattr(episode, name) is not None:
            units = list(meta.get(f"{name}_units", []))
            setattr(mapping, name, [Columns(field, None, list(meta[f"{name}_names"]), units)])
    frames = meta.get("sensor_frames", {})
    if episode.wrench is not None:
        for sensor in meta["sensor_names"]:
            mapping.wrench[sensor] = Wrench(f"observation.wrench.{sensor}", str(frames.get(sensor, "not stated")))
    if episode.taxels is not None:
        for sensor in meta["taxel_sensors"]:
            shape, channels = list(episode.taxels.shape[2:]), list(meta.get("taxel_channels", []))
            mapping.tactile[sensor] = Tactile(f"observation.tactile.{sensor}", shape, None, channels)
    for camera in episode.camera_to_base:
        mapping.camera_to_base[camera] = Pose("camera_to_base", "opencv", f"observation.extrinsics.{camera}")
    for camera in episode.intrinsics:
        mapping.intrinsics[camera] = Intrinsics(f"observation.intrinsics.{camera}")
    if episode.points is not None:
        mapping.points = Points("observation.points", "base", point_names, "observation.visible")
    return mapping
