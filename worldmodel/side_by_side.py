"""Several evaluations side by side: one page and one JSON file, made of their reports alone."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from worldmodel.errors import ConfigError
from worldmodel.page import compose
from worldmodel.plots import number
from worldmodel.report import SPLIT_NAMES, STREAM_NAMES
from worldmodel.report_closed_loop import horizon
from worldmodel.rerun import read_report
from worldmodel.trials import row_name

ALIKE = {
    "protocol": ("stamp", "protocol", "name"),
    "content of the protocol": ("stamp", "protocol", "sha256"),
    "the settings' departure from the protocol": ("stamp", "protocol", "departures"),
    "data": ("stamp", "data_index_sha256"),
}
"""What reports must agree in for their figures to compare, by where it stands in them."""
VERSIONS = {
    name: ("stamp", "versions", name) for name in ("torch", "metaworld", "robosuite", "mujoco", "gym-pusht", "pymunk")
}
"""What may explain small differences."""
EVERYTHING, CLOSED_LOOP = "everything", "closed_loop"


def write_comparison(paths: Sequence[str | Path], out: str | Path | None) -> tuple[Path, Path]:
    """Write comparison.json and comparison.html and return their paths; by default beside the first of the reports.

    Raises ConfigError for fewer than two reports, and DataError for one that is none.
    """
    if isinstance(paths, str) or len(paths) < 2:
        raise ConfigError(f"compare: {paths}; expected two or more, compare=[runs/one,runs/two]")
    reports = [read_report(path) for path in paths]
    compared = compare_reports(reports)
    folder = Path(reports[0]["path"]).parent if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "comparison.json", folder / "comparison.html"
    data.write_text(json.dumps(compared, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page.write_text(render(compared), encoding="utf-8")
    return data, page


def compare_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plain values: the `runs`, `warnings` where they are not alike, and tables of `offline` and `closed_loop`.

    Each row has a value with interval per column, null where a run has none, and `best`: the number of the column whose
    interval is apart from that of every other on the better side, or null. Where data, protocols or settings differ
    nothing is best.
    """
    titles = [str(report.get("title")) for report in reports]
    names = [t if titles.count(t) == 1 else f"{t} ({titles[:i].count(t) + 1})" for i, t in enumerate(titles)]
    splits = dict.fromkeys(result["split"] for report in reports for result in report["offline"])
    unlike = {scope: _unlike(places) for scope, places in _settings(list(splits), reports).items()}
    warnings = [_warning(what, names, values) for found in unlike.values() for what, values in found.items()]
    tables = {split: _figures(split, reports) for split in splits}
    closed = _closed_loop(names, reports)
    for scope, rows in {**tables, CLOSED_LOOP: closed["rows"]}.items():
        if unlike[EVERYTHING] or unlike[scope]:
            rows[:] = [row | {"best": None} for row in rows]
    return {
        "runs": [
            {"name": n, "path": r["path"], "parameters": r["stamp"].get("parameters")}
            for n, r in zip(names, reports, strict=True)
        ],
        "warnings": warnings,
        "offline": tables,
        "closed_loop": closed,
    }


def best_of(values: Sequence[Mapping[str, float | None] | None], higher: bool) -> int | None:
    """Number of the value whose interval lies on the better side of all others' intervals; None if there is no such."""
    known = {}
    for number_, value in enumerate(values):
        low, high = (None, None) if value is None else (value["low"], value["high"])
        if low is not None and high is not None:
            known[number_] = (low, high) if higher else (-high, -low)
    if len(known) < 2:
        return None
    top = max(known, key=lambda n: known[n][0])
    return top if all(high < known[top][0] for n, (_, high) in known.items() if n != top) else None


