"""What a network that predicts `clean` starts from, fitted to sample clips before it learns."""

import torch
from torch import Tensor, nn

from worldmodel.contracts import Future, Observation, Senses
from worldmodel.joint import JointTransformer


@torch.no_grad()
def fit_guess(model: JointTransformer, observation: Observation, future: Future) -> None:
    """Fits the guess that nothing moves but what is foreseen.

    `still` maps the latent of the newest image to that of a film in which it stands still (least squares; the tokeniser
    has two codes for one image). `carried` says how far each camera goes where the hand goes. `stream_scale` is how far
    futures stray from the guess (root mean square), the unit of the network's answer.
    """
    latents = model.history_latents(observation)
    last = latents[:, -1]
    frozen = observation.rgb[:, -1:].expand_as(future.rgb)
    target = model.future_latents(observation, future._replace(rgb=frozen))[:, 0]
    known = nn.functional.pad(last.movedim(2, -1).flatten(0, 3), (0, 1), value=1.0)
    # In float64: a solver's last bits depend on where its memory lies, and seeds must repeat.
    solution = torch.linalg.lstsq(known.double(), target.movedim(2, -1).flatten(0, 3).double()).solution
    model.get_buffer("still").copy_(solution)
    s = model.normaliser(observation, model.grid)
    if model.expert.foresight is not None and model.expert.foresight.carries:
        model.get_buffer("carried").copy_(carried_along(model, s, observation, future))
    state = model.future_state(s, future, model.future_latents(observation, future))
    foreseen = model.foresee(model.remember(s, latents))
    moved = {name: getattr(state, name) - lead for name, lead in foreseen.items()}
    state = state._replace(video=state.video - model.still_latents(last[:, None]), **moved)
    scales = [value[future.valid].square().mean().sqrt() for value in state]
    model.get_buffer("stream_scale").copy_(torch.stack(scales).clamp(min=0.02))


def carried_along(model: JointTransformer, s: Senses, observation: Observation, future: Future) -> Tensor:
    """(V,) the share of the hand's way that each camera goes, 0 for one that stands and 1 for one on the hand.

    Least squares over the translations of all latent frames at whose end an action was done, all robots together.
    """
    stride, effector = model.spec.stride, model.normaliser.effector
    frames = min(model.spec.future, future.proprio.shape[1] // stride)
    ends = slice(stride - 1, frames * stride, stride)
    hand = future.proprio[:, ends][..., effector] - observation.proprio[:, -1:, effector]
    cameras = future.camera_to_base[:, :frames, :, :3, 3] - observation.camera_to_base[:, -1:, :, :3, 3]
    known = future.valid[:, :frames] & future.action_valid[:, ends] & s.has_proprio[:, None]
    hand = (hand * known[..., None]).unsqueeze(2).double()
    seen = s.has_camera[:, None, :, None]
    way = (hand.square() * seen).sum((0, 1, 3)).clamp(min=1e-9)
    return ((hand * cameras.double() * seen).sum((0, 1, 3)) / way).clamp(0, 1)
