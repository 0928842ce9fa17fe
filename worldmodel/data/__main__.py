"""Command line of the data package: generate, import, export, validate, stats, inspect."""

import argparse
import json
import logging
import sys
from pathlib import Path

from worldmodel.data.formats.registry import FORMATS
from worldmodel.errors import WorldModelError

DESCRIPTION = """\
Make, check and look at datasets: folders of WebDataset shards with index.json and stats.json.

  python -m worldmodel.data generate metaworld data/demo      demonstrations with every sense, all of ML10
  python -m worldmodel.data import lerobot SRC data/mine      shards from a dataset in a foreign format
  python -m worldmodel.data export lerobot data/demo OUT      our shards as a LeRobot dataset
  python -m worldmodel.data validate data/demo                read everything and list every fault
  python -m worldmodel.data inspect data/demo                 what is in it
  python -m worldmodel.data stats data/demo                   compute stats.json again, from the train split
"""
GENERATE = """\
Run Meta-World's scripted experts and record two cameras (images, intrinsics, poses), 3D points of objects and goals,
wrist force/torque, finger taxels, proprioception, actions and a written instruction at 20 Hz.

Splits: train and heldout_episodes (ten training tasks of ML10, different object positions) and heldout_tasks (ML10's
five test tasks, which training refuses to see). The bytes are a function of the seed and the counts, not of the number
of workers. An interrupted run continues when it is started again with the same arguments; a folder that holds other
data is refused. Rendering needs no display: EGL or OSMesa is chosen by trying (MUJOCO_GL overrides).
"""

