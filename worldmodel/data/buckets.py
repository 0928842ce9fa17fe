"""Buckets: the sizes of picture and lengths of future that the batches of a phase come in, one bucket a batch.

Pictures of any size are brought to that of a bucket, and the intrinsics of their cameras with them. Batches of small
or short clips hold more of them, so that every batch has about as many tokens as one of the largest clips.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from worldmodel.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Pictures of `height` × `width` pixels, `future` latent frames; `weight` is how often, beside the others."""

    height: int
    width: int
    future: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.future) < 1 or self.weight < 0:
            raise ConfigError(
                f"bucket of {self.height} × {self.width} pixels, {self.future} latent frames, weight {self.weight}: "
                "sizes are 1 or more, weights 0 or more"
            )


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of a clip: `views` pictures a frame in cells of `cell` × `cell` pixels, and `others` of other streams.

    Sides of pictures must be multiples of `multiple` pixels, so that cells and what is read of several cells come out
    whole.
    """

    views: int
    cell: int
    multiple: int
    others: int
    history: int

    def picture(self, bucket: Bucket) -> int:
        """Tokens of a single frame of pictures alone.

        Raises `ConfigError` for a size that is not whole.
        """
        if bucket.height % self.multiple or bucket.width % self.multiple:
            raise ConfigError(
                f"bucket of {bucket.height} × {bucket.width} pixels: this model needs sides that are multiples of "
                f"{self.multiple}"
            )
        return self.views * (bucket.height // self.cell) * (bucket.width // self.cell)

    def clip(self, bucket: Bucket) -> int:
        """Tokens of history and future."""
        return (self.history + bucket.future) * (self.picture(bucket) + self.others)


def batch_sizes(
    batch_size: int, counts: TokenCounts, buckets: tuple[Bucket, ...], *, chunks: int, pictures: bool
) -> dict[tuple[Bucket, bool], int]:
    """How many rows a batch has, by bucket and by whether it is of single pictures instead of clips.

    `batch_size` is that of the rows with most tokens; others come in as many as have no more tokens together. A row
    has `chunks` clips, 0 if all batches are of single pictures; `pictures` says whether any are.
    """
    buckets = tuple(bucket for bucket in buckets if bucket.weight)
    tokens = {(bucket, False): chunks * counts.clip(bucket) for bucket in buckets if chunks}
    tokens |= {(bucket, True): counts.picture(bucket) for bucket in buckets if pictures}
    budget = batch_size * max(tokens.values())
    return {key: budget // count for key, count in tokens.items()}


def cover(pictures: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 3, h, w) uint8 of another size (n, 3, H, W), and what that makes of pixel coordinates.

    They are scaled until they cover the new size, with antialiasing, and cut to it around their centre. Returns also
    the matrix (3, 3) float32 that takes old homogeneous pixel coordinates to new ones; times it, intrinsics stay true.
    """
    old = (pictures.shape[2], pictures.shape[3])
    scale = max(new / before for new, before in zip(size, old, strict=True))
    whole = [max(round(before * scale), new) for new, before in zip(size, old, strict=True)]
    if whole != list(old):
        # The corner of a picture is (0, 0), so that scaling moves no coordinate by half a pixel.
        scaled = F.interpolate(torch.from_numpy(np.ascontiguousarray(pictures)), whole, mode="bilinear", antialias=True)
        pictures = scaled.numpy()
    top, left = ((have - new) // 2 for have, new in zip(whole, size, strict=True))
    matrix = np.array([[whole[1] / old[1], 0, -left], [0, whole[0] / old[0], -top], [0, 0, 1]], np.float32)
    return pictures[:, :, top : top + size[0], left : left + size[1]], matrix


def make_bucket(values: Mapping[str, object]) -> Bucket:
    """A bucket from plain values. Raises `ConfigError` for a field that it does not have."""
    known = Bucket.__dataclass_fields__
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"buckets: unknown field {unknown[0]!r}; a bucket has {', '.join(known)}")
    return Bucket(**values)  # pyright: ignore[reportArgumentType]
