"""Given futures as the video transformer reads them, and guidance by what they change."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from worldmodel.contracts import STREAMS, ClipSpec, Future, Observation, Senses, WorldState
from worldmodel.draws import Draws
from worldmodel.errors import ConfigError
from worldmodel.geometry import interpolate_poses
from worldmodel.joint import JointTransformer, Memory
from worldmodel.synthesis.compositor import Moves, by_geometry
from worldmodel.synthesis.conditions import CONDITIONS, Given, heat_maps

Flags = Mapping[str, Tensor | bool]
"""Condition -> whether it is given: for all rows, per row (B,), or per slot (B, V) or (B, K)."""
GUIDABLE = ("text", "camera", "points", "actions", "embodiment")


def give(
    model: JointTransformer,
    observation: Observation,
    s: Senses,
    future: Future | None,
    flags: Flags,
    *,
    lacks: Flags | None = None,
    latents: Tensor | None = None,
) -> Given | None:
    """What of `future` is given, by `flags`; cameras and points that are not are absent where `lacks` says so.

    The embodiment is given unless a flag denies it. A camera or a point is only given where it was observed too, since
    it is told as a difference. `latents` (B, F, V, C, h', w') of the future are needed where views are given. None for
    a model without a `ConditionEncoder`, which can be given actions alone; raises `ConfigError` for anything else then,
    for an unknown condition, and where there is no future to give.
    """
    if unknown := [name for name in flags if name not in CONDITIONS]:
        raise ConfigError(f"given: unknown condition {unknown[0]!r}; one of {', '.join(CONDITIONS)}")
    wanted = [name for name, flag in flags.items() if flag is not False and name != "embodiment"]
    if model.denoiser.conditions is None:
        if other := [name for name in wanted if name != "actions"]:
            raise ConfigError(
                f"given: {other[0]!r} cannot be given to a model without synthesis.denoiser.conditions; actions can"
            )
        return None
    if wanted and future is None:
        raise ConfigError(f"given: {', '.join(wanted)} of no future; pass the future that has them")
    spec, b = model.spec, s.text.shape[0]
    frames = spec.future
    has = {name: spread(flags.get(name, name == "embodiment"), name, s, spec) for name in CONDITIONS}
    has |= {"camera": has["camera"] & s.has_camera, "points": has["points"] & s.has_points}
    lack = {name: spread((lacks or {}).get(name, False), "", s, spec) for name in ("camera", "points")}
    newest = observation.camera_to_base[:, -1:]
    known = (s.has_camera | has["camera"])[:, None, :, None, None, None]
    lens = observation.intrinsics[:, -1:]
    poses, points, steps = newest.expand(-1, frames, -1, -1, -1), observation.points[:, -1:], frames * spec.stride
    tracks, actions = points.expand(-1, frames, -1, -1), s.points.new_zeros(b, steps, spec.action)
    # A future of which only some things are known has no frames of the others.
    if future is not None and "camera" in wanted:
        poses = torch.where(has["camera"][:, None, :, None, None], future.camera_to_base, poses)
    if future is not None and "points" in wanted:
        tracks = torch.where(has["points"][:, None, :, None], future.points, tracks)
    if future is not None and "actions" in wanted:
        moves = model.normaliser.standardise("action", future.actions, s.embodiment)[:, :steps]
        actions = functional.pad(moves, (0, 0, 0, steps - moves.shape[1]))
    size = (spec.height, spec.width)
    marks = [torch.cat([p, c[..., :3, 3]], 2)[:, :, None] for p, c in ((points, newest), (tracks, poses))]
    now = heat_maps(marks[0], lens, newest, size, model.grid).expand(-1, frames, -1, -1, -1, -1)
    then = heat_maps(marks[1], lens, poses, size, model.grid)
    shown = torch.cat([has["points"], has["camera"]], 1)[:, None, None, :, None, None]
    if latents is None and flags.get("video", False) is not False:
        raise ConfigError("given: views of the future are given as latents, which are missing")
    if {"camera", "points"} & set(wanted):
        film, moved = moved_pictures(model, observation, poses, tracks, has["camera"], has["points"])
    else:  # no branch on values, which an exported graph cannot have
        film = None
        moved = poses.new_zeros(b, frames, poses.shape[2], model.autoencoder.channels, *model.grid)
    return Given(
        video=latents,
        camera=model.future_camera(s, poses),
        points=model.future_points(s, tracks),
        actions=actions.unflatten(1, (frames, spec.stride)).flatten(2),
        rays=model.normaliser.rays(lens.expand(-1, frames, -1, -1, -1), poses, model.grid),
        moved=moved,
        film=film,
        heat=torch.cat([now, then], 3) * (shown.repeat(1, 1, 1, 2, 1, 1) & known),
        embodiment=s.embodiment,
        **{f"has_{name}": flag for name, flag in has.items()},
        **{f"lacks_{name}": flag for name, flag in lack.items()},
    )


@torch.no_grad()
def moved_pictures(
    model: JointTransformer, o: Observation, poses: Tensor, tracks: Tensor, cameras: Tensor, points: Tensor
) -> tuple[Tensor, Tensor]:
    """The newest pictures moved along what is given, as a film (B, F*R, V, 3, h, w) in [-1, 1] and as latents.

    Arguments as in `find_moves`, at the ends of the latent frames; between them everything goes straight on. By the
    model's `Compositor` or, where it has none, by geometry alone. Latents (B, F, V, C, h', w') are less those of the
    picture standing still. They are zero, and the film is the picture, where nothing is given or it is not known.
    """
    stride, frames = model.spec.stride, poses.shape[1]
    moves, rows = find_moves(o, *between(o, poses, tracks, stride), cameras, points)
    film, v = moves.pictures.clone(), poses.shape[2]
    out = poses.new_zeros(len(poses) * v, frames, model.autoencoder.channels, *model.grid)
    if rows.any():
        led = moves.chosen(rows)
        film[rows] = by_geometry(led, tracks.shape[2]) if model.compositor is None else model.compositor(led)
        led_views = rows.unflatten(0, (len(poses), -1, v))[:, 0].flatten()
        later = film.unflatten(0, (len(poses), -1, v)).transpose(1, 2).flatten(0, 1)[led_views]
        last = o.rgb[:, -1].flatten(0, 1)[led_views].float() / 127.5 - 1.0
        still = model.still_latents(model.autoencoder.encode_frames(last)[:, None, None])[:, 0]
        out[led_views] = model.autoencoder.encode_future(last, later) - still
    return film.unflatten(0, (len(poses), -1, v)), out.unflatten(0, (-1, v)).transpose(1, 2)


def between(o: Observation, poses: Tensor, tracks: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Poses (B, F, V, 4, 4) and tracks (B, F, K, 3) at each of the F `steps` that lead there from now."""
    path = interpolate_poses(torch.cat([o.camera_to_base[:, -1:], poses], 1), steps)
    known = torch.cat([o.points[:, -1:], tracks], 1)
    share = ((torch.arange(steps, device=known.device) + 1) / steps).to(known).reshape(1, 1, -1, 1, 1)
    return path, torch.lerp(known[:, :-1, None], known[:, 1:, None], share).flatten(1, 2)


