"""Images to tokens by a vision transformer of transformers: SigLIP, SigLIP 2, DINOv2, DINOv3, CLIP, ViT."""

import inspect
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from worldmodel.encoders.feature_store import key_of, pixels_of
from worldmodel.encoders.pretrained import Pretrained
from worldmodel.errors import ConfigError
from worldmodel.nn import at_grid

PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


def normalisation(option: str, path: str | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel that a network wants, in [0, 1]: what its folder says, else 0.5.

    Raises `ConfigError` if the folder does not say.
    """
    if path is None:
        return [0.5] * 3, [0.5] * 3
    for name in PREPROCESSORS:
        if (file := Path(path) / name).is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            content = content.get("image_processor", content)
            if {"image_mean", "image_std"} <= set(content):
                return list(content["image_mean"]), list(content["image_std"])
    raise ConfigError(f"{option}.path: {path} has no image_mean and image_std in {' or '.join(PREPROCESSORS)}")


class Resize(nn.Module):
    """Pictures (N, 3, h, w) in [-1, 1] of `size`, or another -> (N, 3, H, W) of `pixels`, standardised as a network
    wants them.

    Bilinear with antialiasing as two matrix products, which every exporter has.
    """

    def __init__(
        self, *, size: tuple[int, int], pixels: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.size, self.pixels = (size[0], size[1]), pixels
        for name, before, after in zip(("rows", "columns"), size, pixels, strict=True):
            self.register_buffer(name, resampling(before, after), persistent=False)
        scale = 1 / torch.tensor(std)
        self.register_buffer("scale", 0.5 * scale[:, None, None], persistent=False)
        self.register_buffer("shift", ((0.5 - torch.tensor(mean)) * scale)[:, None, None], persistent=False)

    def forward(self, rgb: Tensor) -> Tensor:
        """-> (N, 3, H, W)."""
        rows, columns = self.get_buffer("rows"), self.get_buffer("columns")
        if (shown := shown_size(rgb, self.size)) != self.size:
            rows, columns = (resampling(*sides).to(rgb) for sides in zip(shown, self.pixels, strict=True))
        seen = rows @ rgb @ columns.mT
        return seen * self.get_buffer("scale") + self.get_buffer("shift")


def shown_size(rgb: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of pictures, which are of `size` in a graph that is being traced."""
    return size if is_tracing() else (rgb.shape[-2], rgb.shape[-1])


def resampling(before: int, after: int) -> Tensor:
    """Matrix (after, before) of bilinear resampling with antialiasing along one axis."""
    return F.interpolate(torch.eye(before)[None, None], (after, before), mode="bilinear", antialias=True)[0, 0]


class VisionBackbone(Pretrained):
    """Pictures (N, 3, h, w) in [-1, 1] -> features (N, cells, D): patches of the last layer, averaged over cells."""

    def __init__(
        self,
        *,
        path: str | None,
        config: Mapping[str, Any],
        frozen: bool,
        size: tuple[int, int],
        cells: tuple[int, int],
        pixels: tuple[int, int] | None,
    ) -> None:
        super().__init__(option="encoders.image", path=path, config=config, frozen=frozen)
        # Models of image and text are taken apart; heads that pool the patches are not read.
        self.net = vision_part(self.net)
        own = self.net.config
        if self.net.main_input_name != "pixel_values" or not isinstance(getattr(own, "patch_size", None), int):
            raise ConfigError(
                f"encoders.image.{'config' if path is None else f'path: {path}'} is a {own.model_type}, which is no "
                "vision transformer; siglip, siglip2, dinov2, dinov3_vit, clip and vit are"
            )
        image = getattr(own, "image_size", None) or own.patch_size * int(own.num_patches**0.5)
        self.pixels = pixels or (image, image)
        self.patch = own.patch_size
        if any(side % self.patch for side in self.pixels):
            raise ConfigError(
                f"encoders.image.pixels: {self.pixels} is no multiple of {self.patch}, the patch of {own.model_type}"
            )
        self.grid = (self.pixels[0] // self.patch, self.pixels[1] // self.patch)
        self.width: int = own.hidden_size
        self.patched = own.model_type == "siglip2_vision_model"
        for axis in (0, 1) if self.patched else ():
            stretch = resampling(int(own.num_patches**0.5), self.grid[axis])
            self.register_buffer(f"stretch_{axis}", stretch, persistent=False)
        able = "interpolate_pos_encoding" in inspect.signature(self.net.forward).parameters
        self.extra = {"interpolate_pos_encoding": True} if able and self.pixels != (image, image) else {}
        self.mean, self.std = normalisation(self.option, path)
        self.cells = cells
        self.resize = Resize(size=size, pixels=self.pixels, mean=self.mean, std=self.std)
        self.register_buffer("pool", pooling(self.grid, cells), persistent=False)
        self.net.requires_grad_(not frozen).eval()

    def settings(self) -> dict[str, Any]:
        """What features depend on beside the weights."""
        return {"pixels": self.pixels, "cells": self.cells, "mean": self.mean, "std": self.std}

    def forward(self, rgb: Tensor) -> Tensor:
        """-> (N, cells, D)."""
        if self.store is None:
            return self.run(rgb).float()
        return torch.stack(self.recall(self.keys(rgb), rgb.device, lambda places: list(self.run(rgb[places]))))

    def keys(self, rgb: Tensor) -> list[int]:
        """What the features of pictures (N, 3, h, w) are stored under."""
        return [key_of(pixels) for pixels in pixels_of(rgb)]

    def examples(
        self, text: Tensor, has_text: Tensor, rgb: Tensor, has_rgb: Tensor, *, known: Container[int], silent: bool
    ) -> dict[int, Tensor]:
        """Features of the images that are there, and of the black one that stands where a view is absent."""
        images = torch.cat([rgb[has_rgb], torch.full_like(rgb[:1, 0], -1.0)])
        new = {key: place for place, key in enumerate(self.keys(images)) if key not in known}
        return dict(zip(new, self.run(images[list(new.values())]), strict=True)) if new else {}

    def run(self, rgb: Tensor) -> Tensor:
        """The network itself; its answer has its own precision."""
        gradients, precision = self.running(rgb.device)
        with gradients, precision:
            x = self.resize(rgb).to(self.net.dtype)
            hidden = self.read_patches(x) if self.patched else self.net(pixel_values=x, **self.extra).last_hidden_state
            patches = hidden[:, -self.grid[0] * self.grid[1] :]  # after those of the class and registers
            pool, cells = self.get_buffer("pool"), self.cells_of(rgb)
            if cells != self.cells:
                pool = pooling(self.grid, cells).to(pool)
            return (pool @ patches.float()).to(patches.dtype)

    def cells_of(self, rgb: Tensor) -> tuple[int, int]:
        """Cells of pictures, which are as large in one of another size as in one of the size of the data."""
        own, shown = self.resize.size, shown_size(rgb, self.resize.size)
        return (self.cells[0] * shown[0] // own[0], self.cells[1] * shown[1] // own[1])

    def read_patches(self, x: Tensor) -> Tensor:
        """Hidden states (N, patches, D) of SigLIP 2 for pictures (N, 3, H, W) of one size.

        Its own forward checks the sizes of padded pictures in a way that no graph can hold.
        """
        n, (rows, columns), p = x.shape[0], self.grid, self.patch
        x = x.reshape(n, 3, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).reshape(n, rows * columns, -1)
        embed = self.net.embeddings
        square = embed.position_embedding.weight.float().unflatten(0, (embed.position_embedding_size, -1))
        stretched = torch.einsum("ri,cj,ijd->rcd", self.get_buffer("stretch_0"), self.get_buffer("stretch_1"), square)
        x = embed.patch_embedding(x) + stretched.flatten(0, 1).to(x.dtype)
        return self.net.post_layernorm(self.net.encoder(inputs_embeds=x).last_hidden_state)


def pooling(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Matrix (cells, patches) that averages the patches of a grid over cells."""
    identity = torch.eye(grid[0] * grid[1]).unflatten(1, grid)
    return F.interpolate(identity[None], cells, mode="area")[0].flatten(1).T


def vision_part(net: Any) -> Any:
    """The part of a network that reads images, without a head that pools its patches."""
    net = getattr(net, "vision_model", net)
    if getattr(net, "use_head", False):
        net.use_head = False
        del net.head
    if getattr(net, "pooler", None) is not None:
        net.pooler = None
    return net


class VisionEncoder(nn.Module):
    """Images (B, V, 3, h, w) in [-1, 1] -> tokens (B, V, rows * columns, W), as `rgb.ImageEncoder` gives them.

    Args:
        width: of the tokens.
        size: rows and columns of the pictures as the data have them.
        cells: rows and columns of tokens that a picture becomes.
        path: folder of a vision transformer as transformers saves it, with its preprocessor; null builds `config` with
            random weights.
        config: `model_type` and sizes.
        pixels: rows and columns of the pictures as the network gets them; null is what it was trained with.
        frozen: whether it keeps its weights; what projects its features to `width` trains in any case.
    """

    def __init__(
        self,
        *,
        width: int,
        size: tuple[int, int],
        cells: tuple[int, int],
        path: str | None,
        config: Mapping[str, Any],
        pixels: tuple[int, int] | None = None,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        size, cells = (size[0], size[1]), (cells[0], cells[1])
        pixels = None if pixels is None else (pixels[0], pixels[1])
        self.backbone = VisionBackbone(path=path, config=config, frozen=frozen, size=size, cells=cells, pixels=pixels)
        self.project = nn.Sequential(nn.LayerNorm(self.backbone.width), nn.Linear(self.backbone.width, width))
        self.position = nn.Parameter(torch.randn(cells[0] * cells[1], width) * 0.02)

    def forward(self, rgb: Tensor) -> Tensor:
        """-> (B, V, rows * columns, W)."""
        features = self.backbone(rgb.flatten(0, 1))
        position = at_grid(self.position, self.backbone.cells, self.backbone.cells_of(rgb))
        return (self.project(features) + position).unflatten(0, rgb.shape[:2])
