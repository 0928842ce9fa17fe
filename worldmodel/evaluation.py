"""Offline evaluation: all five modes and the heads of stage 1 on clips nobody trained on, beside trivial baselines."""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldmodel import metrics
from worldmodel.checkpoint import instructions_read
from worldmodel.conditioning import Flags
from worldmodel.contracts import Batch, ClipSpec, Future, Observation, Prediction, Understanding
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.data.transforms import hide
from worldmodel.evaluation_given import frame_mask, score_actions, score_given
from worldmodel.figures import SampleClip, sample_clip, summarise, worst_and_median
from worldmodel.geometry import intrinsics_to_fov
from worldmodel.holdout import Clip, TrainingMeans, check_unseen, choose_clips, training_means
from worldmodel.metrics import Rows, Sums
from worldmodel.model import WorldModel
from worldmodel.motion_evaluation import Overlay, has_masks, motion_means, score_motion

SPLITS = ("heldout_episodes", "heldout_tasks", "heldout_robots")


class Evaluated(Protocol):
    """What the evaluation needs of a model; `worldmodel.model.WorldModel` has it."""

    spec: ClipSpec
    metadata: dict

    @property
    def givable(self) -> Sequence[str]:
        """Which conditions its synthesis can be given."""
        ...

    def predict(
        self,
        observation: Observation,
        future: Future | None,
        mode: str,
        *,
        generator: torch.Generator,
        steps: int | None = None,
        coupling: str | None = None,
        given: Flags | None = None,
    ) -> Prediction:
        """Answer one of the five modes in physical units."""
        ...

    def understand(self, observation: Observation) -> Understanding:
        """Read the heads of stage 1."""
        ...

    def reconstruct(self, rgb: Tensor) -> Tensor:
        """Send clips (B, 1 + F*R, V, 3, h, w) uint8 through the tokeniser and back, in [0, 1]."""
        ...


def evaluate_offline(
    model: Evaluated,
    reader: ShardReader,
    split: str,
    *,
    clips_per_episode: int = 2,
    batch_size: int = 20,
    seed: int = 0,
    sampler_steps: int | None = None,
    max_clips: int = 120,
) -> dict:
    """Evaluate a model on at most `max_clips` clips of one held-out split.

    Returns a dict of plain values (`figures`, `horizons`, `per_task`, counts and settings) plus `samples`, a list of
    `SampleClip` for the report. Raises DataError if anything in the split was trained on, or if it holds no clip with
    a full future. `sampler_steps` overrides the flow steps of the streams; actions keep those of deployment. The same
    arguments give the same numbers on one machine.
    """
    started = time.perf_counter()
    found = measure(
        model,
        reader,
        split,
        clips_per_episode=clips_per_episode,
        batch_size=batch_size,
        seed=seed,
        sampler_steps=sampler_steps,
        max_clips=max_clips,
    )
    settings = {"clips_per_episode": clips_per_episode, "max_clips": max_clips, "batch_size": batch_size}
    return {
        "split": split,
        "spec": model.spec,
        **counted(found.clips),
        "unread": unread(model.metadata, found.clips),
        "settings": {**settings, "seed": seed, "sampler_steps": sampler_steps},
        "seconds": round(time.perf_counter() - started, 1),
        **summarise(found.rows, found.clips, seed),
        "samples": worst_and_median(found.samples),
        "overlays": list({overlay.clip.task: overlay for overlay in found.overlays}.values()),
    }


class Measured(NamedTuple):
    """Errors of a split clip by clip, not summarised yet, and its clips for pictures."""

    clips: list[Clip]
    rows: dict[str, Rows]
    samples: list[SampleClip]
    overlays: list[Overlay]


def counted(clips: list[Clip]) -> dict:
    """How many clips, of how many episodes, of which tasks."""
    return {
        "clips": len(clips),
        "episodes": len({clip.episode for clip in clips}),
        "tasks": sorted({clip.task for clip in clips}),
    }


def unread(metadata: dict, clips: list[Clip]) -> list[str]:
    """Instructions that count as absent, since the model was not trained on them (`Normaliser`)."""
    known = instructions_read(metadata)
    return [] if known is None else sorted({clip.instruction for clip in clips} - set(known))