def find_moves(o: Observation, poses: Tensor, tracks: Tensor, cameras: Tensor, points: Tensor) -> tuple[Moves, Tensor]:
    """The newest pictures and where paths and tracks lead them, B T V in all, and which of these are led (B T V).

    Paths (B, T, V, 4, 4) count for given `cameras` (B, V), tracks (B, T, K, 3) for given `points` (B, K). Things
    stand on the horizontal plane through the lowest known point, or through the base.
    """
    _, frames, v = poses.shape[:3]
    lowest = torch.where(o.has_points, o.points[:, -1, :, 2], torch.inf).amin(1)
    here = o.camera_to_base[:, -1]
    marks = torch.cat([o.points[:, -1], here[..., :3, 3]], 1)
    led = torch.cat([tracks, poses[..., :3, 3]], 2)
    rows = o.has_rgb & o.has_camera & (cameras.any(1) | points.any(1))[:, None]

    def each(x: Tensor, dim: int) -> Tensor:
        """(B, ...) or, by the axis `dim` that it has, (B, T, ...) or (B, V, ...) -> (B T V, ...)."""
        x = x[:, None] if dim != 1 else x
        x = x[:, :, None] if dim != 2 else x
        return x.expand(-1, frames, v, *x.shape[3:]).flatten(0, 2)

    moves = Moves(
        pictures=each(o.rgb[:, -1].float() / 127.5 - 1.0, 2),
        intrinsics=each(o.intrinsics[:, -1], 2),
        here=each(here, 2),
        path=poses.flatten(0, 2),
        marks=each(marks, 0),
        tracks=each(led, 1),
        carried=each(torch.cat([points, cameras], 1), 0),
        ground=each(torch.where(lowest.isfinite(), lowest, 0.0), 0),
        view=torch.arange(v, device=poses.device).repeat(len(poses) * frames),
    )
    return moves, each(rows, 2)


def spread(flag: Tensor | bool, name: str, s: Senses, spec: ClipSpec) -> Tensor:
    """A flag as a mask: (B, V) of views, (B, K) of points, (B,) of anything else."""
    width = {"video": len(spec.cameras), "camera": len(spec.cameras), "points": spec.points}.get(name)
    mask = torch.as_tensor(flag, device=s.text.device).expand(s.text.shape[:1]) if isinstance(flag, bool) else flag
    if width is None:
        return mask
    return mask[:, None].expand(-1, width) if mask.dim() == 1 else mask


