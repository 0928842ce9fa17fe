"""Imagined against real outcomes of the same actions: order of candidates, errors, calibration of samples.

  python benchmarks/imagination.py RUN [--tasks TASK ...] [--states 10] [--candidates 8] [--out imagination.json]

The policy drives, and a moment before it wins is drawn. From there the chunk that it would execute and candidates that
differ from it by a drawn offset are executed in the simulator, each from the same state, and imagined by mode
`forward_dynamics` of the same checkpoint.

- Order: of all pairs of candidates whose real outcomes differ by at least `--least` millimetres, how many imagination
  puts into the right order; outcomes are the distances of hand and object, and of object and goal. Half is chance.
  `integrated actions` is what the actions alone say: the hand goes where they ask for, and the object stays.
- Errors in millimetres of hand and object, beside both staying where they are and beside integrated actions.
- Calibration: how often truth lies within the range of samples, coordinate by coordinate, beside how often it would if
  it were one of them; and the same with samples spread about their mean by a factor that is fitted on every second
  state and judged on the others.

Intervals are 95 % bootstrap intervals over states. Prints Markdown tables; `--out` keeps every state's figures.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

STEP = 0.04
"""Metres that an action of 1 asks for in a control step of Meta-World."""
GRASP = ("hand to object", "object to goal")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--tasks", nargs="+", help="default: those trained on")
    parser.add_argument("--states", type=int, default=10, help="per task")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--spread", type=float, default=0.5, help="standard deviation of the offsets, in action units")
    parser.add_argument("--samples", type=int, default=19, help="draws for calibration; 19: their range covers 90 %%")
    parser.add_argument("--least", type=float, default=5.0, help="millimetres that outcomes of a pair differ at least")
    parser.add_argument("--camera", default="wrist", help="the camera that the hand carries")
    parser.add_argument("--workers", type=int, default=2, help="processes, one task each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


def main() -> None:
    """Measures and prints."""
    from worldmodel.checkpoint import load_model
    from worldmodel.errors import WorldModelError

    given = arguments().parse_args()
    try:
        tasks = given.tasks or load_model(given.run).metadata["training"]["tasks"]
        found: list[dict[str, Any]] = []
        context = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(given.workers, context) as pool,
            tqdm(total=len(tasks) * given.states, unit="state") as bar,
        ):
            for done in as_completed(pool.submit(measure, given, task) for task in tasks):
                found.extend(done.result())
                bar.update(given.states)
    except WorldModelError as error:
        sys.exit(f"imagination.py: {error}")
    found.sort(key=lambda row: (row["task"], row["trial"]))
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found, given))


def measure(given: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """Figures of every state of a task."""
    import torch

    from worldmodel.checkpoint import load_model
    from worldmodel.closed_loop import MetaworldScenes
    from worldmodel.controllers import EagerPolicy
    from worldmodel.imagination import Candidates, compare_state, reach

    torch.set_num_threads(1)
    model = load_model(given.run)
    scene: Any = MetaworldScenes(model.spec.height, model.spec.cameras)(task)
    policy = EagerPolicy(model, seed=given.seed)
    candidates = Candidates(count=given.candidates, spread=given.spread)
    rows = []
    for trial in range(given.states):
        state = reach(
            scene,
            policy,
            candidates,
            task=task,
            trial=trial,
            seed=given.seed,
            replan=model.spec.stride,
            stride=model.spec.stride,
        )
        generator = torch.Generator().manual_seed(given.seed + trial)
        how = {"seed": given.seed, "camera": given.camera, "samples": given.samples, "generator": generator}
        found = compare_state(model, scene, state, **how)
        goal = scene.point_names.index("goal") if "goal" in scene.point_names else None
        steps = min(model.spec.window, state.chunks.shape[1])
        asked = found.before.hand + STEP * state.chunks[:, :steps, :3].sum(1)
        rows.append({"task": task, "trial": trial, "at": len(state.done), **figures(found, asked, goal)})
    return rows


def figures(found: Any, asked: np.ndarray, goal: int | None) -> dict[str, Any]:
    """Plain numbers of one state, in metres: outcomes of all candidates, and samples beside truth."""
    still = np.broadcast_to(found.before.points, found.real.points.shape)

    def outcomes(hand: np.ndarray, points: np.ndarray) -> dict[str, list[float]]:
        values = {GRASP[0]: np.linalg.norm(hand - points[:, 0], axis=-1)}
        if goal is not None:
            values[GRASP[1]] = np.linalg.norm(points[:, 0] - points[:, goal], axis=-1)
        return {name: value.tolist() for name, value in values.items()}

    def off(hand: np.ndarray, points: np.ndarray) -> dict[str, float]:
        errors = {"hand": hand - found.real.hand, "object": points[:, 0] - found.real.points[:, 0]}
        return {name: float(np.linalg.norm(error, axis=-1).mean()) for name, error in errors.items()}

    stays = np.broadcast_to(found.before.hand, found.real.hand.shape)
    return {
        "outcomes": {
            "real": outcomes(*found.real),
            "imagined": outcomes(*found.imagined),
            "integrated actions": outcomes(asked, still),
        },
        "errors": {
            "imagined": off(*found.imagined),
            "all stays": off(stays, still),
            "integrated actions": off(asked, still),
        },
        "samples": {"hand": found.samples.hand.tolist(), "object": found.samples.points[:, 0].tolist()},
        "truth": {"hand": found.real.hand[0].tolist(), "object": found.real.points[0, 0].tolist()},
    }


def interval(values: Sequence[Any], statistic: Any, seed: int = 0) -> tuple[float, float, float]:
    """A statistic of all states, and its 95 % bootstrap interval over them."""
    rng, rows = np.random.default_rng(seed), np.array(values, float)
    drawn = [statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(1000)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(statistic(rows)), float(low), float(high)


def tables(found: list[dict[str, Any]], given: argparse.Namespace) -> str:
    """The Markdown tables of all states."""
    return "\n\n".join((order(found, given.least / 1000), errors(found), calibration(found, given.samples)))


def order(found: list[dict[str, Any]], least: float) -> str:
    """How often pairs are in the right order, and rank correlation."""
    from worldmodel.imagination import rank_correlation, ranked_pairs

    lines = [
        "| outcome | told by | pairs in order | 95 % interval | rank correlation | 95 % interval | pairs | states |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in GRASP:
        for kind in ("imagined", "integrated actions"):
            pairs, ranks = [], []
            for state in found:
                if name not in (outcomes := state["outcomes"])["real"]:
                    continue
                real, told = (np.array(outcomes[which][name]) for which in ("real", kind))
                pairs.append(ranked_pairs(real, told, least))
                if np.ptp(real) >= least:
                    ranks.append(rank_correlation(real, told))
            some = [row for row in pairs if row[1]]
            if not some or np.isnan(ranks).all():
                continue
            right, low, high = interval(some, lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
            rank, lowest, highest = interval(ranks, np.nanmean)
            cells = [
                name,
                kind,
                f"{right:.1%}",
                f"{low:.0%}-{high:.0%}",
                f"{rank:.2f}",
                f"{lowest:.2f} to {highest:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} | {sum(row[1] for row in some)} | {len(some)} |")
    return "\n".join(lines)


def errors(found: list[dict[str, Any]]) -> str:
    """Mean distances from the truth."""
    lines = [
        "| told by | hand, mm | 95 % interval | object, mm | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for kind in found[0]["errors"]:
        cells = []
        for part in ("hand", "object"):
            value, low, high = interval([1000 * state["errors"][kind][part] for state in found], np.mean)
            cells.append(f"{value:.1f} | {low:.1f}-{high:.1f}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def calibration(found: list[dict[str, Any]], samples: int) -> str:
    """How often truth lies among the samples, as they are and widened."""
    from worldmodel.imagination import coverage, fitted_width, nominal, widened

    lines = [
        "| part | nominal | covered | 95 % interval | factor | covered when widened | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in ("hand", "object"):
        drawn = [np.array(state["samples"][part]) for state in found]
        truth = [np.array(state["truth"][part]) for state in found]
        for drop in (0, samples // 4):
            factor = fitted_width(drawn[::2], truth[::2], drop)
            plain = interval(
                [coverage(d, t, drop).mean() for d, t in zip(drawn, truth, strict=True)],
                np.mean,
            )
            wide = interval(
                [coverage(widened(d, factor), t, drop).mean() for d, t in zip(drawn[1::2], truth[1::2], strict=True)],
                np.mean,
            )
            shares = [f"{value:.0%} | {low:.0%}-{high:.0%}" for value, low, high in (plain, wide)]
            lines.append(f"| {part} | {nominal(samples, drop):.0%} | {shares[0]} | {factor:.1f} | {shares[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