def measure(
    model: Evaluated,
    reader: ShardReader,
    split: str,
    *,
    clips_per_episode: int,
    batch_size: int,
    seed: int,
    sampler_steps: int | None,
    max_clips: int,
) -> Measured:
    """Every error of a split, clip by clip; arguments and errors as in `evaluate_offline`."""
    check_unseen(model.metadata, reader, split)
    moving = getattr(model, "motion", None) is not None and has_masks(reader, split)
    dataset = ClipDataset(reader, model.spec, split=split, masks=moving)
    clips = choose_clips(dataset, clips_per_episode, max_clips, seed)
    means = training_means(reader, model.spec)
    motion = motion_means(reader, model.spec) if moving else None
    overlays: list[Overlay] = []
    rows: dict[str, Rows] = {}
    samples = []
    # Batches of nearly equal size: a last batch of one clip would have no other clip to borrow shuffled actions from.
    groups = np.array_split(np.arange(len(clips)), -(-len(clips) // batch_size))
    for number, group in enumerate(tqdm(groups, desc=f"evaluate {split}", unit="batch")):
        chosen = [clips[i] for i in group]
        batch = collate([dataset[clip.item] for clip in chosen])
        led: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        with torch.inference_mode():
            prediction = _predicted_streams(model, batch, chosen, means, rows, seed + number, sampler_steps)
            movable = torch.stack([clip.movable for clip in chosen])
            _dynamics(model, batch, movable, means, rows, seed + number, sampler_steps, prediction)
            _understanding(model, batch, chosen, means, rows)
            if {"camera", "points"} <= set(model.givable):
                led = score_given(partial(_told, model, seed + number, sampler_steps), model.understand, batch, movable,
                                  prediction, partial(_put, rows))  # fmt: skip
            if motion is not None:
                overlays.extend(score_motion(cast(WorldModel, model), batch, chosen, motion, rows))
        samples.extend(sample_clip(batch, prediction, *led, clip, i) for i, clip in enumerate(chosen))
    return Measured(clips, rows, samples, overlays)


def _predicted_streams(
    model: Evaluated,
    batch: Batch,
    clips: list[Clip],
    means: TrainingMeans,
    rows: dict[str, Rows],
    seed: int,
    steps: int | None,
) -> Prediction:
    """Score mode video_prediction on all its streams and mode policy on the actions."""
    spec, observation, future = model.spec, batch.observation, batch.future
    prediction = model.predict(observation, None, "video_prediction", generator=_noise(seed), steps=steps)
    target, mask = future.rgb.float() / 255, frame_mask(batch)
    still = metrics.copy_last_frame(observation, spec.window)
    for v, view in enumerate(("", *(f"/{c}" for c in spec.cameras))):
        seen = mask if v == 0 else mask & (torch.arange(len(spec.cameras)) == v - 1)
        _put(rows, f"video_psnr{view}", metrics.squared_error(prediction.rgb, target, seen),
             copy_last_frame=metrics.squared_error(still, target, seen))  # fmt: skip
    _put(
        rows,
        "video_ssim",
        metrics.ssim(prediction.rgb, target, mask),
        copy_last_frame=metrics.ssim(still, target, mask),
    )

    movable = torch.stack([clip.movable for clip in clips]) & observation.has_points
    shown = future.valid[:, :, None] & movable[:, None]
    rest = metrics.constant(observation.points[:, -1], spec.future)
    parts = {
        "trajectory_ade": shown,
        "trajectory_fde": metrics.last_valid(shown),
        "trajectory_moving": shown & metrics.moving(observation.points, future.points)[:, None],
    }
    for name, part in parts.items():
        _put(rows, name, metrics.trajectory_error(prediction.points, future.points, part),
             constant_position=metrics.trajectory_error(rest, future.points, part))  # fmt: skip

    present = future.valid[:, :, None] & observation.has_camera[:, None]
    now = metrics.constant(observation.camera_to_base[:, -1], spec.future)
    for v, view in enumerate(spec.cameras):
        for name, error in (("translation", metrics.translation_error), ("rotation", metrics.rotation_error)):
            ours, base = (error(p[:, :, v], future.camera_to_base[:, :, v]) for p in (prediction.camera_to_base, now))
            _put(rows, f"camera_path_{name}/{view}", metrics.masked_sums(ours, present[..., v]),
                 constant_pose=metrics.masked_sums(base, present[..., v]))  # fmt: skip

    touched = future.valid[:, :, None] & observation.has_wrench[:, None]
    mean = metrics.constant(means.wrench[observation.embodiment], spec.future)
    last = metrics.constant(observation.wrench[:, -1].mean(1), spec.future)
    for name, torque in (("force_future", False), ("torque_future", True)):
        ours, base, held = (
            metrics.wrench_error(w, future.wrench, touched, torque) for w in (prediction.wrench, mean, last)
        )
        _put(rows, name, ours, mean_force=base, last_force=held)

    policy = model.predict(observation, None, "policy", generator=_noise(seed))
    inverse = model.predict(observation, future, "inverse_dynamics", generator=_noise(seed), coupling="joint")
    gripper, executed = torch.stack([c.gripper for c in clips]), torch.stack([c.last_action for c in clips])
    average = metrics.constant(means.actions[observation.embodiment], spec.chunk)
    ours, informed, held, base = (
        metrics.action_error(a, future.actions, future.action_valid, future.action_dims)
        for a in (policy.actions, inverse.actions, metrics.hold_pose(executed, gripper, spec.chunk), average)
    )
    _put(rows, "action", ours, hold_pose=held, mean_action=base)
    _put(rows, "action_inverse", informed, hold_pose=held, mean_action=base, policy_mode=ours)
    return prediction


def _told(
    model: Evaluated, seed: int, steps: int | None, observation: Observation, future: Future, given: Flags
) -> Prediction:
    return model.predict(observation, future, "video_prediction", generator=_noise(seed), steps=steps, given=given)


def _dynamics(
    model: Evaluated,
    batch: Batch,
    movable: Tensor,
    means: TrainingMeans,
    rows: dict[str, Rows],
    seed: int,
    steps: int | None,
    plain: Prediction,
) -> None:
    """Score forward dynamics under the executed actions and under another clip's, mode joint, and the tokeniser."""
    observation, future, mask = batch.observation, batch.future, frame_mask(batch)
    target = future.rgb.float() / 255
    rolled = future._replace(actions=future.actions.roll(1, 0), action_valid=future.action_valid.roll(1, 0))
    told, misled = (
        model.predict(observation, f, "forward_dynamics", generator=_noise(seed), steps=steps, coupling="joint")
        for f in (future, rolled)
    )
    score_actions(told, misled, plain, batch, movable, model.spec.cameras, partial(_put, rows))
    still = metrics.squared_error(metrics.copy_last_frame(observation, model.spec.window), target, mask)
    both = model.predict(observation, None, "joint", generator=_noise(seed), steps=steps, coupling="joint")
    _put(rows, "video_joint", metrics.squared_error(both.rgb, target, mask), copy_last_frame=still)
    average = metrics.constant(means.actions[observation.embodiment], model.spec.chunk)
    joint, base = (
        metrics.action_error(a, future.actions, future.action_valid, future.action_dims)
        for a in (both.actions, average)
    )
    _put(rows, "action_joint", joint, mean_action=base)
    rebuilt = model.reconstruct(torch.cat((observation.rgb[:, -1:], future.rgb), 1)).clamp(0, 1)
    _put(rows, "tokeniser", metrics.squared_error(rebuilt[:, 1:], target, mask))


def _understanding(
    model: Evaluated, batch: Batch, clips: list[Clip], means: TrainingMeans, rows: dict[str, Rows]
) -> None:
    """Score the heads of stage 1, each with the sense it reads out hidden from it."""
    spec, observation = model.spec, batch.observation
    robot = observation.embodiment
    single = model.understand(hide(observation, ("camera", "points", "touch", "proprio", "text")))
    pose, fov = observation.camera_to_base[:, -1], intrinsics_to_fov(observation.intrinsics[:, -1], spec.height)
    mean_pose, mean_fov = means.camera_to_base[robot], means.fov[robot]
    known = observation.has_camera & observation.has_rgb
    for v, view in enumerate(spec.cameras):
        seen, target = known[:, v, None], pose[:, v, None]
        for name, error in (("translation", metrics.translation_error), ("rotation", metrics.rotation_error)):
            ours, base = (error(p[:, v, None], target) for p in (single.camera_to_base, mean_pose))
            _put(
                rows,
                f"camera_{name}/{view}",
                metrics.masked_sums(ours, seen),
                mean_pose=metrics.masked_sums(base, seen),
            )
        ours, base = (torch.rad2deg((f - fov)[:, v, None].abs()) for f in (single.fov, mean_fov))
        _put(rows, f"camera_fov/{view}", metrics.masked_sums(ours, seen), mean_fov=metrics.masked_sums(base, seen))

    movable = (torch.stack([clip.movable for clip in clips]) & observation.has_points)[:, None]
    unaided = model.understand(hide(observation, ("points",)))
    now = observation.points[:, -1:]
    ours, base = (metrics.trajectory_error(p[:, None], now, movable) for p in (unaided.points, means.points[robot]))
    _put(rows, "object_position", ours, mean_position=base)

    numb = model.understand(hide(observation, ("touch",)))
    felt, touched = observation.wrench[:, -1].mean(1)[:, None], observation.has_wrench[:, None]
    for name, torque in (("force_now", False), ("torque_now", True)):
        ours, base = (
            metrics.wrench_error(w[:, None], felt, touched, torque) for w in (numb.wrench, means.wrench[robot])
        )
        _put(rows, name, ours, mean_force=base)


def _noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _put(rows: dict[str, Rows], name: str, ours: Sums, **baselines: Sums) -> None:
    rows.setdefault(name, Rows()).add(ours, **baselines)
