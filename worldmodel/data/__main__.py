"""Command line of the data package: generate, import, export, validate, stats, inspect."""

import argparse
import json
import logging
import os
import sys
from collections import Counter

from worldmodel.data.arguments import USAGE, make_parser
from worldmodel.errors import ConfigError, WorldModelError

SHOWN = 20
"""Faults of one field and severity that `validate` prints; --json has all."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return COMMANDS[options.command](options)
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ConfigError) else 2


def _generate(options: argparse.Namespace) -> int:
    from worldmodel.data.generate import generate

    root = generate(
        options.source,
        options.out,
        benchmark=options.benchmark,
        tasks=options.tasks,
        robots=options.robots,
        heldout_tasks=options.heldout_tasks,
        heldout_robots=options.heldout_robots,
        episodes=options.episodes,
        heldout_episodes=options.heldout_episodes,
        heldout_task_episodes=options.heldout_task_episodes,
        seed=options.seed,
        workers=options.workers,
        ray=options.ray,
        pixels=options.pixels,
        pictures=options.pictures,
        variants=options.variants,
        vary=options.vary,
        masks=options.masks,
        progress=not options.quiet,
    )
    print(f"dataset ready: {root}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from worldmodel.data.importing import import_dataset

    root = import_dataset(
        options.format,
        options.source,
        options.out,
        mapping=options.map,
        workers=options.workers,
        ray=options.ray,
        progress=not options.quiet,
        pictures=options.pictures,
        episodes_per_shard=options.episodes_per_shard,
    )
    print(f"dataset ready: {root}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from worldmodel.data.formats.lerobot_export import export_lerobot

    root = export_lerobot(
        options.source,
        options.out,
        embodiment=options.embodiment,
        lossless=options.lossless,
        progress=not options.quiet,
    )
    print(f"dataset ready: {root}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    from worldmodel.data.validate import examine

    workers = options.workers if options.workers is not None else os.cpu_count() or 1
    report = examine(options.directory, workers=workers, ray=options.ray, progress=not options.quiet)
    if options.json:
        print(json.dumps(report.plain(), indent=1))
        return report.status
    printed: Counter[tuple[str, str]] = Counter()
    for fault in report.faults:
        printed[kind := (fault.severity, fault.field)] += 1
        if printed[kind] <= SHOWN:
            print(fault)
    for (severity, field), number in printed.items():
        if number > SHOWN:
            print(f"{severity}: {field}: {number - SHOWN} more; --json lists all")
    for note, number in report.notes:
        print(f"note: {note.field or note.file}: {note.message}" + (f" ({number} episodes)" if number > 1 else ""))
    points = report.projection
    if points.points:
        visible, inside = points.visible / points.points, points.inside / points.points
        both = points.visible_inside / max(points.visible, 1)
        print(
            f"object points: {visible:.1%} marked visible ({both:.1%} of them in a picture), {inside:.1%} in a picture"
        )
    errors, warnings = report.count("error"), report.count("warning")
    counts = f"{errors} error{'' if errors == 1 else 's'}, {warnings} warning{'' if warnings == 1 else 's'}"
    print(f"{options.directory}: {report.episodes} episodes, {counts}")
    return report.status


def _stats(options: argparse.Namespace) -> int:
    from worldmodel.data.statistics import STATISTICS, statistics_hash, write_statistics

    statistics = write_statistics(options.directory)
    print(f"{options.directory / STATISTICS}  sha256 {statistics_hash(statistics)}")
    for embodiment, fields in statistics["embodiments"].items():
        for name, measures in fields.items():
            print(f"  {embodiment:12} {name:20} {measures['count']:>9} samples")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from worldmodel.data.overview import table

    print(table(options.directory))
    if options.html is not None:
        from worldmodel.data.overview_page import write_page

        print(f"page: {write_page(options.directory, options.html)}")
    return 0


COMMANDS = {
    "generate": _generate,
    "import": _import,
    "export": _export,
    "validate": _validate,
    "stats": _stats,
    "inspect": _inspect,
}


if __name__ == "__main__":
    sys.exit(main())