def draw_given(
    rates: Mapping[str, float], absent: float, spec: ClipSpec, batch: int, generator: Draws
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random flags of a training batch and what its rows lack: the dropout of conditions that guidance needs.

    Each condition is given in a row with its own rate. Points are then all given in half of the rows and one by one in
    the others; of the views one is given, and the others are to be found. Cameras and points that are not given are
    absent with probability `absent`.
    """
    flags: dict[str, Tensor] = {}
    for name, rate in rates.items():
        flags[name] = rows = generator.rand(batch) < rate
        if name == "points":
            some = generator.rand(batch, spec.points) < 0.5
            flags[name] = rows[:, None] & (some | (generator.rand(batch, 1) < 0.5))
        if name == "video":
            view = generator.randint(len(spec.cameras), batch, 1)
            flags[name] = rows[:, None] & (torch.arange(len(spec.cameras)) == view)
    lacks = {name: generator.rand(batch) < absent for name in ("camera", "points")} if absent else {}
    return flags, lacks


def guided(velocity: Callable[[str | None], dict[str, Tensor]], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Classifier-free guidance by several conditions, each with its own scale (after Ho & Salimans 2022, eq. 6).

    `velocity(c)` answers without condition c, `velocity(None)` with all: v + sum over c of (w_c - 1)(v - v_c). A scale
    of 1 changes and costs nothing, 0 is as if the condition were absent.
    """
    full = velocity(None)
    out = dict(full)
    for name, scale in scales.items():
        if scale != 1:
            lacking = velocity(name)
            out = {key: value + (scale - 1) * (full[key] - lacking[key]) if key in lacking else value
                   for key, value in out.items()}  # fmt: skip
    return out


@dataclass(frozen=True)
class GuidedFlow:
    """From noise to data: the guided velocity of whatever is denoised, everything beside it held fixed.

    `memories` and `conditions` have what is known under None and, for each condition of `scales` that is known there,
    what is left without it; `fixed` are clean streams and actions.
    """

    model: JointTransformer
    memories: Mapping[str | None, Memory]
    conditions: Mapping[str | None, Given | None]
    fixed: Mapping[str, Tensor]
    scales: Mapping[str, float]
    coupling: str

    def __call__(self, now: dict[str, Tensor], sigma: float | Tensor) -> dict[str, Tensor]:
        """Velocities of `now`, noisy streams and actions, all at noise level sigma, one number or one per row."""
        return guided(lambda without: self.velocity(now, sigma, without), self.scales)

    def velocity(self, now: dict[str, Tensor], sigma: float | Tensor, without: str | None) -> dict[str, Tensor]:
        """The same without one of the conditions, unguided."""
        values = {**self.fixed, **now}
        if without == "actions":
            values.pop("actions")
        has_streams, has_actions = any(name in values for name in STREAMS), "actions" in values
        first = next(iter(now.values()))
        rows = first.shape[0]
        level = sigma.to(first).expand(rows) if isinstance(sigma, Tensor) else first.new_full((rows,), sigma)
        filled = {**dict.fromkeys(STREAMS, level), **values}  # the denoiser does not read streams it has not
        stream_level = level if any(name in now for name in STREAMS) else torch.zeros_like(level)
        streams, action = self.model.velocity(
            self.memories.get(without, self.memories[None]),
            state=WorldState(*(filled[n] for n in STREAMS)) if has_streams else None,
            levels=stream_level[:, None].expand(-1, len(STREAMS)) if has_streams else None,
            actions=values.get("actions"),
            action_level=(level if "actions" in now else torch.zeros_like(level)) if has_actions else None,
            coupling=self.coupling,
            given=self.conditions[without] if has_streams else None,
        )
        return streams if action is None else {**streams, "actions": action}


def cautious(
    values: Mapping[str, Tensor], s: Senses, share: float, given: Given | None, *, informed: bool
) -> dict[str, Tensor]:
    """Predicted streams that go only `share` of the way from now, where an instruction is not read.

    Nothing then tells what will be done, and what the state alone reminds of is too sure. Left as they are: pictures,
    and rows whose actions are known, all of them if `informed`.
    """
    if share == 1 or informed:
        return dict(values)
    unsure = (s.new_text if given is None else s.new_text & ~given.has_actions)[:, None, None, None]
    # The others are differences from now themselves.
    now = {"camera": 0.0, "points": 0.0, "force": s.force.mean(2)[:, -1:]}
    part = {name: now[name] + share * (x - now[name]) for name, x in values.items() if name in now}
    return {name: torch.where(unsure, part[name], x) if name in part else x for name, x in values.items()}


def check_guidance(scales: Mapping[str, float], given: Sequence[str]) -> None:
    """Raises `ConfigError` for a condition that cannot guide, or that is not given and so would change nothing."""
    for name in scales:
        if name not in GUIDABLE:
            raise ConfigError(f"guidance: unknown condition {name!r}; one of {', '.join(GUIDABLE)}")
        if name not in given:
            raise ConfigError(f"guidance: {name!r} is not given here; given are {', '.join(given) or 'none'}")
