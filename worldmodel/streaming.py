"""Long rollouts: chunk after chunk, each predicted after the memory of all before it, in constant memory.

A chunk is the future of one prediction, F latent frames. What was predicted is then read as if it had been observed -
pictures through the tokeniser, poses, points and forces, at noise level 0 - and the next chunk begins. Senses that the
model does not predict (proprioception, taxels) are absent from then on.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from worldmodel.conditioning import Flags
from worldmodel.contracts import Future, Observation, Prediction
from worldmodel.errors import ConfigError
from worldmodel.joint import Memory
from worldmodel.model import WorldModel
from worldmodel.policy.realtime import Decided

Actions = Callable[[int], Tensor]
"""Number of a chunk -> its actions (B, A, D) in the embodiment's units, the first of which is executed at its start."""


def read(
    model: WorldModel,
    observation: Observation,
    past: Memory | None = None,
    fresh: int | None = None,
    decided: Decided | None = None,
) -> Memory:
    """Reads an observation after `past`: all of its history, or its `fresh` newest frames alone (see `remember`).

    `decided` are in the robot's units.
    """
    latents = model.history_latents(observation if fresh is None else observation.newest(fresh))
    decided = model.own_units(decided, observation.embodiment)
    senses = model.normaliser(observation, model.grid)
    return model.remember(senses, latents, past=past, fresh=fresh, decided=decided)


def roll_out(
    model: WorldModel,
    observation: Observation,
    *,
    chunks: int,
    generator: torch.Generator,
    actions: Actions | str | None = None,
    futures: Callable[[int], Future] | None = None,
    given: Flags | None = None,
    guidance: Mapping[str, float] | None = None,
    steps: int | None = None,
) -> Iterator[tuple[Prediction, Memory]]:
    """Predicts `chunks` chunks, each with the memory that it was predicted from.

    `actions` is a function that gives each chunk's (the true ones, or others: a counterfactual), `policy` for those
    that the model proposes, or None for a future that is not told any. `given` says what else of each chunk's `futures`
    is given, and `guidance` how much that leads (see `WorldModel.predict`). `steps` are flow steps of the streams; None
    is the model's own number. Only the last few frames and the memory are kept, whatever the number of chunks. Raises
    `ConfigError` for any other `actions`; and see `WorldModel.predict`.
    """
    if not (actions is None or actions == "policy" or callable(actions)):
        raise ConfigError(f"actions of a rollout: {actions!r}; they are given by a function, 'policy' or None")
    memory, fresh = None, None
    for number in range(chunks):
        with torch.inference_mode():
            memory = read(model, observation, memory, fresh)
            chosen = actions
            if chosen == "policy":
                chosen = propose(model, memory, observation, generator)
            elif callable(chosen):
                chosen = chosen(number)
            mode = "video_prediction" if chosen is None else "forward_dynamics"
            future = None if futures is None else futures(number)
            if isinstance(chosen, Tensor):
                future = future_of_actions(observation, chosen) if future is None else future._replace(actions=chosen)
            now = observation.newest(1)  # older frames are in the memory
            prediction = model.predict(
                now, future, mode, generator=generator, steps=steps, memory=memory, given=given, guidance=guidance
            )
            observation = after(observation, prediction, model)
        fresh = model.spec.future
        yield prediction, memory


def propose(model: WorldModel, memory: Memory, observation: Observation, generator: torch.Generator) -> Tensor:
    """The policy's actions (B, A, D) in the embodiment's units."""
    rows = observation.text.shape[0]
    noise = torch.randn((rows, model.spec.chunk, model.spec.action), generator=generator).to(memory.rays)
    return model.act_from(memory, noise)


def future_of_actions(observation: Observation, actions: Tensor) -> Future:
    """A future of which nothing but the actions is known; the rest has no frames."""
    none = slice(0, 0)
    rows, device = actions.shape[0], actions.device
    return Future(
        rgb=observation.rgb[:, none],
        camera_to_base=observation.camera_to_base[:, none],
        points=observation.points[:, none],
        visible=observation.visible[:, none],
        wrench=observation.wrench[:, none].mean(2),
        actions=actions,
        proprio=observation.proprio[:, none],
        valid=torch.ones(rows, 0, dtype=torch.bool, device=device),
        action_valid=torch.ones(actions.shape[:2], dtype=torch.bool, device=device),
        action_dims=torch.ones(rows, actions.shape[2], dtype=torch.bool, device=device),
    )


def after(observation: Observation, prediction: Prediction, model: WorldModel) -> Observation:
    """What would be observed at the end of a predicted chunk, as long a history as that needs.

    Lenses and visibility stay as they were; what is not predicted is absent.
    """
    o, p, spec = observation, prediction, model.spec
    frames, stride = spec.future, spec.stride
    kept = max(spec.history, frames)
    rgb = (p.rgb[:, stride - 1 :: stride] * 255).round().to(torch.uint8)
    wrench = p.wrench[:, :, None].expand(-1, -1, stride, -1, -1)

    def last(old: Tensor, new: Tensor | None = None) -> Tensor:
        new = old[:, -1:].expand(-1, frames, *old.shape[2:]) if new is None else new
        return torch.cat([old, new], 1)[:, -kept:]

    return o._replace(
        rgb=last(o.rgb, rgb),
        intrinsics=last(o.intrinsics),
        camera_to_base=last(o.camera_to_base, p.camera_to_base),
        points=last(o.points, p.points),
        visible=last(o.visible),
        wrench=last(o.wrench, wrench),
        taxels=last(o.taxels),
        proprio=last(o.proprio),
        has_taxels=torch.zeros_like(o.has_taxels),
        has_proprio=torch.zeros_like(o.has_proprio),
    )
