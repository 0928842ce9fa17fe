"""Where cameras of a MuJoCo model stand and look."""

from typing import Any

import numpy as np

from worldmodel.data.sources.rendering import mujoco_module

_LOWEST, _HIGHEST = 12.0, 75.0
"""Degrees above the horizon between which a camera that goes round a scene stays."""


def place_camera(model: Any, name: str, position: np.ndarray, rotation: np.ndarray, fovy: float) -> None:
    """Put a camera at `position` with `rotation` (MuJoCo's axes), both in its body's frame; `fovy` in degrees."""
    camera = model.camera(name)
    camera.pos[:], camera.fovy[0] = position, fovy
    quaternion = np.zeros(4)
    mujoco_module().mju_mat2Quat(quaternion, np.ascontiguousarray(rotation).ravel())
    camera.quat[:] = quaternion


def look_at(position: np.ndarray, target: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rotation of a MuJoCo camera (looks along -z, y up) at `position` that faces `target`."""
    backward = (position - target) / np.linalg.norm(position - target)
    right = np.cross(up, backward)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(backward, right), backward], axis=1)


def euler(angles: np.ndarray) -> np.ndarray:
    """Rotation about x, then y, then z by `angles` in radians."""
    rotation = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[j, i], turn[i, j] = np.sin(angle), -np.sin(angle)
        rotation = turn @ rotation
    return rotation


def orbited(offset: np.ndarray, azimuth: float, elevation: float) -> np.ndarray:
    """`offset` (3,) from a target to a camera, turned by angles in degrees: about the vertical, and upwards."""
    distance = np.linalg.norm(offset)
    around = np.arctan2(offset[1], offset[0]) + np.radians(azimuth)
    up = np.degrees(np.arcsin(offset[2] / distance)) + elevation
    up = np.radians(np.clip(up, _LOWEST, _HIGHEST))
    return distance * np.array([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)])


def in_picture(points: np.ndarray, camera_to_base: np.ndarray, intrinsics: np.ndarray, side: int) -> np.ndarray:
    """(..., K) bool: points (..., K, 3) are in front of the camera and inside its square picture of `side` pixels."""
    in_camera = (points - camera_to_base[..., None, :3, 3]) @ camera_to_base[..., :3, :3]
    pixels = in_camera @ np.swapaxes(intrinsics, -1, -2)
    depth = pixels[..., 2]
    pixels = pixels[..., :2] / np.where(np.abs(depth) < 1e-6, 1e-6, depth)[..., None]
    return (depth > 0.01) & ((pixels >= 0) & (pixels < side)).all(-1)
