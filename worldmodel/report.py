"""The evaluation report: report.json for programs and report.html, one page that loads nothing else, for people."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from worldmodel.contracts import ClipSpec
from worldmodel.figures import KNOWN, SampleClip
from worldmodel.page import compose
from worldmodel.plots import line_chart, number
from worldmodel.report_closed_loop import closed_loop_section
from worldmodel.report_edits import edit_section
from worldmodel.report_missing import missing_section
from worldmodel.report_motion import motion_section
from worldmodel.report_samples import sample_sections

SPLIT_NAMES = {
    "heldout_episodes": "Held-out episodes of training tasks",
    "heldout_tasks": "Held-out tasks",
    "heldout_robots": "Held-out robots",
}
STREAM_NAMES = {
    "video": "video", "camera": "camera pose", "points": "object trajectories", "force": "touch and force",
    "action": "actions", "motion": "moving and standing", "element": "replaced elements", "view": "other views",
}  # fmt: skip


def write_report(results: dict, out_dir: str | Path) -> tuple[Path, Path]:
    """Write report.json and report.html and return their paths.

    `results` holds `title`, `stamp` (nested plain values), `offline` (what `evaluate_offline` returned, per split) and
    `closed_loop` (what `comparison.compare` returned; may be empty), and may hold `edits` (what `evaluate_edits`
    returned), `missing` (what `evaluate_missing` returned, per split) and `missing_closed_loop` (what `compare_success`
    returned). The JSON is `results` itself, with pictures left out and null where a value is not finite.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "report.json", folder / "report.html"
    data.write_text(json.dumps(plain(results), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page.write_text(render(results), encoding="utf-8")
    return data, page


def plain(value: Any) -> Any:
    """Reduce results to what JSON can hold: pictures go, numbers that are not finite become null."""
    if isinstance(value, SampleClip):
        clip = value.clip
        return {
            "task": clip.task,
            "episode": clip.episode,
            "step": clip.step,
            "kind": value.kind,
            "psnr": plain(value.psnr),
        }
    if isinstance(value, ClipSpec):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key not in ("video", "overlays")}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def render(results: dict) -> str:
    """Compose the page."""
    offline, closed = results["offline"], results["closed_loop"]
    sections = {"Summary": ("summary", _summary(offline))}
    if closed:
        sections["Closed loop"] = ("closed-loop", closed_loop_section(closed))
    if results.get("edits"):
        sections["Edits"] = ("edits", edit_section(results["edits"], _figure_table))
    lost, without = results.get("missing") or [], results.get("missing_closed_loop") or []
    if lost or without:
        sections["Missing sensors"] = ("missing", missing_section(lost, without, SPLIT_NAMES, STREAM_NAMES))
    sections["Over the horizon"] = ("horizon", _horizons(offline))
    sections["By task"] = ("tasks", _tasks(offline))
    sections["Predicted and true"] = ("samples", sample_sections(offline, SPLIT_NAMES))
    if any(result.get("overlays") for result in offline):
        sections["Moving and standing"] = ("motion", motion_section(offline, SPLIT_NAMES))
    sections["Protocol"] = ("protocol", _protocol(offline, results["stamp"]))
    return compose(
        f"{results['title']}: evaluation",
        _verdict(offline),
        _cards(offline, closed),
        sections,
        "Every figure on this page is also in report.json beside it.",
    )


def headline_counts(result: dict) -> tuple[int, int]:
    """How many headline figures beat all their trivial baselines, and how many there are with anything to learn."""
    judged = [
        f["beats_all"] for f in result["figures"] if f["headline"] and f["applicable"] and f["beats_all"] is not None
    ]
    return sum(judged), len(judged)


def _verdict(offline: list[dict]) -> str:
    parts = []
    for result in offline:
        won, judged = headline_counts(result)
        parts.append(f"{won} of {judged} figures beat every trivial baseline on {SPLIT_NAMES[result['split']].lower()}")
    return "; ".join(parts) + "." if parts else "No offline evaluation in this report."


def _cards(offline: list[dict], closed: list[dict]) -> list[tuple[str, str]]:
    cards = []
    for result in closed:
        low, high = result["interval"]
        trials = sum(task["trials"] for task in result["tasks"])
        cards.append(
            (
                f"{result['mean_success']:.0%}",
                f"{result['policy']}: closed-loop success, {low:.0%}–{high:.0%} over {trials} trials",
            )
        )
    for result in offline:
        won, judged = headline_counts(result)
        where = SPLIT_NAMES[result["split"]].lower()
        cards.append((f"{won} / {judged}", f"figures beat their baselines, {where} ({result['clips']} clips)"))
    return cards


def _summary(offline: list[dict]) -> str:
    if not offline:
        return '<p class="quiet">No offline evaluation in this report.</p>'
    intro = (
        "Each figure with its 95 % bootstrap interval over episodes, and the trivial baselines it has to beat. "
        '<i class="yes">✓</i> better, <i class="no">✗</i> not better; “clearly” where the interval of the paired '
        "difference excludes zero."
    )
    rest = _figure_table(offline, headline=False)
    main = _figure_table(offline, headline=True)
    return f"<p>{intro}</p>{main}<details><summary>Also measured</summary>{rest}</details>"


def _figure_table(offline: list[dict], headline: bool) -> str:
    found = {f["name"]: f for result in offline for f in result["figures"] if f["headline"] == headline}
    by_split = [{f["name"]: f for f in result["figures"]} for result in offline]
    heads = [SPLIT_NAMES[result["split"]] for result in offline]
    rows = []
    for stream, title in STREAM_NAMES.items():
        names = [name for name, figure in found.items() if figure["stream"] == stream]
        if names:
            rows.append(f'<tr class="group"><td colspan="{len(heads) + 1}">{title}</td></tr>')
        for name in sorted(names, key=lambda n: list(KNOWN).index(n.split("/")[0])):
            unit = f' <span class="interval">{escape(found[name]["unit"])}</span>' if found[name]["unit"] else ""
            cells = "".join(
                f'<td data-head="{head}">{_cell(split[name]) if name in split else "–"}</td>'
                for head, split in zip(heads, by_split, strict=True)
            )
            rows.append(f"<tr><td>{escape(found[name]['label'])}{unit}</td>{cells}</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("Figure", *heads))
    return f'<table class="summary"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(figure: dict) -> str:
    value, low, high = (number(figure["ours"][k]) for k in ("value", "low", "high"))
    lines = [f'<span class="ours">{value}</span> <span class="interval">{low} – {high}</span>']
    for baseline in figure["baselines"]:
        text = f"{escape(baseline['name'])} {number(baseline['value'])}"
        if figure["applicable"]:
            mark = '<i class="yes">✓</i>' if baseline["beaten"] else '<i class="no">✗</i>'
            text = f"{mark} {text}{', clearly' if baseline['clearly'] else ''}"
        lines.append(f'<span class="versus">{text}</span>')
    if not figure["applicable"]:
        lines.append('<span class="versus">does not vary in this data: nothing to learn</span>')
    return "".join(lines)


def _horizons(offline: list[dict]) -> str:
    parts = [
        "<p>How each error grows with the distance into the future; a good model stays away from its baselines.</p>"
    ]
    for result in offline:
        labels = {f["name"]: (f["label"], f["unit"]) for f in result["figures"]}
        applicable = {f["name"]: f["applicable"] for f in result["figures"]}
        plots = []
        for name, lines in result["horizons"].items():
            if not applicable[name]:
                continue
            series = {("model" if k == "ours" else k): v for k, v in lines.items() if k != "axis"}
            label, unit = labels[name]
            x = list(range(1, len(lines["ours"]) + 1))
            plots.append(line_chart(x, series, lines["axis"], f"{label} [{unit}]" if unit else label))
        parts.append(f'<h3>{SPLIT_NAMES[result["split"]]}</h3><div class="grid">{"".join(plots)}</div>')
    return "".join(parts)


def _tasks(offline: list[dict]) -> str:
    parts = []
    for result in offline:
        shown = [f for f in result["figures"] if f["headline"] and f["applicable"]]
        units = [f" [{f['unit']}]" if f["unit"] else "" for f in shown]
        heads = "".join(f'<th class="n">{escape(f["label"] + u)}</th>' for f, u in zip(shown, units, strict=True))
        rows = "".join(
            f"<tr><td>{escape(task)}</td>"
            + "".join(_task_cell(result["per_task"][f["name"]][task], f) for f in shown)
            + "</tr>"
            for task in result["tasks"]
        )
        parts.append(
            f"<details><summary>{SPLIT_NAMES[result['split']]}: {len(result['tasks'])} tasks, {len(shown)} figures"
            f'</summary><div class="wide"><table><thead><tr><th>Task</th>{heads}</tr></thead><tbody>{rows}</tbody>'
            "</table></div></details>"
        )
    return "<p>Model above, strongest trivial baseline below it.</p>" + "".join(parts)


def _task_cell(values: dict, figure: dict) -> str:
    trivial: Iterable[float] = [values[b["name"]] for b in figure["baselines"] if b["trivial"]]
    finite = [v for v in trivial if math.isfinite(v)]
    best = (max if figure["higher_is_better"] else min)(finite) if finite else math.nan
    ours = values["ours"]
    better = ours > best if figure["higher_is_better"] else ours < best
    mark = "" if math.isnan(ours) or math.isnan(best) else ' class="yes"' if better else ' class="no"'
    return f'<td class="n"><span{mark}>{number(ours)}</span><span class="versus">{number(best)}</span></td>'


def absent_instructions(result: dict) -> str:
    """How many instructions of a split the model did not read, to append to what is said of its clips."""
    count = len(result.get("unread", ()))
    return f"; {count} of its instructions were not trained on and count as absent" if count else ""


def _protocol(offline: list[dict], stamp: dict) -> str:
    entries = []
    for result in offline:
        settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in result["settings"].items())
        text = (
            f"{result['clips']} clips of {result['episodes']} episodes, {len(result['tasks'])} tasks; {settings}; "
            f"{result['seconds']:g} s{absent_instructions(result)}"
        )
        entries.append((SPLIT_NAMES[result["split"]], text))
    config = stamp.get("config")
    entries += [(key.replace("_", " "), _inline(value)) for key, value in stamp.items() if key != "config"]
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in entries)
    block = (
        f"<details><summary>Configuration</summary><pre>{escape(json.dumps(plain(config), indent=2))}</pre></details>"
    )
    return (
        "<p>No evaluated episode, and no task of the held-out tasks, was trained on: checked against the index of the "
        "data before anything was measured. Forecasts are single samples of the model, with noise from the seed; PSNR "
        f"is that of the mean squared error. Field of view is vertical.</p><dl>{rows}</dl>{block if config else ''}"
    )


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_inline(item) for item in value)
    return str(value)
