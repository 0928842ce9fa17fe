"""What the compositor learns from: clips whose paths and tracks are known, and what their cameras then saw."""

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.conditioning import between, draw_given, find_moves
from worldmodel.contracts import Batch
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.losses import masked_mean
from worldmodel.model import WorldModel


def composite_loss(model: WorldModel, batch: Batch, given: Mapping[str, float], generator: Draws) -> dict[str, Tensor]:
    """Absolute error of the newest picture moved along what is given, of one view and step of each row.

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
    moves, led = find_moves(observation, *between(observation, poses, tracks, spec.stride), cameras, points)
    each = spec.window * v
    pick = (torch.arange(b) * each + generator.randint(each, b)).to(device)
    target = future.rgb.flatten(0, 2)[pick].float() / 127.5 - 1.0
    counts = led & future.valid.repeat_interleave(spec.stride, 1)[:, :, None].expand(-1, -1, v).flatten()
    error = (model.compositor(moves.chosen(pick)) - target).abs()
    return {"loss": masked_mean(error, counts[pick])}
