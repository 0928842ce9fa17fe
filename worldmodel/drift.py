"""How far a streamed rollout drifts from the episode it began in: errors per chunk, under several kinds of actions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from worldmodel import metrics
from worldmodel.contracts import Batch, ClipSpec, Observation, Prediction
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset, Request
from worldmodel.errors import ConfigError, DataError
from worldmodel.holdout import Clip, clip_at
from worldmodel.metrics import Sums
from worldmodel.model import WorldModel
from worldmodel.streaming import Actions, roll_out

KINDS = ("given", "shuffled", "other", "policy", "none", "camera", "points")
LED = ("camera", "points")
"""Kinds that are told something else than actions: the episode's camera paths, or its object tracks."""
HELD, ANEW = "last frame held", "given, true history"
"""The two references beside every rollout."""
MEASURES = {
    "psnr": ("Video, PSNR", "dB", True),
    "ssim": ("Video, SSIM", "", True),
    "ade": ("Object trajectories, ADE", "m", False),
    "camera_translation": ("Position of cameras that move", "m", False),
    "camera_rotation": ("Rotation of cameras that move", "°", False),
}
"""Measure -> label, unit, whether more is better."""
MOVED = 1e-3
"""Metres from where it began beyond which a camera counts as moving."""


class Film(NamedTuple):
    """One episode under one kind of actions, for people to look at."""

    clip: Clip
    kind: str
    predicted: np.ndarray  # (T, V, 3, h, w) uint8
    true: np.ndarray


def choose_episodes(dataset: ClipDataset, count: int, start: int) -> list[Clip]:
    """`count` episodes from step `start` on, the longest of each task first, tasks in turn.

    Raises `DataError` if none has a whole chunk left there.
    """
    first, offers = 0, []
    for entry in dataset.entries():
        if entry.length - 1 - start >= dataset.spec.window:
            offers.append((entry.task, -entry.length, first + start))
        first += entry.length
    turns: dict[str, int] = {}
    ranked = []
    for task, length, item in sorted(offers):
        turns[task] = turns.get(task, -1) + 1
        ranked.append((turns[task], length, item))
    if not ranked:
        raise DataError(
            f"{dataset.reader.root}: no episode of {dataset.split!r} has {dataset.spec.window} steps after step {start}"
        )
    return [clip_at(dataset, item) for *_, item in sorted(ranked)[:count]]


