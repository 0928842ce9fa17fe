"""Offline evaluation of given futures: whether synthesis follows the camera paths and object tracks it is asked for."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, grid_sample

from worldmodel import metrics
from worldmodel.conditioning import between, find_moves
from worldmodel.contracts import Batch, Future, Observation, Prediction, Understanding
from worldmodel.data.transforms import hide
from worldmodel.geometry import compose_se3, interpolate_poses, invert_se3, project_points
from worldmodel.metrics import MOVED, Sums
from worldmodel.synthesis.compositor import by_geometry


def score_given(
    predict: Callable[..., Prediction],
    understand: Callable[[Observation], Understanding],
    batch: Batch,
    movable: Tensor,
    plain: Prediction,
    put: Callable[..., None],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores pictures under given camera paths and object tracks.

    Told what will happen, the pictures should come closer to what did, as a whole (`video_given_*`) and around the
    object (`object_given_points`). Told to move otherwise (`another_motion`), they should follow that too: of the asked
    motion of a camera `camera_followed` is the share that stage 1 reads in the last picture, and `points_followed` says
    how much the place where an object is asked to be looks like the object. `plain` is the prediction without anything
    given, `geometry_alone` the newest picture moved without any learning, `what_happened` the true picture: what can be
    read at all. `put(name, ours, **others)` takes the sums. Returns the pictures by what they were given, and where
    points and cameras are asked to be in them (B, F*R, V, K + V, 2) pixels, NaN where none is.
    """
    led: dict[str, Tensor] = {}
    places: dict[str, Tensor] = {}
    observation, future = batch.observation, batch.future
    target, mask = future.rgb.float() / 255, frame_mask(batch)
    still = metrics.copy_last_frame(observation, target.shape[1])
    another = another_motion(observation, future)
    thing = movable & observation.has_points
    thing = thing & (thing.cumsum(1) == 1)  # further points only say how it is turned
    for name in ("camera", "points"):
        read = partial(camera_share, understand) if name == "camera" else partial(likeness, thing)
        own: dict[str, Tensor] = {}
        films: dict[str, Tensor] = {}
        for label, whose, asked in (("its own", "own", future), ("half of another clip's", "another's", another)):
            films = {
                "ours": predict(observation, asked, given={name: True}).rgb,
                "copy_last_frame": still,
                "not_given": plain.rgb,
                "geometry_alone": geometry_alone(observation, asked, name),
            }
            led[f"{label} {name}"] = films["ours"]
            places[f"{label} {name}"] = asked_places(observation, asked, name, movable)
            shown = films | ({"what_happened": target} if whose == "own" else {})
            put(f"{name}_followed/{whose}", **{k: read(observation, asked, rgb) for k, rgb in shown.items()})
            own = own or films
        own["another_clip"] = films["ours"]
        put(f"video_given_{name}", **{k: metrics.squared_error(rgb, target, mask) for k, rgb in own.items()})
        if name == "points":
            put("object_given_points", **{k: around_object(thing, batch, rgb) for k, rgb in own.items()})
    return led, places


def score_actions(
    told: Prediction,
    misled: Prediction,
    plain: Prediction,
    batch: Batch,
    movable: Tensor,
    cameras: Sequence[str],
    put: Callable[..., None],
) -> None:
    """Scores the streams under the executed actions, beside those of another clip and those without any."""
    observation, future = batch.observation, batch.future
    target, mask = future.rgb.float() / 255, frame_mask(batch)
    still = metrics.copy_last_frame(observation, target.shape[1])
    true, other, free, base = (
        metrics.squared_error(rgb, target, mask) for rgb in (told.rgb, misled.rgb, plain.rgb, still)
    )
    put("video_given_actions", true, copy_last_frame=base, not_given=free, shuffled_actions=other)
    frames = future.valid.shape[1]
    rest = metrics.constant(observation.points[:, -1], frames)
    shown = future.valid[:, :, None] & (movable & observation.has_points)[:, None]
    true, other, free, base = (
        metrics.trajectory_error(points, future.points, shown)
        for points in (told.points, misled.points, plain.points, rest)
    )
    put("trajectory_given_actions", true, constant_position=base, not_given=free, shuffled_actions=other)
    now = metrics.constant(observation.camera_to_base[:, -1], frames)
    present = future.valid[:, :, None] & observation.has_camera[:, None]
    for v, view in enumerate(cameras):
        true, other, free, base = (
            metrics.masked_sums(
                metrics.translation_error(pose[:, :, v], future.camera_to_base[:, :, v]), present[..., v]
            )
            for pose in (told.camera_to_base, misled.camera_to_base, plain.camera_to_base, now)
        )
        put(f"camera_given_actions/{view}", true, constant_pose=base, not_given=free, shuffled_actions=other)


