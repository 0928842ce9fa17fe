"""How often a simulator's scripted experts succeed, by task and robot, and what an episode costs without pictures.

  python benchmarks/experts.py --source robosuite [--tasks Lift Door] [--robots panda ur5e] [--trials 20] [--seed 0]
  python benchmarks/experts.py --source metaworld --benchmark ml45

Every trial starts from a state of its own, the same for every robot as far as the simulator allows, and fails where
`generate` would record a failure: after the task's number of control steps. Prints a Markdown table with successes of
trials, 95 % Wilson intervals in per cent, and seconds that the processor spent on an episode. Each combination goes to
standard error when it is done, with the numbers of the trials that failed; `--trial N` runs one of them alone. The
extra `robosuite` wants an environment of its own, see the README.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

STREAM = 0xE0E0
"""Second seed word; recorded episodes have their split there, which counts from 0."""


class Outcome(NamedTuple):
    """One trial."""

    task: str
    robot: str
    trial: int
    success: bool
    seconds: float


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    from worldmodel.data.sources.registry import SOURCES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", choices=list(SOURCES), default="robosuite", help="default: %(default)s")
    parser.add_argument("--benchmark", metavar="NAME", help="task list of the source (default: its first)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (default: all, held-out ones too)")
    parser.add_argument("--robots", nargs="+", metavar="ROBOT", help="only these (default: all)")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="per task and robot (default: %(default)s)")
    parser.add_argument("--trial", type=int, metavar="N", help="only trial number N, counted from 0")
    parser.add_argument("--seed", type=int, default=0, help="of the start states (default: %(default)s)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    return parser


def main() -> None:
    """Runs every combination and prints the table."""
    given = arguments().parse_args()

    from tqdm import tqdm

    from worldmodel.data.generate import make_plan
    from worldmodel.errors import WorldModelError

    try:
        plan = make_plan(
            given.source,
            benchmark=given.benchmark,
            tasks=given.tasks,
            robots=given.robots,
            heldout_robots=None,
            counts={"train": given.trials},
            seed=given.seed,
            pixels=64,
        )
        numbers = range(given.trials) if given.trial is None else [given.trial]
        jobs = [(given.source, task, robot, numbers, given.seed) for task in plan.tasks for robot in plan.robots]
        workers = min(len(jobs), given.workers or os.cpu_count() or 1)
        outcomes: list[Outcome] = []
        bar = tqdm(total=len(jobs) * len(numbers), unit="trial", desc=given.source)
        with bar, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for done in as_completed([pool.submit(run, *job) for job in jobs]):
                outcomes += (new := done.result())
                failed = [outcome.trial for outcome in new if not outcome.success]
                bar.write(f"{new[0].task}, {new[0].robot}: {rate(new)}, failed: {failed}", file=sys.stderr)
                bar.update(len(numbers))
                bar.set_postfix(success=f"{sum(outcome.success for outcome in outcomes) / len(outcomes):.0%}")
    except WorldModelError as error:
        sys.exit(f"error: {error}")
    print(table(outcomes, plan.tasks, plan.robots))


def run(source: str, task: str, robot: str, trials: Iterable[int], seed: int) -> list[Outcome]:
    """The given trials of one task with one robot."""
    import numpy as np

    from worldmodel.data.sources.registry import SOURCES

    scene, outcomes = SOURCES[source].make_scene(task, robot, 64, SOURCES[source].cameras), []
    scene.reset(np.random.default_rng(seed), images=False)
    scene.step(scene.expert().act(), images=False)  # compiles what the simulator compiles at first use
    for trial in trials:
        started, success = time.process_time(), False
        scene.reset(np.random.default_rng([seed, STREAM, trial]), images=False)
        expert = scene.expert()
        for _ in range(scene.max_steps - 1):
            _, success = scene.step(expert.act(), images=False)
            if success:
                break
        outcomes.append(Outcome(task, robot, trial, success, time.process_time() - started))
    scene.close()
    return outcomes


def table(outcomes: list[Outcome], tasks: list[str], robots: list[str]) -> str:
    """A Markdown table, tasks by robots, with sums at its edges."""

    def cell(task: str | None, robot: str | None) -> list[Outcome]:
        return [o for o in outcomes if task in (None, o.task) and robot in (None, o.robot)]

    columns: list[str | None] = [*robots, None] if len(robots) > 1 else [*robots]
    rows: list[str | None] = [*tasks, None]
    heads = [robot or "all" for robot in columns]
    lines = [f"| task | {' | '.join(heads)} | s/episode |", "| --- |" + " ---: |" * (len(heads) + 1)]
    for task in rows:
        shown = " | ".join(rate(cell(task, robot)) for robot in columns)
        lines.append(f"| {task or 'all'} | {shown} | {mean_seconds(cell(task, None)):.1f} |")
    if len(robots) > 1:
        times = " | ".join(f"{mean_seconds(cell(None, robot)):.1f}" for robot in columns)
        lines.append(f"| s/episode | {times} | |")
    return "\n".join(lines)


def rate(outcomes: list[Outcome]) -> str:
    """Successes of trials with the interval of the rate in per cent."""
    from worldmodel.trials import wilson_interval

    successes = sum(outcome.success for outcome in outcomes)
    low, high = wilson_interval(successes, len(outcomes))
    return f"{successes}/{len(outcomes)} ({100 * low:.0f}-{100 * high:.0f})"


def mean_seconds(outcomes: list[Outcome]) -> float:
    """Mean over the trials."""
    return sum(outcome.seconds for outcome in outcomes) / len(outcomes)


if __name__ == "__main__":
    main()
