"""The part of the report that shows what is lost with each sense."""

from collections.abc import Mapping
from html import escape
from typing import Any

from worldmodel.plots import number


def missing_section(
    missing: list[dict], success: list[dict], split_names: Mapping[str, str], stream_names: Mapping[str, str]
) -> str:
    """Show what `evaluate_missing` returned per split, a table per stream, and `compare_success` if anything."""
    parts = [
        "<p>One checkpoint, each sense hidden when it is tested, and put out of reach: the model gets what a robot "
        "without the sensor sends. Below each figure the difference to nothing missing, on the same clips with the "
        "same noise, and its 95 % bootstrap interval over episodes; coloured where the interval excludes zero. Cameras "
        "and objects are predicted as displacements from where they are sensed, so without their own sense their paths "
        "have no place to start from, and the error is the distance to the origin.</p>"
    ]
    if success:
        cells = "".join(f"<tr><td>{escape(row['missing'])}</td>{_success(row)}</tr>" for row in success)
        parts.append(
            "<h3>Closed loop</h3><p>Success without each sense, and the difference to nothing missing over the same "
            'start states.</p><div class="wide"><table><thead><tr><th>Missing</th><th class="n">Mean success</th>'
            f'<th class="n">Trials</th></tr></thead><tbody>{cells}</tbody></table></div>'
        )
    for result in missing:
        counts = f"{result['clips']} clips of {result['episodes']} episodes"
        tables = "".join(_table(result, stream, title) for stream, title in stream_names.items())
        parts.append(f"<h3>{split_names[result['split']]}: {counts}</h3>{tables}")
    return "".join(parts)


def _table(result: dict, stream: str, title: str) -> str:
    columns = [figure for figure in result["complete"] if figure["stream"] == stream]
    if not columns:
        return ""
    units = [f" [{figure['unit']}]" if figure["unit"] else "" for figure in columns]
    heads = "".join(f'<th class="n">{escape(f["label"] + u)}</th>' for f, u in zip(columns, units, strict=True))
    whole = "".join(f'<td class="n">{_value(figure["ours"])}</td>' for figure in columns)
    rows = "".join(
        f"<tr><td>{escape(row['missing'])}</td>"
        + "".join(_cell(row["figures"].get(figure["name"])) for figure in columns)
        + "</tr>"
        for row in result["rows"]
    )
    return (
        f"<details{' open' if stream in ('video', 'action') else ''}><summary>{title[0].upper()}{title[1:]}</summary>"
        f'<div class="wide lost"><table><thead><tr><th>Missing</th>{heads}</tr></thead><tbody>'
        f"<tr><td>nothing</td>{whole}</tr>{rows}</tbody></table></div></details>"
    )


def _value(values: Mapping[str, Any]) -> str:
    low, high = (number(values[name]) for name in ("low", "high"))
    return f'{number(values["value"])}<span class="versus">{low} – {high}</span>'


def _cell(values: Mapping[str, Any] | None) -> str:
    return '<td class="n">–</td>' if values is None else f'<td class="n">{number(values["value"])}{_lost(values)}</td>'


def _success(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    rate = f'{row["mean_success"]:.0%} <span class="interval">{low:.0%}–{high:.0%}</span>'
    return f'<td class="n">{rate}{_lost(row)}</td><td class="n">{row["trials"]}</td>'


def _lost(values: Mapping[str, Any]) -> str:
    change = values["difference"]
    mark = "" if not values["clearly"] else " yes" if values["better"] else " no"
    value, low, high = (number(change[name]) for name in ("value", "low", "high"))
    sign = "+" if change["value"] > 0 else ""
    return f'<span class="versus{mark}">{sign}{value} ({low} – {high})</span>'