def frame_mask(batch: Batch) -> Tensor:
    """Which future pictures count, (B, F*R, V)."""
    stride = batch.future.rgb.shape[1] // batch.future.valid.shape[1]
    return batch.future.valid.repeat_interleave(stride, 1)[:, :, None] & batch.observation.has_rgb[:, None]


def another_motion(observation: Observation, future: Future) -> Future:
    """Futures in which cameras and points move half as far as those of the next clip do, from where they are.

    The whole way, from another place, often ends inside of something.
    """
    now = observation.camera_to_base[:, -1:]
    moves = compose_se3(invert_se3(now), future.camera_to_base).roll(1, 0)
    rest = torch.eye(4).to(moves).expand_as(moves)
    half = interpolate_poses(torch.stack([rest, moves], 1), 2)[:, 0]
    shift = 0.5 * (future.points - observation.points[:, -1:]).roll(1, 0)
    return future._replace(
        camera_to_base=compose_se3(now.expand_as(half), half), points=observation.points[:, -1:] + shift
    )


def geometry_alone(observation: Observation, asked: Future, name: str) -> Tensor:
    """Pictures (B, F*R, V, 3, h, w) in [0, 1] moved along the asked paths of the `camera` or tracks of `points`."""
    frames, points = asked.points.shape[1:3]
    stride = asked.rgb.shape[1] // frames
    cameras, tracked = (
        has & (name == given) for has, given in ((observation.has_camera, "camera"), (observation.has_points, "points"))
    )
    poses = torch.where(cameras[:, None, :, None, None], asked.camera_to_base, observation.camera_to_base[:, -1:])
    tracks = torch.where(tracked[:, None, :, None], asked.points, observation.points[:, -1:])
    moves, _ = find_moves(observation, *between(observation, poses, tracks, stride), cameras, tracked)
    return by_geometry(moves, points).unflatten(0, (len(poses), -1, poses.shape[2])) * 0.5 + 0.5


def seen(observation: Observation, rgb: Tensor) -> Observation:
    """The observation of someone who sees the last of the pictures (B, T, V, 3, h, w) and nothing before it."""
    last = (rgb[:, -1:].clamp(0, 1) * 255).round().to(torch.uint8)
    return observation._replace(rgb=last.expand_as(observation.rgb))


def camera_share(
    understand: Callable[[Observation], Understanding], observation: Observation, asked: Future, rgb: Tensor
) -> Sums:
    """Share of the asked motion of cameras that stage 1 reads between the newest picture and the last of `rgb`.

    The slope of a line through zero, read against asked displacement, over cameras asked to move: errors of the reader
    that do not depend on the picture cancel.
    """
    before, after = (
        understand(hide(seen(observation, x), ("camera", "points", "touch", "proprio", "text"))).camera_to_base
        for x in (observation.rgb[:, -1:].float() / 255, rgb)
    )
    way = asked.camera_to_base[:, -1, :, :3, 3] - observation.camera_to_base[:, -1, :, :3, 3]
    read = (after - before)[..., :3, 3]
    shown = (observation.has_camera & observation.has_rgb & (way.norm(dim=-1) > MOVED))[..., None].expand_as(way)
    total, weight = (torch.where(shown, way * x, 0.0).double().sum((1, 2))[:, None] for x in (read, way))
    return Sums(total, weight)


