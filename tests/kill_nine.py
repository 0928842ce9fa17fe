"""Kill generation, an import and training with -9 at random points and see that nothing is lost and nothing twice.

    python tests/kill_nine.py [--kills 10] [--only import training] [--seed 0] [--wait-while FILE]

Each subject first runs undisturbed. Then it is started, killed after a random part of the time that this took, and
started again in the same folder by the same command, until it comes to its end; this is repeated with new folders until
the kills are used up. Every second kill hits the main process alone, whose workers must end with it, the others hit all
its processes. What stands in the folder at the end must be what the undisturbed run left: the same files with the same
bytes (shards hold every key once), for training the same weights. One line is printed per kill, and a table at the end;
the status is 1 if anything differs.
"""

import argparse
import atexit
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from test_formats_hdf5 import write_aloha
from test_training import ROOT, short

MAP = """\
embodiment: aloha
fps: 50
instruction: {text: Hand the cube over.}
split: {heldout: 0.2}
cameras: {top: top, wrist: cam_wrist}
proprio: [observations/qpos]
action: action
ignore: ['*']
"""
TASKS = ("drawer-close-v3", "button-press-topdown-v3", "drawer-open-v3")
LONGER = [  # phases long enough that kills fall into them, not only into the start of the program
    f"phases.{name}.steps={steps}"
    for name, steps in {
        "tokeniser": 6,
        "understanding": 40,
        "locate": 20,
        "compositor": 20,
        "synthesis": 8,
        "behaviour": 60,
        "policy": 30,
    }.items()
]


@dataclass
class Subject:
    """Something that is killed: its command, what it leaves, and what a moment of it looks like."""

    name: str
    command: Callable[[Path], list[str]]
    result: Callable[[Path], dict[str, str]]
    state: Callable[[Path], str]
    seconds: float = 0.0  # of the undisturbed run
    wanted: dict[str, str] = field(default_factory=dict)
    kills: int = 0
    runs: int = 0  # that came to their end
    wrong: list[str] = field(default_factory=list)


def digests(root: Path, pattern: str = "*") -> dict[str, str]:
    """sha256 of the files in a folder."""
    files = [path for path in root.glob(pattern) if path.is_file()]
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shards_done(root: Path) -> str:
    """What an unfinished dataset holds."""
    finished, unfinished = len(list(root.glob(".progress/shard*.json"))), len(list(root.glob("*.tmp")))
    ready = "index" if (root / "index.json").exists() else "no index"
    return f"{finished} shards finished, {unfinished} being written, {ready}"


def phases_done(run: Path) -> str:
    """What an unfinished training run holds."""
    done = sorted(path.parent.name for path in run.glob("phases/*/model.safetensors"))
    resumable = sorted(path.parent.name for path in run.glob("phases/*/last.ckpt"))
    return f"{len(done)} phases finished, can resume in {resumable or 'none'}"


def weights(run: Path) -> dict[str, str]:
    """sha256 of the weights after every phase and of the end."""
    return digests(run, "phases/*/model.safetensors") | digests(run, "model.safetensors")


def subjects(folder: Path) -> list[Subject]:
    """The three, with their sources made."""
    (folder / "hands_over").mkdir()
    for number in range(24):
        write_aloha(folder / "hands_over" / f"episode_{number}.hdf5", number, steps=40)
    (folder / "map.yaml").write_text(MAP)
    data = [sys.executable, "-m", "worldmodel.data"]
    counts = ["--episodes", "3", "--heldout-episodes", "2", "--heldout-task-episodes", "2", "--workers", "2", "--quiet"]
    options = ["--map", str(folder / "map.yaml"), "--episodes-per-shard", "2", "--workers", "2", "--quiet"]
    dataset = folder / "generation" / "whole"

    def train(run: Path) -> list[str]:
        return [sys.executable, "train.py", *short(dataset, run, "trainer.save_every=1", *LONGER)]

    return [
        Subject(
            "generation",
            lambda out: [*data, "generate", "metaworld", str(out), "--tasks", *TASKS, *counts],
            digests,
            shards_done,
        ),
        Subject(
            "import",
            lambda out: [*data, "import", "aloha", str(folder / "hands_over"), str(out), *options],
            digests,
            shards_done,
        ),
        Subject("training", train, weights, phases_done),
    ]


running: list[subprocess.Popen[bytes]] = []
"""The started process, which must not outlive this program."""


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    running[:] = [process]
    return process


def stop() -> None:
    """End what still runs."""
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(subject: Subject, out: Path, log: Path) -> None:
    """Wait for the end of a run that nobody kills, which must be a good one."""
    if status := start(subject.command(out), log).wait():
        raise SystemExit(f"{subject.name}: status {status}\n{log.read_text(errors='replace')[-3000:]}")


def torment(subject: Subject, folder: Path, wanted: int, rng: random.Random, wait: Callable[[], None]) -> None:
    """Kill `subject` as often as wanted, and hold every run that came to its end against the undisturbed one."""
    while subject.kills < wanted or subject.runs == 0:
        out, log = folder / subject.name / f"killed-{subject.runs}", folder / f"{subject.name}.log"
        while subject.kills < wanted:
            wait()
            after = rng.uniform(0.02, 1.0) * subject.seconds
            process = start(subject.command(out), log)
            try:
                status = process.wait(timeout=after)
            except subprocess.TimeoutExpired:
                alone = subject.kills % 2 == 0
                (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
                process.wait()
                subject.kills += 1
                target = "main process" if alone else "all processes"
                print(f"{subject.name} {subject.kills}: {target} after {after:.1f} s: {subject.state(out)}", flush=True)
                continue
            if status:
                raise SystemExit(f"{subject.name}: status {status}\n{log.read_text(errors='replace')[-3000:]}")
            break
        wait()
        finish(subject, out, log)  # after a run that ended by itself this finds nothing to do
        subject.runs += 1
        found = subject.result(out)
        names = sorted(found.keys() | subject.wanted.keys())
        subject.wrong += [name for name in names if found.get(name) != subject.wanted.get(name)]
        shutil.rmtree(out)


def main() -> int:
    """Torments the chosen subjects."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of each subject (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=("generation", "import", "training"), metavar="SUBJECT")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--wait-while", type=Path, default=None, help="a file during whose life nothing is started")
    options = parser.parse_args()
    atexit.register(stop)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def wait() -> None:
        while options.wait_while is not None and options.wait_while.exists():
            time.sleep(2)

    with tempfile.TemporaryDirectory(prefix="kill_nine") as name:
        folder, chosen = Path(name), []
        for subject in subjects(folder):
            needed = subject.name == "generation" and "training" in (options.only or ["training"])
            if options.only and subject.name not in options.only and not needed:
                continue
            wait()
            started = time.monotonic()
            (folder / subject.name).mkdir()
            finish(subject, folder / subject.name / "whole", folder / f"{subject.name}.log")
            subject.seconds = time.monotonic() - started
            subject.wanted = subject.result(folder / subject.name / "whole")
            if not options.only or subject.name in options.only:
                torment(subject, folder, options.kills, random.Random(f"{options.seed} {subject.name}"), wait)
                chosen.append(subject)
    print(f"\n{'subject':12}{'undisturbed':>12}{'kills':>7}{'runs ended':>12}{'files':>7}  differing")
    for subject in chosen:
        differing = ", ".join(subject.wrong) or "none"
        print(
            f"{subject.name:12}{subject.seconds:>10.1f} s{subject.kills:>7}{subject.runs:>12}{len(subject.wanted):>7}"
            f"  {differing}"
        )
    return 1 if any(subject.wrong for subject in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