IMPORT = """\
Turn a dataset in a foreign format into shards, index and statistics.

Names are matched by a map: cameras, proprio, action, wrench, tactile, camera poses and their frames, the instruction
and the split. Without --map the dataset's own or an obvious map is used; where a name is unknown or ambiguous, or a
frame is not stated, nothing is written: the command lists what the data has and prints a suggested map. Save it, answer
every ???, and pass it with --map. The map's form is described in worldmodel/data/formats/mapping.py.

  python -m worldmodel.data import lerobot ~/pick_cubes data/pick_cubes --map pick_cubes.yaml

An interrupted import continues when it is started again with the same arguments. The bytes written are a function of
the source and the map, not of the number of workers.
"""
EXPORT = """\
Write our shards as a dataset in a foreign format: lerobot is LeRobot v3.0 (parquet and mp4), with the map that imports
it again. Pictures are compressed with H.264; --lossless stores them as PNG and takes many times the space.
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m worldmodel.data", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "generate", help="make demonstrations in a simulator", description=GENERATE, formatter_class=raw
    )
    command.add_argument("source", choices=["metaworld"], help="where the demonstrations come from")
    command.add_argument("out", type=Path, help="folder for shards, index.json and stats.json")
    command.add_argument("--benchmark", default="ml10", choices=["ml10"], help="task list (default: %(default)s)")
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks, for example reach-v3")
    command.add_argument(
        "--episodes", type=int, default=50, metavar="N", help="per training task, for training (default: %(default)s)"
    )
    command.add_argument(
        "--heldout-episodes",
        type=int,
        default=8,
        metavar="N",
        help="per training task, for evaluation (default: %(default)s)",
    )
    command.add_argument(
        "--heldout-task-episodes",
        type=int,
        default=8,
        metavar="N",
        help="per held-out task, for evaluation (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    command.add_argument("--pixels", type=int, default=64, help="image height and width (default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = commands.add_parser(
        "import", help="shards from a foreign format", description=IMPORT, formatter_class=raw
    )
    command.add_argument("format", choices=list(FORMATS), metavar="FORMAT", help=", ".join(FORMATS))
    command.add_argument("source", type=Path, metavar="SRC", help="the dataset: folder or file, as the format has it")
    command.add_argument("out", type=Path, metavar="OUT", help="folder for shards, index.json and stats.json")
    command.add_argument("--map", type=Path, metavar="MAP.yaml", help="names, frames and split (default: the obvious)")
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    command.add_argument(
        "--episodes-per-shard", type=int, default=25, metavar="N", help="at most so many (default: %(default)s)"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = commands.add_parser(
        "export", help="a foreign format from shards", description=EXPORT, formatter_class=raw
    )
    command.add_argument("format", choices=["lerobot"], metavar="FORMAT", help="lerobot")
    command.add_argument("source", type=Path, metavar="SRC", help="dataset folder with index.json")
    command.add_argument("out", type=Path, metavar="OUT", help="folder to make; it must not exist or be empty")
    command.add_argument("--embodiment", metavar="NAME", help="which robot, where the data hold several")
    command.add_argument("--lossless", action="store_true", help="pictures as PNG, which keep every pixel")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = commands.add_parser(
        "validate",
        help="read everything and list every fault",
        description="Read every shard and every field and list all faults, each with file, key, field and a fix; also "
        "leakage between splits. Exit status 0 if there is none, 1 otherwise.",
    )
    command.add_argument("directory", type=Path, help="dataset folder")
    command.add_argument("--json", action="store_true", help="faults as JSON on standard output")

    command = commands.add_parser(
        "stats",
        help="compute stats.json again",
        description="Compute mean, std, min, max and quantiles of every field per embodiment from the train split, "
        "write stats.json and print its hash, which checkpoints carry.",
    )
    command.add_argument("directory", type=Path, help="dataset folder")

    command = commands.add_parser(
        "inspect",
        help="what is in a dataset",
        description="Table of tasks, splits, episodes, successes, steps and sizes.",
    )
    command.add_argument("directory", type=Path, help="dataset folder")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return COMMANDS[options.command](options)
    except WorldModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _generate(options: argparse.Namespace) -> int:
    from worldmodel.data.generate import generate

    root = generate(
        options.source,
        options.out,
        benchmark=options.benchmark,
        tasks=options.tasks,
        episodes=options.episodes,
        heldout_episodes=options.heldout_episodes,
        heldout_task_episodes=options.heldout_task_episodes,
        seed=options.seed,
        workers=options.workers,
        pixels=options.pixels,
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
        progress=not options.quiet,
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
    from worldmodel.data.validate import validate

    faults = validate(options.directory)
    if options.json:
        print(json.dumps([fault._asdict() for fault in faults], indent=1))
    else:
        for fault in faults:
            print(fault)
        print(f"{options.directory}: {len(faults)} fault{'' if len(faults) == 1 else 's'}")
    return 1 if faults else 0


def _stats(options: argparse.Namespace) -> int:
    from worldmodel.data.statistics import STATISTICS, statistics_hash, write_statistics

    statistics = write_statistics(options.directory)
    print(f"{options.directory / STATISTICS}  sha256 {statistics_hash(statistics)}")
    for embodiment, fields in statistics["embodiments"].items():
        for name, measures in fields.items():
            print(f"  {embodiment:12} {name:20} {measures['count']:>9} samples")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from worldmodel.data.shards import ShardReader

    reader = ShardReader(options.directory)
    rows: dict[tuple[str, str], list[int]] = {}
    for entry in reader.entries:
        for key in ((entry.split, entry.task), (entry.split, "all")):
            row = rows.setdefault(key, [0, 0, 0, 0])
            for column, value in enumerate((1, int(entry.success), entry.length, entry.size)):
                row[column] += value
    print(
        f"{options.directory}: {len(reader)} episodes, {reader.frames} steps, "
        f"{len(reader.index['shards'])} shards, embodiments {', '.join(reader.index['embodiments'])}, "
        f"schema {reader.index['schema_version']}"
    )
    print(f"{'split':18}{'task':28}{'episodes':>9}{'success':>9}{'steps':>9}{'MB':>9}")
    for split in dict.fromkeys(split for split, _ in rows):
        for (_, task), row in sorted(
            (item for item in rows.items() if item[0][0] == split), key=lambda item: item[0][1] == "all"
        ):
            print(f"{split:18}{task:28}{row[0]:>9}{row[1] / row[0]:>9.0%}{row[2]:>9}{row[3] / 1e6:>9.1f}")
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
