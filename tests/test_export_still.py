"""Folded weights encode a picture as the video encoder does."""

from typing import Any

import pytest
import torch

from export.still import still_pictures
from worldmodel.synthesis.autoencoder import VideoAutoencoder

COSMOS: dict[str, Any] = {
    "latent_channels": 6,
    "encoder_block_out_channels": [8, 8, 16, 16],
    "decode_block_out_channels": [8, 8, 16, 16],
    "num_layers": 2,
    "resolution": 32,
    "attention_resolutions": [8, 4],
}
SIZES: dict[str, dict[str, Any]] = {
    "space and time": {"spatial_compression_ratio": 8, "temporal_compression_ratio": 8},
    "space twice": {"spatial_compression_ratio": 16, "temporal_compression_ratio": 4},
    "time alone": {"spatial_compression_ratio": 4, "temporal_compression_ratio": 8},
    "neither": {"spatial_compression_ratio": 4, "temporal_compression_ratio": 4},
}


class Model:
    """What a model is to the fold."""

    def __init__(self, autoencoder: VideoAutoencoder) -> None:
        self.autoencoder = autoencoder


def made(name: str, config: dict[str, Any], shortcut: bool) -> VideoAutoencoder:
    """An autoencoder whose every weight, also those that start at zero, is random."""
    coder = VideoAutoencoder(
        name=name,
        channels=6,
        spatial=config.get("spatial_compression_ratio", 8),
        temporal=config.get("temporal_compression_ratio", 4),
        shortcut=shortcut,
        config=config | {"latents_mean": None, "latents_std": None} if name.endswith("Cosmos") else config,
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in coder.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    coder.get_buffer("mean").copy_(torch.randn(6, generator=generator))
    coder.get_buffer("std").copy_(torch.rand(6, generator=generator) + 0.5)
    return coder.eval()


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("patches", ["rearrange", "haar"])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_folded_encoder_is_the_encoder(sizes: str, patches: str, shortcut: bool) -> None:
    coder = made("AutoencoderKLCosmos", COSMOS | SIZES[sizes] | {"patch_type": patches}, shortcut)
    rgb = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        expected = coder.encode_frames(rgb)
        names = set(coder.state_dict())
        with still_pictures(Model(coder)):
            assert coder.still is not None
            found = coder.encode_frames(rgb)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert found.std() > 0.1
        # Nothing of it stays: training goes on with the encoder itself.
        assert coder.still is None and set(coder.state_dict()) == names
        assert all(parameter.requires_grad for parameter in coder.parameters())
        coder.net.encoder.conv_in.conv_s.weight.mul_(2)
        assert not torch.allclose(coder.encode_frames(rgb), expected, rtol=1e-3)


def test_other_tokenisers_are_exported_as_they_are() -> None:
    config = {"base_dim": 8, "z_dim": 6, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    config |= {"latents_mean": [0.0] * 6, "latents_std": [1.0] * 6}
    coder = made("AutoencoderKLWan", config, shortcut=False)
    with still_pictures(Model(coder)):
        assert coder.still is None
    with still_pictures(object()):
        pass
