"""Charts as inline SVG: lines, histograms, bars with intervals, and camera frusta with tracks in space.

Colours are classes (`s0`, `s1`, ... for series, `true` and `predicted` for scenes) that the page's style sheet defines
for light, dark and print; so a chart needs no script and scales with its column. The page's script only turns scenes.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 400, 240
SCENE_HEIGHT = 320
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
DASHES = ("", "6 4", "2 3", "8 3 2 3")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A figure with three significant digits, without an exponent where it can be avoided."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    if value < 0:
        return f"−{number(-value)}"
    digits = 2 - math.floor(math.log10(value))
    return f"{value:.1e}" if digits > 6 else f"{value:.{max(0, min(digits, 6))}f}"


def legend(names: Sequence[str]) -> str:
    """The legend of a chart as HTML, so that it wraps on a narrow screen."""
    items = (
        f'<span><svg width="24" height="8" aria-hidden="true"><line class="s{i}" x1="1" x2="23" y1="4" y2="4" '
        f'stroke-dasharray="{DASHES[i % 4]}"/></svg>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def line_chart(x: Sequence[float], series: Mapping[str, Sequence[float]], x_label: str, y_label: str) -> str:
    """Draw named series over x; the first is ours, solid, the others dashed. Gaps where a value is not finite."""
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    if not finite:
        return '<p class="quiet">Nothing was measured.</p>'
    low, high = min(finite), max(finite)
    margin = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
    # Errors start at zero; figures whose zero is far away (PSNR) would be squeezed flat by it.
    low = 0.0 if 0 <= low < 0.5 * high else low - margin
    high += margin
    x_low, x_high = min(x), max(x)

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((value - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    shown = x if len(x) <= 10 else ticks(x_low, x_high, 8)
    for tick in shown:
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for i, values in reversed(list(enumerate(series.values()))):
        for run in _runs(x, values):
            points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in run)
            parts.append(f'<polyline class="s{i}" stroke-dasharray="{DASHES[i % 4]}" points="{points}"/>')
            parts.extend(f'<circle class="s{i}" cx="{across(a):.1f}" cy="{up(b):.1f}" r="2.5"/>' for a, b in run)
    parts.append("</svg>")
    head = f"<figcaption>{escape(y_label)}</figcaption>"
    return f'<figure class="plot">{head}{"".join(parts)}{legend(list(series))}</figure>'


def _runs(x: Sequence[float], values: Sequence[float]) -> list[list[tuple[float, float]]]:
    """Split a series at its missing values."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(x, values, strict=True):
        if math.isfinite(b):
            runs[-1].append((a, b))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def interval_chart(rows: Mapping[str, Mapping[str, tuple[float, float, float]]], names: Sequence[str]) -> str:
    """Draw shares in [0, 1]: one group per row, one dot (value, low, high) with whiskers per name."""
    left, pitch = 172, 12
    group = pitch * len(names) + 10
    height = group * len(rows) + 30
    span = WIDTH - left - 22
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="success by task">']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + span * share
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="4" y2="{height - 22}"/>')
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="middle">{share:.0%}</text>')
    for r, (row, values) in enumerate(rows.items()):
        top = 8 + r * group
        parts.append(f'<text x="{left - 8}" y="{top + group / 2}" text-anchor="end">{escape(row)}</text>')
        for i, name in enumerate(names):
            if name in values:
                value, low, high = (left + span * v for v in values[name])
                y = top + pitch * (i + 0.5)
                ends = f'x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"'
                parts.append(f'<line class="s{i}" stroke-dasharray="{DASHES[i % 4]}" {ends}/>')
                parts.append(f'<circle class="s{i}" cx="{value:.1f}" cy="{y}" r="4"/>')
    return f'<figure class="plot narrow">{"".join(parts)}</svg>{legend(names)}</figure>'


