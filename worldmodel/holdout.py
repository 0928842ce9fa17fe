"""What is evaluated: clips of held-out episodes, proof that none was trained on, and training means as baselines."""

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmodel.contracts import ClipSpec
from worldmodel.data.align import Aligned, align
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.errors import DataError
from worldmodel.geometry import intrinsics_to_fov
from worldmodel.metrics import chordal_mean

STATIC_POINT = "goal"
"""Name of the tracked point that marks a place: it never moves, so its trajectory is no achievement."""


class Clip(NamedTuple):
    """One starting point of an evaluated episode, with what the baselines and masks need beyond its batch."""

    item: int  # number in the clip dataset
    episode: str  # key
    task: str
    instruction: str
    step: int
    movable: Tensor  # (K,) bool, points that are no goal marker
    gripper: Tensor  # (D,) bool, action dimensions that command the gripper
    last_action: Tensor  # (D,) the action executed one step before; zeros at the start
    motion: str = ""  # key of the episode whose motion it shows: variants are no independent trials


class TrainingMeans(NamedTuple):
    """Means over the train split, one row per embodiment of the spec."""

    camera_to_base: Tensor  # (E, V, 4, 4) mean translation, chordal mean rotation
    fov: Tensor  # (E, V) vertical, radians
    points: Tensor  # (E, K, 3)
    wrench: Tensor  # (E, S, 6)
    actions: Tensor  # (E, D)


def check_unseen(metadata: dict[str, Any], reader: ShardReader, split: str) -> None:
    """Raise DataError if the model was trained on an episode of this split, in `heldout_tasks` on a task of it, or in
    `heldout_robots` on a robot.

    Compares the checkpoint's `training` record (`episodes`, `tasks`, `robots`) with the index: episodes by their keys,
    and start states with those of the train split, so that a recording under a second name is found too.
    """
    evaluated = [entry for entry in reader.entries if entry.split == split]
    if not evaluated:
        known = sorted({entry.split for entry in reader.entries})
        raise DataError(f"{reader.root}: no episode of split {split!r}; the index has {known}")
    record = metadata.get("training", {})
    kept = ("episodes", "tasks", "robots") if split == "heldout_robots" else ("episodes", "tasks")
    if missing := [name for name in kept if name not in record]:
        raise DataError(
            f"the checkpoint does not say what it was trained on (training.{missing[0]} is missing), so nothing can be "
            "called held out; train again with this version"
        )
    trained = set(record["episodes"])
    starts = {e.initial_state for e in reader.entries if e.split == "train" or e.key in trained}
    for entry in evaluated:
        if entry.key in trained:
            raise DataError(f"{split}: episode {entry.key!r} was trained on; evaluate on data of another seed")
        if entry.initial_state in starts:
            raise DataError(f"{split}: episode {entry.key!r} starts exactly like a training episode")
    if split == "heldout_tasks" and (shared := sorted({e.task for e in evaluated} & set(record["tasks"]))):
        raise DataError(f"{split}: tasks {shared} were trained on; they are not held out")
    if split == "heldout_robots" and (shared := sorted({e.embodiment for e in evaluated} & set(record["robots"]))):
        raise DataError(f"{split}: robots {shared} were trained on; they are not held out")


def choose_clips(dataset: ClipDataset, clips_per_episode: int, max_clips: int, seed: int) -> list[Clip]:
    """Choose starting points at multiples of R that have a full future, a few per episode and `max_clips` in all.

    A bound takes clips away evenly: every episode gives its first clip before any gives a second, and tasks take
    turns. Which steps an episode offers depends on the seed and its key only. Raises DataError if no episode is long
    enough.
    """
    spec, offers, first = dataset.spec, [], 0
    places: dict[str, int] = {}
    for entry in dataset.entries():
        starts = np.arange(0, entry.length - max(spec.window, spec.chunk), spec.stride)
        rng = np.random.default_rng([seed, zlib.crc32(entry.key.encode())])
        place = places[entry.task] = places.get(entry.task, -1) + 1
        for turn, step in enumerate(rng.permutation(starts)[:clips_per_episode].tolist()):
            offers.append((turn, place, entry.task, first + step))
        first += entry.length
    if not offers:
        raise DataError(f"{dataset.reader.root}: no episode of {dataset.split!r} is longer than {spec.window} steps")
    return [clip_at(dataset, index) for *_, index in sorted(offers)[:max_clips]]


