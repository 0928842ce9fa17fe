"""Where things are, read from high-resolution maps of the newest images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from worldmodel.contracts import Senses
from worldmodel.nn import FeedForward, modulate


def convolution(before: int, out: int, stride: int = 1) -> nn.Sequential:
    """3 × 3 convolution, group norm, SiLU."""
    return nn.Sequential(nn.Conv2d(before, out, 3, stride, padding=1), nn.GroupNorm(4, out), nn.SiLU())


class Keypoints(nn.Module):
    """One view's image and the instruction -> places in the image, how sure they are, and what is seen there.

    Every keypoint is the mean place of a softmax over a map of a quarter of the image's size (spatial softmax: Levine
    et al. 2016, arXiv 1504.00702, section 5.1), so it lies between cells; a token of a coarse grid cannot tell
    centimetres. What the maps look for depends on the instruction by a scale and a shift of each channel (Perez et al.
    2018, arXiv 1709.07871).
    """

    def __init__(self, *, channels: Sequence[int], keypoints: int, instruction: int, size: tuple[int, int]) -> None:
        super().__init__()
        first, second = channels
        self.stem = nn.Sequential(
            convolution(3, first, 2),
            convolution(first, first),
            convolution(first, second, 2),
            convolution(second, second),
        )
        self.film = nn.Linear(instruction, 2 * second)
        self.last = convolution(second, second)
        self.maps = nn.Conv2d(second, keypoints, 1)
        self.sharpness = nn.Parameter(torch.ones(keypoints))
        self.size = (size[0] // 4, size[1] // 4)
        self.features = 3 * keypoints + second

    def forward(self, rgb: Tensor, instruction: Tensor) -> Tensor:
        """rgb (B, 3, h, w) in [-1, 1], instruction (B, W) -> (B, features); x and y from -1 to 1, right and down."""
        x = self.stem(rgb)
        scale, shift = self.film(instruction)[..., None, None].chunk(2, 1)
        x = self.last(modulate(x, scale, shift))
        # A traced graph has one size, and asking for it would make a constant of it with a warning.
        rows, columns = self.size if is_tracing() else x.shape[-2:]
        down, right = (torch.linspace(-1, 1, n, device=x.device, dtype=x.dtype) for n in (rows, columns))
        logits = self.maps(x)
        share = (logits * self.sharpness.exp()[:, None, None]).flatten(2).softmax(-1)
        planes = share.unflatten(-1, (rows, columns))
        places = [(planes.sum(2) * right).sum(-1), (planes.sum(3) * down).sum(-1)]
        seen = (share.mean(1, keepdim=True) * x.flatten(2)).sum(-1)
        return torch.cat([*places, (share * logits.flatten(2)).sum(-1), seen], -1)


class KeypointHead(nn.Module):
    """Tracked points from the keypoints of all views, the instruction and, where present, proprioception and the
    cameras' poses. It shares nothing with the tokens of images: those are made for the network that reads them."""

    def __init__(
        self,
        *,
        views: int,
        points: int,
        proprio: int,
        instruction: int,
        embodiments: int,
        channels: Sequence[int],
        keypoints: int,
        hidden: int,
        size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.views = nn.ModuleList(
            Keypoints(channels=channels, keypoints=keypoints, instruction=instruction, size=size) for _ in range(views)
        )
        self.embodiment = nn.Embedding(embodiments, instruction)
        features = 3 * keypoints + channels[-1]
        self.read = FeedForward(
            width=views * (features + 1 + 16) + proprio + 1 + instruction, hidden=hidden, out=hidden
        )
        self.out = FeedForward(width=hidden, hidden=hidden, out=3 * points)

    def forward(self, s: Senses, instruction: Tensor, images: bool = True) -> Tensor:
        """Senses and instruction (B, W) -> standardised points (B, K, 3). Without `images`, no view is looked at."""
        task = instruction + self.embodiment(s.embodiment)
        parts = [task]
        for number, view in enumerate(self.views):
            here, posed = s.has_rgb[:, number, None], s.has_camera[:, number, None]
            if images:
                seen = view(s.rgb[:, number], task)
            else:
                here, seen = torch.zeros_like(here), task.new_zeros(len(task), view.features)
            flags = torch.cat([here, posed], -1).to(task.dtype)
            # The ray through one corner tells the lens beside the pose.
            pose = torch.cat([s.camera[:, -1, number], s.rays[:, -1, number, :, 0, 0]], -1)
            parts += [torch.where(here, seen, 0.0), torch.where(posed, pose, 0.0), flags]
        here = s.has_proprio[:, None]
        parts += [torch.where(here, s.proprio[:, -1], 0.0), here.to(task.dtype)]
        return self.out(nn.functional.silu(self.read(torch.cat(parts, -1)))).unflatten(-1, (-1, 3))