def histogram(
    series: Mapping[str, np.ndarray], x_label: str, caption: str, *, bins: int = 40, log: bool = False
) -> str:
    """Draw the distribution of named values, stacked in common bins; `log` shows rare values beside frequent ones."""
    values = {name: np.asarray(v, np.float64).ravel() for name, v in series.items() if np.size(v)}
    if not values:
        return '<p class="quiet">Nothing was recorded.</p>'
    every = np.concatenate(list(values.values()))
    low, high = float(every.min()), float(every.max())
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    counts = np.stack([np.histogram(v, edges)[0] for v in values.values()])
    tops = np.cumsum(counts, axis=0)
    most = float(tops[-1].max())
    full = math.log10(most + 1) if log else most

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    def up(count: float) -> float:
        share = (math.log10(count + 1) if log else count) / full
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    marks = [10.0**p for p in range(math.ceil(full))] if log else ticks(0, most, 4)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">']
    for mark in marks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(mark):.1f}" y2="{up(mark):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:.6g}</text>')
    for tick in ticks(low, high, 6):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.4g}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for i, (row, top) in enumerate(zip(counts, tops, strict=True)):
        for b in np.flatnonzero(row):
            left, width = across(edges[b]), across(edges[b + 1]) - across(edges[b])
            y, bottom = up(top[b]), up(top[b] - row[b])
            parts.append(
                f'<rect class="s{i % 4}" x="{left:.1f}" y="{y:.1f}" width="{max(width - 1, 1):.1f}" '
                f'height="{bottom - y:.1f}"/>'
            )
    key = "".join(f'<span><i class="s{i % 4}"></i>{escape(name)}</span>' for i, name in enumerate(values))
    key = f'<div class="legend">{key}</div>' if len(values) > 1 else ""
    return f'<figure class="plot"><figcaption>{escape(caption)}</figcaption>{"".join(parts)}</svg>{key}</figure>'


AZIMUTH, ELEVATION = 35.0, 25.0
"""Degrees: the viewpoint of scenes, from the front right and above."""


def _project(points: np.ndarray, azimuth: float = AZIMUTH, elevation: float = ELEVATION) -> np.ndarray:
    """Orthographic picture coordinates (N, 2), y down, of base-frame points (N, 3), z up."""
    a, e = math.radians(azimuth), math.radians(elevation)
    right = np.array([math.cos(a), math.sin(a), 0.0])
    up = np.array([-math.sin(a) * math.sin(e), math.cos(a) * math.sin(e), math.cos(e)])
    return points @ np.stack((right, -up), axis=1)


def _frustum(camera_to_base: np.ndarray, fov: float, depth: float, aspect: float = 1.0) -> np.ndarray:
    """Five corners (5, 3) in the base frame: the camera and the far rectangle of its view, `aspect` times as wide."""
    half = depth * math.tan(fov / 2)
    wide = aspect * half
    corners = np.array(
        [[0, 0, 0], [-wide, -half, depth], [wide, -half, depth], [wide, half, depth], [-wide, half, depth]]
    )
    return corners @ camera_to_base[:3, :3].T + camera_to_base[:3, 3]


def scene(
    cameras: Mapping[str, Sequence[tuple[np.ndarray, float]]], tracks: Mapping[str, Sequence[np.ndarray]], caption: str
) -> str:
    """Draw camera frusta and point tracks in the base frame from one viewpoint, true to scale.

    cameras maps "true" and "predicted" to poses (4, 4) with vertical fields of view in radians; tracks maps the same
    names to polylines (T, 3) in metres whose last point is marked.
    """
    lines: list[tuple[str, np.ndarray, bool]] = []
    for name, poses in cameras.items():
        for pose, fov in poses:
            apex, *far = _frustum(pose, fov, 0.08)
            lines.append((name, np.stack([*far, far[0]]), False))
            lines.extend((name, np.stack([apex, corner]), False) for corner in far)
    lines.extend((name, track, True) for name, group in tracks.items() for track in group)
    lines = [(name, _project(points), dot) for name, points, dot in lines if np.isfinite(points).all() and len(points)]
    if not lines:
        return '<p class="quiet">No pose or track to draw.</p>'
    every = np.concatenate([points for _, points, _ in lines])
    low, high = every.min(0), every.max(0)
    scale = min((WIDTH - 40) / max(high[0] - low[0], 1e-3), (HEIGHT - 60) / max(high[1] - low[1], 1e-3))
    shift = np.array([WIDTH / 2, (HEIGHT - 24) / 2]) - scale * (low + high) / 2
    bar = ticks(0, 100 / scale, 3)[-1]
    parts = [f'<svg class="chart scene" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">']
    for name, points, dot in lines:
        placed = points * scale + shift
        parts.append(f'<polyline class="{name}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in placed)}"/>')
        if dot:
            parts.append(f'<circle class="{name}" cx="{placed[-1, 0]:.1f}" cy="{placed[-1, 1]:.1f}" r="3.5"/>')
    parts.append(f'<line class="bar" x1="14" x2="{14 + bar * scale:.1f}" y1="{HEIGHT - 10}" y2="{HEIGHT - 10}"/>')
    parts.append(f'<text x="{20 + bar * scale:.1f}" y="{HEIGHT - 6}">{bar * 100:g} cm</text></svg>')
    key = "".join(
        '<span><svg width="24" height="8" aria-hidden="true">'
        f'<polyline class="{name}" points="1,4 23,4"/></svg>{name}</span>'
        for name in tracks or cameras
    )
    head = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure class="plot">{head}{"".join(parts)}<div class="legend">{key}</div></figure>'


