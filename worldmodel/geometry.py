"""SO(3), SE(3), cameras and rays: pure functions over torch tensors, batch dimensions first.

Rotations are 3x3 matrices inside; quaternions are xyzw. Cameras use OpenCV axes (x right, y down, z forward) and pixel
coordinates in which the centre of the top left pixel is (0.5, 0.5). All functions trace and export: no branching on
values, no operators that ONNX lacks (but for `seen_from`, which no exported path needs).
"""

import torch
from torch import Tensor
from torch.nn import functional

_EPS = 1e-8
_FAR = 1000.0
"""Metres at which things stand that are not in the plane of `seen_from`."""


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions xyzw (..., 4), which need not have unit length."""
    x, y, z, w = (quaternion / quaternion.norm(dim=-1, keepdim=True).clamp_min(_EPS)).unbind(-1)
    rows = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    )
    return torch.stack(rows, dim=-2)


def rotation_6d_to_matrix(rotation: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of 6D rotations (..., 6): the first two columns, orthonormalised.

    Zhou et al., On the Continuity of Rotation Representations in Neural Networks, 2019, eq. 15. Any input gives a
    finite matrix; inputs whose halves are neither zero nor parallel give a rotation.
    """
    a, b = rotation[..., :3], rotation[..., 3:]
    x = _unit(a)
    y = _unit(b - (x * b).sum(-1, keepdim=True) * x)
    return torch.stack([x, y, _cross(x, y)], dim=-1)


def matrix_to_rotation_6d(matrix: Tensor) -> Tensor:
    """6D rotations (..., 6) of matrices (..., 3, 3): the first column, then the second."""
    return torch.cat([matrix[..., :, 0], matrix[..., :, 1]], dim=-1)


def geodesic_angle(first: Tensor, second: Tensor) -> Tensor:
    """Angle (...) in radians between rotations (..., 3, 3).

    Uses atan2 of sine and cosine: acos of the trace loses half of the digits near 0 and its gradient is infinite there.
    """
    relative = first.transpose(-1, -2) @ second
    axis = torch.stack(
        [
            relative[..., 2, 1] - relative[..., 1, 2],
            relative[..., 0, 2] - relative[..., 2, 0],
            relative[..., 1, 0] - relative[..., 0, 1],
        ],
        dim=-1,
    )
    trace = relative[..., 0, 0] + relative[..., 1, 1] + relative[..., 2, 2]
    sine = ((axis * axis).sum(-1) + _EPS * _EPS).sqrt()
    return torch.atan2(sine, trace - 1)


