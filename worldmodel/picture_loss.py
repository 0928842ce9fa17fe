"""Single pictures: what teaches the video transformer what things look like, beside clips that teach how they move."""

from collections.abc import Mapping

from torch import Tensor

from worldmodel.contracts import STREAMS, Batch, WorldState
from worldmodel.data.transforms import PRESENCE, hide, modality_dropout
from worldmodel.draws import Draws
from worldmodel.losses import distance, masked_mean
from worldmodel.model import WorldModel
from worldmodel.synthesis.flow import add_noise, sample_sigma, velocity_target

CAPTION = "text"
"""The only sense that a picture is made from; whatever else is sensed would show it."""


def picture_loss(
    model: WorldModel,
    batch: Batch,
    latents: Tensor,
    generator: Draws,
    *,
    dropout: Mapping[str, float],
    weights: Mapping[str, float],
    huber: float | None,
) -> dict[str, Tensor]:
    """Flow matching of the newest picture of each view alone, from noise and the instruction.

    The network sees one frame at position 0: the latent that the causal autoencoder gives a first frame, noisy, with no
    history, no other stream, no rays and no newest frame beside it. Views of a moment see each other, as in a clip. It
    has no future, so nothing teaches the network that things stand still. `latents` (B, H, V, C, h', w') are those of
    the history, of which the newest are taken. `dropout` and `weights` (of `video`) are those of the phase, `huber` the
    knee of the `distance`; the noise level is shifted as for one frame.
    """
    hidden = hide(batch.observation, [sense for sense in PRESENCE if sense not in (CAPTION, "rgb")])
    observation, _ = modality_dropout(hidden, {CAPTION: dropout.get(CAPTION, 0.0)}, generator)
    there = observation.has_rgb
    s = model.normaliser(hide(observation, ["rgb"]), model.grid)
    clean = latents[:, -1:]
    level = sample_sigma(len(batch.key), model.shift(1), generator).to(clean)
    noise = generator.randn(*clean.shape).to(clean)
    noisy = add_noise(clean, noise, level)
    memory = model.remember_nothing(s, there)
    state = WorldState(*(noisy for _ in STREAMS))  # the denoiser reads no other than those of the memory
    velocity = model.velocity(memory, state=state, levels=level[:, None].expand(-1, len(STREAMS)))[0]["video"]
    error = velocity - velocity_target(clean, noise)
    error = distance(model.loss_weight("video", level, error, alone=True) * error, huber)
    loss = masked_mean(error, there[:, None])
    return {"loss": weights.get("video", 1.0) * loss, "image/video": loss}
