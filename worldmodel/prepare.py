"""What a phase looks at before it trains: clips that fix scales, and the latents of all frames."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from worldmodel.contracts import Batch, ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.model import WorldModel


def sample_batch(reader: ShardReader, spec: ClipSpec, count: int = 256, on_error: str = "raise") -> Batch:
    """About `count` clips spread evenly over the training data: what fixes scales before a phase trains."""
    dataset = ClipDataset(reader, spec, split="train", on_error=on_error)
    return collate([dataset[i] for i in range(0, len(dataset), max(len(dataset) // count, 1))])


def whole_clips(batch: Batch) -> Tensor:
    """Newest observed frame and future of every view: (B V, 3, 1 + F*R, h, w) in [-1, 1]."""
    clips = torch.cat([batch.observation.rgb[:, -1:], batch.future.rgb], 1)
    return rearrange(clips, "b t v c h w -> (b v) c t h w").float() / 127.5 - 1.0


def latent_cache(model: WorldModel, reader: ShardReader, spec: ClipSpec, run: Path) -> Tensor:
    """Single-frame latents (frames, V, C, h', w') of the training frames by dataset-wide number, from disk if current.

    Valid for one tokeniser and one dataset, whose hash is kept beside it. Frames of other splits stay NaN.
    """
    from tqdm import tqdm

    path = run / "latents.safetensors"
    entries = [(i, e) for i, e in enumerate(reader.entries) if e.split == "train"]
    digest = hashlib.sha256(model.metadata["training"]["index_sha256"].encode())
    for name, value in model.autoencoder.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    if reader.chosen is not None:
        digest.update(reader.chosen.encode())
    key = digest.hexdigest()[:16]
    if path.is_file():
        held = load_file(path)
        if key in held:
            return held[key]
    cache = torch.full((reader.frames, len(spec.cameras), model.autoencoder.channels, *model.grid), torch.nan)
    model.autoencoder.eval()
    with torch.no_grad():
        for i, entry in tqdm(entries, desc="latents", unit="episode"):
            rgb = np.zeros((entry.length, len(spec.cameras), 3, spec.height, spec.width), np.uint8)
            for v, camera in enumerate(spec.cameras):
                if camera not in spec.absent_cameras:
                    rgb[:, v] = reader.pictures(i, camera, range(entry.length))
            flat = torch.from_numpy(rgb).flatten(0, 1).float() / 127.5 - 1.0
            encoded = model.autoencoder.encode_frames(flat)
            cache[entry.start : entry.start + entry.length] = encoded.unflatten(0, rgb.shape[:2])
    save_file({key: cache}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return cache
