"""The action path as a module with a flat tensor signature, the only form that every exporter accepts.

Shapes: see the legend in `worldmodel.contracts`.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from worldmodel.contracts import ClipSpec, Observation


class ActionModel(Protocol):
    """What export needs of a model; `worldmodel.model.WorldModel` has it."""

    spec: ClipSpec
    metadata: dict[str, Any]
    action_steps: int

    @property
    def statistics(self) -> dict[str, Any]:
        """Statistics of the training data, per embodiment."""
        ...

    @property
    def statistics_hash(self) -> str:
        """sha256 of the statistics."""
        ...

    def act(self, observation: Observation, noise: Tensor) -> Tensor:
        """(B, A, D) actions in the robot's units from an observation and (B, A, D) standard normal noise."""
        ...

    def eval(self) -> Any:
        """Switches to inference behaviour."""
        ...


class InputSpec(NamedTuple):
    """One graph input, without its batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    unit: str
    frame: str
    description: str


class ActionPath(nn.Module):
    """Flat tensors in, actions out: every field of `Observation` in order, then the noise.

    The output keeps the padded action dimensions; the manifest says how many of them each embodiment has, and the
    runtime cuts the rest off.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        rgb: Tensor,
        intrinsics: Tensor,
        camera_to_base: Tensor,
        points: Tensor,
        visible: Tensor,
        wrench: Tensor,
        taxels: Tensor,
        proprio: Tensor,
        text: Tensor,
        embodiment: Tensor,
        has_rgb: Tensor,
        has_camera: Tensor,
        has_points: Tensor,
        has_wrench: Tensor,
        has_taxels: Tensor,
        has_proprio: Tensor,
        has_text: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Actions (B, A, D) in the robot's units; D is the padded width."""
        observation = Observation(
            rgb,
            intrinsics,
            camera_to_base,
            points,
            visible,
            wrench,
            taxels,
            proprio,
            text,
            embodiment,
            has_rgb,
            has_camera,
            has_points,
            has_wrench,
            has_taxels,
            has_proprio,
            has_text,
        )
        return self.model.act(observation, noise)  # type: ignore[operator]


INPUT_NAMES = (*Observation._fields, "noise")


def input_specs(spec: ClipSpec) -> list[InputSpec]:
    """Every graph input of a model with these sizes, in the order of `ActionPath.forward`."""
    h, v, r, k, s = spec.history, len(spec.cameras), spec.stride, spec.points, len(spec.sensors)
    f32, i64, flag = torch.float32, torch.int64, torch.bool
    rows = [
        InputSpec("rgb", (h, v, 3, spec.height, spec.width), torch.uint8, "0..255", "image", "views, oldest first"),
        InputSpec("intrinsics", (h, v, 3, 3), f32, "pixel", "image", "pinhole matrix of the image as given"),
        InputSpec("camera_to_base", (h, v, 4, 4), f32, "m", "base", "pose of each camera, OpenCV axes"),
        InputSpec("points", (h, k, 3), f32, "m", "base", "tracked object points"),
        InputSpec("visible", (h, k), flag, "", "", "whether a point is seen"),
        InputSpec("wrench", (h, r, s, 6), f32, "N, N·m", "sensor", "[fx fy fz tx ty tz], the R steps up to each frame"),
        InputSpec("taxels", (h, s, *spec.taxels), f32, "N", "sensor", "force grid of each touch sensor"),
        InputSpec("proprio", (h, spec.proprio), f32, "robot's own", "", "state vector, padded with 0"),
        InputSpec("text", (spec.text,), i64, "", "", "instruction: UTF-8 byte + 1, padded with 0"),
        InputSpec("embodiment", (), i64, "", "", "index of the robot in `embodiments`"),
        InputSpec("has_rgb", (v,), flag, "", "", "which views are there"),
        InputSpec("has_camera", (v,), flag, "", "", "which views have intrinsics and pose"),
        InputSpec("has_points", (k,), flag, "", "", "which points are tracked"),
        InputSpec("has_wrench", (s,), flag, "", "", "which sensors measure a wrench"),
        InputSpec("has_taxels", (s,), flag, "", "", "which sensors have a force grid"),
        InputSpec("has_proprio", (), flag, "", "", "whether the state vector is there"),
        InputSpec("has_text", (), flag, "", "", "whether there is an instruction"),
        InputSpec("noise", (spec.chunk, spec.action), f32, "", "", "standard normal start of the action flow"),
    ]
    assert tuple(row.name for row in rows) == INPUT_NAMES
    return rows


def random_inputs(spec: ClipSpec, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Valid made-up inputs of every kind, for tracing and for timing; all senses present."""
    generator = torch.Generator().manual_seed(seed)
    tensors: list[Tensor] = []
    for row in input_specs(spec):
        shape = (batch, *row.shape)
        if row.name == "intrinsics":
            focal = float(spec.height)
            matrix = torch.tensor([[focal, 0, spec.width / 2], [0, focal, spec.height / 2], [0, 0, 1]])
            tensors.append(matrix.expand(shape).clone())
        elif row.name == "camera_to_base":
            pose = torch.eye(4).expand(shape).clone()
            pose[..., :3, 3] = torch.rand((*shape[:-2], 3), generator=generator)
            tensors.append(pose)
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
