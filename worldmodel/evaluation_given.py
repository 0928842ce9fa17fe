"""Offline evaluation of given futures: whether synthesis follows the camera paths and object tracks it is asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from worldmodel import metrics
from worldmodel.contracts import Batch, Future, Observation, Prediction, Understanding
from worldmodel.data.transforms import hide
from worldmodel.geometry import compose_se3, invert_se3
from worldmodel.metrics import MOVED, Sums


def score_given(
    predict: Callable[..., Prediction],
    understand: Callable[[Observation], Understanding],
    batch: Batch,
    movable: Tensor,
    plain: Prediction,
    put: Callable[..., None],
) -> dict[str, Tensor]:
    """Scores pictures under given camera paths and object tracks.

    Told what will happen, the pictures should come closer to what did (`video_given_*`), and told what another clip
    did, they should follow that: its motion, carried over to this clip, is asked for, and stage 1 reads from the last
    picture alone where the camera and the objects are (`*_followed`). The same reading of pictures that were told
    nothing says how far off they are. `plain` is the prediction without anything given; `put(name, ours, **others)`
    takes the sums. Returns the pictures by what they were given.
    """
    led: dict[str, Tensor] = {}
    observation, future = batch.observation, batch.future
    target = future.rgb.float() / 255
    mask = frame_mask(batch)
    still = metrics.copy_last_frame(observation, target.shape[1])
    asked = another_motion(observation, future)
    for name in ("camera", "points"):
        told, misled = (predict(observation, f, given={name: True}).rgb for f in (future, asked))
        led |= {f"its own {name}": told, f"another clip's {name}": misled}
        ours, free, other, base = (metrics.squared_error(rgb, target, mask) for rgb in (told, plain.rgb, misled, still))
        put(f"video_given_{name}", ours, copy_last_frame=base, not_given=free, another_clip=other)
        shown: dict[str, Tensor] = {"ours": misled, "not_given": plain.rgb, "copy_last_frame": still}
        read = camera_error if name == "camera" else points_error
        put(f"{name}_followed", **{k: read(understand, observation, asked, rgb, movable) for k, rgb in shown.items()})
    return led


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
    """Futures in which cameras and points move as those of the next clip do, from where they are."""
    now = observation.camera_to_base[:, -1:]
    moves = compose_se3(invert_se3(now), future.camera_to_base).roll(1, 0)
    shift = (future.points - observation.points[:, -1:]).roll(1, 0)
    return future._replace(
        camera_to_base=compose_se3(now.expand_as(moves), moves), points=observation.points[:, -1:] + shift
    )


def seen(observation: Observation, rgb: Tensor) -> Observation:
    """The observation of someone who sees the last of the pictures (B, T, V, 3, h, w) and nothing before it."""
    last = (rgb[:, -1:].clamp(0, 1) * 255).round().to(torch.uint8)
    return observation._replace(rgb=last.expand_as(observation.rgb))


def camera_error(
    understand: Callable[[Observation], Understanding], observation: Observation, asked: Future, rgb: Tensor, _: Any
) -> Sums:
    """Metres between the asked last pose and the one read from the last picture, of cameras asked to move."""
    pictures = hide(seen(observation, rgb), ("camera", "points", "touch", "proprio", "text"))
    error = metrics.translation_error(understand(pictures).camera_to_base, asked.camera_to_base[:, -1])
    path = metrics.translation_error(observation.camera_to_base[:, -1], asked.camera_to_base[:, -1])
    shown = observation.has_camera & observation.has_rgb & (path > MOVED)
    return metrics.masked_sums(error[:, None], shown[:, None])


def points_error(
    understand: Callable[[Observation], Understanding],
    observation: Observation,
    asked: Future,
    rgb: Tensor,
    movable: Tensor,
) -> Sums:
    """Metres between asked last positions and those read from the last pictures, of objects asked to move."""
    pictures = hide(seen(observation, rgb), ("points", "touch", "proprio"))
    shown = movable & observation.has_points & metrics.moving(observation.points, asked.points)
    return metrics.trajectory_error(understand(pictures).points[:, None], asked.points[:, -1:], shown[:, None])