def object_places(thing: Tensor, observation: Observation, asked: Future) -> tuple[Tensor, Tensor, Tensor]:
    """Where an object is seen now and is to be seen at the end: pixels (B, V, 2) twice, and whether it counts (B, V).

    It counts in views that stand still, where it is asked to move by more than a patch and both places are inside.
    """
    index = thing.long().argmax(1)
    poses, lens = observation.camera_to_base[:, -1], observation.intrinsics[:, -1]
    found = []
    for points in (observation.points[:, -1], asked.points[:, -1]):
        point = points[torch.arange(len(points)), index][:, None, None].expand(-1, poses.shape[1], -1, -1)
        pixels, depth = project_points(point, lens, poses)
        found.append((pixels.squeeze(2), depth.squeeze(2)))
    (old, far), (new, near) = found
    h, w = observation.rgb.shape[-2:]
    radius = patch_radius(h)
    edge = torch.tensor([w - radius, h - radius]).to(old)
    inside = ((old > radius) & (old < edge) & (new > radius) & (new < edge)).all(-1) & (far > 0) & (near > 0)
    still = metrics.translation_error(poses, asked.camera_to_base[:, -1]) < MOVED
    counts = thing.any(1)[:, None] & observation.has_rgb & observation.has_camera & still & inside
    return old, new, counts & ((new - old).norm(dim=-1) > radius)


def patch_radius(rows: int) -> int:
    """Pixels around a point that its object is taken to fill."""
    return max(rows // 16, 1)


def patches(pictures: Tensor, places: Tensor) -> Tensor:
    """Squares of twice `patch_radius` and a pixel around places (N, 2) in pictures (N, 3, h, w)."""
    h, w = pictures.shape[-2:]
    offset = torch.arange(-patch_radius(h), patch_radius(h) + 1).to(places)
    x, y = (places[:, i, None] + offset for i in (0, 1))
    grid = torch.stack([x[:, None].expand(-1, len(offset), -1), y[..., None].expand(-1, -1, len(offset))], -1)
    return grid_sample(pictures, 2 * grid / grid.new_tensor([w, h]) - 1, align_corners=False)


def likeness(thing: Tensor, observation: Observation, asked: Future, rgb: Tensor) -> Sums:
    """Normalised correlation of what is now at the object with what the last picture shows where it is asked to be."""
    old, new, counts = object_places(thing, observation, asked)
    now, then = observation.rgb[:, -1].flatten(0, 1).float() / 255, rgb[:, -1].flatten(0, 1)
    here, there = (
        (p - p.mean((2, 3), keepdim=True)).flatten(1) for p in (patches(now, old.flatten(0, 1)),
                                                               patches(then, new.flatten(0, 1)))
    )  # fmt: skip
    value = cosine_similarity(here, there, dim=1, eps=1e-6).unflatten(0, old.shape[:2])
    return metrics.masked_sums(value[:, None], counts[:, None])


def around_object(thing: Tensor, batch: Batch, rgb: Tensor) -> Sums:
    """Squared error of the last picture around the object, where it was and where it has gone."""
    old, new, counts = object_places(thing, batch.observation, batch.future)
    truth = batch.future.rgb[:, -1].float().div(255).flatten(0, 1)
    errors = [
        (patches(rgb[:, -1].flatten(0, 1), at) - patches(truth, at)).square().mean((1, 2, 3))
        for at in (old.flatten(0, 1), new.flatten(0, 1))
    ]
    value = torch.stack(errors).mean(0).unflatten(0, old.shape[:2])
    return metrics.masked_sums(value[:, None], (counts & batch.future.valid[:, -1:])[:, None])


def asked_places(observation: Observation, asked: Future, name: str, movable: Tensor) -> Tensor:
    """Pixels (B, F*R, V, K + V, 2) at which each picture should show the points, or other cameras; NaN for no such."""
    frames, points = asked.points.shape[1:3]
    views = asked.camera_to_base.shape[2]
    tracks, poses = asked.points, observation.camera_to_base[:, -1:].expand_as(asked.camera_to_base)
    if name == "camera":
        poses = asked.camera_to_base
    marks = torch.cat([tracks, asked.camera_to_base[..., :3, 3]], 2)[:, :, None].expand(-1, -1, views, -1, -1)
    pixels, depth = project_points(marks, observation.intrinsics[:, -1:], poses)
    told = torch.cat(
        [movable & observation.has_points & (name == "points"), observation.has_camera & (name == "camera")], 1
    )
    shown = told[:, None, None] & (depth > 0) & (observation.has_camera & observation.has_rgb)[:, None, :, None]
    pixels = torch.where(shown.unsqueeze(-1), pixels, torch.nan)
    return pixels.repeat_interleave(asked.rgb.shape[1] // frames, 1)
