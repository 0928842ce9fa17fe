"""The arguments of the data package's command line, and the text of its help."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from worldmodel.data.formats.registry import FORMATS
from worldmodel.data.sources.registry import SOURCES

USAGE = 64
"""Exit status of a command that was given wrongly (EX_USAGE); 2 is for data that are wrong."""

DESCRIPTION = """\
Make, check and look at datasets: folders of WebDataset shards with index.json and stats.json.

  python -m worldmodel.data generate metaworld data/demo      demonstrations with every sense (or {others})
  python -m worldmodel.data import lerobot SRC data/mine      shards from a dataset in a foreign format
  python -m worldmodel.data export lerobot data/demo OUT      our shards as a LeRobot dataset
  python -m worldmodel.data validate data/demo                read everything and list every fault
  python -m worldmodel.data inspect data/demo --html a.html   what is in it, as a table and as a page to look at
  python -m worldmodel.data stats data/demo                   compute stats.json again, from the train split
""".format(others=", ".join(list(SOURCES)[1:]))
GENERATE = """\
Run scripted experts in a simulator and record cameras (images, intrinsics, poses), 3D points of objects and goals,
wrist force/torque, finger taxels, proprioception, actions and a written instruction; two cameras at 20 Hz, but for
pusht.

  metaworld   one arm (sawyer); --benchmark ml10 (ten training tasks, five held out; the default), ml45 (45 and five) or
              mt10 (ten, none held out); the same task, split and seed give the same episodes in all of them;
              experts fail often at basketball-v3, lever-pull-v3 and stick-pull-v3
  robosuite   several arms ({robots}) on the same tasks; {heldout} is held out; needs the extra `robosuite`
              experts fail often at PickPlaceCereal with panda and iiwa, at PickPlaceCan with sawyer_osc
  pusht       a pusher that brings a T to its place, planned in the simulator; one camera from above, no touch, 10 Hz,
              no variants or masks; needs the extra `pusht`

Splits: train, heldout_episodes (training tasks, different object positions), heldout_tasks (tasks that training refuses
to see) and heldout_robots (with --heldout-robots). Counts hold for each task and robot, failures included: training
leaves those out, and where less than 80 % succeed, a warning says so at the end. Variants lie beside their
original and are linked to it; where the instruction names a colour, theirs names the new one. The bytes are a
function of the seed and the counts, not of the number of workers. An interrupted run continues when it is started again
with the same arguments; a folder that holds other data is refused. Rendering needs no display: EGL or OSMesa is chosen
by trying (MUJOCO_GL overrides).
""".format(
    robots=", ".join(SOURCES["robosuite"].robots),
    heldout=", ".join(SOURCES["robosuite"].benchmarks["single_arm"].heldout_tasks),
)
VALIDATE = """\
Read every shard and every member and list all faults, each with file, key, field, message and fix: schema, checksums,
lengths, clocks and rates, NaN and infinity, rotations, reprojection of object points, masks beside their points, dead
or clipped sensor channels, jumps of actions, black, plain or frozen pictures, the gripper's sign, copies of episodes,
variants unlike their original, leakage between splits.

Exit status: 0 clean, 1 warnings only, 2 errors, 64 the command itself was wrong.
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
it again. Pictures are compressed with H.264; --lossless stores them as PNG and takes many times the space. LeRobot has
no place for masks: they are left out, with a warning; variants become episodes that keep their link.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser; `command` of what it returns is one of the subcommands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m worldmodel.data", description=DESCRIPTION, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "generate", help="make demonstrations in a simulator", description=GENERATE, formatter_class=raw
    )
    command.add_argument(
        "source",
        choices=list(SOURCES),
        metavar="SOURCE",
        help=f"where the demonstrations come from: {', '.join(SOURCES)}",
    )
    command.add_argument("out", type=Path, help="folder for shards, index.json and stats.json")
    lists = "; ".join(f"{source.name} has {', '.join(source.benchmarks)}" for source in SOURCES.values())
    command.add_argument("--benchmark", metavar="NAME", help=f"task list: {lists} (default: the first)")
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks, for example reach-v3 or Lift")
    command.add_argument(
        "--heldout-tasks",
        nargs="*",
        metavar="TASK",
        help="those of the tasks that training never sees; alone: none (default: the benchmark's)",
    )
    command.add_argument("--robots", nargs="+", metavar="ROBOT", help="only these robots, for example panda ur5e")
    command.add_argument(
        "--heldout-robots",
        nargs="+",
        metavar="ROBOT",
        help="robots that training never sees; their episodes go into the split heldout_robots",
    )
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
    _add_workers(command)
    command.add_argument("--pixels", type=int, default=64, help="image height and width (default: %(default)s)")
    _add_pictures(command)
    command.add_argument(
        "--variants",
        type=int,
        default=0,
        metavar="N",
        help="show each demonstration N times again: other colours, table and background textures, lights and camera "
        "placement, the same motion; with masks (default: %(default)s, or one for each --vary)",
    )
    command.add_argument(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        metavar="WHAT",
        help="what differs in a variant: element (the colour of one thing), objects (the colours of all), surfaces "
        "(table and background), lights, view (camera placement); give it again for the next variant, for example "
        "--vary element --vary surfaces lights --vary view (default: all but element, in every variant)",
    )
    command.add_argument(
        "--masks", action="store_true", help="store which element of the scene each pixel shows, also without variants"
    )
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = commands.add_parser(
        "import", help="shards from a foreign format", description=IMPORT, formatter_class=raw
    )
    command.add_argument("format", choices=list(FORMATS), metavar="FORMAT", help=", ".join(FORMATS))
    command.add_argument("source", type=Path, metavar="SRC", help="the dataset: folder or file, as the format has it")
    command.add_argument("out", type=Path, metavar="OUT", help="folder for shards, index.json and stats.json")
    command.add_argument("--map", type=Path, metavar="MAP.yaml", help="names, frames and split (default: the obvious)")
    _add_workers(command)
    command.add_argument(
        "--episodes-per-shard", type=int, default=25, metavar="N", help="at most so many (default: %(default)s)"
    )
    _add_pictures(command)
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
        description=VALIDATE,
        formatter_class=raw,
    )
    command.add_argument("directory", type=Path, help="dataset folder")
    command.add_argument("--json", action="store_true", help="the whole report as JSON on standard output")
    _add_workers(command)
    command.add_argument("--quiet", action="store_true", help="no progress bar")

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
        description="Table of tasks, splits, episodes, successes, steps and sizes; with --html also a page with a "
        "video per task, histograms of actions and forces, and cameras and trajectories in space.",
    )
    command.add_argument("directory", type=Path, help="dataset folder")
    command.add_argument("--html", type=Path, metavar="FILE", help="write one page that loads nothing else")
    return parser


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes, or tasks at once over Ray (default: one per core)"
    )
    command.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="work on a Ray cluster (extra `ray`): alone, the one that runs here; else host:port, ray://host:port, or "
        "`local` to start one. The folders must be on storage that all its machines see",
    )


def _add_pictures(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pictures",
        choices=("jpeg", "raw"),
        default="jpeg",
        help="how pictures are stored: jpeg (quality 95), or raw, which loses nothing, takes 2 to 7 times the disk and "
        "is read several times faster (default: %(default)s)",
    )
