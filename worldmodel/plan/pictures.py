"""What a step makes of pictures before its network reads them, counted once for each size: latents, moved pictures."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from worldmodel import conditioning
from worldmodel.contracts import Observation
from worldmodel.phases import Phase
from worldmodel.plan.meter import Meter
from worldmodel.synthesis.compositor import by_geometry

FILMS = (3, 4)
"""Latent frames of the two films from which longer ones are continued."""


def given_share(phase: Phase) -> float:
    """Share of a batch's pictures that are moved along a given camera path or tracks."""
    rates = [phase.given.get(name, 0.0) for name in ("camera", "points")]
    return 1 - math.prod(1 - rate for rate in rates)


class Encoding(NamedTuple):
    """What encoding a film takes."""

    frames: float  # latent ones
    flops: float
    surge: float  # most bytes at a time

    def continued(self, other: "Encoding", steps: float) -> "Encoding":
        """This plus `steps` times the difference of the other to it."""
        return Encoding(*(a + steps * (b - a) for a, b in zip(self, other, strict=True)))


def remembered(
    encode: Callable[[Tensor], Tensor], temporal: int, meter: Meter, known: dict[Any, Any]
) -> Callable[[Tensor], Tensor]:
    """Counts what encoding pictures takes, of each shape once; long films go on from those of `FILMS`."""

    def measured(video: Tensor) -> tuple[Encoding, torch.Size, torch.dtype]:
        before, flops = meter.activations, meter.flops.copy()
        with torch.no_grad(), meter.surge():
            out = encode(video)
        most = meter.surges.pop()[1]
        took = sum((meter.flops - flops).values())
        meter.flops = flops
        return Encoding(out.shape[2], took, most - before), out.shape, out.dtype

    def run(video: Tensor) -> Tensor:
        key = (video.shape, torch.is_autocast_enabled("cpu"))
        if key not in known:
            frames, films = (video.shape[2] - 1) / temporal, FILMS if video.shape[2] > 1 + FILMS[1] * temporal else ()
            if films:
                # Encoders go through a film in pieces, each of which takes what the one before it did.
                (one, shape, kind), (two, _, _) = (
                    measured(video.new_empty(*video.shape[:2], 1 + n * temporal, *video.shape[3:])) for n in films
                )
                took = one.continued(two, frames - films[0])
            else:
                took, shape, kind = measured(video)
            known[key] = (took, (*shape[:2], round(took.frames), *shape[3:]), kind)
        took, shape, kind = known[key]
        meter.add(took.flops, 0)
        meter.surges.append((meter.made, meter.activations + int(took.surge)))
        return video.new_empty(shape, dtype=kind)

    return run


def moved(meter: Meter, share: float, known: dict[Any, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Stands for `conditioning.moved_pictures`, which moves the rows that are drawn: FLOPs are those of a mean batch,
    `share` of all its rows, memory that of one whose rows are all moved. `known` as in `remembered`."""

    def led(model: Any, o: Observation, poses: Tensor, tracks: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        b, v, coder = len(poses), poses.shape[2], model.autoencoder
        path = conditioning.between(o, poses, tracks, model.spec.stride)
        moves, _ = conditioning.find_moves(o, *path, *given)
        film = by_geometry(moves, tracks.shape[2]) if model.compositor is None else model.compositor(moves)
        film, last = film.unflatten(0, (b, -1, v)), o.rgb[:, -1].flatten(0, 1).float() / 127.5 - 1.0
        still = model.still_latents(coder.encode_frames(last)[:, None, None])[:, 0]
        out = coder.encode_future(last, film.transpose(1, 2).flatten(0, 1)) - still
        return film, out.unflatten(0, (b, v)).transpose(1, 2)

    @torch.no_grad()
    def pictures(model: Any, o: Observation, poses: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        key = ("moved", poses.shape, o.rgb.shape, torch.is_autocast_enabled("cpu"))
        if key not in known:
            before, flops, first = meter.activations, meter.flops.copy(), len(meter.surges)
            with meter.surge():
                out = led(model, o, poses, *given)
            most = max(size for _, size in meter.surges[first:])  # of encoding too
            del meter.surges[first:]
            took, meter.flops = sum((meter.flops - flops).values()), flops
            known[key] = took, most - before, [(x.shape, x.dtype) for x in out]
            del out
        took, surge, made = known[key]
        meter.add(share * took, 0)
        meter.surges.append((meter.made, meter.activations + surge))
        film, latents = (poses.new_empty(shape, dtype=kind) for shape, kind in made)
        return film, latents

    return pictures
