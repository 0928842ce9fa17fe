"""Sample videos during training: predicted beside true futures of a few held-out clips, for people to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.loggers import Logger, WandbLogger

from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.model import WorldModel
from worldmodel.viz import encode_mp4, side_by_side

SPLIT = "heldout_episodes"


def write_samples(model: WorldModel, reader: ShardReader, folder: Path, *, seed: int, count: int = 4) -> list[Path]:
    """Predicts `count` clips spread over the held-out episodes and writes one mp4 each: views below one another,
    predicted on the left, true on the right. Returns the paths; none if the dataset has no such split."""
    if SPLIT not in reader.index["splits"]:
        return []
    dataset = ClipDataset(reader, model.spec, split=SPLIT)
    batch = collate([dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, count + 2)[1:-1]])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        prediction = model.predict(batch.observation, None, "video_prediction", generator=generator)
    model.train(was_training)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, key in enumerate(batch.key):
        views = [
            side_by_side(prediction.rgb[i, :, v].numpy(), batch.future.rgb[i, :, v].float().div(255).numpy())
            for v in range(len(model.spec.cameras))
        ]
        path = folder / f"{i}-{key.replace('/', '_').replace(' ', '_')}.mp4"
        path.write_bytes(encode_mp4(np.concatenate(views, axis=1)))
        paths.append(path)
    return paths


def log_samples(paths: Sequence[Path], loggers: Sequence[Logger], name: str) -> None:
    """Hands the videos to wandb where it is on."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.experiment.log({f"{name}/samples": [wandb.Video(str(path), format="mp4") for path in paths]})
