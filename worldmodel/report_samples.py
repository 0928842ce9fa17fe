"""The part of the report that shows clips: videos, force curves, and cameras and tracks in space."""

from collections.abc import Mapping
from html import escape

import numpy as np

from worldmodel.contracts import ClipSpec
from worldmodel.figures import SampleClip
from worldmodel.plots import line_chart, number, scene
from worldmodel.viz import ringed, video_data_uri, video_tag


def sample_sections(offline: list[dict], split_names: Mapping[str, str]) -> str:
    """Show the worst and the median clip of every task, split by split, each with its videos and curves."""
    shown = [result for result in offline if result["samples"]]
    if not shown:
        return '<p class="quiet">No clips in this report.</p>'
    intro = (
        "Left predicted from the history alone, right what happened, at a quarter of real speed. For every task the "
        "clip with the lowest PSNR and the one in the middle."
    )
    parts = [f"<p>{intro}</p>"]
    for result in shown:
        parts.append(f"<h3>{split_names[result['split']]}</h3>")
        clips = "".join(_sample(sample, result["spec"]) for sample in result["samples"])
        parts.append(f'<div class="samples">{clips}</div>')
    return "".join(parts)


def _sample(sample: SampleClip, spec: ClipSpec) -> str:
    clip = sample.clip
    videos = "".join(
        video_tag(
            video_data_uri(sample.predicted_rgb[:, v], sample.true_rgb[:, v], fps=max(1, round(spec.fps / 4))),
            f"{escape(view)}: predicted | true",
        )
        for v, view in enumerate(spec.cameras)
    )
    heading = (
        f'<p><span class="tag">{sample.kind}</span> <b>{escape(clip.task)}</b> “{escape(clip.instruction)}” '
        f'<span class="interval">{escape(clip.episode)}, step {clip.step}, PSNR {number(sample.psnr)} dB</span></p>'
    )
    curves = "".join([*_force(sample, spec), *_space(sample, spec)])
    led = "".join(_led(sample, spec))
    return (
        f'<div class="sample">{heading}<div class="clips">{videos}</div>'
        f'<details><summary>Force, cameras and tracks</summary><div class="grid">{curves}</div></details>{led}</div>'
    )


def _led(sample: SampleClip, spec: ClipSpec) -> list[str]:
    """Videos of each view under given futures, folded away; nothing for a model that can be given none.

    Rings show where the points, or the other cameras, are asked to be.
    """
    if not sample.led_rgb:
        return []
    shown = {"nothing given": sample.predicted_rgb, **sample.led_rgb, "true": sample.true_rgb}
    nowhere = np.full_like(next(iter(sample.led_places.values())), np.nan)
    videos = "".join(
        video_tag(
            video_data_uri(
                *(ringed(film[:, v], sample.led_places.get(name, nowhere)[:, v]) for name, film in shown.items()),
                fps=max(1, round(spec.fps / 4)),
            ),
            f"{escape(view)}: {escape(' | '.join(shown))}",
        )
        for v, view in enumerate(spec.cameras)
    )
    summary = "Under given camera paths and object tracks; rings: where points and other cameras are asked to be"
    return [f"<details><summary>{summary}</summary>{videos}</details>"]


def _force(sample: SampleClip, spec: ClipSpec) -> list[str]:
    """One chart of the force's magnitude per sensor; the past is drawn with the true future."""
    past, future = np.arange(1 - spec.history, 1), np.arange(1, spec.future + 1)
    steps = [int(i) * spec.stride for i in (*past, *future)]
    charts = []
    for s, sensor in enumerate(spec.sensors):
        if not sample.wrench_shown[s]:
            continue
        felt, true, predicted = (
            np.linalg.norm(w[:, s, :3], axis=-1).tolist()
            for w in (sample.wrench_past, sample.true_wrench, sample.predicted_wrench)
        )
        unknown = [float("nan")] * (spec.history - 1)
        series = {"predicted": [*unknown, felt[-1], *predicted], "true": [*felt, *true]}
        charts.append(line_chart(steps, series, "control steps from now", f"Force on {sensor.replace('_', ' ')} [N]"))
    return charts


def _space(sample: SampleClip, spec: ClipSpec) -> list[str]:
    """The scene with its cameras, and the tracks of the objects alone, larger."""
    fov = sample.fov
    cameras = {
        "true": [(sample.true_camera[-1, v], float(fov[v])) for v in range(len(spec.cameras))],
        "predicted": [(sample.predicted_camera[-1, v], float(fov[v])) for v in range(len(spec.cameras))],
    }
    shown = np.flatnonzero(sample.points_shown)
    tracks = {
        "true": [np.concatenate((sample.points_past[:, k], sample.true_points[:, k])) for k in shown],
        "predicted": [np.concatenate((sample.points_past[-1:, k], sample.predicted_points[:, k])) for k in shown],
    }
    end = f"{spec.window} control steps ahead"
    charts = [scene(cameras, tracks, f"Cameras and objects, {end}")]
    if len(shown):
        charts.append(scene({}, tracks, f"Tracks of the objects, {end}"))
    return charts
