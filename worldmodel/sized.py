"""Another size of picture and another length of future, for as long as a batch of a bucket is trained on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from worldmodel.contracts import Batch
from worldmodel.data.buckets import TokenCounts
from worldmodel.joint import JointTransformer


@contextmanager
def sized(model: JointTransformer, batch: Batch) -> Iterator[None]:
    """The model at the sizes of a batch, until it is left; no weight depends on them.

    A batch without pictures says nothing about their size, and nothing that is read of it does either.
    """
    denoiser, normaliser = model.denoiser, model.normaliser
    before = (model.spec, model.grid, normaliser.size, denoiser.rows, denoiser.columns, denoiser.counts)
    height, width = batch.observation.rgb.shape[-2:]
    size = (height, width) if height and width else (model.spec.height, model.spec.width)
    try:
        model.spec = replace(model.spec, height=size[0], width=size[1], future=batch.future.points.shape[1])
        rows, columns = (side // model.autoencoder.spatial for side in size)
        model.grid, normaliser.size = (rows, columns), size
        denoiser.rows, denoiser.columns = rows // denoiser.patch, columns // denoiser.patch
        video = len(model.spec.cameras) * denoiser.rows * denoiser.columns
        denoiser.counts = {**denoiser.counts, "video": video}
        yield
    finally:
        model.spec, model.grid, normaliser.size, denoiser.rows, denoiser.columns, denoiser.counts = before


def token_counts(model: JointTransformer) -> TokenCounts:
    """What a clip costs this model, whatever its size."""
    spatial, denoiser = model.autoencoder.spatial, model.denoiser
    return TokenCounts(
        views=len(model.spec.cameras),
        cell=spatial * denoiser.patch,
        # Image tokens of stage 1 have the rays of `camera.rays` × `camera.rays` latent cells added to them.
        multiple=spatial * math.lcm(denoiser.patch, model.encoder.camera.rays),
        others=sum(denoiser.counts[name] for name in denoiser.streams if name != "video"),
        history=model.spec.history,
    )
