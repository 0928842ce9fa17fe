"""Closed-loop success when the policy takes time to think: plain chunks beside those that know of it.

  python benchmarks/delay.py RUN OUT [--delays 0 1 2 4] [--trials 20]

A chunk arrives so many control steps after the observation that it answers; the robot goes on with the chunk before
until then. `plain` does not know of it, `realtime` is given the actions of that time and continues them from the state
that foresight expects; `reactive` is `realtime` whose every action follows what is measured when it is executed. All
are the same network, start states and noise. `RUN` should have been trained with a rate `decided` in its phases. Prints
a Markdown table with 95 % Wilson intervals; results stay in OUT and are not made twice.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 4], help="control steps, at most `replan`")
    parser.add_argument("--trials", type=int, default=20, help="per task, delay and kind")
    parser.add_argument("--tasks", nargs="+", help="default: those trained on")
    parser.add_argument("--mask", nargs="+", default=[], help="senses that are hidden, e.g. points touch")
    parser.add_argument("--image-every", type=int, help="control steps between pictures; default: those of the history")
    parser.add_argument("--replan", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1, help="processes of the closed loop")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Measures and prints."""
    from worldmodel.checkpoint import load_model
    from worldmodel.closed_loop import SourceScenes
    from worldmodel.comparison import Contender, Protocol, compare
    from worldmodel.controllers import CheckpointFactory
    from worldmodel.errors import WorldModelError

    given = arguments().parse_args()
    try:
        model = load_model(given.run)
        factory = CheckpointFactory(given.run, mask=tuple(given.mask), seed=given.seed)
        scenes = SourceScenes(model.spec.height, model.spec.cameras)
        print("| delay, steps (ms) | chunks | success | 95 % interval | trials |\n| ---: | --- | ---: | ---: | ---: |")
        for delay in given.delays:
            protocol = Protocol(
                tasks=tuple(given.tasks or model.metadata["training"]["tasks"]),
                trials=given.trials,
                seed=given.seed,
                replan=given.replan,
                delay=delay,
                image_every=given.image_every or model.spec.stride,
                record=0,
            )
            for kind in ("plain", "realtime", "reactive") if delay else ("plain", "reactive"):
                contender = Contender(
                    policy=f"{given.run.name}, {kind}, delay {delay}",
                    observes="all senses" if not given.mask else f"all but {', '.join(given.mask)}",
                    factory=factory,
                    weights=given.run,
                    realtime=delay > 0 and kind != "plain",
                    reactive=kind == "reactive",
                )
                (result,) = compare([contender], protocol, given.out, make_scene=scenes, workers=given.workers)
                low, high = result["interval"]
                trials = sum(task["trials"] for task in result["tasks"])
                time = f"{delay} ({1000 * delay / model.spec.fps:.0f})"
                print(
                    f"| {time} | {kind} | {result['mean_success']:.1%} | {low:.0%}-{high:.0%} | {trials} |", flush=True
                )
    except WorldModelError as error:
        sys.exit(f"delay.py: {error}")


if __name__ == "__main__":
    main()