def clip_at(dataset: ClipDataset, index: int) -> Clip:
    """What is known of clip `index` beside its batch."""
    number, step = dataset.locate(index)
    spec, entry = dataset.spec, dataset.reader.entries[number]
    episode = dataset.reader.read(number, images=False)
    names, actions = episode.meta.get("point_names", []), episode.meta.get("action_names", [])
    movable, gripper = torch.zeros(spec.points, dtype=torch.bool), torch.zeros(spec.action, dtype=torch.bool)
    movable[: len(names)] = torch.tensor([name != STATIC_POINT for name in names], dtype=torch.bool)
    gripper[: len(actions)] = torch.tensor(["gripper" in name for name in actions], dtype=torch.bool)
    last = torch.zeros(spec.action)
    if step > 0 and episode.action is not None:
        last[: len(actions)] = torch.from_numpy(episode.action[step - 1])
    motion = entry.variant_of or entry.episode_id
    return Clip(index, entry.key, entry.task, episode.meta["instruction"], step, movable, gripper, last, motion)


def training_means(reader: ShardReader, spec: ClipSpec) -> TrainingMeans:
    """Average the successful train episodes per embodiment; one without any gets the mean over all others.

    Raises DataError if there is no train split to average.
    """
    groups: dict[str, list[Aligned]] = {}
    for number, entry in enumerate(reader.entries):
        if entry.split == "train" and entry.success:
            where = f"{entry.shard}: key {entry.key}"
            aligned = align(reader.read(number, images=False), spec, {}, where)
            groups.setdefault(entry.embodiment, []).append(aligned)
    if not groups:
        raise DataError(f"{reader.root}: no successful episode of split 'train', so the baselines have no means")
    everything = [aligned for group in groups.values() for aligned in group]
    means = [_means(groups.get(name, everything), spec) for name in spec.embodiments]
    return TrainingMeans(*(torch.stack(column) for column in zip(*means, strict=True)))


def _means(episodes: list[Aligned], spec: ClipSpec) -> TrainingMeans:
    pose, fov = torch.eye(4).repeat(len(spec.cameras), 1, 1), torch.ones(len(spec.cameras))
    for v in range(len(spec.cameras)):
        known = [e for e in episodes if e.constant["has_camera"][v]]
        if known:
            poses = torch.from_numpy(np.concatenate([e.camera_to_base[:, v] for e in known]))
            pose[v, :3, 3] = poses[:, :3, 3].mean(0)
            pose[v, :3, :3] = chordal_mean(poses[:, :3, :3])
            lenses = torch.from_numpy(np.concatenate([e.intrinsics[:, v] for e in known]))
            fov[v] = intrinsics_to_fov(lenses, spec.height).mean()
    return TrainingMeans(
        pose,
        fov,
        _slot_means([(e.points, e.constant["has_points"]) for e in episodes]),
        _slot_means([(e.wrench, e.constant["has_wrench"]) for e in episodes]),
        _slot_means([(e.action, e.constant["action_dims"]) for e in episodes]),
    )


def _slot_means(series: list[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """Mean over all steps of values (T, slots, ...), each slot over the episodes that have it; zero if none has."""
    total, count = np.zeros(series[0][0].shape[1:]), np.zeros(series[0][1].shape)
    for values, present in series:
        total[present] += values.sum(0, dtype=np.float64)[present]
        count[present] += len(values)
    weight = np.maximum(count, 1).reshape(-1, *([1] * (total.ndim - 1)))
    return torch.from_numpy(total / weight).float()
