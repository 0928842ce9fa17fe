"""The tokeniser for single pictures, as graphs hold it: what time does to one frame alone is folded into its weights.

A causal video encoder repeats the first frame where it looks back in time. For a picture alone that makes a convolution
over time a sum of its weights, temporal attention a pair of linear layers, and most of what follows one another one
convolution: less than half of the operators, none of them in three dimensions. Exact but for rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Affine(NamedTuple):
    """Weights (O, I, h, w) and bias (O,) of a convolution over one picture."""

    weight: Tensor
    bias: Tensor

    def then(self, after: "Affine") -> "Affine":
        """With a convolution of size 1 after it."""
        matrix = after.weight[:, :, 0, 0]
        return Affine(torch.einsum("oi,ijhw->ojhw", matrix, self.weight), matrix @ self.bias + after.bias)

    def plus(self, inside: slice, share: float) -> "Affine":
        """With `share` of the input's own channel added where `inside` is."""
        weight, size = self.weight.clone(), len(self.bias)
        weight[:, :, inside, inside] += share * torch.eye(size)[:, :, None, None].to(weight)
        return Affine(weight, self.bias)

    def module(self, stride: int = 1, padding: int = 0) -> nn.Conv2d:
        """As a layer."""
        rows, columns, *kernel = self.weight.shape
        made = nn.Conv2d(columns, rows, (kernel[0], kernel[1]), stride, padding)
        made.load_state_dict({"weight": self.weight, "bias": self.bias})
        return made.to(self.weight)


def still(convolution: nn.Conv3d) -> Affine:
    """A causal convolution of a frame that is repeated backwards."""
    assert convolution.bias is not None
    return Affine(convolution.weight.sum(2), convolution.bias)


def projection(layer: Any) -> Affine:
    """A convolution in space and the one in time after it."""
    return still(layer.conv_s).then(still(layer.conv_t))


class StillResidual(nn.Module):
    """A residual block of the encoder."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList([deepcopy(block.norm1.norm), deepcopy(block.norm2.norm)])
        self.layers = nn.ModuleList(
            [projection(block.conv1).module(padding=1), projection(block.conv2).module(padding=1)]
        )
        short = block.conv_shortcut
        self.shortcut = still(short).module() if isinstance(short, nn.Conv3d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h, w)."""
        left = self.shortcut(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = layer(F.silu(norm(x)))
        return left + x


class StillAttention(nn.Module):
    """Attention within a picture, and what attention over time is for a picture alone: its values."""

    def __init__(self, spatial: Any, temporal: Any) -> None:
        super().__init__()
        self.norm, self.heads = deepcopy(spatial.norm.norm), spatial.num_attention_heads
        parts = [still(layer) for layer in (spatial.to_q, spatial.to_k, spatial.to_v)]
        self.qkv = Affine(torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])).module()
        self.out = still(spatial.to_out[0]).module()
        self.norm_time = deepcopy(temporal.norm.norm)
        self.time = still(temporal.to_v).then(still(temporal.to_out[0])).module()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2)
        x = x + self.out(mixed.unflatten(2, x.shape[2:]))
        return x + self.time(self.norm_time(x))


class StillDown(nn.Module):
    """Halves a picture where the encoder halves space."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.spatial = layer.spatial_downsample
        eye = torch.eye(layer.conv3.in_channels)[:, :, None, None].to(layer.conv3.weight)
        made = Affine(eye, torch.zeros_like(layer.conv3.bias))
        if self.spatial:
            made = still(layer.conv1).plus(slice(0, 2), 0.25)  # beside it the mean of two by two
        if layer.temporal_downsample:
            made = made.then(still(layer.conv2).plus(slice(0, 1), 1.0))
        self.layer = made.then(still(layer.conv3)).module(2 if self.spatial else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h / 2, w / 2), or (N, C, h, w)."""
        return self.layer(F.pad(x, (0, 1, 0, 1)) if self.spatial else x)


class StillCosmos(nn.Module):
    """A copy of what `VideoAutoencoder.encode_frames` does with an `AutoencoderKLCosmos`, in fewer operators."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        encoder = autoencoder.net.encoder
        first = projection(encoder.conv_in)
        self.patch = encoder.patch_embed
        self.unshuffle: int = self.patch.patch_size if self.patch.patch_method == "rearrange" else 0
        if self.unshuffle:  # the same picture at every place in time of a patch
            first = Affine(first.weight.unflatten(1, (3, self.unshuffle, -1)).sum(2).flatten(1, 2), first.bias)
        layers: list[nn.Module] = [first.module(padding=1)]
        for block in encoder.down_blocks:
            for resnet, spatial, temporal in zip(block.resnets, block.attentions, block.temp_attentions, strict=True):
                layers += [StillResidual(resnet)] + ([] if spatial is None else [StillAttention(spatial, temporal)])
            for layer in block.downsamplers or ():
                layers += [StillDown(layer)] if layer.spatial_downsample or layer.temporal_downsample else []
        middle = encoder.mid_block
        layers.append(StillResidual(middle.resnets[0]))
        for spatial, temporal, resnet in zip(
            middle.attentions, middle.temp_attentions, middle.resnets[1:], strict=True
        ):
            layers += [StillAttention(spatial, temporal), StillResidual(resnet)]
        mean, std = autoencoder.mean, autoencoder.std
        scale = Affine(torch.diag(1 / std)[:, :, None, None], -mean / std)
        last = projection(encoder.conv_out).then(still(autoencoder.net.quant_conv)).then(scale)
        self.layers = nn.Sequential(*layers, deepcopy(encoder.norm_out.norm), nn.SiLU(), last.module(padding=1))
        self.shortcut: nn.Module | None = None
        if (short := autoencoder.shortcut) is not None:
            linear, size = short.encoders[0], short.spatial
            patches = Affine(linear.weight.unflatten(1, (3, size, size)), linear.bias)
            self.shortcut = patches.then(scale._replace(bias=torch.zeros_like(mean))).module(size)

    def forward(self, rgb: Tensor) -> Tensor:
        """Single images (N, 3, h, w) in [-1, 1] -> standardised latents (N, C, h', w')."""
        patches = F.pixel_unshuffle(rgb, self.unshuffle) if self.unshuffle else self.patch(rgb.unsqueeze(2)).squeeze(2)
        latents = self.layers(patches)
        return latents if self.shortcut is None else latents + self.shortcut(rgb)


@contextmanager
def still_pictures(model: Any) -> Iterator[None]:
    """Within it, `model` encodes single pictures with folded weights, if its tokeniser is one that can be folded."""
    autoencoder = getattr(model, "autoencoder", None)
    if type(getattr(autoencoder, "net", None)).__name__ != "AutoencoderKLCosmos":
        yield
        return
    assert autoencoder is not None
    with torch.no_grad():
        autoencoder.still = StillCosmos(autoencoder).eval().requires_grad_(False)
    try:
        yield
    finally:
        autoencoder.still = None
