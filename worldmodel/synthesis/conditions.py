"""What synthesis may be given of the future: views, the path of a camera, tracks of objects, actions; and which robot.

A slot of the future - the picture or the camera of a view, a point - is in one of three states: predicted (a noisy
token), given (a clean one, at noise level 0) or absent (no token at all). Beside its token, what is given reaches the
video by a short way that a few training steps suffice to find: actions and the embodiment modulate every block beside
the noise level, a camera's path turns the Pluecker rays of its video tokens, paths and tracks bring what the newest
picture becomes along them (`compositor`), and objects and cameras appear as heat maps where a camera sees them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worldmodel.contracts import STREAMS
from worldmodel.geometry import project_points
from worldmodel.nn import FeedForward

CONDITIONS = ("video", "camera", "points", "actions", "embodiment")
"""What has an on and an off of its own; instructions and histories have theirs in the observation (`has_text`, ...)."""
SPREAD = 0.7
"""Standard deviation of an object's heat map, in cells of a latent frame."""


class Given(NamedTuple):
    """The future as far as it is given, in the network's own units; letters as in `contracts`."""

    video: Tensor | None  # (B, F, V, C, h', w') latents, None where no view is given
    camera: Tensor  # (B, F, V, 9) as in `WorldState`
    points: Tensor  # (B, F, K, 3) as in `WorldState`
    actions: Tensor  # (B, F, R D) standardised, the R control steps of each latent frame
    rays: Tensor  # (B, F, V, 6, h', w') of the given path
    moved: Tensor  # (B, F, V, C, h', w') latents of the newest picture, moved along path and tracks, less its own
    film: Tensor | None  # (B, F R, V, 3, h, w) in [-1, 1], the newest picture so moved, None where nothing moves it
    heat: Tensor  # (B, F, V, 2 (K + V), h', w') where a view sees given points and cameras: now, then
    embodiment: Tensor  # (B,)
    has_video: Tensor  # (B, V) bool
    has_camera: Tensor  # (B, V) bool
    has_points: Tensor  # (B, K) bool
    has_actions: Tensor  # (B,) bool
    has_embodiment: Tensor  # (B,) bool
    lacks_camera: Tensor  # (B,) bool: cameras that are not given are absent
    lacks_points: Tensor  # (B,) bool

    def presence(self, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Which slots have a token, and which views have rays, after a history of which `known` are there."""
        return known | {
            "video": known["video"] | self.has_video,
            "camera": (known["camera"] & ~self.lacks_camera[:, None]) | self.has_camera,
            "points": (known["points"] & ~self.lacks_points[:, None]) | self.has_points,
            "rays": known["rays"] | self.has_camera,
        }

    def led(self) -> Tensor:
        """Views (B, V) whose newest picture was moved."""
        return self.moved.abs().amax((1, 3, 4, 5)) > 0

    def clean(self, name: str) -> Tensor | None:
        """Slots (B, n) of a stream that are given, None where none can be."""
        return getattr(self, f"has_{name}", None)

    def tokens(self, stream: Sequence[int]) -> Tensor:
        """Which tokens (B, N) stand for what is given; `stream` is the number of each token's stream."""
        parts = []
        for number, name in enumerate(STREAMS):
            count, slots = stream.count(number), self.clean(name)
            if slots is None:
                slots = self.has_actions.new_zeros(self.has_actions.shape[0], 1)
            parts.append(slots.repeat_interleave(count // slots.shape[1], dim=1))
        return torch.cat(parts, 1)

    def fill(self, name: str, value: Tensor) -> Tensor:
        """A stream's value (B, F, n, ...) with its given slots in place."""
        clean, has = getattr(self, name, None), self.clean(name)
        if clean is None or has is None:
            return value
        return torch.where(has.reshape(has.shape[0], 1, -1, *([1] * (value.dim() - 3))), clean, value)


def heat_maps(
    points: Tensor, intrinsics: Tensor, camera_to_base: Tensor, size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """Gaussians where cameras see points, at the resolution of latents, 1 at their centre and 0 behind the camera.

    Args:
        points: (..., K, 3) metres, base frame.
        intrinsics: (..., 3, 3) pixels of images of `size`.
        camera_to_base: (..., 4, 4).
        size: rows and columns of the images.
        grid: rows and columns of a latent frame.

    Returns:
        (..., K, rows, columns).
    """
    pixels, depth = project_points(points, intrinsics, camera_to_base)
    x, y = (pixels[..., i, None, None] * (grid[1 - i] / size[1 - i]) - 0.5 for i in (0, 1))
    rows = torch.arange(grid[0], device=points.device, dtype=points.dtype)[:, None]
    columns = torch.arange(grid[1], device=points.device, dtype=points.dtype)
    square = (y - rows).square() + (x - columns).square()
    return torch.exp(-square / (2 * SPREAD**2)) * (depth > 0)[..., None, None]


class ConditionEncoder(nn.Module):
    """The short ways of given futures into the video transformer; they start at zero, so that they disturb nothing.

    Actions and the embodiment enter as the class does in DiT (Peebles & Xie 2023, arXiv 2212.09748, section 3.2). That
    a picture moved by geometry guides better than poses alone is known from GEN3C (Ren et al. 2025, arXiv 2503.03751).
    Of the moved pictures the video takes over `share` at the start: 1 where the network corrects a guess, so that it
    follows from the beginning, 0 where a network is to be disturbed by nothing. With `own_head` corrections of moved
    pictures have an output layer of their own: those of a picture that stands still are other ones.
    """

    def __init__(
        self,
        *,
        width: int,
        patch: int,
        latent_channels: int,
        views: int,
        points: int,
        action: int,
        stride: int,
        embodiments: int,
        share: float = 0.0,
        own_head: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.actions = FeedForward(width=stride * action, hidden=width, out=width)
        self.embodiment = nn.Embedding(embodiments, width)
        self.heat = nn.Linear(2 * (points + views) * patch**2, width, bias=False)
        self.moved = nn.Linear(latent_channels * patch**2, width, bias=False)
        self.gate = nn.Linear(width, patch**2)
        self.head = nn.Linear(width, latent_channels * patch**2) if own_head else None
        last = self.actions[-1]
        ways = (last, self.gate, self.embodiment, self.heat, self.moved, *([self.head] if self.head else []))
        for parameter in (p for way in ways for p in way.parameters()):
            nn.init.zeros_(parameter)
        nn.init.constant_(self.gate.bias, share)

    def forward(self, given: Given) -> Tensor:
        """What modulates the blocks beside the noise level, (B, F, W)."""
        actions = self.actions(given.actions) * given.has_actions[:, None, None]
        return actions + (self.embodiment(given.embodiment) * given.has_embodiment[:, None])[:, None]
