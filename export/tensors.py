"""Inputs and outputs of exported graphs: names, shapes, units, and made-up values to trace with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from worldmodel.contracts import ClipSpec, Observation


class TensorSpec(NamedTuple):
    """One input or output of a graph, without its batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: str
    frame: str
    description: str


F32, I64, FLAG, U8 = torch.float32, torch.int64, torch.bool, torch.uint8


def observation_specs(spec: ClipSpec, frames: int | None = None, images: int | None = None) -> list[TensorSpec]:
    """Every field of `Observation` in order, with `frames` frames of history and `images` of the pictures in it."""
    h, v, r, k, s = frames or spec.history, len(spec.cameras), spec.stride, spec.points, len(spec.sensors)
    pictures = (images or h, v, 3, spec.height, spec.width)
    rows = [
        TensorSpec("rgb", pictures, U8, "0..255", "image", "views, oldest first"),
        TensorSpec("intrinsics", (h, v, 3, 3), F32, "pixel", "image", "pinhole matrix of the image as given"),
        TensorSpec("camera_to_base", (h, v, 4, 4), F32, "m", "base", "pose of each camera, OpenCV axes"),
        TensorSpec("points", (h, k, 3), F32, "m", "base", "tracked object points"),
        TensorSpec("visible", (h, k), FLAG, "", "", "whether a point is seen"),
        TensorSpec(
            "wrench", (h, r, s, 6), F32, "N, N·m", "sensor", "[fx fy fz tx ty tz], the R steps up to each frame"
        ),
        TensorSpec("taxels", (h, s, *spec.taxels), F32, "N", "sensor", "force grid of each touch sensor"),
        TensorSpec("proprio", (h, spec.proprio), F32, "robot's own", "", "state vector, padded with 0"),
        TensorSpec("text", (spec.text,), I64, "", "", "instruction: UTF-8 byte + 1, padded with 0"),
        TensorSpec("embodiment", (), I64, "", "", "index of the robot in `embodiments`"),
        TensorSpec("has_rgb", (v,), FLAG, "", "", "which views are there"),
        TensorSpec("has_camera", (v,), FLAG, "", "", "which views have intrinsics and pose"),
        TensorSpec("has_points", (k,), FLAG, "", "", "which points are tracked"),
        TensorSpec("has_wrench", (s,), FLAG, "", "", "which sensors measure a wrench"),
        TensorSpec("has_taxels", (s,), FLAG, "", "", "which sensors have a force grid"),
        TensorSpec("has_proprio", (), FLAG, "", "", "whether the state vector is there"),
        TensorSpec("has_text", (), FLAG, "", "", "whether there is an instruction"),
    ]
    assert tuple(row.name for row in rows) == Observation._fields
    return rows


def command_specs(spec: ClipSpec) -> list[TensorSpec]:
    """What a path that answers with actions reads beside the observation."""
    return [
        TensorSpec("noise", (spec.chunk, spec.action), F32, "", "", "standard normal start of the action flow"),
        TensorSpec(
            "previous", (2, spec.action), F32, "robot's own", "", "the two commands executed before, oldest first"
        ),
        TensorSpec("has_previous", (2,), FLAG, "", "", "which of them there were in this episode"),
        TensorSpec(
            "decided", (spec.chunk, spec.action), F32, "robot's own", "", "actions that are executed whatever comes"
        ),
        TensorSpec("is_decided", (spec.chunk,), FLAG, "", "", "which rows of the chunk these are, the first ones"),
    ]


def answer_specs(spec: ClipSpec, limits: int) -> list[TensorSpec]:
    """What a path that answers with actions gives."""
    chunk = "row 0 is executed now, one row per control step; dimensions beyond the robot's are padding"
    return [
        TensorSpec("actions", (spec.chunk, spec.action), F32, "action_units of the embodiment", "", chunk),
        TensorSpec("limited", (spec.chunk, limits), FLAG, "", "", "which limit changed which row, see `limits`"),
        TensorSpec("confidence", (), F32, "0..1", "", "see `trust`"),
        TensorSpec("novelty", (), F32, "1 = threshold", "", "distance from the training data, see `trust`"),
        TensorSpec("out_of_distribution", (), FLAG, "", "", "novelty above 1"),
    ]


def random_tensors(rows: Sequence[TensorSpec], spec: ClipSpec, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Valid made-up inputs of every kind, for tracing and for timing; all senses present, nothing decided."""
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor] = []
    for row in rows:
        shape = (batch, *row.shape)
        if row.name == "intrinsics":
            focal = float(spec.height)
            matrix = torch.tensor([[focal, 0, spec.width / 2], [0, focal, spec.height / 2], [0, 0, 1]])
            tensors.append(matrix.expand(shape).clone())
        elif row.name == "camera_to_base":
            pose = torch.eye(4).expand(shape).clone()
            pose[..., :3, 3] = torch.rand((*shape[:-2], 3), generator=generator)
            tensors.append(pose)
        elif row.name == "is_decided":
            tensors.append(torch.zeros(shape, dtype=torch.bool))
        elif row.dtype is torch.bool:
            tensors.append(torch.ones(shape, dtype=torch.bool))
        elif row.dtype is torch.uint8:
            tensors.append(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
        elif row.name == "embodiment":
            tensors.append(torch.zeros(shape, dtype=torch.int64))
        elif row.dtype is torch.int64:
            tensors.append(torch.randint(1, 257, shape, generator=generator))
        else:
            tensors.append(torch.randn(shape, generator=generator))
    return tuple(tensors)