def _figures(split: str, reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for report in reports:
        result = next((r for r in report["offline"] if r["split"] == split), {"figures": []})
        found.append({figure["name"]: figure for figure in result["figures"]})
    rows = []
    for name in dict.fromkeys(name for figures in found for name in figures):
        figure = next(figures[name] for figures in found if name in figures)
        values = [figures[name]["ours"] if name in figures else None for figures in found]
        kept = {key: figure[key] for key in ("name", "stream", "label", "unit", "higher_is_better")}
        rows.append(kept | {"values": values, "best": best_of(values, figure["higher_is_better"])})
    return rows


def _closed_loop(names: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns are the policies of all runs; the first row is the mean over tasks."""
    tried = [(name, result) for name, r in zip(names, reports, strict=True) for result in r["closed_loop"]]
    rows = []
    for task in [None, *dict.fromkeys(row_name(row) for _, result in tried for row in _rows(result))]:
        values = [_rate(result, task) for _, result in tried]
        rows.append({"task": task, "values": values, "best": best_of(values, True)})
    columns = [{"run": name, "policy": result["policy"], "seed": result["seed"]} for name, result in tried]
    return {"columns": columns, "rows": rows if tried else []}


def _rows(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """By task and robot, then by robot where there are several."""
    return [*result["tasks"], *result.get("robots", ())]


def _rate(result: Mapping[str, Any], task: str | None) -> dict[str, Any] | None:
    if task is None:
        rate, (low, high), count = result["mean_success"], result["interval"], sum(t["trials"] for t in result["tasks"])
    else:
        found = next((row for row in _rows(result) if row_name(row) == task), None)
        if found is None:
            return None
        rate, (low, high), count = found["success"], found["interval"], found["trials"]
    return {"value": rate, "low": low, "high": high, "trials": count}


def _settings(splits: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """What must be alike, per part of the comparison: a value for each report, None where it has no such part."""
    found = {
        EVERYTHING: {what: [_at(report, place) or "unknown" for report in reports] for what, place in ALIKE.items()},
        "versions": {what: [_at(report, place) for report in reports] for what, place in VERSIONS.items()},
    }
    for split in splits:
        settings = [next((r["settings"] for r in x["offline"] if r["split"] == split), {}) for x in reports]
        names = dict.fromkeys(name for setting in settings for name in setting)
        where = SPLIT_NAMES[split].lower()
        found[split] = {f"{name.replace('_', ' ')} on {where}": [s.get(name) for s in settings] for name in names}
    found[CLOSED_LOOP] = {
        f"{name.replace('_', ' ')} of the closed loop": [
            sorted({str(horizon(result) if name == "max_steps" else result[name]) for result in report["closed_loop"]})
            or None
            for report in reports
        ]
        for name in ("seed", "replan", "ensemble", "max_steps")
    }
    return found


def _unlike(settings: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        what: values
        for what, values in settings.items()
        if len({json.dumps(value, sort_keys=True) for value in values if value is not None}) > 1
    }


def _warning(what: str, names: Sequence[str], values: Sequence[Any]) -> str:
    said = [f"{name} {_short(value)}" for name, value in zip(names, values, strict=True) if value is not None]
    return f"{what} differs: {'; '.join(said)}"


def _at(report: Any, place: Sequence[str]) -> Any:
    for key in place:
        report = report.get(key) if isinstance(report, Mapping) else None
    return report


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) == 64 else text


def render(compared: Mapping[str, Any]) -> str:
    """Compose the page of what `compare_reports` returned."""
    runs, warnings = compared["runs"], compared["warnings"]
    sections = {}
    if warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in warnings)
        intro = "Figures that this concerns do not compare, so none of them is marked as best:"
        sections["Not alike"] = ("warnings", f'<p class="no">{intro}</p><ul>{items}</ul>')
    closed = compared["closed_loop"]
    if closed["rows"]:
        heads = [f"{column['run']}: {column['policy']}" for column in closed["columns"]]
        rows = [("mean over tasks" if row["task"] is None else row["task"], row) for row in closed["rows"]]
        sections["Closed loop"] = (
            "closed-loop",
            "<p>Success with 95 % Wilson intervals.</p>" + _table("Task", heads, rows, _rate_cell),
        )
    for split, figures in compared["offline"].items():
        tables = []
        for stream, title in STREAM_NAMES.items():
            rows = [
                (f"{f['label']} [{f['unit']}]" if f["unit"] else f["label"], f)
                for f in figures
                if f["stream"] == stream
            ]
            if rows:
                tables.append(f"<h3>{title[0].upper()}{title[1:]}</h3>")
                tables.append(_table("Figure", [run["name"] for run in runs], rows, _value_cell))
        sections[SPLIT_NAMES[split]] = (split, "".join(tables))
    return compose(
        f"{len(runs)} evaluations side by side",
        "The best of a row is marked where its 95 % interval is apart from all others; elsewhere none is better.",
        [(run["name"], f"{run['path']}; {run['parameters'] or 'unknown'} parameters") for run in runs],
        sections,
        "Every figure on this page is also in comparison.json beside it.",
    )


def _table(head: str, columns: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Any]]], cell: Any) -> str:
    heads = "".join(f'<th class="n">{escape(column)}</th>' for column in columns)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f'<td class="n">{cell(v, i == row["best"])}</td>' for i, v in enumerate(row["values"]))
        + "</tr>"
        for name, row in rows
    )
    heads = f"<th>{head}</th>{heads}"
    return f'<div class="wide lost"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _value_cell(value: Mapping[str, Any] | None, best: bool) -> str:
    if value is None or value["value"] is None:
        return "–"
    low, high = ("–" if value[name] is None else number(value[name]) for name in ("low", "high"))
    return f'{_marked(number(value["value"]), best)}<span class="versus">{low} – {high}</span>'


def _rate_cell(value: Mapping[str, Any] | None, best: bool) -> str:
    if value is None:
        return "–"
    text = f"{value['low']:.0%}–{value['high']:.0%} of {value['trials']}"
    return f'{_marked(format(value["value"], ".0%"), best)}<span class="versus">{text}</span>'


def _marked(text: str, best: bool) -> str:
    return f'<b class="yes">{text} ✓</b>' if best else text
