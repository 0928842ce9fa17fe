"""A plan as Markdown and as a page."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from worldmodel.page import compose
from worldmodel.plan.estimate import GIB

Table = tuple[str, Sequence[str], list[list[str]]]
"""Heading, columns, rows."""
SPENT = ("compute", "gather", "reduce-scatter", "all-reduce", "update")
RATES = ("samples/s and node", "pictures/s and node")


def tables(plan: dict[str, Any]) -> list[Table]:
    """Everything a plan says, as tables."""
    counted = [row for row in plan["phases"] if "step" in row]
    names = list(dict.fromkeys(name for row in plan["phases"] for name in row["parameters"]))
    sizes = [
        [row["name"], *(f"{row['parameters'].get(n, 0) / 1e6:,.1f}" for n in names), f"{row['trained'] / 1e6:,.1f}"]
        for row in plan["phases"]
    ]
    flops = [
        [
            row["name"],
            part,
            f"{way['forward'] / 1e12:,.3g}",
            f"{way['backward'] / 1e12:,.3g}",
            f"{way['again'] / 1e12:,.3g}",
        ]
        for row in counted
        for part, way in row["flops"].items()
        if sum(way.values()) > 1e-6 * row["step"]["flops"]
    ]
    kinds = list(dict.fromkeys(kind for row in counted for kind in row["memory"] if kind != "total"))
    memory = [
        [
            row["name"],
            *(f"{row['memory'].get(k, 0) / GIB:,.2f}" for k in (*kinds, "total")),
            "yes" if row["fits"] else "no",
        ]
        for row in counted
    ]
    times = []
    for row in counted:
        step = row["step"]
        parts = [step[n] for n in ("compute", "gather", "reduce-scatter", "all-reduce", "update", "seconds")]
        cells = [f"{step['flops'] / 1e12:,.4g}", f"{step['again'] / 1e12:,.4g}", *(f"{1e3 * s:,.1f}" for s in parts)]
        rate = step["samples"] / step["seconds"]
        cells += [f"{step['samples']:,.0f}", f"{rate:,.4g}", f"{rate * row['tokens_per_sample']:,.0f}"]
        times.append([row["name"], *cells])
    needs = [
        [
            row["name"],
            f"{row['steps']:,}",
            f"{row['days']:,.2f}",
            f"{row['steps'] * row['step']['samples'] * row['tokens_per_sample'] / 1e9:,.4g}",
            f"{row['data']['hours']:,.4g}",
            f"{row['data']['gigabytes']:,.4g}",
            f"{row['data']['shards']:,.0f}",
            f"{row['data']['samples_per_s_and_node']:,.4g}",
            f"{row['data']['pictures_per_s_and_node']:,.4g}",
        ]
        for row in counted
    ]
    return [
        ("Parameters, millions", ["phase", *names, "trained"], sizes),
        ("FLOPs of a step on each GPU, 10^12", ["phase", "part", "forward", "backward", "again"], flops),
        ("Memory of each GPU, GiB", ["phase", *kinds, "total", "fits"], memory),
        (
            "Time of a step, ms",
            ["phase", "TFLOP per GPU", "TFLOP again", *SPENT, "step", "samples", "samples/s", "tokens/s"],
            times,
        ),
        (
            "Days and data",
            [*("phase", "steps", "days", "10^9 tokens", "hours recorded", "GB", "shards"), *RATES],
            needs,
        ),
    ]


def verdict(plan: dict[str, Any]) -> list[str]:
    """Whether it fits and what would."""
    lines, limit = [], plan["gpu"]["memory"] * (1 - plan["settings"]["spare"])
    for row in plan["phases"]:
        if "uncounted" in row:
            lines.append(f"{row['name']}: not counted, {row['uncounted']}.")
        elif not row["fits"]:
            asked = f"{row['memory']['total'] / GIB:,.1f} GiB of {limit:.1f}"
            ways = [
                f"batch={w['batch']} shard={w['shard']} trainer.checkpointing={w['checkpointing']}"
                f" ({w['total'] / GIB:,.1f} GiB)"
                for w in row["would_fit"]
            ]
            lines.append(
                f"{row['name']}: DOES NOT FIT, {asked}. {'Would: ' + '; '.join(ways) if ways else 'Nothing would'}."
            )
    return lines or [f"Every phase fits {limit:.1f} GiB of each GPU."]


def assumptions(plan: dict[str, Any]) -> list[str]:
    """What the figures stand on."""
    s, gpu = plan["settings"], plan["gpu"]
    network = gpu["network"] if s["network"] is None else s["network"]
    return [
        f"{s['nodes']} nodes of {s['gpus']} {s['gpu']}: {gpu['tflops']} TFLOP/s bfloat16 dense, {gpu['memory']} GiB, "
        f"{gpu['bandwidth']} GB/s, {gpu['link']} GB/s to GPUs of the node ({gpu['source']}), "
        f"{network} GB/s to other nodes",
        f"MFU {s['mfu']:.0%} of that peak, links at {s['efficiency']:.0%}, {s['spare']:.0%} of memory left free; "
        "communication hides behind computing",
        f"shard={s['shard']}, checkpointing={s['checkpointing']}, precision {plan['precision']}, "
        f"accumulate={s['accumulate']}; gathered in bfloat16, reduced in float32",
        f"attention never stores its scores, the delta rule is fused; pictures {s['bits']} bits a pixel, "
        f"seen {s['epochs']} times, shards of {s['shard_gb']} GB",
        *plan["notes"],
    ]


def markdown(plan: dict[str, Any]) -> str:
    """The plan as Markdown."""
    lines = [*verdict(plan), "", f"{plan['days']:,.2f} days in all.", "", *(f"- {line}." for line in assumptions(plan))]
    for head, columns, rows in tables(plan):
        left = {"phase", "part", "fits"}
        rule = [" --- " if c in left else " ---: " for c in columns]
        lines += ["", f"**{head}**", "", row_of(columns), f"|{'|'.join(rule)}|", *(row_of(row) for row in rows)]
    return "\n".join(lines)


def row_of(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def page(plan: dict[str, Any], title: str) -> str:
    """The plan as one HTML file."""
    counted = [row for row in plan["phases"] if "step" in row]
    cards = [(f"{plan['days']:,.1f}", "days"), (f"{plan['settings']['nodes'] * plan['settings']['gpus']}", "GPUs")]
    if counted:
        cards.append((f"{max(row['memory']['total'] for row in counted) / GIB:,.1f} GiB", "most memory of a GPU"))
    sections = {}
    for number, (head, columns, rows) in enumerate(tables(plan)):
        top = "".join(f"<th>{escape(c)}</th>" for c in columns)
        body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
        sections[head] = (f"part{number}", f"<table><tr>{top}</tr>{body}</table>")
    listed = "".join(f"<li>{escape(line)}</li>" for line in assumptions(plan))
    sections["Assumptions"] = ("assumptions", f"<ul>{listed}</ul>")
    return compose(title, " ".join(verdict(plan)), cards, sections, "python -m worldmodel.plan")
