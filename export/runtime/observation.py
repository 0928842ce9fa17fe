"""Checks of what a robot observes, before it reaches a graph."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .manifest import RuntimeContractError

ROTATION_TOLERANCE = 1e-3


def encode_instruction(text: str, length: int) -> np.ndarray:
    """UTF-8 bytes plus one, padded with 0 to `length`: (L,) int64.

    Raises:
        RuntimeContractError: the text is longer than the model reads.
    """
    if not isinstance(text, str):
        raise RuntimeContractError(f"instruction: got {type(text).__name__}, expected str")
    encoded = text.encode("utf-8")
    if len(encoded) > length:
        raise RuntimeContractError(f"instruction: {len(encoded)} bytes, expected at most {length}: {text!r}")
    row = np.zeros(length, np.int64)
    row[: len(encoded)] = np.frombuffer(encoded, np.uint8).astype(np.int64) + 1
    return row


def observation_shapes(spec: dict[str, Any], proprio: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every observation name of one control step."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for camera in spec["cameras"]:
        shapes[f"rgb.{camera}"] = ((spec["height"], spec["width"], 3), "uint8")
        shapes[f"intrinsics.{camera}"] = ((3, 3), "float32")
        shapes[f"camera_to_base.{camera}"] = ((4, 4), "float32")
    sensors = len(spec["sensors"])
    return shapes | {
        "points": ((spec["points"], 3), "float32"),
        "visible": ((spec["points"],), "bool"),
        "wrench": ((sensors, 6), "float32"),
        "taxels": ((sensors, *spec["taxels"]), "float32"),
        "proprio": ((proprio,), "float32"),
        "has_points": ((spec["points"],), "bool"),
        "has_wrench": ((sensors,), "bool"),
        "has_taxels": ((sensors,), "bool"),
    }


def known(names: Iterable[str], valid: list[str], argument: str) -> set[str]:
    """The names as a set, all of them valid."""
    if isinstance(names, str):
        raise RuntimeContractError(f"{argument}: got the text {names!r}, expected a collection of names")
    for name in (chosen := set(names)):
        if name not in valid:
            raise RuntimeContractError(f"{argument}: unknown name {name!r}, expected some of {valid}")
    return chosen


def checked(key: str, value: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A private copy of `value` in the expected type, after checking shape, type, finiteness and geometry."""
    array = np.asarray(value)
    # A scene with fewer tracked points than the model knows brings fewer rows.
    fits = array.shape == shape
    if key in ("points", "visible", "has_points"):
        fits = array.ndim == len(shape) and array.shape[0] <= shape[0] and array.shape[1:] == shape[1:]
    if not fits or (array.dtype.kind != "f" if dtype == "float32" else array.dtype != dtype):
        raise RuntimeContractError(f"{key}: got {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}")
    array = array.astype(dtype)
    if dtype == "float32" and not np.isfinite(array).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise RuntimeContractError(f"{key}: non-finite value at {index}, expected finite {dtype} {list(shape)}")
    if key.startswith("camera_to_base."):
        rotation = array[:3, :3].astype(np.float64)
        error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
        if error > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0 or not np.array_equal(array[3], (0, 0, 0, 1)):
            raise RuntimeContractError(
                f"{key}: not a rigid transform (max |R Rᵀ - I| {error:.2g}, det {np.linalg.det(rotation):.3f}, "
                f"last row {array[3].tolist()}); expected det +1, at most {ROTATION_TOLERANCE}, [0, 0, 0, 1]"
            )
    if key.startswith("intrinsics.") and (array[0, 0] <= 0 or array[1, 1] <= 0 or array[2, 2] != 1):
        raise RuntimeContractError(
            f"{key}: focal lengths {array[0, 0]:g}, {array[1, 1]:g}, last entry {array[2, 2]:g}; expected > 0, > 0, 1"
        )
    return array


def sound_rows(key: str, value: Any) -> np.ndarray | None:
    """Which points or sensors of a value are finite, (rows,) bool; None where it has no such rows, or none is."""
    array = np.asarray(value)
    if key not in ("points", "wrench", "taxels") or array.dtype.kind != "f" or array.ndim < 2:
        return None
    sound = np.asarray(np.isfinite(array.reshape(len(array), -1)).all(1))
    return sound if sound.any() else None
