"""A plan as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

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
    ways = ("forward", "backward", "teacher", "again")
    flops = [[row["name"], *(f"{row['step'][way] / 1e12:,.4g}" for way in ways)] for row in counted]
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
        cells = [f"{1e3 * s:,.1f}" for s in parts]
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
        ("FLOPs of a step on each GPU, 10^12", ["phase", *ways], flops),
        ("Memory of each GPU, GiB", ["phase", *kinds, "total", "fits"], memory),
        (
            "Time of a step, ms",
            ["phase", *SPENT, "step", "samples", "samples/s", "tokens/s"],
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
            way = row["would_fit"]
            lines.append(f"{row['name']}: DOES NOT FIT, {asked}. ")
            lines[-1] += (
                "Neither checkpointing nor sharding helps: a smaller batch may."
                if way is None
                else (
                    f"Would: shard={way['shard']} trainer.checkpointing={way['checkpointing']}"
                    f" ({way['total'] / GIB:,.1f} GiB)."
                )
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
        f"{s['mfu']:.0%} of that peak, links at {s['efficiency']:.0%}, {s['spare']:.0%} of memory left free; "
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
        left = {"phase", "fits"}
        rule = [" --- " if c in left else " ---: " for c in columns]
        lines += ["", f"**{head}**", "", row_of(columns), f"|{'|'.join(rule)}|", *(row_of(row) for row in rows)]
    return "\n".join(lines)


def row_of(cells: Iterable[str]) -> str:
    """One row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
