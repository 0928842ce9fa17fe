"""The tokeniser: a causal video autoencoder of diffusers, with standardised latents.

It compresses four frames into one latent in time and the first frame alone. History therefore enters as single-frame
latents (no wait for four frames), the future as temporal latents after the last observed frame.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from worldmodel.errors import ConfigError


class VideoAutoencoder(nn.Module):
    """Wraps a diffusers video autoencoder named by its class (`AutoencoderKLCosmos`, `AutoencoderKLWan`, ...)."""

    def __init__(self, *, name: str, channels: int, spatial: int, temporal: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        import diffusers

        if not hasattr(diffusers, name):
            known = sorted(n for n in dir(diffusers) if n.startswith("AutoencoderKL"))
            raise ConfigError(f"diffusers has no autoencoder {name!r}; it has {', '.join(known)}")
        self.channels, self.spatial, self.temporal = channels, spatial, temporal
        self.net = getattr(diffusers, name)(**dict(config))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def encode_raw(self, video: Tensor) -> Tensor:
        """video (B, 3, T, h, w) in [-1, 1] -> most likely latents (B, C, T', h', w'), not standardised."""
        return self.net.encode(video).latent_dist.mode()

    def sample(self, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A draw of the latents and its regulariser: KL to a standard normal, or the mean square of an autoencoder
        that is not variational."""
        posterior = self.net.encode(video).latent_dist
        if not hasattr(posterior, "logvar"):
            latents = posterior.mode()
            return latents, latents.square().mean()
        mean, logvar = posterior.mean, posterior.logvar.clamp(-20, 4)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return mean + noise * (0.5 * logvar).exp(), 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()

    def set_scale(self, latents: Tensor) -> None:
        """Sets mean and standard deviation from sample latents (B, C, ...), so that what stage 2 sees is standard."""
        flat = latents.transpose(0, 1).flatten(1)
        self.get_buffer("mean").copy_(flat.mean(1))
        self.get_buffer("std").copy_(flat.std(1).clamp(min=1e-3))

    def standardise(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, T', h', w') -> standardised (B, T', C, h', w')."""
        return ((latents.transpose(1, 2) - self.column("mean")) / self.column("std")).contiguous()

    def column(self, name: str) -> Tensor:
        """A per-channel buffer as (C, 1, 1)."""
        return self.get_buffer(name)[:, None, None]

    def encode_frames(self, rgb: Tensor) -> Tensor:
        """Single images (N, 3, h, w) in [-1, 1] -> standardised latents (N, C, h', w')."""
        return self.standardise(self.encode_raw(rgb.unsqueeze(2)))[:, 0]

    def encode_future(self, last: Tensor, future: Tensor) -> Tensor:
        """Last observed frame (N, 3, h, w) and F * R frames after it (N, F*R, 3, h, w) -> latents (N, F, C, h', w')."""
        video = torch.cat([last.unsqueeze(1), future], dim=1).transpose(1, 2)
        return self.standardise(self.encode_raw(video))[:, 1:]

    def decode(self, first: Tensor, future: Tensor) -> Tensor:
        """Latents of the last frame (N, C, h', w') and after it (N, F, C, h', w') -> frames (N, 1 + F*R, 3, h, w)."""
        latents = torch.cat([first.unsqueeze(1), future], dim=1) * self.column("std") + self.column("mean")
        return self.net.decode(latents.transpose(1, 2)).sample.transpose(1, 2)


def carry_residual(decoded: Tensor, last: Tensor, sharpness: float = 40.0) -> Tensor:
    """Keeps what a small tokeniser blurs: adds the known error of the last frame where a frame has not changed.

    decoded (N, 1 + T, 3, h, w) with the reconstruction of the last frame first, last (N, 3, h, w) as it was seen, both
    in [-1, 1]. Where the decoded change is large, the error no longer belongs there and is faded out exponentially.
    Returns the T future frames.
    """
    first, future = decoded[:, :1], decoded[:, 1:]
    change = (future - first).abs().mean(2, keepdim=True)
    return future + torch.exp(-sharpness * change**2 / 0.1) * (last.unsqueeze(1) - first)
