"""The tokeniser: a causal video autoencoder of diffusers, with standardised latents.

It compresses four frames into one latent in time and the first frame alone. History therefore enters as single-frame
latents (no wait for four frames), the future as temporal latents after the last observed frame.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldmodel.draws import Draws
from worldmodel.errors import ConfigError


class PatchShortcut(nn.Module):
    """Linear path around a small autoencoder: the first frame's patches, and each later group of frames, to latents.

    `fit` sets it to the principal components of the data, so that a freshly built tokeniser already reconstructs as
    well as a linear one and training spends its steps on the rest (residual autoencoding as in Chen et al. 2024,
    DC-AE, arXiv 2410.10733, with a fitted instead of a fixed shortcut). It keeps the causality of the autoencoder.
    """

    def __init__(self, *, channels: int, spatial: int, temporal: int) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        sizes = (3 * spatial**2, 3 * temporal * spatial**2)
        self.encoders = nn.ModuleList(nn.Linear(size, channels) for size in sizes)
        self.decoders = nn.ModuleList(nn.Linear(channels, size) for size in sizes)

    def patches(self, frames: Tensor, group: int) -> Tensor:
        """(B, 3, n group, h, w) -> (B, n, h', w', 3 group spatial^2)."""
        b, c, t, h, w = frames.shape
        p = self.spatial
        x = frames.reshape(b, c, t // group, group, h // p, p, w // p, p)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)

    def frames(self, patches: Tensor, group: int) -> Tensor:
        """Inverse of `patches`."""
        b, n, rows, columns, _ = patches.shape
        p = self.spatial
        x = patches.reshape(b, n, rows, columns, 3, group, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(b, 3, n * group, rows * p, columns * p)

    def encode(self, video: Tensor) -> Tensor:
        """video (B, 3, 1 + n R, h, w) -> latents (B, C, 1 + n, h', w')."""
        parts = [self.encoders[0](self.patches(video[:, :, :1], 1))]
        if video.shape[2] > 1:
            parts.append(self.encoders[1](self.patches(video[:, :, 1:], self.temporal)))
        return torch.cat(parts, 1).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, 1 + n, h', w') -> video (B, 3, 1 + n R, h, w)."""
        x = latents.movedim(1, -1)
        parts = [self.frames(self.decoders[0](x[:, :1]), 1)]
        if x.shape[1] > 1:
            parts.append(self.frames(self.decoders[1](x[:, 1:]), self.temporal))
        return torch.cat(parts, 2)

    @torch.no_grad()
    def fit(self, video: Tensor) -> None:
        """Principal components of the patches of sample clips, scaled to latents of unit variance."""
        for i, (frames, group) in enumerate(((video[:, :, :1], 1), (video[:, :, 1:], self.temporal))):
            x = self.patches(frames, group).flatten(0, 3)
            mean = x.mean(0)
            variance, axes = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
            encoder, decoder = self.encoders[i], self.decoders[i]
            assert isinstance(encoder, nn.Linear) and isinstance(decoder, nn.Linear)
            scale = variance[-encoder.out_features :].clamp(min=1e-8).sqrt()
            axes = axes[:, -len(scale) :]
            encoder.weight.copy_(axes.T / scale[:, None])
            encoder.bias.copy_(-(axes.T @ mean) / scale)
            decoder.weight.copy_(axes * scale)
            decoder.bias.copy_(mean)


