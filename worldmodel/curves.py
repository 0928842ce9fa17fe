"""Curves of training runs as one page: `python -m worldmodel.curves RUN [RUN ...] [--out FILE]`.

Reads the logs in the run folders, those of interrupted attempts too, and draws phase by phase the losses, the losses by
noise level, the gradient norm, speed, MFU and waiting for data; several runs lie over one another.
"""

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from worldmodel.errors import ConfigError, WorldModelError
from worldmodel.page import compose
from worldmodel.plots import line_chart, number

Series = dict[str, dict[int, float]]
"""Column of the log -> step -> value."""
RUNS, POINTS = 4, 120
"""Runs that a chart can tell apart, and points of a line; more are averaged."""
MACHINE = {
    "samples_per_s": "Samples per second, all ranks",
    "tokens_per_s": "Tokens per second, all ranks",
    "mfu": "Model FLOPs, share of the measured peak",
    "data_wait": "Waiting for data, share of the time",
    "memory_gib": "Memory of a rank, GiB",
}
COURSE = {
    "gradient_norm": "Gradient norm before clipping",
    "learning_rate": "Learning rate",
    "ema_decay": "Decay of the moving average",
}


def read_log(run: Path) -> dict[str, Series]:
    """Phases of a run in their order, each with what it logged; what was trained again after a stop counts once.

    Raises `ConfigError` if the folder has no log.
    """
    folder = run / "csv"
    # Attempts in their order: numbered ones first, then the newest. Within a file, rows are in the order of training.
    earlier = sorted(folder.glob("metrics.*.csv"), key=lambda path: int(path.name.split(".")[1]))
    files = [path for path in (*earlier, folder / "metrics.csv") if path.is_file()]
    if not files:
        raise ConfigError(f"{run} has no {folder / 'metrics.csv'}; is it a run folder of train.py?")
    phases: dict[str, Series] = {}
    for path in files:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                values = {name: float(text) for name, text in row.items() if text}
                names = [name.removesuffix("/loss") for name in values if name.endswith("/loss")]
                if not names:
                    continue
                series = phases.setdefault(names[0], {})
                step = int(values.pop("step")) + 1
                for name, value in values.items():
                    series.setdefault(name.removeprefix(f"{names[0]}/"), {})[step] = value
    return phases


def thinned(points: Mapping[int, float]) -> list[tuple[float, float]]:
    """Points in the order of their steps, neighbours averaged so that `POINTS` or fewer are left."""
    items = sorted(points.items())
    size = math.ceil(len(items) / POINTS)
    groups = [items[i : i + size] for i in range(0, len(items), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def chart(lines: Mapping[str, Mapping[int, float]], label: str) -> str:
    """Lines over their steps; each may have steps of its own."""
    drawn = {name: dict(thinned(points)) for name, points in lines.items()}
    steps = sorted({step for points in drawn.values() for step in points})
    # A line has no gap where only another has a point.
    series = {name: filled(steps, points) for name, points in drawn.items()}
    return line_chart(steps, series, "step", label)


def filled(steps: Sequence[float], points: Mapping[float, float]) -> list[float]:
    """A line at the steps of all lines: straight between its own points, nothing outside of them."""
    own, values = sorted(points), []
    for step in steps:
        if step in points or not own or not own[0] <= step <= own[-1]:
            values.append(points.get(step, math.nan))
            continue
        right = next(i for i, x in enumerate(own) if x > step)
        left, share = own[right - 1], (step - own[right - 1]) / (own[right] - own[right - 1])
        values.append((1 - share) * points[left] + share * points[own[right]])
    return values


def section(phase: str, runs: Mapping[str, Series]) -> str:
    """All charts of a phase."""
    names = list(dict.fromkeys(name for series in runs.values() for name in series))
    parts = sorted(n for n in names if n not in {*MACHINE, *COURSE, "loss", "epoch"} and not n.startswith("noise/"))
    parts = [n for n in parts if not n.startswith(("tokens_per_s/", "mix/")) and n != "skipped_clips"]

    def over(name: str, label: str) -> str:
        lines = {run: series[name] for run, series in runs.items() if name in series}
        return chart(lines, label) if lines else ""

    losses = over("loss", "Loss") + "".join(over(name, name) for name in parts)
    levels = ""
    for stream in dict.fromkeys(name.split("/")[1] for name in names if name.startswith("noise/")):
        for run, series in runs.items():
            ends = {name: int(name.split("/")[2]) for name in series if name.startswith(f"noise/{stream}/")}
            lines = {f"σ up to {ends[n] / 100:g}": series[n] for n in sorted(ends, key=lambda name: ends[name])}
            levels += chart(lines, f"{stream}: loss by noise level" + f", {run}" * (len(runs) > 1)) if lines else ""
    course = "".join(over(name, label) for name, label in COURSE.items())
    machine = "".join(over(name, label) for name, label in MACHINE.items())
    groups = {"Loss": losses, "Noise levels": levels, "Course": course, "Machine": machine}
    return "".join(f'<h3>{head}</h3><div class="grid">{html}</div>' for head, html in groups.items() if html)


def write_curves(runs: Sequence[Path], out: Path) -> Path:
    """Writes the page of some runs and returns its path.

    Raises `ConfigError` for more runs than a chart can tell apart, and for a folder without a log.
    """
    if len(runs) > RUNS:
        raise ConfigError(f"{len(runs)} runs, but a chart tells {RUNS} apart; name fewer")
    names = [run.name for run in runs] if len({run.name for run in runs}) == len(runs) else [str(run) for run in runs]
    logs = {name: read_log(run) for name, run in zip(names, runs, strict=True)}
    phases = list(dict.fromkeys(phase for log in logs.values() for phase in log))
    sections, cards = {}, []
    for phase in phases:
        found = {name: log[phase] for name, log in logs.items() if phase in log}
        sections[phase] = (f"phase-{phases.index(phase)}", section(phase, found))
        for name, series in found.items():
            cards.append((last(series["loss"]), f"{phase}: loss at the end" + f", {name}" * (len(logs) > 1)))
    verdict = f"{', '.join(names)}: {len(phases)} phases, losses as averages between two lines of the log."
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(compose("Training curves", verdict, cards, sections, ", ".join(map(str, runs))), encoding="utf-8")
    return out


def last(points: Mapping[int, float]) -> str:
    """The value at the last step."""
    return escape(number(points[max(points)]))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m worldmodel.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of train.py, up to four")
    parser.add_argument("--out", type=Path, help="the page (default: curves.html in the first run folder)")
    given = parser.parse_args(argv)
    try:
        print(write_curves(given.runs, given.out or given.runs[0] / "curves.html"))
    except WorldModelError as error:
        sys.exit(f"python -m worldmodel.curves: {error}")


if __name__ == "__main__":
    main()
