"""Objectives of what acts on the state of one moment: the state policy, and its foresight of that state."""

from collections.abc import Mapping

import torch
from torch import Tensor

from worldmodel.contracts import Batch
from worldmodel.data.transforms import hide, jittered, modality_dropout
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.losses import masked_mean, proposal_error
from worldmodel.model import WorldModel
from worldmodel.policy.foresight import Foresight
from worldmodel.policy.realtime import Decided, draw_prefixes
from worldmodel.policy.state_policy import Measured, measure


def proposal_loss(
    model: WorldModel,
    batch: Batch,
    dropout: Mapping[str, float],
    generator: Draws,
    *,
    drop: tuple[str, ...] = (),
    decided: float = 0.0,
    jitter: float = 0.0,
) -> dict[str, Tensor]:
    """Behaviour cloning of the state policy alone: it needs no history, and pictures only where points are in `drop`.

    Then it acts on where stage 1 sees them. A rate `decided` of the rows begins with actions that are known, and acts
    on the state that foresight expects after them; foresight itself learns from all rows. `jitter`: see
    `transforms.jittered`. Raises `ConfigError` if the model has no state policy.
    """
    policy, foresight = model.expert.state, model.expert.foresight
    if policy is None:
        raise ConfigError("mode 'proposal' trains the state policy, but policy.expert.state is null")
    observation, _ = modality_dropout(hide(batch.observation, drop), dropout, generator)
    s = model.normaliser(observation, model.grid)
    seen = None
    if "points" in drop:
        with torch.no_grad():
            seen = model.encoder.locate(s, images="rgb" not in drop)
    words, robot = model.encoder.instruction(s), s.embodiment
    now, losses = measure(jittered(s, jitter, model.normaliser.effector, generator), seen), {}
    prefix: Decided | None = None
    if foresight is not None:
        losses["foresight"] = foresight_error(model, foresight, measure(s, seen), batch)
        if decided:
            actions = model.normaliser.standardise("action", batch.future.actions, robot)
            prefix = draw_prefixes(actions, decided, generator)
            now = foresight.after(now, prefix, robot)
    _, proposal = policy(now, words, robot)
    proposal = proposal if prefix is None else prefix.after(proposal)
    losses["proposal"] = proposal_error(model, proposal, batch, prefix)
    return {"loss": torch.stack(list(losses.values())).sum(), **losses}


def foresight_error(model: WorldModel, foresight: Foresight, now: Measured, batch: Batch) -> Tensor:
    """Mean absolute error of how the state has changed after each of the next actions, as far as foresight reaches.

    Points are known at the ends of latent frames alone. What counts is how far they have moved, also where the robot
    does not track them and sees them in another place.
    """
    future, robot, stride = batch.future, batch.observation.embodiment, model.spec.stride
    actions = model.normaliser.standardise("action", future.actions, robot)
    proprio = model.normaliser.standardise("proprio", future.proprio, robot)
    effector = model.normaliser.standardise("points", future.proprio[..., model.normaliser.effector], robot)
    ends, start = (model.normaliser.standardise("points", x.points, robot) for x in (future, batch.observation))
    motion, seen = ends - start[:, -1:], now.points
    errors = []
    for step in range(min(foresight.reach, actions.shape[1] - 1)):
        now = foresight(now, actions[:, step], robot)
        # The state after an action is there if another action followed.
        there = future.action_valid[:, step + 1, None]
        felt = there & now.has_proprio
        errors += [masked_mean((now.proprio - proprio[:, step]).abs(), felt.expand_as(now.proprio))]
        errors += [masked_mean((now.effector - effector[:, step]).abs(), felt.expand_as(now.effector))]
        frame, rest = divmod(step + 1, stride)
        if rest == 0 and frame <= motion.shape[1]:
            error = (now.points - seen - motion[:, frame - 1]).abs()
            errors.append(masked_mean(error, there & now.answered[..., 0] & batch.observation.has_points))
    return torch.stack(errors).sum() if errors else now.points.new_zeros(())
