"""Imagined against real outcomes of the same actions: order of candidates, errors, calibration of samples.

  python benchmarks/imagination.py RUN [--tasks TASK ...] [--states 10] [--candidates 8] [--out imagination.json]

The policy drives, and a moment before it wins is drawn. From there the chunk that it would execute and candidates that
differ from it by a drawn offset are executed in the simulator, each from the same state, and imagined by mode
`forward_dynamics` of the same checkpoint.

- Order: of all pairs of candidates whose real outcomes differ by at least `--least` millimetres, how many imagination,
  one draw of noise for all candidates, puts into the right order; outcomes are the distances of hand and object, and of
  object and goal. Half is chance, and pairs of which the same is expected count half. `integrated actions` is what the
  actions alone say: the hand goes where they ask for, and the object stays. Rank correlations are means over states.
- Errors in millimetres of hand and object, beside both staying where they are and beside integrated actions.
- Calibration: how often truth lies within the range of samples, coordinate by coordinate, beside how often it would if
  it were one of them; and the same with samples spread about their median by a factor that is fitted on every second
  state and judged on the others.

Intervals are 95 % bootstrap intervals over states. Prints Markdown tables; `--out` keeps settings and every state's
figures. A state that the simulator does not come back to is left out, and the number of these is printed.
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
OUTCOMES = ("hand to object", "object to goal")


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

    parser = arguments()
    given = parser.parse_args()
    if given.states < 1 or given.samples < 4 or given.least <= 0:
        parser.error("at least 1 state, 4 samples, and millimetres above 0 are needed")
    try:
        model = load_model(given.run)
        tasks = given.tasks or model.metadata["training"]["tasks"]
        if given.camera not in model.spec.cameras or len(tasks) * given.states < 2:
            parser.error(f"--camera is one of {', '.join(model.spec.cameras)}, and one state alone has no interval")
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
        found = everything(given, tasks)
    except WorldModelError as error:
        sys.exit(f"imagination.py: {error}")
    if given.out:
        settings = {name: str(value) for name, value in vars(given).items()}
        given.out.write_text(json.dumps({"settings": settings, "states": found}, indent=1) + "\n")
    print(tables(found, given.least / 1000, given.samples))
    print(f"\n{len(tasks) * given.states - len(found)} of {len(tasks) * given.states} states could not be repeated.")


def everything(given: argparse.Namespace, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of all states, in the order of tasks and trials."""
    found: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(given.workers, len(tasks)), context) as pool,
        tqdm(total=len(tasks) * given.states, unit="state") as bar,
    ):
        jobs = [pool.submit(measure, given, task) for task in tasks]
        try:
            for done in as_completed(jobs):
                found.extend(done.result())
                bar.update(given.states)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return sorted(found, key=lambda row: (row["task"], row["trial"]))


def measure(given: argparse.Namespace, task: str) -> list[dict[str, Any]]:
    """Figures of every state of a task that can be repeated."""
    import torch

    from worldmodel.checkpoint import load_model
    from worldmodel.closed_loop import SourceScenes
    from worldmodel.controllers import EagerPolicy
    from worldmodel.errors import ContractError
    from worldmodel.imagination import Candidates, compare_state, horizon, reach

    torch.set_num_threads(1)
    model = load_model(given.run)
    spec = model.spec
    scene: Any = SourceScenes(spec.height, spec.cameras)(task)
    policy = EagerPolicy(model, seed=given.seed)
    candidates = Candidates(count=given.candidates, spread=given.spread)
    rows = []
    for trial in range(given.states):
        where: dict[str, Any] = {"task": task, "trial": trial, "seed": given.seed}
        state = reach(scene, policy, candidates, **where, replan=spec.stride, stride=spec.stride)
        words = np.random.SeedSequence([given.seed, *task.encode(), trial]).generate_state(1)
        generator = torch.Generator().manual_seed(int(words[0]))
        how: dict[str, Any] = {"seed": given.seed, "camera": given.camera, "samples": given.samples}
        try:
            found = compare_state(model, scene, state, **how, generator=generator)
        except ContractError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        goal = scene.point_names.index("goal") if "goal" in scene.point_names else None
        asked = found.before.hand + STEP * state.chunks[:, : horizon(spec), :3].sum(1)
        rows.append({"task": task, "trial": trial, "at": len(state.done), **figures(found, asked, goal)})
    return rows


def figures(found: Any, asked: np.ndarray, goal: int | None) -> dict[str, Any]:
    """Plain numbers of one state, in metres: outcomes of all candidates, and samples beside truth."""
    still = np.broadcast_to(found.before.points, found.real.points.shape)

    def outcomes(hand: np.ndarray, points: np.ndarray) -> dict[str, list[float]]:
        values = {OUTCOMES[0]: np.linalg.norm(hand - points[:, 0], axis=-1)}
        if goal is not None:
            values[OUTCOMES[1]] = np.linalg.norm(points[:, 0] - points[:, goal], axis=-1)
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


def tables(found: list[dict[str, Any]], least: float, samples: int) -> str:
    """The Markdown tables of all states; `least` in metres."""
    return "\n\n".join((order(found, least), errors(found), calibration(found, samples)))


def order(found: list[dict[str, Any]], least: float) -> str:
    """How often pairs are in the right order, and rank correlation; "–" where nothing has a rank."""
    from worldmodel.imagination import rank_correlation, ranked_pairs

    lines = [
        "| outcome | told by | pairs in order | 95 % interval | rank correlation | 95 % interval | pairs | states |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in OUTCOMES:
        for kind in ("imagined", "integrated actions"):
            pairs, ranks = [], []
            for state in found:
                if name not in (outcomes := state["outcomes"])["real"]:
                    continue
                real, told = (np.array(outcomes[which][name]) for which in ("real", kind))
                right, all_pairs = ranked_pairs(real, told, least)
                if all_pairs:
                    pairs.append((right, all_pairs))
                    # What differs by less than this is noise of the simulator.
                    ranks.append(rank_correlation(np.round(real / least * 10), told))
            if not pairs:
                continue
            share = "{:.1%} | {:.0%}-{:.0%}".format(*interval(pairs, lambda rows: rows[:, 0].sum() / rows[:, 1].sum()))
            known = [rank for rank in ranks if not np.isnan(rank)]
            rank = "{:.2f} | {:.2f} to {:.2f}".format(*interval(known, np.mean)) if known else "– | –"
            lines.append(f"| {name} | {kind} | {share} | {rank} | {sum(row[1] for row in pairs)} | {len(pairs)} |")
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
