"""Flat named observations of a running robot, turned into the `Observation` that the eager model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from worldmodel.contracts import ClipSpec, Observation
from worldmodel.data.align import text_ids
from worldmodel.data.clip import Layout
from worldmodel.errors import ContractError


def observation_from_history(
    history: Sequence[Mapping[str, Any]],
    spec: ClipSpec,
    *,
    embodiment: str | None = None,
    proprio: int | None = None,
) -> Observation:
    """An `Observation` of batch size 1 from consecutive control steps.

    Args:
        history: one flat named observation per control step (names: `contracts.Policy`), oldest first, the last one is
            now. The last H * R steps are enough; a shorter history is taken as the start of an episode. Pictures and
            poses may be missing from steps that are not history frames. A stream whose name is missing now is absent;
            `has_points` (K,), `has_wrench` (S,) and `has_taxels` (S,) mark single points and sensors as absent.
        spec: names and sizes of the model.
        embodiment: which of `spec.embodiments`; None is the first.
        proprio: how wide its state is, the rest is padding; None is all of the spec's.

    Raises:
        ContractError: empty history, or a field of the wrong shape; the message names the field and the right shape.
    """
    if not history:
        raise ContractError("the history is empty; observe at least one control step before acting")
    embodiment = spec.embodiments[0] if embodiment is None else embodiment
    if embodiment not in spec.embodiments:
        raise ContractError(f"embodiment {embodiment!r} is none of {list(spec.embodiments)}")
    now = history[-1]
    layout, newest = Layout(spec), len(history) - 1
    frames = np.maximum(layout.history + newest, 0)
    h, v, s = spec.history, len(spec.cameras), len(spec.sensors)

    def series(name: str, steps: np.ndarray, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        rows = []
        for step in steps:
            if name not in history[step]:
                raise ContractError(f"{name}: missing {len(history) - 1 - step} control steps ago; expected {shape}")
            value = np.asarray(history[step][name])
            if value.shape != shape:
                raise ContractError(f"{name}: shape {value.shape}, expected {shape}")
            rows.append(value)
        return np.stack(rows).astype(dtype)

    rgb = np.zeros((h, v, 3, spec.height, spec.width), np.uint8)
    intrinsics = np.broadcast_to(np.eye(3, dtype=np.float32), (h, v, 3, 3)).copy()
    poses = np.broadcast_to(np.eye(4, dtype=np.float32), (h, v, 4, 4)).copy()
    has_rgb, has_camera = np.zeros(v, bool), np.zeros(v, bool)
    for i, camera in enumerate(spec.cameras):
        if f"rgb.{camera}" in now:
            pictures = series(f"rgb.{camera}", frames, (spec.height, spec.width, 3), np.uint8)
            rgb[:, i], has_rgb[i] = pictures.transpose(0, 3, 1, 2), True
        if f"camera_to_base.{camera}" in now:
            poses[:, i] = series(f"camera_to_base.{camera}", frames, (4, 4), np.float32)
            intrinsics[:, i] = series(f"intrinsics.{camera}", frames, (3, 3), np.float32)
            has_camera[i] = True

    points, visible = np.zeros((h, spec.points, 3), np.float32), np.zeros((h, spec.points), bool)
    has_points = np.zeros(spec.points, bool)
    if "points" in now:
        k = len(now["points"])
        if k > spec.points:
            raise ContractError(f"points: {k} of them, the model has room for {spec.points}")
        points[:, :k] = series("points", frames, (k, 3), np.float32)
        visible[:, :k] = series("visible", frames, (k,), bool)
        has_points[:k] = now.get("has_points", np.ones(k, bool))

    def touch(name: str, steps: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        if name not in now:
            return np.zeros((len(steps), *shape), np.float32), np.zeros(s, bool)
        return series(name, steps, shape, np.float32), np.asarray(now.get(f"has_{name}", np.ones(s, bool)))

    wrench, has_wrench = touch("wrench", np.maximum(layout.touch + newest, 0), (s, 6))
    taxels, has_taxels = touch("taxels", frames, (s, *spec.taxels))
    state, width = np.zeros((h, spec.proprio), np.float32), spec.proprio if proprio is None else proprio
    if "proprio" in now:
        state[:, :width] = series("proprio", frames, (width,), np.float32)
    instruction = str(now.get("instruction", ""))
    fields = {
        "rgb": rgb,
        "intrinsics": intrinsics,
        "camera_to_base": poses,
        "points": points,
        "visible": visible,
        "wrench": wrench.reshape(h, spec.stride, s, 6),
        "taxels": taxels,
        "proprio": state,
        "text": text_ids(instruction, spec.text),
        "embodiment": np.array(spec.embodiments.index(embodiment), np.int64),
        "has_rgb": has_rgb,
        "has_camera": has_camera,
        "has_points": has_points,
        "has_wrench": has_wrench,
        "has_taxels": has_taxels,
        "has_proprio": np.array("proprio" in now),
        "has_text": np.array(bool(instruction)),
    }
    return Observation(**{name: torch.from_numpy(np.asarray(value)).unsqueeze(0) for name, value in fields.items()})
