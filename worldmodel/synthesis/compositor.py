"""What the newest picture becomes along given paths and tracks: moved in several ways, and chosen from pixel by pixel.

No one motion fits a whole picture: fingers stay where they are in the picture of a camera that they carry, walls and
the table move each in their own way, an object takes the hand that holds it along and leaves the table behind.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from worldmodel.geometry import project_points, seen_from

PATCH = 0.04
"""Metres around a mark that are taken to move with it where nothing is known of what else does."""
_BLUR = 9
"""Pixels over which surroundings are averaged, twice, to fill in what comes to light."""
_NEAR = 0.01
"""Metres from a camera within which nothing is drawn."""


class Moves(NamedTuple):
    """Pictures, and where their cameras and what they show go; M marks are the tracked points and the cameras."""

    pictures: Tensor  # (N, 3, h, w)
    intrinsics: Tensor  # (N, 3, 3) pixels
    here: Tensor  # (N, 4, 4) camera_to_base when they were taken
    path: Tensor  # (N, 4, 4) camera_to_base then
    marks: Tensor  # (N, M, 3) metres, base frame, when they were taken
    tracks: Tensor  # (N, M, 3) the same then
    carried: Tensor  # (N, M) bool, which marks are known to go there
    ground: Tensor  # (N,) metres above the base, of the plane that things stand on
    view: Tensor  # (N,) int64, number of the camera

    def chosen(self, rows: Tensor) -> "Moves":
        """Those of a mask or an index of N."""
        return Moves(*(value[rows] for value in self))


def carry(moves: Moves, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures drawn along with mark k as a whole, larger or smaller as it comes nearer.

    Returns them (N, 3, h, w), and how near to the mark each pixel lies when they were taken and then (N, h, w each): 1
    at the mark, 1/e at `PATCH` metres. Both are 0 and the picture is as it was where the mark is not carried or
    behind the camera.
    """
    rows, columns = moves.pictures.shape[-2:]
    (old, far), (new, near) = (
        project_points(points[:, k, None], moves.intrinsics, pose)
        for points, pose in ((moves.marks, moves.here), (moves.tracks, moves.path))
    )
    y, x = (torch.arange(n, device=old.device, dtype=old.dtype) + 0.5 for n in (rows, columns))
    place = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], -1)
    seen = (moves.carried[:, k] & (far[:, 0] > _NEAR) & (near[:, 0] > _NEAR))[:, None, None]
    scale = (near / far.clamp(min=_NEAR))[:, :, None, None]
    source = old[:, :, None] + (place - new[:, :, None]) * scale
    source = torch.where(seen.unsqueeze(-1), source, place)
    drawn = functional.grid_sample(
        moves.pictures, 2 * source / source.new_tensor([columns, rows]) - 1, padding_mode="border", align_corners=False
    )
    focal = moves.intrinsics[:, 0, 0, None, None] * PATCH
    nearness = (
        torch.exp(-(place - at[:, :, None]).square().sum(-1) / (focal / depth.clamp(min=_NEAR)[..., None]).square())
        for at, depth in ((old, far), (new, near))
    )
    before, after = (torch.where(seen, value, 0.0) for value in nearness)
    return drawn, before, after


def by_geometry(moves: Moves, points: int) -> Tensor:
    """Pictures (N, 3, h, w) moved by geometry alone: everything lies on the ground, patches follow `points` marks."""
    out, _ = seen_from(moves.pictures, moves.intrinsics, moves.here, moves.intrinsics, moves.path, plane=moves.ground)
    for k in range(points):
        drawn, _, after = carry(moves, k)
        share = torch.exp(-after.log().square())  # a disc with soft edges
        out = out + share.unsqueeze(1) * (drawn - out)
    return out


class Compositor(nn.Module):
    """Pictures moved along given paths and tracks, composed of several motions by learned masks.

    Candidates for a pixel are the picture as it was, what it shows seen from the new pose if that lay on one of several
    horizontal planes (as in DeepStereo, Flynn et al. 2016, arXiv 1506.06825) or far away, the picture drawn along with
    each mark - a point, or another camera, which the hand carries - and a blur of the surroundings for what comes to
    light. A small network sees all of them and mixes them (compositing masks, Finn et al. 2016, arXiv 1605.07157).

    Args:
        width: channels of the network, which works at half the size of the picture.
        views: cameras, each with a bias of its own.
        points: tracked points.
        planes: metres of the planes above the ground.
    """

    def __init__(self, *, width: int, views: int, points: int, planes: tuple[float, ...]) -> None:
        super().__init__()
        self.planes, self.marks = tuple(planes), points + views
        candidates = len(self.planes) + self.marks + 3
        channels = 3 * candidates + len(self.planes) + 1 + 2 * self.marks + 2
        self.view = nn.Embedding(views, width)
        nn.init.zeros_(self.view.weight)
        self.first = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.rest = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (2, 4, 1))
        self.choice = nn.Conv2d(width, candidates, 1)

    def candidates(self, moves: Moves) -> tuple[Tensor, Tensor]:
        """Candidates (N, candidates, 3, h, w) and what else the choice depends on (N, channels, h, w)."""
        size = moves.pictures.shape[-2:]
        found, maps = [moves.pictures], []
        # A plane far below the cameras: what lies there turns with the camera and nothing else.
        for plane in (*(moves.ground + height for height in self.planes), torch.full_like(moves.ground, -1e4)):
            drawn, seen = seen_from(
                moves.pictures, moves.intrinsics, moves.here, moves.intrinsics, moves.path, plane=plane
            )
            found.append(drawn)
            maps.append(seen.to(drawn))
        blurred = found[1]
        for k in range(self.marks):
            drawn, before, after = carry(moves, k)
            found.append(drawn)
            maps += [before, after]
        for _ in range(2):
            blurred = functional.avg_pool2d(blurred, _BLUR, 1, _BLUR // 2, count_include_pad=False)
        y, x = (torch.linspace(-1, 1, n, device=blurred.device, dtype=blurred.dtype) for n in size)
        maps += [y[:, None].expand(len(blurred), *size), x.expand(len(blurred), *size)]
        return torch.stack([*found, blurred], 1), torch.stack(maps, 1)

    def forward(self, moves: Moves) -> Tensor:
        """Pictures (N, 3, h, w) in [-1, 1] where the moves have led."""
        candidates, maps = self.candidates(moves)
        x = self.first(torch.cat([candidates.flatten(1, 2), maps], 1)) + self.view(moves.view)[:, :, None, None]
        x = functional.relu(x)
        for layer in self.rest:
            x = x + functional.relu(layer(x))
        masks = functional.interpolate(self.choice(x), moves.pictures.shape[-2:], mode="bilinear")
        return (candidates * masks.softmax(1).unsqueeze(2)).sum(1)
