"""A plan as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from worldmodel.plan.estimate import GIB

Table = tuple[str, Sequence[str], list[list[str]]]
"""Heading, columns, rows."""
SPENT = ("compute", "gather", "reduce-scatter", "all-reduce", "update")
RATES = ("samples/s and node", "pictures/s and node")


def tables(plan: dict[str, Any]) -> list[Table]:
    """Everything a plan says, as tables."""
    every = plan["phases"]
    counted = [row for row in every if "step" in row]
    names = list(dict.fromkeys(name for row in every for name in row["parameters"]))
    kinds = list(dict.fromkeys(kind for row in counted for kind in row["memory"]))
    ways, spent = ("forward", "backward", "teacher", "again"), (*SPENT, "seconds")

    def memory(row: dict[str, Any]) -> list[str]:
        return [*(f"{row['memory'][kind] / GIB:,.2f}" for kind in kinds), "yes" if row["fits"] else "no"]

    def times(row: dict[str, Any]) -> list[str]:
        step = row["step"]
        rate = step["samples"] / step["seconds"]
        cells = [f"{1e3 * step[name]:,.1f}" for name in spent]
        return [*cells, f"{step['samples']:,.0f}", f"{rate:,.4g}", f"{rate * row['clip']['tokens']:,.0f}"]

    def needs(row: dict[str, Any]) -> list[str]:
        tokens, d = row["steps"] * row["step"]["samples"] * row["clip"]["tokens"], row["data"]
        cells = [f"{row['steps']:,}", f"{row['days']:,.2f}", f"{tokens / 1e9:,.4g}"]
        return [*cells, *(f"{d[name]:,.4g}" for name in ("hours", "gigabytes")), f"{d['shards']:,.0f}",
                *(f"{d[name]:,.4g}" for name in ("samples_per_s_and_node", "pictures_per_s_and_node"))]  # fmt: skip

    def table(head: str, columns: Sequence[str], rows: list[Any], cells: Callable[[Any], list[str]]) -> Table:
        return head, ["phase", *columns], [[row["name"], *cells(row)] for row in rows]

    return [
        table("Parameters, millions", [*names, "trained"], every,
              lambda row: [f"{n / 1e6:,.1f}" for n in (*(row["parameters"].get(x, 0) for x in names), row["trained"])]),
        table("FLOPs of a step on each GPU, 10^12", ways, counted,
              lambda row: [f"{row['step'][way] / 1e12:,.4g}" for way in ways]),
        table("Memory of each GPU, GiB", [*kinds, "fits"], counted, memory),
        table("Time of a step, ms", [*SPENT, "step", "samples", "samples/s", "tokens/s"], counted, times),
        table("Days and data", ("steps", "days", "10^9 tokens", "hours recorded", "GB", "shards", *RATES),
              counted, needs),
    ]  # fmt: skip


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
