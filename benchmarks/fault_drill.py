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
from pathlib import Path

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
    from export.runtime import Controller, OnnxPolicy
    from worldmodel.closed_loop import MetaworldScenes, Rollout
    from worldmodel.data.sources.metaworld_tasks import TRAIN_TASKS
    from worldmodel.errors import WorldModelError
    from worldmodel.trials import wilson_interval

    given = arguments().parse_args()
    try:
        needy = OnnxPolicy(given.artefact, seed=given.seed)
        patient = OnnxPolicy(given.artefact, seed=given.seed, allow_missing=needy.cameras)
        stride = needy.stride
        rollout = Rollout(seed=given.seed, max_steps=given.max_steps, image_every=stride, delay=given.delay)
        scenes = MetaworldScenes(needy.manifest["spec"]["height"], tuple(needy.cameras))
        rows = [(fault, patient) for fault in FAULTS]
        rows += [(fault, needy) for fault in ("camera dropped", "camera frozen")]
        results: list[list[Drilled]] = [[] for _ in rows]
        for task in given.tasks or TRAIN_TASKS:
            scene = scenes(task)
            for (fault, policy), found in zip(rows, results, strict=True):
                make = lambda policy=policy: Controller(policy.fork(), replan=stride, realtime=not given.plain)  # noqa: E731
                for trial in range(given.trials):
                    found.append(drill_trial(make, scene, task, trial, fault, rollout=rollout))
                print(f"{task}, {fault}: {sum(r.success for r in found)} of {len(found)} so far", file=sys.stderr)
    except (WorldModelError, ValueError) as error:
        sys.exit(f"fault_drill.py: {error}")
    print(
        "| fault | success | 95 % interval | trials | run / hold / stop, % of steps | values dropped "
        "| commands | not finite | outside | hand outside, mm |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    report = []
    for (fault, policy), found in zip(rows, results, strict=True):
        successes, steps = sum(r.success for r in found), sum(r.steps for r in found)
        low, high = wilson_interval(successes, len(found))
        row = {
            "fault": fault + (", needed" if policy is needy else ""),
            "successes": successes,
            "trials": len(found),
            "interval": [low, high],
            "steps": steps,
            "states": {state: sum(r.states[state] for r in found) for state in found[0].states},
            "dropped": sum(r.dropped for r in found),
            "not_finite": sum(r.watch.not_finite for r in found),
            "outside": sum(r.watch.outside for r in found),
            "farthest_m": max(r.watch.farthest for r in found),
        }
        report.append(row)
        states = " / ".join(f"{100 * count / steps:.0f}" for count in row["states"].values())
        print(
            f"| {row['fault']} | {successes / len(found):.0%} | {low:.0%}-{high:.0%} | {len(found)} | {states} "
            f"| {row['dropped']} | {steps} | {row['not_finite']} | {row['outside']} | {1000 * row['farthest_m']:.1f} |"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps({"arguments": {k: str(v) for k, v in vars(given).items()}, "rows": report}, indent=1)
    )


if __name__ == "__main__":
    main()