class VideoAutoencoder(nn.Module):
    """Wraps a diffusers video autoencoder named by its class (`AutoencoderKLCosmos`, `AutoencoderKLWan`, ...).

    Built from `config`, or loaded from the folder `path` as diffusers saves it (`config.json` and safetensors).
    `shortcut` adds a `PatchShortcut`; leave it off for published weights.
    """

    def __init__(
        self,
        *,
        name: str,
        channels: int,
        spatial: int,
        temporal: int,
        shortcut: bool,
        config: Mapping[str, Any],
        path: str | None = None,
    ) -> None:
        super().__init__()
        import diffusers

        known = sorted(n for n in dir(diffusers) if n.startswith("AutoencoderKL"))
        if name not in known:
            raise ConfigError(f"diffusers has no autoencoder {name!r}; it has {', '.join(known)}")
        self.channels, self.spatial, self.temporal = channels, spatial, temporal
        self.still: nn.Module | None = None
        """What encodes single pictures instead while the model is exported, see `export.still`."""
        with torch.device("cpu"):  # importing makes constants that all models share, one on the meta device too
            kind = getattr(diffusers, name)
        if path is None:
            self.net = kind(**dict(config))
        elif (Path(path) / "config.json").is_file():
            self.net = kind.from_pretrained(path, local_files_only=True, use_safetensors=True)
        else:
            raise ConfigError(f"synthesis.autoencoder.path: {path} has no config.json; diffusers saves such a folder")
        self.shortcut = PatchShortcut(channels=channels, spatial=spatial, temporal=temporal) if shortcut else None
        if self.shortcut is not None:
            # The shortcut starts alone: the last layer of both halves, and what follows the encoder's, gives zero.
            outer = [
                *list(self.net.encoder.conv_out.parameters())[-2:],
                *list(self.net.decoder.conv_out.parameters())[-2:],
            ]
            quant = getattr(self.net, "quant_conv", None)
            for parameter in [*outer, *([] if quant is None else [p for p in quant.parameters() if p.dim() == 1])]:
                nn.init.zeros_(parameter)
        # Published autoencoders state the scale of their latents; for others it is set after training.
        for moment, fill in (("mean", 0.0), ("std", 1.0)):
            known = getattr(self.net.config, f"latents_{moment}", None) or [fill] * channels
            if len(known) != channels:
                raise ConfigError(f"synthesis.autoencoder: channels is {channels}, but {name} here has {len(known)}")
            self.register_buffer(moment, torch.tensor(known))

    def encode_raw(self, video: Tensor) -> Tensor:
        """video (B, 3, T, h, w) in [-1, 1] -> most likely latents (B, C, T', h', w'), not standardised."""
        latents = self.net.encode(video).latent_dist.mode()
        return latents if self.shortcut is None else self.shortcut.encode(video) + latents

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Latents (B, C, T', h', w'), not standardised -> video (B, 3, T, h, w)."""
        video = self.net.decode(latents).sample
        return video if self.shortcut is None else self.shortcut.decode(latents) + video

    def sample(self, video: Tensor, generator: Draws) -> tuple[Tensor, Tensor]:
        """A draw of the latents and its regulariser: KL to a standard normal, or the mean square of an autoencoder
        that is not variational."""
        posterior = None if self.shortcut is not None else self.net.encode(video).latent_dist
        if posterior is None or not hasattr(posterior, "logvar"):
            latents = self.encode_raw(video)
            return latents, latents.square().mean()
        mean, logvar = posterior.mean, posterior.logvar.clamp(-20, 4)
        noise = generator.randn(*mean.shape).to(mean)
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
        if self.still is not None:
            return self.still(rgb)
        return self.standardise(self.encode_raw(rgb.unsqueeze(2)))[:, 0]

    def encode_future(self, last: Tensor, future: Tensor) -> Tensor:
        """Last observed frame (N, 3, h, w) and F * R frames after it (N, F*R, 3, h, w) -> latents (N, F, C, h', w')."""
        video = torch.cat([last.unsqueeze(1), future], dim=1).transpose(1, 2)
        return self.standardise(self.encode_raw(video))[:, 1:]

    def decode(self, first: Tensor, future: Tensor) -> Tensor:
        """Latents of the last frame (N, C, h', w') and after it (N, F, C, h', w') -> frames (N, 1 + F*R, 3, h, w)."""
        latents = torch.cat([first.unsqueeze(1), future], dim=1) * self.column("std") + self.column("mean")
        return self.decode_raw(latents.transpose(1, 2)).transpose(1, 2)


def carry_residual(
    decoded: Tensor, rebuilt: Tensor, seen: Tensor, fade: float = 0.2, hold: float = 0.15, window: int = 11
) -> Tensor:
    """Keeps what a small tokeniser blurs: pictures change where the decoded change is visible, and stay elsewhere.

    decoded (N, T, 3, h, w) is what was predicted, seen (N, 1 or T, 3, h, w) the pictures that it changes - the last
    frame, or one for each - and rebuilt the same through the tokeniser, all in [-1, 1]. The known error of `rebuilt` is
    added where a pixel has not changed; where the decoded change is large it no longer belongs there: it falls to 1/e
    at a change of `fade`. A change whose mean over `window` pixels is small against `hold` is taken for an error of the
    decoder and held back. Returns T frames.
    """
    change = (decoded - rebuilt).abs().mean(2, keepdim=True)
    sharp = decoded + torch.exp(-((change / fade) ** 2)) * (seen - rebuilt)
    around = F.avg_pool2d(change.flatten(0, 1), window, 1, window // 2, count_include_pad=False).view_as(change)
    return seen + (1 - torch.exp(-((around / hold) ** 2))) * (sharp - seen)