def orbit(cameras: Sequence[tuple[np.ndarray, float, float]], tracks: Mapping[str, np.ndarray], caption: str) -> str:
    """Draw camera frusta and named tracks in the base frame; the page's script lets the reader turn the scene.

    cameras: poses (4, 4) with vertical field of view in radians and width over height; tracks: polylines (T, 3) in
    metres whose last point is marked. Where there are cameras, the axes of the base are drawn too.
    """
    places = [
        *(pose[None, :3, 3] for pose, _, _ in cameras),
        *tracks.values(),
        *([np.zeros((1, 3))] if cameras else []),
    ]
    extent = 0.15 * float(np.ptp(np.concatenate(places), axis=0).max()) if places else 0.0
    lines: list[tuple[str, str, np.ndarray, bool]] = []
    for pose, fov, aspect in cameras:
        apex, *far = _frustum(pose, fov, extent, aspect)
        lines.append(("camera", "", np.stack([*far, far[0]]), False))
        lines.extend(("camera", "", np.stack([apex, corner]), False) for corner in far)
    if cameras:
        lines.extend(("base", "", np.stack([np.zeros(3), axis]), False) for axis in extent * np.eye(3))
    for i, track in enumerate(tracks.values()):
        lines.append((f"s{i % 4}", DASHES[i // 4 % 4], track, True))
    lines = [line for line in lines if len(line[2]) and np.isfinite(line[2]).all()]
    if not lines:
        return '<p class="quiet">No pose or track to draw.</p>'
    every = np.concatenate([points for _, _, points, _ in lines])
    centre = (every.min(0) + every.max(0)) / 2
    # The whole ball fits, so nothing leaves the picture however it is turned.
    radius = max(float(np.linalg.norm(every - centre, axis=1).max()), 1e-3)
    middle, scale = np.array([WIDTH / 2, SCENE_HEIGHT / 2]), (SCENE_HEIGHT - 20) / 2 / radius
    bar = ticks(0, 80 / scale, 3)[-1]
    view = f"{middle[0]:g} {middle[1]:g} {scale:.2f}"
    parts = [
        f'<svg class="chart scene orbit" viewBox="0 0 {WIDTH} {SCENE_HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(caption)}" data-view="{view}" data-azimuth="{AZIMUTH:g}" data-elevation="{ELEVATION:g}">'
    ]
    for name, dash, points, marked in lines:
        offset = points - centre
        placed = _project(offset) * scale + middle
        parts.append(
            f'<polyline class="{name}" stroke-dasharray="{dash}" data-xyz="{_coordinates(offset)}" '
            f'points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in placed)}"/>'
        )
        if marked:
            at = f'cx="{placed[-1, 0]:.1f}" cy="{placed[-1, 1]:.1f}"'
            parts.append(f'<circle class="{name}" data-xyz="{_coordinates(offset[-1:])}" {at} r="3.5"/>')
    parts.append(
        f'<line class="bar" x1="14" x2="{14 + bar * scale:.1f}" y1="{SCENE_HEIGHT - 10}" y2="{SCENE_HEIGHT - 10}"/>'
    )
    parts.append(f'<text x="{20 + bar * scale:.1f}" y="{SCENE_HEIGHT - 6}">{bar * 100:g} cm</text></svg>')
    key = "".join(
        f'<span><svg width="24" height="8" aria-hidden="true"><line class="s{i % 4}" x1="1" x2="23" y1="4" y2="4" '
        f'stroke-dasharray="{DASHES[i // 4 % 4]}"/></svg>{escape(name)}</span>'
        for i, name in enumerate(tracks)
    )
    head = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure class="plot">{head}{"".join(parts)}<div class="legend">{key}</div></figure>'


def _coordinates(points: np.ndarray) -> str:
    """Coordinates in metres to the millimetre, apart by spaces."""
    return " ".join(f"{value:.3f}" for value in points.ravel())
