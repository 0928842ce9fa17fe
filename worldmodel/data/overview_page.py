"""A page about a dataset to look at: a video per task, distributions, and cameras and trajectories in space."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from worldmodel.data.overview import SAMPLED_EPISODES, Row, Series, examples, rows, series, tracks
from worldmodel.data.schema import Episode
from worldmodel.data.sections import Entry
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError
from worldmodel.page import compose
from worldmodel.plots import histogram, orbit
from worldmodel.viz import PALETTE, encode_mp4, enlarged, video_tag

SHOWN_TASKS = 60
"""Tasks with videos: a page of some megabytes still opens on a phone. The table lists all."""
SIDE = 256
"""Largest picture side in pixels; larger ones are thinned out."""
SHOWN_VARIANTS = 3
"""Variants of one episode whose videos are shown."""
FRAMES = 120
"""Largest number of frames of a video; of longer episodes every n-th is shown, at true speed."""


def write_page(root: str | Path, file: str | Path) -> Path:
    """Write the page about the dataset in `root` to `file` and return its path.

    Raises:
        DataError: no dataset in `root`, or one that is damaged.
        ConfigError: `file` cannot be written.
    """
    page = render(ShardReader(root, cache_bytes=0))
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the page cannot be written there ({error}); give another file") from error
    return path


def render(reader: ShardReader) -> str:
    """Compose the page."""
    totals, values, index = rows(reader), series(reader), reader.index
    sections = {
        "Tasks and splits": ("tasks", _table(totals, reader)),
        "Demonstrations": ("demonstrations", _demonstrations(reader)),
        "Episode lengths": ("lengths", _lengths(reader)),
        "Actions": ("actions", _histograms(values, "actions")),
        "Forces": ("forces", _histograms(values, "forces")),
        "Absent senses": ("absent", _absent(values)),
    }
    size = sum(entry.size for entry in reader.entries)
    successes = sum(bool(entry.success) for entry in reader.entries)
    cards = [
        (f"{len(reader)}", f"episodes in {len(index['shards'])} shards, {_bytes(size)}"),
        (f"{reader.frames}", _duration(reader.frames, values)),
        (f"{len(index['tasks'])}", f"tasks, {len(reader.heldout_tasks)} of them held out"),
        (f"{successes / max(len(reader), 1):.0%}", "of the episodes were successful"),
    ]
    robots = ", ".join(index["embodiments"])
    verdict = f"Demonstrations of {robots}. {_extent(values, reader)}"
    footer = f"Schema {index['schema_version']}. `python -m worldmodel.data validate` says whether the data are sound."
    return compose(f"{reader.root.resolve().name}: dataset", verdict, cards, sections, footer)


def _extent(values: Mapping[str, Series], reader: ShardReader) -> str:
    read = sum(kept.episodes for kept in values.values())
    if read == len(reader):
        return "Distributions are over all episodes."
    return f"Distributions are over {read} evenly spread episodes (at most {SAMPLED_EPISODES})."


def _duration(steps: int, values: Mapping[str, Series]) -> str:
    rates = {rate for kept in values.values() for rate in kept.rates}
    if len(rates) != 1:
        return f"steps at {', '.join(f'{rate:g}' for rate in sorted(rates))} Hz"
    minutes = steps / min(rates) / 60
    length = f"{minutes / 60:.3g} hours" if minutes >= 120 else f"{minutes:.3g} minutes"
    return f"steps, {length} at {min(rates):g} Hz"


def _bytes(size: int) -> str:
    if size < 1e9:
        return f"{size / 1e6:.3g} MB"
    return f"{size / 1e9:,.3g} GB"


def _table(totals: Iterable[Row], reader: ShardReader) -> str:
    body, split = [], None
    for row in totals:
        if row.split != split:
            split = row.split
            body.append(f'<tr class="group"><td colspan="6">{escape(split)}</td></tr>')
        task = "<b>all tasks</b>" if row.task == "all" else escape(row.task)
        held = ' <span class="tag">held out</span>' if row.task in reader.heldout_tasks else ""
        numbers = (
            f"{row.episodes}",
            f"{row.successes / row.episodes:.0%}",
            f"{row.steps}",
            f"{row.steps / row.episodes:.0f}",
            _bytes(row.size),
        )
        cells = "".join(f'<td class="n">{f"<b>{v}</b>" if row.task == "all" else v}</td>' for v in numbers)
        body.append(f"<tr><td>{task}{held}</td>{cells}</tr>")
    heads = "".join(f'<th class="n">{name}</th>' for name in ("Episodes", "Success", "Steps", "Mean length", "Size"))
    return (
        f'<div class="wide"><table><thead><tr><th>Task</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _demonstrations(reader: ShardReader) -> str:
    parts = []
    for number, (entry, episode) in enumerate(examples(reader)):
        if number == SHOWN_TASKS:
            break
        variants = reader.variants(entry.episode_id)
        shown = [reader.read(i) for i in variants[:SHOWN_VARIANTS]]
        parts.append(_demonstration(entry, episode, shown, len(variants)))
    more = len(reader.index["tasks"]) - len(parts)
    rest = f'<p class="quiet">{more} more tasks are in the table only.</p>' if more > 0 else ""
    return (
        "<p>One successful episode per task, if there is one, at real speed. Scenes are in the base frame, true to "
        "scale; drag them or use the arrow keys to turn them. A dot marks where a track ends.</p>"
        f'<div class="samples">{"".join(parts)}</div>{rest}'
    )


def _demonstration(entry: Entry, episode: Episode, variants: Sequence[Episode], number: int) -> str:
    mark = "" if entry.success else '<span class="tag no">failed</span>'
    heading = (
        f"<p><b>{escape(entry.task)}</b> “{escape(episode.meta['instruction'])}” {mark}"
        f'<span class="interval">{escape(entry.key)}, {entry.length} steps</span></p>'
    )
    videos = "".join(_video(camera, pictures, episode) for camera, pictures in episode.rgb.items())
    videos = videos or '<p class="quiet">No pictures.</p>'
    scenes = _scenes(episode)
    return (
        f'<div class="sample">{heading}<div class="clips">{videos}</div>{_masks(episode)}{_variants(variants, number)}'
        f'<details><summary>Cameras and trajectories</summary><div class="grid">{scenes}</div></details></div>'
    )


def _masks(episode: Episode) -> str:
    """Masks as videos, and which colour stands for which element."""
    if not episode.masks:
        return ""
    names = episode.meta["elements"]
    videos = "".join(_video(f"{camera}, masks", PALETTE[masks], episode) for camera, masks in episode.masks.items())
    there = np.unique(np.concatenate([np.unique(masks) for masks in episode.masks.values()]))
    key = "".join(
        f'<span style="color:rgb({",".join(str(c) for c in PALETTE[i])})">&#9632;</span> {escape(names[i])} '
        for i in there
    )
    return f'<div class="clips">{videos}</div><p class="quiet">{key}</p>'


def _variants(variants: Sequence[Episode], number: int) -> str:
    """The first variants of an episode as videos."""
    if not variants:
        return ""
    videos = "".join(
        _video(f"variant {variant.meta['variant']}, {camera}", pictures, variant)
        for variant in variants
        for camera, pictures in variant.rgb.items()
    )
    return (
        f"<details><summary>The same motion in other looks: {len(variants)} of {number}</summary>"
        f'<div class="clips">{videos}</div></details>'
    )


def _video(camera: str, pictures: np.ndarray, episode: Episode) -> str:
    """Pictures (T, h, w, 3) as a playing figure."""
    skip = max(1, math.ceil(len(pictures) / FRAMES))
    thin = max(1, math.ceil(max(pictures.shape[1:3]) / SIDE))
    shown = enlarged(pictures[::skip, ::thin, ::thin].transpose(0, 3, 1, 2), least=64)
    data = encode_mp4(shown, fps=max(1, round(float(episode.meta["fps"]) / skip)))
    return video_tag("data:video/mp4;base64," + base64.b64encode(data).decode(), escape(camera))


def _scenes(episode: Episode) -> str:
    """The whole scene with its cameras, and the tracks alone, larger."""
    found = tracks(episode)
    cameras, paths = [], {}
    for camera, poses in episode.camera_to_base.items():
        matrix = episode.intrinsics[camera][0]
        # The principal point lies in the middle of the picture, near enough for a drawing.
        fov, aspect = (
            2 * math.atan2(matrix[1, 2], matrix[1, 1]),
            matrix[0, 2] * matrix[1, 1] / (matrix[1, 2] * matrix[0, 0]),
        )
        moves = bool(np.ptp(poses[:, :3, 3], axis=0).max() > 1e-3)
        cameras += [(pose, fov, aspect) for pose in (poses[[0, -1]] if moves else poses[:1])]
        if moves:
            paths[f"{camera} camera"] = poses[:, :3, 3]
    whole = orbit(cameras, {**found, **paths}, "Cameras, end effector and objects")
    return whole + (orbit([], found, "Tracks alone") if found else "")


def _lengths(reader: ShardReader) -> str:
    lengths: dict[str, list[int]] = {}
    for entry in reader.entries:
        lengths.setdefault(entry.split, []).append(entry.length)
    named = {split: np.array(values) for split, values in lengths.items()}
    return f'<div class="narrow">{histogram(named, "steps", "Episodes by length")}</div>'


def _histograms(values: Mapping[str, Series], what: str) -> str:
    parts = []
    for embodiment, kept in values.items():
        charts = "".join(
            histogram({name: np.concatenate(pieces)}, "value" if what == "actions" else "N", name, log=what == "forces")
            for name, pieces in getattr(kept, what).items()
        )
        charts = charts or '<p class="quiet">Absent.</p>'
        parts.append(f'<h3>{escape(embodiment)}</h3><div class="grid">{charts}</div>')
    intro = {
        "actions": "Steps by value of each action dimension.",
        "forces": "Steps by magnitude of the force at each sensor. The axis of counts is logarithmic, so that rare "
        "contacts show beside rest.",
    }
    return f"<p>{intro[what]}</p>{''.join(parts)}"


def _absent(values: Mapping[str, Series]) -> str:
    body = []
    for embodiment, kept in values.items():
        for modality, missing in kept.absent.items():
            if missing == 0:
                state = "in every episode"
            elif missing == kept.episodes:
                state = "<b>absent</b>"
            else:
                state = f"absent in {missing / kept.episodes:.0%} of the episodes"
            body.append(f"<tr><td>{escape(embodiment)}</td><td>{modality}</td><td>{state}</td></tr>")
    return (
        "<p>What a robot cannot sense is marked absent and masked when read, never filled with zeros.</p>"
        '<div class="wide"><table><thead><tr><th>Embodiment</th><th>Sense</th><th>Recorded</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
