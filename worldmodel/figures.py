"""The figures of an offline evaluation: their names and units, their summary, and the clips worth looking at."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldmodel import metrics
from worldmodel.contracts import Batch, Prediction
from worldmodel.geometry import intrinsics_to_fov
from worldmodel.holdout import Clip
from worldmodel.metrics import Rows, Sums, bootstrap, joined, pooled, resampling_counts, summary


@dataclass(frozen=True)
class Figure:
    """How one error is named, pooled and read; `axis` is what its horizon counts, empty if it has none."""

    stream: str
    label: str
    unit: str
    axis: str = ""
    decibel: bool = False
    higher: bool = False
    headline: bool = True


STEPS, FRAMES = "control steps ahead", "latent frames ahead"
FIGURES = {
    "video_psnr": Figure("video", "Predicted video, PSNR", "dB", STEPS, decibel=True, higher=True),
    "video_ssim": Figure("video", "Predicted video, SSIM", "", STEPS, higher=True),
    "trajectory_ade": Figure("points", "Object trajectory, ADE", "m", FRAMES),
    "trajectory_fde": Figure("points", "Object trajectory, FDE", "m"),
    "trajectory_moving": Figure("points", "Trajectory of objects in motion, ADE", "m", FRAMES, headline=False),
    "camera_path_translation": Figure("camera", "Future camera position", "m", FRAMES),
    "camera_path_rotation": Figure("camera", "Future camera rotation", "°", FRAMES),
    "force_future": Figure("force", "Future contact force, MAE", "N", FRAMES),
    "torque_future": Figure("force", "Future contact torque, MAE", "N·m", FRAMES, headline=False),
    "action": Figure("action", "Action chunk (policy), MAE", "action units", "action of the chunk"),
    "action_inverse": Figure("action", "Action chunk (inverse dynamics), MAE", "action units", "action of the chunk"),
    "video_given_actions": Figure("video", "Video under given actions, PSNR", "dB", STEPS, decibel=True, higher=True),
    "trajectory_given_actions": Figure("points", "Object trajectory under given actions, ADE", "m", FRAMES),
    "camera_given_actions": Figure("camera", "Future camera position under given actions", "m", FRAMES),
    "video_given_camera": Figure("video", "Video under given camera paths, PSNR", "dB", STEPS, True, True),
    "video_given_points": Figure("video", "Video under given object tracks, PSNR", "dB", STEPS, True, True),
    "object_given_points": Figure("video", "Around the object under its given track, PSNR", "dB", "", True, True),
    "camera_followed": Figure("camera", "Share of the asked camera motion that stage 1 reads", "", higher=True),
    "points_followed": Figure("points", "Likeness of the object at its asked place", "", higher=True),
    "video_joint": Figure("video", "Predicted video, mode joint, PSNR", "dB", STEPS, True, True, headline=False),
    "action_joint": Figure(
        "action", "Action chunk, mode joint, MAE", "action units", "action of the chunk", headline=False
    ),
    "camera_translation": Figure("camera", "Camera position from one image", "m"),
    "camera_rotation": Figure("camera", "Camera rotation from one image", "°"),
    "camera_fov": Figure("camera", "Field of view from one image", "°"),
    "object_position": Figure("points", "Object position from images", "m"),
    "force_now": Figure("force", "Contact force without touch, MAE", "N"),
    "torque_now": Figure("force", "Contact torque without touch, MAE", "N·m", headline=False),
    "moving_iou": Figure("motion", "Mask of all that moves, IoU", "", higher=True),
    "moving_iou_unposed": Figure("motion", "The same without camera poses, IoU", "", higher=True, headline=False),
    "slot_iou": Figure("motion", "Mask of what moves, IoU", "", higher=True),
    "slot_track": Figure("motion", "Position of what moves", "mm"),
    "slot_track_unposed": Figure("motion", "Position without camera poses", "mm", headline=False),
    "slot_motion": Figure("motion", "Motion since the first frame", "mm"),
    "slot_moves": Figure("motion", "Whether it moves, share right", "", higher=True),
    "tokeniser": Figure("video", "Tokeniser reconstruction, PSNR", "dB", decibel=True, higher=True, headline=False),
}
"""Every figure of the offline report. A name may carry a part after a slash (a view): `camera_rotation/wrist`."""
EDIT_FIGURES = {
    "element_inside": Figure("element", "Inside the mask, PSNR", "dB", decibel=True, higher=True),
    "element_colour": Figure("element", "Mean colour inside the mask, distance", "of 1"),
    "element_outside": Figure(
        "element", "Outside the mask as drawn, PSNR to the recording", "dB", "", True, True, False
    ),
    "view_psnr": Figure("view", "Other view, PSNR", "dB", STEPS, decibel=True, higher=True),
    "view_ssim": Figure("view", "Other view, SSIM", "", STEPS, higher=True),
    "across_psnr": Figure("view", "View that was not recorded, PSNR", "dB", STEPS, decibel=True, higher=True),
    "across_ssim": Figure("view", "View that was not recorded, SSIM", "", STEPS, higher=True),
}
"""Every figure of edits; after the slash stands how an element was asked for, or which view."""
KNOWN = FIGURES | EDIT_FIGURES
INFORMATIVE = ("shuffled actions", "policy mode", "not given", "another clip", "geometry alone", "what happened")
"""Comparisons that are no trivial baseline: they show whether the model uses what it is given, and what could be."""


class SampleClip(NamedTuple):
    """One clip as predicted and as it was, for pictures; arrays without the batch axis, physical units."""

    clip: Clip
    kind: str  # "worst" or "median" of its task by PSNR
    psnr: float
    predicted_rgb: np.ndarray  # (F*R, V, 3, h, w) uint8
    true_rgb: np.ndarray
    fov: np.ndarray  # (V,) radians
    camera_now: np.ndarray  # (V, 4, 4)
    predicted_camera: np.ndarray  # (F, V, 4, 4)
    true_camera: np.ndarray
    points_past: np.ndarray  # (H, K, 3)
    predicted_points: np.ndarray  # (F, K, 3)
    true_points: np.ndarray
    points_shown: np.ndarray  # (K,) bool
    wrench_past: np.ndarray  # (H, S, 6)
    predicted_wrench: np.ndarray  # (F, S, 6)
    true_wrench: np.ndarray
    wrench_shown: np.ndarray  # (S,) bool
    led_rgb: Mapping[str, np.ndarray]  # what was given -> (F*R, V, 3, h, w) uint8
    led_places: Mapping[str, np.ndarray]  # the same -> (F*R, V, K + V, 2) pixels asked for, NaN for none


def summarise(rows: dict[str, Rows], clips: list[Clip], seed: int) -> dict:
    """Turn rows of sums into `figures` (with intervals and verdicts), `horizons` and `per_task`, all plain values.

    A baseline's `difference` is ours minus the baseline with its paired interval over episodes; `beaten` compares the
    two values, `clearly` says that the interval excludes zero. Where the best baseline is exact (a camera that never
    moves), `applicable` is False: there is nothing to learn.
    """
    counts, owner = resampling_counts([clip.motion or clip.episode for clip in clips], seed)
    tasks = np.array([clip.task for clip in clips])
    figures, horizons, per_task = [], {}, {}
    for name, row in rows.items():
        kind = KNOWN[name.split("/")[0]]
        ours = joined(row.ours)
        if ours.weight.sum() == 0:
            continue
        distribution = bootstrap(ours, counts, owner, kind.decibel)
        figure = _described(name, kind) | {"ours": summary(distribution)._asdict(), "baselines": []}
        figure["clips"] = int((ours.weight.sum(1) > 0).sum())
        lines = {"ours": pooled(ours, kind.decibel).tolist()}
        by_task = {task: {"ours": _of_task(ours, tasks == task, kind.decibel)} for task in sorted(set(tasks))}
        for baseline, batches in row.baselines.items():
            sums = joined(batches)
            other = bootstrap(sums, counts, owner, kind.decibel)
            lines[baseline] = pooled(sums, kind.decibel).tolist()
            figure["baselines"].append(
                {"name": baseline, "trivial": baseline not in INFORMATIVE} | _verdict(distribution, other, kind)
            )
            for task, values in by_task.items():
                values[baseline] = _of_task(sums, tasks == task, kind.decibel)
        trivial = [b for b in figure["baselines"] if b["trivial"]]
        still = any(
            not np.isfinite(b["value"]) if kind.decibel else b["value"] < 1e-6 and not kind.higher for b in trivial
        )
        figure["applicable"] = not still
        figure["beats_all"] = bool(trivial) and all(b["beaten"] for b in trivial) if not still else None
        figures.append(figure)
        if kind.axis:
            horizons[name] = {"axis": kind.axis, **lines}
        per_task[name] = by_task
    return {"figures": figures, "horizons": horizons, "per_task": per_task}


def _described(name: str, kind: Figure) -> dict:
    part = name.partition("/")[2]
    label = f"{kind.label} ({part})" if part else kind.label
    # A view's own PSNR repeats the headline row; camera figures exist per view only.
    headline = kind.headline and not (part and kind.stream == "video")
    return {"name": name, "stream": kind.stream, "label": label, "unit": kind.unit, "higher_is_better": kind.higher,
            "headline": headline}  # fmt: skip


def _verdict(ours: Tensor, baseline: Tensor, kind: Figure) -> dict:
    """How ours compares with a baseline, from the two paired bootstrap distributions."""
    difference = summary(ours - baseline)
    value, low, high = summary(baseline)
    gain = difference.value if kind.higher else -difference.value
    return {"value": value, "low": low, "high": high, "difference": difference._asdict(), "beaten": gain > 0,
            "clearly": difference.low > 0 or difference.high < 0}  # fmt: skip


def _of_task(sums: Sums, chosen: np.ndarray, decibel: bool) -> float:
    part = Sums(sums.total[torch.from_numpy(chosen)], sums.weight[torch.from_numpy(chosen)])
    value = part.total.sum() / part.weight.sum()
    return (metrics.psnr(value) if decibel else value).item()


def sample_clip(
    batch: Batch,
    prediction: Prediction,
    led: Mapping[str, Tensor],
    places: Mapping[str, Tensor],
    clip: Clip,
    i: int,
) -> SampleClip:
    """Take clip i of a batch, its prediction and the pictures that were led by something given out as arrays."""
    observation, future = batch.observation, batch.future
    predicted = _bytes(prediction.rgb[i])
    error = (predicted.float() - future.rgb[i].float()).div(255).square().mean((-3, -2, -1))[:, observation.has_rgb[i]]
    arrays = (
        predicted,
        future.rgb[i],
        intrinsics_to_fov(observation.intrinsics[i, -1], future.rgb.shape[-2]),
        observation.camera_to_base[i, -1],
        prediction.camera_to_base[i],
        future.camera_to_base[i],
        observation.points[i],
        prediction.points[i],
        future.points[i],
        observation.has_points[i] & clip.movable,
        observation.wrench[i].mean(1),
        prediction.wrench[i],
        future.wrench[i],
        observation.has_wrench[i],
    )
    led_rgb = {name: _bytes(rgb[i]).cpu().numpy() for name, rgb in led.items()}
    psnr = metrics.psnr(error.mean()).item()
    led_places = {name: pixels[i].cpu().numpy() for name, pixels in places.items()}
    return SampleClip(clip, "", psnr, *(a.cpu().numpy() for a in arrays), led_rgb=led_rgb, led_places=led_places)


def _bytes(rgb: Tensor) -> Tensor:
    return (rgb.clamp(0, 1) * 255).round().byte()


def worst_and_median(samples: list[SampleClip]) -> list[SampleClip]:
    """Keep of every task the clip with the lowest PSNR and the one in the middle, tasks in alphabetical order."""
    kept = []
    for task in sorted({sample.clip.task for sample in samples}):
        ranked = sorted((s for s in samples if s.clip.task == task), key=lambda s: s.psnr)
        kept.append(ranked[0]._replace(kind="worst"))
        if len(ranked) > 1:
            kept.append(ranked[len(ranked) // 2]._replace(kind="median"))
    return kept


def text_table(results: list[dict]) -> str:
    """Headline figures of several splits as a Markdown table: ours, and the strongest trivial baseline beside it."""
    splits = [{f["name"]: f for f in result["figures"] if f["headline"]} for result in results]
    names = list(dict.fromkeys(name for split in splits for name in split))
    heads = " | ".join(f"{result['split']} | baseline" for result in results)
    lines = [f"| figure | {heads} |", "| --- |" + " ---: | --- |" * len(results)]
    for name in names:
        figure = next(split[name] for split in splits if name in split)
        label = f"{figure['label']} [{figure['unit']}]" if figure["unit"] else figure["label"]
        lines.append(f"| {label} | " + " | ".join(_text_cell(split.get(name)) for split in splits) + " |")
    return "\n".join(lines)


def _text_cell(figure: dict | None) -> str:
    if figure is None:
        return " | "
    ours = f"{figure['ours']['value']:.4g}"
    trivial = [baseline for baseline in figure["baselines"] if baseline["trivial"]]
    if not figure["applicable"] or not trivial:
        return f"{ours} | does not vary"
    best = (max if figure["higher_is_better"] else min)(trivial, key=lambda baseline: baseline["value"])
    return f"{ours} | {best['name']} {best['value']:.4g} {'beaten' if best['beaten'] else 'NOT BEATEN'}"