def measure_drift(
    model: WorldModel,
    dataset: ClipDataset,
    clips: Sequence[Clip],
    *,
    chunks: int | None,
    kinds: Sequence[str],
    seed: int,
    guidance: Mapping[str, float] | None = None,
    steps: int | None = None,
    films: int = 0,
) -> tuple[dict[str, Any], list[Film]]:
    """Rolls out all `clips` at once under each kind of actions.

    Returns plain values - `figures` {measure: {kind: value per chunk}}, the number of `episodes` per chunk, `chunk`
    seconds, bytes of the memory - and films of the first `films` episodes. `guidance` has a scale for `actions`,
    `camera`, `points` or `embodiment`, which leads the kinds that are given it. Raises `ConfigError` for an unknown
    kind or guide, or for other episodes' actions where there is but one.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(f"actions: unknown {unknown[0]!r}; some of {', '.join(KINDS)}")
    if "other" in kinds and len(clips) < 2:
        raise ConfigError("actions: `other` takes those of another episode, but there is only one; raise episodes")
    guidance = guidance or {}
    if unknown := sorted(set(guidance) - {"actions", "embodiment", *LED}):
        raise ConfigError(f"guidance: {unknown[0]!r} cannot lead a rollout; actions, camera, points, embodiment can")
    spec = model.spec
    lengths = [dataset.reader.entries[dataset.locate(clip.item)[0]].length - 1 - clip.step for clip in clips]
    count = max(lengths) // spec.window if chunks is None else chunks
    movable = torch.stack([clip.movable for clip in clips])
    now: dict[str, Batch] = {}
    order = torch.Generator().manual_seed(seed)
    told: dict[str, Actions | str | None] = {
        "given": lambda _: now["batch"].future.actions,
        "shuffled": lambda _: shuffled(now["batch"].future.actions, order),
        "other": lambda _: now["batch"].future.actions.roll(1, 0),
        "policy": "policy",
        **dict.fromkeys(("none", *LED)),
    }
    streams, begun = {}, None
    sums: dict[str, dict[str, list[Sums]]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    moves, nbytes = torch.zeros(len(clips), len(spec.cameras), dtype=torch.bool), 0
    for number in tqdm(range(count), desc="rollout", unit="chunk"):
        now["batch"] = batch = collate([dataset[Request(clip.item, ahead=number)] for clip in clips])
        if begun is None:
            begun = batch.observation
            for kind in kinds:
                noise = torch.Generator().manual_seed(seed)
                led = {"futures": lambda _: now["batch"].future, "given": {kind: True}} if kind in LED else {}
                has = ("embodiment", kind if led else "actions" if told[kind] is not None else "")
                lead = {name: scale for name, scale in guidance.items() if name in has}
                streams[kind] = roll_out(
                    model, begun, chunks=count, generator=noise, actions=told[kind], guidance=lead, steps=steps, **led
                )
        away = batch.future.camera_to_base[..., :3, 3] - begun.camera_to_base[:, -1:, :, :3, 3]
        moves |= (away.norm(dim=-1) > MOVED).any(1)
        answers = {}
        for kind, stream in streams.items():
            answers[kind], memory = next(stream)
            nbytes = memory.kept.nbytes
        if "given" in kinds:
            answers[ANEW] = anew(model, batch, seed, steps)
        answers[HELD] = held(begun, spec)
        for kind, answer in answers.items():
            for name, value in errors(answer, batch, movable, moves).items():
                sums.setdefault(name, {}).setdefault(kind, []).append(value)
            if films and kind in kinds:
                shown.setdefault(kind, []).append((answer.rgb[:films] * 255).round().byte().numpy())
        if films:
            shown.setdefault("true", []).append(batch.future.rgb[:films].numpy())
    figures = {name: {kind: [figure(name, s) for s in rows] for kind, rows in by.items()} for name, by in sums.items()}
    result = {
        "chunk_seconds": spec.window / spec.fps,
        "episodes": [sum(length >= (n + 1) * spec.window for length in lengths) for n in range(count)],
        "memory_bytes_per_episode": nbytes // len(clips),
        "figures": figures,
    }
    return result, make_films(clips[:films], lengths, {name: np.concatenate(rows, 1) for name, rows in shown.items()})


def shuffled(actions: Tensor, generator: torch.Generator) -> Tensor:
    """Actions (B, A, D) with the steps of each row in random order."""
    order = torch.rand(actions.shape[:2], generator=generator).argsort(1)
    return actions.gather(1, order[..., None].expand_as(actions))


def held(begun: Observation, spec: ClipSpec) -> Prediction:
    """The reference that nothing changes from the moment the rollout begins."""
    return Prediction(
        rgb=metrics.copy_last_frame(begun, spec.window),
        camera_to_base=metrics.constant(begun.camera_to_base[:, -1], spec.future),
        points=metrics.constant(begun.points[:, -1], spec.future),
        wrench=metrics.constant(begun.wrench[:, -1].mean(1), spec.future),
        actions=begun.points.new_zeros(len(begun.text), spec.chunk, spec.action),
    )


def anew(model: WorldModel, batch: Batch, seed: int, steps: int | None) -> Prediction:
    """The reference without drift: the chunk predicted from what was really observed before it."""
    noise = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        return model.predict(batch.observation, batch.future, "forward_dynamics", generator=noise, steps=steps)


def errors(answer: Prediction, batch: Batch, movable: Tensor, moves: Tensor) -> dict[str, Sums]:
    """Errors of one chunk, one row per episode; `movable` (B, K) points and cameras (B, V) that have moved count."""
    future, observation = batch.future, batch.observation
    target = future.rgb.float() / 255
    stride = target.shape[1] // future.valid.shape[1]
    seen = future.valid.repeat_interleave(stride, 1)[..., None] & observation.has_rgb[:, None]
    known = future.valid[..., None] & (observation.has_camera & moves)[:, None]
    points = future.valid[..., None] & (observation.has_points & movable)[:, None]
    poses = (answer.camera_to_base, future.camera_to_base)
    return {
        "psnr": metrics.squared_error(answer.rgb, target, seen),
        "ssim": metrics.ssim(answer.rgb, target, seen),
        "ade": metrics.trajectory_error(answer.points, future.points, points),
        "camera_translation": metrics.masked_sums(metrics.translation_error(*poses), known),
        "camera_rotation": metrics.masked_sums(metrics.rotation_error(*poses), known),
    }


def figure(name: str, sums: Sums) -> float:
    """The figure of one chunk over all episodes and steps; NaN where nothing was measured."""
    mean = sums.total.sum() / sums.weight.sum()
    return float(metrics.psnr(mean) if name == "psnr" else mean)


def make_films(clips: Sequence[Clip], lengths: Sequence[int], shown: dict[str, np.ndarray]) -> list[Film]:
    """Cuts each shown episode (n, T, V, 3, h, w) at its end."""
    return [
        Film(clip, kind, frames[i, : lengths[i]], shown["true"][i, : lengths[i]])
        for i, clip in enumerate(clips)
        for kind, frames in shown.items()
        if kind != "true"
    ]


def drift_table(result: dict[str, Any], cell: Callable[[float], str]) -> str:
    """A Markdown table: a row per measure and kind of actions, a column per chunk."""
    episodes, seconds = result["episodes"], result["chunk_seconds"]
    heads = " | ".join(f"{(i + 1) * seconds:.1f} s ({n})" for i, n in enumerate(episodes))
    lines = [f"| measure | actions | {heads} |", "| --- | --- |" + " ---: |" * len(episodes)]
    for name, kinds in result["figures"].items():
        label, unit, _ = MEASURES[name]
        for kind, values in kinds.items():
            cells = " | ".join(cell(value) for value in values)
            lines.append(f"| {label}{f' [{unit}]' if unit else ''} | {kind} | {cells} |")
    return "\n".join(lines)