def make_se3(rotation: Tensor, translation: Tensor) -> Tensor:
    """Transforms (..., 4, 4) from rotations (..., 3, 3) and translations (..., 3)."""
    top = torch.cat([rotation, translation.unsqueeze(-1)], dim=-1)
    bottom = torch.cat([torch.zeros_like(top[..., :1, :3]), torch.ones_like(top[..., :1, 3:])], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def invert_se3(a_to_b: Tensor) -> Tensor:
    """b_to_a (..., 4, 4), without a general matrix inverse."""
    rotation = a_to_b[..., :3, :3].transpose(-1, -2)
    return make_se3(rotation, -(rotation @ a_to_b[..., :3, 3:]).squeeze(-1))


def compose_se3(b_to_c: Tensor, a_to_b: Tensor) -> Tensor:
    """a_to_c (..., 4, 4): first `a_to_b`, then `b_to_c`."""
    return b_to_c @ a_to_b


def transform_points(a_to_b: Tensor, points_in_a: Tensor) -> Tensor:
    """Points (..., K, 3) in frame b of points in frame a, with a_to_b (..., 4, 4)."""
    return points_in_a @ a_to_b[..., :3, :3].transpose(-1, -2) + a_to_b[..., None, :3, 3]


def project_points(points: Tensor, intrinsics: Tensor, camera_to_base: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates and depth of points in the base frame.

    Args:
        points: (..., K, 3) metres.
        intrinsics: (..., 3, 3) pixels.
        camera_to_base: (..., 4, 4).

    Returns:
        Pixels (..., K, 2) as x, y, and depth (..., K) in metres along the optical axis. Where the depth is not positive
        the pixels are finite and meaningless.
    """
    in_camera = transform_points(invert_se3(camera_to_base), points)
    depth = in_camera[..., 2]
    on_plane = in_camera / depth.clamp_min(1e-6).unsqueeze(-1)
    return (on_plane @ intrinsics.transpose(-1, -2))[..., :2], depth


def fov_to_intrinsics(fov: Tensor, height: int, width: int) -> Tensor:
    """Intrinsics (..., 3, 3) of square pixels and a centred axis, from the vertical field of view (...) in radians."""
    focal = 0.5 * height / torch.tan(fov / 2)
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    rows = (
        torch.stack([focal, zero, one * (width / 2)], dim=-1),
        torch.stack([zero, focal, one * (height / 2)], dim=-1),
        torch.stack([zero, zero, one], dim=-1),
    )
    return torch.stack(rows, dim=-2)


def intrinsics_to_fov(intrinsics: Tensor, height: int) -> Tensor:
    """Vertical field of view (...) in radians of intrinsics (..., 3, 3) for images of `height` rows."""
    return 2 * torch.atan2(torch.full_like(intrinsics[..., 1, 1], 0.5 * height), intrinsics[..., 1, 1])


def pluecker_rays(
    intrinsics: Tensor,
    camera_to_base: Tensor,
    height: int,
    width: int,
    rows: int | None = None,
    columns: int | None = None,
) -> Tensor:
    """Rays of an image in the base frame, in Pluecker coordinates.

    Args:
        intrinsics: (..., 3, 3) pixels of the full image.
        camera_to_base: (..., 4, 4).
        height: rows of the full image.
        width: columns of the full image.
        rows: rows of the grid of rays; None is one ray per image row. Rays pass through the centres of the cells.
        columns: columns of the grid of rays.

    Returns:
        (..., rows, columns, 6): unit direction, then moment = origin x direction in metres.
    """
    rows, columns = rows or height, columns or width
    like = {"dtype": intrinsics.dtype, "device": intrinsics.device}
    y = ((torch.arange(rows, **like) + 0.5) * (height / rows))[:, None]
    x = ((torch.arange(columns, **like) + 0.5) * (width / columns))[None, :]
    fx, fy = intrinsics[..., 0, 0, None, None], intrinsics[..., 1, 1, None, None]
    cx, cy, skew = (intrinsics[..., i, j, None, None] for i, j in ((0, 2), (1, 2), (0, 1)))
    v = (y - cy) / fy + torch.zeros_like(x)
    u = (x - cx - skew * v) / fx
    in_camera = torch.stack([u, v, torch.ones_like(u)], dim=-1)
    rotation = camera_to_base[..., None, :3, :3]
    direction = _unit(in_camera @ rotation.transpose(-1, -2))
    origin = camera_to_base[..., None, None, :3, 3].expand_as(direction)
    return torch.cat([direction, _cross(origin, direction)], dim=-1)


def interpolate_poses(poses: Tensor, steps: int) -> Tensor:
    """Poses (B, 1 + F, ..., 4, 4) -> those (B, F * steps, ..., 4, 4) at equal steps after the first, up to the last.

    Positions are interpolated linearly, and so are the columns of rotations, which are then made orthonormal.
    """
    share = ((torch.arange(steps, device=poses.device) + 1) / steps).to(poses)
    share = share.reshape(1, 1, -1, *([1] * (poses.dim() - 2)))
    mixed = torch.lerp(poses[:, :-1, None], poses[:, 1:, None], share).flatten(1, 2)
    return make_se3(rotation_6d_to_matrix(matrix_to_rotation_6d(mixed[..., :3, :3])), mixed[..., :3, 3])


def orbit(pose: Tensor, centre: Tensor, azimuth: Tensor, elevation: Tensor, distance: Tensor) -> Tensor:
    """Camera poses (..., 4, 4) after going round a centre (..., 3) in metres, and still looking the same way at it.

    `azimuth` (...) is about the vertical, anticlockwise from above, then `elevation` (...) up about the camera's own
    right, both in radians; `distance` (...) is the factor by which it then is farther away.
    """
    up = torch.zeros_like(pose[..., :3, 0])
    up[..., 2] = 1.0
    turn = _turn(up, azimuth)
    turn = _turn((turn @ pose[..., :3, :1]).squeeze(-1), -elevation) @ turn
    offset = (turn @ (pose[..., :3, 3] - centre).unsqueeze(-1)).squeeze(-1)
    return make_se3(turn @ pose[..., :3, :3], centre + distance.unsqueeze(-1) * offset)


def _turn(axis: Tensor, angle: Tensor) -> Tensor:
    """Rotations (..., 3, 3) by angles (...) in radians about unit axes (..., 3), right-handed."""
    x, y, z = (axis * angle.unsqueeze(-1)).unbind(-1)
    o = torch.zeros_like(x)
    return torch.linalg.matrix_exp(torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).unflatten(-1, (3, 3)))


def seen_from(
    pictures: Tensor,
    intrinsics: Tensor,
    camera_to_base: Tensor,
    new_intrinsics: Tensor,
    new_camera_to_base: Tensor,
    *,
    plane: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """What another camera would see if all that a picture shows lay in the plane z = `plane` or very far away.

    The homography of a plane (Hartley & Zisserman 2004, sec. 13.1), pixel by pixel.

    Args:
        pictures: (N, C, h, w).
        intrinsics: (N, 3, 3) of the camera that took them.
        camera_to_base: (N, 4, 4) of it.
        new_intrinsics: (N, 3, 3) of the other camera.
        new_camera_to_base: (N, 4, 4) of it.
        plane: metres above the base, one for all or (N,).

    Returns:
        Its pictures (N, C, h, w), and (N, h, w) bool where they show what the old ones do; elsewhere edges repeat.
    """
    h, w = pictures.shape[-2:]
    direction = pluecker_rays(new_intrinsics, new_camera_to_base, h, w)[..., :3]
    origin = new_camera_to_base[:, None, None, :3, 3]
    if isinstance(plane, Tensor):
        plane = plane[:, None, None]
    away = (plane - origin[..., 2]) / torch.where(direction[..., 2].abs() < 1e-6, 1e-6, direction[..., 2])
    away = torch.where((away > 0) & (away < _FAR), away, _FAR)
    points = origin + away.unsqueeze(-1) * direction
    pixels, depth = project_points(points.flatten(1, 2), intrinsics, camera_to_base)
    place = (2 * pixels / torch.tensor([w, h]).to(pixels) - 1).unflatten(1, (h, w))
    seen = (place.abs() <= 1).all(-1) & (depth > 0).unflatten(1, (h, w))
    return functional.grid_sample(pictures, place, padding_mode="border", align_corners=False), seen


def _unit(vector: Tensor) -> Tensor:
    """Unit vectors; the epsilon sits under the root so that value and gradient stay finite at zero."""
    return vector / ((vector * vector).sum(-1, keepdim=True) + _EPS * _EPS).sqrt()


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross product over the last axis by components (torch.linalg.cross has no ONNX form in every exporter)."""
    ax, ay, az = a.unbind(-1)
    bx, by, bz = b.unbind(-1)
    return torch.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], dim=-1)
