"""Fault drill in the closed loop: an artefact drives the simulated arm while messages are lost, late or wrong.

  python benchmarks/fault_drill.py ARTEFACT OUT.json [--trials 20] [--tasks reach-v3 push-v3] [--delay 1]

The arm is commanded by `export.runtime.Controller`, which may mask a camera that is gone (but for the rows `needed`);
the policy thinks `--delay` control steps. `export.drill.Line` says what each fault is. Every fault has the same start
states. Prints a Markdown table: success with 95 % Wilson intervals, share of control steps in each state of the
controller, and, by a watch that shares no code with it, how many commands were not finite or outside the limits of
the manifest, and how far the hand was outside its box.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="folder of `python -m export build`")
    parser.add_argument("out", type=Path, help="JSON file")
    parser.add_argument("--trials", type=int, default=20, help="per task and fault")
    parser.add_argument("--tasks", nargs="+", help="default: ML10's ten training tasks")
    parser.add_argument("--delay", type=int, default=1, help="control steps that the policy thinks")
    parser.add_argument("--max-steps", type=int, default=125)
    parser.add_argument("--plain", action="store_true", help="without real-time chunking")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Measures and prints."""
    from export.drill import FAULTS, Drilled, drill_trial
    from export.runtime import OnnxPolicy
    from worldmodel.closed_loop import Rollout, SourceScenes
    from worldmodel.data.sources.metaworld_tasks import TRAIN_TASKS
    from worldmodel.errors import WorldModelError

    given = arguments().parse_args()
    try:
        needy = OnnxPolicy(given.artefact, seed=given.seed)
        patient = OnnxPolicy(given.artefact, seed=given.seed, allow_missing=needy.cameras)
        stride = needy.stride
        rollout = Rollout(seed=given.seed, max_steps=given.max_steps, image_every=stride, delay=given.delay)
        scenes = SourceScenes(needy.manifest["spec"]["height"], tuple(needy.cameras))
        policies = {fault: patient for fault in FAULTS}
        policies |= {f"{fault}, needed": needy for fault in ("camera dropped", "camera frozen")}
        results: dict[str, list[Drilled]] = {name: [] for name in policies}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {"arguments": {name: str(value) for name, value in vars(given).items()}, "tasks": []}
        for task in given.tasks or TRAIN_TASKS:
            scene = scenes(task)
            for name, policy in policies.items():
                make = partial(_controller, policy, realtime=not given.plain)
                for trial in range(given.trials):
                    fault = name.removesuffix(", needed")
                    results[name].append(drill_trial(make, scene, task, trial, fault, rollout=rollout))
            report["tasks"].append(task)
            report["rows"] = {name: summary(found) for name, found in results.items()}
            given.out.write_text(json.dumps(report, indent=1))
            print(f"{task} is done", file=sys.stderr, flush=True)
    except (WorldModelError, ValueError) as error:
        sys.exit(f"fault_drill.py: {error}")
    print(table(report["rows"]))


def _controller(policy: Any, *, realtime: bool) -> Any:
    """A controller with an episode of its own, asked once for each picture."""
    from export.runtime import Controller

    return Controller(policy.fork(), replan=policy.stride, realtime=realtime)


def summary(found: Sequence[Any]) -> dict[str, Any]:
    """What became of the trials under one fault."""
    from worldmodel.trials import wilson_interval

    successes = sum(r.success for r in found)
    return {
        "successes": successes,
        "trials": len(found),
        "interval": wilson_interval(successes, len(found)),
        "steps": sum(r.steps for r in found),
        "states": {state: sum(r.states[state] for r in found) for state in found[0].states},
        "dropped": sum(r.dropped for r in found),
        "not_finite": sum(r.watch.not_finite for r in found),
        "outside": sum(r.watch.outside for r in found),
        "farthest_m": max(r.watch.farthest for r in found),
    }


def table(rows: Mapping[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| fault | success | 95 % interval | trials | run / hold / stop, % of steps | values dropped | commands "
        "| not finite | outside | hand outside, mm |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        low, high = row["interval"]
        states = " / ".join(f"{100 * count / row['steps']:.0f}" for count in row["states"].values())
        lines.append(
            f"| {name} | {row['successes'] / row['trials']:.0%} | {low:.0%}-{high:.0%} | {row['trials']} | {states} "
            f"| {row['dropped']} | {row['steps']} | {row['not_finite']} | {row['outside']} "
            f"| {1000 * row['farthest_m']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
