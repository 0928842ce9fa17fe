"""What may be wrong with the arrays of an episode: types, axes, lengths, names, values, rotations."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from worldmodel.data.embodiments import metadata_faults

if TYPE_CHECKING:
    from worldmodel.data.schema import Episode

_AXES = {
    "points": "(T, K, 3)",
    "visible": "(T, K)",
    "wrench": "(T, S, 6)",
    "taxels": "(T, S, C, rows, columns)",
    "proprio": "(T, P)",
    "action": "(T, D)",
    "intrinsics": "(T, 3, 3)",
    "camera_to_base": "(T, 4, 4)",
    "rgb": "(T, h, w, 3)",
    "masks": "(T, h, w)",
    "times": "(T,)",
}
RATE = "meta.json fps"
"""Field without which an episode's times mean nothing."""
_SLOWEST, _FASTEST = 1e-3, 1e5
_LARGEST = 1e15
"""Beyond anything in SI units, and small enough that squares and sums of float32 stay finite."""


def faults(episode: "Episode") -> list[str]:
    """Every fault of `episode`, each as `field: what is wrong; what would be right`."""
    found, fps = metadata_faults(episode.meta), episode.meta["fps"]
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not _SLOWEST <= fps <= _FASTEST:
        found.append(f"{RATE}: {fps!r} is no rate; state the control rate in Hz")
    arrays: dict[str, np.ndarray] = {}
    for name, value in _arrays(episode):
        if message := _unlike(name, value):
            found.append(message)
            continue
        arrays[name] = value
        if len(value) != episode.length:
            found.append(f"{name}: {len(value)} steps, meta.json says length {episode.length}; both must agree")
        if value.dtype.kind == "f" and not (finite := np.isfinite(value)).all():
            step = int(np.argwhere(~finite)[0][0])
            found.append(f"{name}: NaN or infinity at step {step}; every value must be finite")
        elif value.dtype.itemsize > 2 and value.size and (large := np.abs(value.astype(np.float64)) > _LARGEST).any():
            step = int(np.argwhere(large)[0][0])
            found.append(f"{name}: above {_LARGEST:.0e} at step {step}; no quantity is that large, check its unit")
    return found + list(_names(episode, arrays)) + list(_cameras(episode, arrays)) + list(_masks(episode, arrays))


def _arrays(episode: "Episode") -> Iterator[tuple[str, np.ndarray]]:
    """Every series by the name of its field; those of a camera or stream as `field.name`."""
    for name in ("intrinsics", "camera_to_base"):
        yield from ((f"{name}.{part}", value) for part, value in getattr(episode, name).items())
    for name in ("points", "visible", "wrench", "taxels", "proprio", "action"):
        if (value := getattr(episode, name)) is not None:
            yield name, value
    for name in ("rgb", "times", "masks"):
        yield from ((f"{name}.{part}", value) for part, value in getattr(episode, name).items())


def _unlike(name: str, value: np.ndarray) -> str | None:
    """What keeps a series from being looked at any closer."""
    if value.dtype.kind not in "fiub" or value.dtype.itemsize > 8:
        return f"{name}: type {value.dtype} holds no real numbers; store float32, flags as bool"
    axes = _AXES[name.partition(".")[0]]
    if value.ndim != len([axis for axis in axes.strip("()").split(",") if axis]):
        return f"{name}: shape {value.shape}, must be {axes}; write the episode again"
    return None


