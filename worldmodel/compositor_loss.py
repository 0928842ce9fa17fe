"""What the compositor learns from: clips whose paths and tracks are known, and what their cameras then saw."""

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.conditioning import draw_given, find_moves
from worldmodel.contracts import Batch
from worldmodel.errors import ConfigError
from worldmodel.losses import masked_mean
from worldmodel.model import WorldModel


def composite_loss(
    model: WorldModel, batch: Batch, given: Mapping[str, float], generator: torch.Generator
) -> dict[str, Tensor]:
    """Absolute error of the newest picture moved along what is given, of one view and latent frame of each row.

    `given` has the rates of `camera` and `points`. Raises `ConfigError` if the model has no compositor.
    """
    if model.compositor is None:
        raise ConfigError("objective `composite` trains the compositor, but synthesis.compositor is null")
    observation, future, spec = batch.observation, batch.future, model.spec
    b, v = observation.has_rgb.shape
    device = observation.text.device
    rates = {name: given.get(name, 0.0) for name in ("camera", "points")}
    flags, _ = draw_given(rates, 0.0, spec, b, generator)
    cameras = observation.has_camera & flags["camera"].to(device)[:, None]
    points = observation.has_points & flags["points"].to(device)
    poses = torch.where(cameras[:, None, :, None, None], future.camera_to_base, observation.camera_to_base[:, -1:])
    tracks = torch.where(points[:, None, :, None], future.points, observation.points[:, -1:])
    moves, led = find_moves(observation, poses, tracks, cameras, points)
    each = spec.future * v
    pick = (torch.arange(b) * each + torch.randint(each, (b,), generator=generator)).to(device)
    target = future.rgb[:, spec.stride - 1 :: spec.stride].flatten(0, 2)[pick].float() / 127.5 - 1.0
    counts = led & future.valid[:, :, None].expand(-1, -1, v).flatten()
    error = (model.compositor(moves.chosen(pick)) - target).abs()
    return {"loss": masked_mean(error, counts[pick])}
