"""The action transformer begun from the video transformer: its weights, drawn narrower by interpolation.

Kairos 3 (arXiv 2606.16533) begins its action transformer so and publishes no more than that; what follows is one way.
Channels of the narrow network stand for evenly spaced places among those of the wide one, the same in every layer, so
that what one layer writes the next still reads. Queries, keys and values are as many in both and keep their channels.
"""

import logging
import math
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

INITIALISE = (None, "interpolate")
"""How the action transformer may begin: as it is built, or drawn from the video transformer."""
BLOCK = ("q", "k", "v", "q_norm", "k_norm", "out")
"""Parts of an action block that a video block of windowed attention has inside its `mix`."""
AROUND = ("time.", "embed_context.", "head_table")
"""What both have outside their blocks."""
MODULATION = ("time.project.1.", 6)
"""The layer whose rows are that many modulation vectors, one after another."""


def resample(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Linear interpolation along every axis whose size changes; what is constant along an axis stays so."""
    for axis, size in enumerate(shape):
        if weight.shape[axis] != size:
            line = weight.movedim(axis, -1)
            drawn = F.interpolate(line.reshape(1, -1, line.shape[-1]), size, mode="linear")
            weight = drawn.reshape(*line.shape[:-1], size).movedim(-1, axis)
    return weight


def narrowed(weight: Tensor, shape: tuple[int, ...], vectors: int = 1) -> Tensor:
    """`resample`, and a matrix then scaled as a whole: outputs of white inputs keep their mean square.

    The outputs may be several `vectors`, which are drawn each by itself.

    Interpolation averages neighbours, which lowers the variance of weights that have nothing to do with each other, and
    a row that is shorter adds up fewer inputs. The factor makes good both: the mean squared norm of the rows is that of
    the wide matrix. Vectors - biases, norms, modulation - are added or multiplied channel by channel and keep their
    values.
    """
    drawn = resample(weight.unflatten(0, (vectors, -1)), (vectors, shape[0] // vectors, *shape[1:])).flatten(0, 1)
    if weight.dim() != 2 or weight.shape == drawn.shape:
        return drawn
    before, after = (w.square().sum(1).mean().item() for w in (weight, drawn))
    return drawn * math.sqrt(before / after) if after else drawn


def interpolated(video: Mapping[str, Tensor], action: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the action transformer drawn from those of the video transformer; both by name, as modules have them.

    Taken are attention, cross-attention, feed-forward, norms and modulation of every block, and the embedding of
    timestep and context. Beside a gated delta layer, which has no such attention, actions take that of the nearest
    block before it that has, or after it if there is none before. What only the action transformer has (actions in and
    out, state, places in the chunk, embodiments) is not in the answer.
    """
    out = {}
    attentive = sorted({int(name.split(".")[1]) for name in video if name.endswith(".mix.q.weight")})
    for name, own in action.items():
        source = name if name.startswith(AROUND) else None
        if name.startswith("blocks."):
            _, number, part, *rest = name.split(".")
            if part not in BLOCK:
                source = name
            elif attentive:
                nearest = max((i for i in attentive if i <= int(number)), default=attentive[0])
                source = ".".join(("blocks", str(nearest), "mix", part, *rest))
        if source is None or source not in video:
            continue
        wide, shape = video[source], tuple(own.shape)
        if name == "head_table" or name.endswith(".table"):
            out[name] = resample(wide, shape)
        else:
            out[name] = narrowed(wide, shape, MODULATION[1] if name.startswith(MODULATION[0]) else 1)
    return out


def begin_from(action: nn.Module, video: nn.Module) -> None:
    """Gives an action transformer the weights that are `interpolated` from a video transformer."""
    drawn = interpolated(video.state_dict(), action.state_dict())
    action.load_state_dict(drawn, strict=False)
    log.info("action transformer: %d tensors interpolated from the video transformer", len(drawn))
