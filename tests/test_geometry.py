"""Geometry by axioms: group laws, round trips, and rays that project back to their pixels."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from worldmodel import geometry as g


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rotations(generator: torch.Generator, count: int = 64) -> Tensor:
    return g.quaternion_to_matrix(torch.randn(count, 4, generator=generator, dtype=torch.float64))


def transforms(generator: torch.Generator, count: int = 64) -> Tensor:
    translation = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return g.make_se3(rotations(generator, count), translation)


def assert_rotation(matrix: Tensor) -> None:
    identity = torch.eye(3, dtype=matrix.dtype).expand_as(matrix)
    torch.testing.assert_close(matrix @ matrix.transpose(-1, -2), identity, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones_like(matrix[..., 0, 0]), atol=1e-6, rtol=0)


def test_quaternion_is_xyzw_and_sign_free(generator: torch.Generator) -> None:
    quarter_about_z = torch.tensor([0.0, 0.0, math.sin(math.pi / 4), math.cos(math.pi / 4)])
    turned = g.quaternion_to_matrix(quarter_about_z) @ torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(turned, torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    quaternion = torch.randn(16, 4, generator=generator)
    torch.testing.assert_close(g.quaternion_to_matrix(quaternion), g.quaternion_to_matrix(-3 * quaternion))
    assert_rotation(g.quaternion_to_matrix(quaternion.double()))


def test_6d_round_trip_and_any_input(generator: torch.Generator) -> None:
    matrix = rotations(generator)
    torch.testing.assert_close(g.rotation_6d_to_matrix(g.matrix_to_rotation_6d(matrix)), matrix)
    assert_rotation(g.rotation_6d_to_matrix(torch.randn(64, 6, generator=generator, dtype=torch.float64)))
    zero = torch.zeros(2, 6, requires_grad=True)
    value = g.rotation_6d_to_matrix(zero)
    value.sum().backward()
    assert value.isfinite().all() and zero.grad is not None and zero.grad.isfinite().all()


def test_geodesic_angle_is_a_metric(generator: torch.Generator) -> None:
    a, b, c = rotations(generator), rotations(generator), rotations(generator)
    ab, bc, ac = g.geodesic_angle(a, b), g.geodesic_angle(b, c), g.geodesic_angle(a, c)
    torch.testing.assert_close(ab, g.geodesic_angle(b, a))
    torch.testing.assert_close(ab, g.geodesic_angle(c @ a, c @ b))
    assert (ac <= ab + bc + 1e-9).all()
    assert (g.geodesic_angle(a, a) < 1e-7).all()


@pytest.mark.parametrize("angle", [1e-4, 0.5, 3.0, math.pi])
def test_geodesic_angle_value(angle: float) -> None:
    turn = g.quaternion_to_matrix(torch.tensor([math.sin(angle / 2), 0.0, 0.0, math.cos(angle / 2)]))
    assert float(g.geodesic_angle(torch.eye(3), turn)) == pytest.approx(angle, abs=1e-5)


def test_se3_group_laws(generator: torch.Generator) -> None:
    a_to_b, b_to_c, c_to_d = transforms(generator), transforms(generator), transforms(generator)
    identity = torch.eye(4, dtype=torch.float64).expand_as(a_to_b)
    torch.testing.assert_close(g.compose_se3(g.invert_se3(a_to_b), a_to_b), identity)
    torch.testing.assert_close(
        g.compose_se3(c_to_d, g.compose_se3(b_to_c, a_to_b)), g.compose_se3(g.compose_se3(c_to_d, b_to_c), a_to_b)
    )
    points = torch.randn(64, 5, 3, generator=generator, dtype=torch.float64)
    there = g.transform_points(a_to_b, points)
    torch.testing.assert_close(g.transform_points(g.invert_se3(a_to_b), there), points)
    torch.testing.assert_close(
        g.transform_points(b_to_c, there), g.transform_points(g.compose_se3(b_to_c, a_to_b), points)
    )


def test_fov_round_trip_and_meaning() -> None:
    fov = torch.linspace(0.2, 2.5, 7, dtype=torch.float64)
    matrix = g.fov_to_intrinsics(fov, 48, 64)
    torch.testing.assert_close(g.intrinsics_to_fov(matrix, 48), fov)
    edge = torch.stack([torch.zeros(7, dtype=fov.dtype), torch.tan(fov / 2), torch.ones(7, dtype=fov.dtype)], -1)
    pixels, _ = g.project_points(edge[:, None], matrix, torch.eye(4, dtype=fov.dtype).expand(7, 4, 4))
    torch.testing.assert_close(pixels[:, 0, 1], torch.full((7,), 48.0, dtype=fov.dtype))


@pytest.mark.parametrize(("rows", "columns"), [(None, None), (4, 8)])
def test_points_on_rays_project_to_their_cells(
    generator: torch.Generator, rows: int | None, columns: int | None
) -> None:
    camera_to_base = transforms(generator, 3)
    intrinsics = g.fov_to_intrinsics(torch.tensor([0.6, 0.9, 1.4], dtype=torch.float64), 16, 24)
    rays = g.pluecker_rays(intrinsics, camera_to_base, 16, 24, rows, columns)
    h, w = rows or 16, columns or 24
    assert rays.shape == (3, h, w, 6)
    direction, moment = rays[..., :3], rays[..., 3:]
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(3, h, w, dtype=torch.float64))
    assert (direction * moment).sum(-1).abs().max() < 1e-9
    # direction x moment is the ray's nearest point to the origin; any point of the ray does.
    nearest = torch.cross(direction, moment, dim=-1)
    origin = camera_to_base[:, None, None, :3, 3]
    along = ((origin - nearest) * direction).sum(-1, keepdim=True)
    points = nearest + (along + 1.7) * direction
    pixels, depth = g.project_points(points.reshape(3, -1, 3), intrinsics, camera_to_base)
    assert (depth > 0).all()
    x = (torch.arange(w, dtype=torch.float64) + 0.5) * 24 / w
    y = (torch.arange(h, dtype=torch.float64) + 0.5) * 16 / h
    expected = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1).expand(3, h, w, 2)
    torch.testing.assert_close(pixels.reshape(3, h, w, 2), expected)


def test_all_of_it_traces() -> None:
    def pipeline(rotation: Tensor, translation: Tensor, fov: Tensor) -> Tensor:
        pose = g.make_se3(g.rotation_6d_to_matrix(rotation), translation)
        rays = g.pluecker_rays(g.fov_to_intrinsics(fov, 8, 8), pose, 8, 8, 2, 2)
        return rays.flatten(-3) + g.geodesic_angle(pose[..., :3, :3], torch.eye(3).expand(3, 3))[..., None]

    program = torch.export.export(
        _Wrapped(pipeline), (torch.randn(2, 6), torch.randn(2, 3), torch.tensor([0.5, 1.0]))
    ).module()
    arguments = (torch.randn(2, 6), torch.randn(2, 3), torch.tensor([0.7, 1.2]))
    np.testing.assert_allclose(program(*arguments), pipeline(*arguments), atol=1e-6)


class _Wrapped(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, rotation: Tensor, translation: Tensor, fov: Tensor) -> Tensor:
        return self.function(rotation, translation, fov)