def _names(episode: "Episode", arrays: dict[str, np.ndarray]) -> Iterator[str]:
    """Widths that are not what the names in the metadata, or a companion, make them."""
    meta = episode.meta
    tails = {"points": (len(meta.get("point_names", ())), 3), "wrench": (len(meta.get("sensor_names", ())), 6)}
    for name, tail in tails.items():
        if name in arrays and arrays[name].shape[1:] != tail:
            yield f"{name}: shape {arrays[name].shape}, meta.json names make it (T, {tail[0]}, {tail[1]})"
    for name in ("proprio", "action"):
        if name not in arrays:
            continue
        for names in (f"{name}_names", f"{name}_units"):
            listed = meta.get(names, () if names.endswith("names") else None)
            if listed is not None and arrays[name].shape[1:] != (len(listed),):
                yield f"{name}: shape {arrays[name].shape}, but meta.json has {len(listed)} {names}"
    for name in ("points", "proprio", "action"):
        if name in arrays and not arrays[name].size:
            yield f"{name}: shape {arrays[name].shape} holds nothing; name its modality in meta.json's absent"
    if "points" in arrays and "visible" in arrays:
        wanted = arrays["points"].shape[:2]
        # Another number of steps has been named.
        if arrays["visible"].shape[1:] != wanted[1:]:
            yield f"visible: shape {arrays['visible'].shape}, the points make it {wanted}; write the episode again"
    if "taxels" in arrays:
        for axis, names in ((1, "taxel_sensors"), (2, "taxel_channels")):
            listed, shape = meta.get(names), arrays["taxels"].shape
            if listed is not None and len(listed) != shape[axis]:
                yield f"taxels: shape {shape}, but meta.json has {len(listed)} {names}; write the episode again"


def _masks(episode: "Episode", arrays: dict[str, np.ndarray]) -> Iterator[str]:
    elements = episode.meta.get("elements", ())
    for camera in episode.masks:
        if (mask := arrays.get(f"masks.{camera}")) is None:
            continue
        if mask.dtype != np.uint8:
            yield f"masks.{camera}: type {mask.dtype}, must be uint8"
        elif mask.size and mask.max() >= len(elements):
            step = int(np.argwhere(mask >= len(elements))[0][0])
            yield (
                f"masks.{camera}: element {mask[step].max()} at step {step}, meta.json names {len(elements)} elements; "
                "pixels are places in that list, from 0"
            )
        picture = arrays.get(f"rgb.{camera}")
        if picture is not None and picture.shape[1:3] != mask.shape[1:3]:
            yield (
                f"masks.{camera}: {mask.shape[1:3]} pixels, the pictures have {picture.shape[1:3]}; both must be of "
                "one size"
            )


def _cameras(episode: "Episode", arrays: dict[str, np.ndarray]) -> Iterator[str]:
    for camera in sorted(set(episode.camera_to_base) - set(episode.intrinsics)):
        yield f"intrinsics.{camera}: is missing; store {camera}.intrinsics in camera.npz"
    for camera in episode.camera_to_base:
        pose = arrays.get(f"camera_to_base.{camera}")
        if pose is not None and (message := _pose_fault(pose)):
            yield f"camera_to_base.{camera}: {message}"
    for camera in episode.intrinsics:
        matrix = arrays.get(f"intrinsics.{camera}")
        if matrix is not None and (
            matrix.shape[1:] != (3, 3) or (matrix[:, 0, 0] <= 0).any() or (matrix[:, 1, 1] <= 0).any()
        ):
            yield f"intrinsics.{camera}: must be (T, 3, 3) with positive focal lengths, got {matrix.shape}"


def _pose_fault(pose: np.ndarray) -> str | None:
    if pose.shape[1:] != (4, 4):
        return f"shape {pose.shape}, must be (T, 4, 4)"
    rotation = pose[:, :3, :3].astype(np.float64)
    # Whatever overflows here deviates.
    with np.errstate(all="ignore"):
        deviation = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
        determinant = np.linalg.det(rotation)
        bad = np.flatnonzero(~((deviation < 1e-3) & (determinant > 0)))
    if len(bad):
        step = int(bad[0])
        return (
            f"no rotation at step {step} (determinant {determinant[step]:.3g}, off orthonormal by "
            f"{deviation[step]:.3g}); the upper left 3x3 must be orthonormal with determinant +1"
        )
    if not np.allclose(pose[:, 3], [0, 0, 0, 1], atol=1e-6):
        return "the last row must be [0, 0, 0, 1]"
    return None
