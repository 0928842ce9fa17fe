"""Closed-loop success when the policy takes time to think: plain chunks beside those that know of it.

  python benchmarks/delay.py RUN OUT [--delays 0 1 2 4] [--trials 20]

A chunk arrives so many control steps after the observation that it answers; the robot goes on with the chunk before
until then, and for its first it waits. `plain` does not know of it, `realtime` is given the actions of that time and
continues them from the state that foresight expects; `reactive` is `realtime` whose every action follows what is
measured when it is executed. All are the same network, start states and noise. With `--noise` the arm does not do
exactly what it is told. `RUN` should have been trained with a rate `decided` in its phases. Prints a Markdown table
with 95 % Wilson intervals; results stay in OUT and are not made twice.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))


KINDS = ("plain", "realtime", "reactive")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("out", type=Path, help="folder for results")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 4], help="control steps, at most `replan`")
    parser.add_argument("--trials", type=int, default=20, help="per task, delay and kind")
    parser.add_argument("--tasks", nargs="+", help="default: those trained on")
    parser.add_argument("--mask", nargs="+", default=[], help="senses that are hidden, e.g. points touch")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="rows of each delay")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="standard deviation of what disturbs the three commands of displacement",
    )
    parser.add_argument("--replan", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1, help="processes of the closed loop")
    parser.add_argument("--seed", type=int, default=0)
    return parser


class Disturbed:
    """A scene whose arm moves otherwise than it is told, by noise that a start state brings along."""

    def __init__(self, scene: Any, noise: float) -> None:
        self.scene, self.noise = scene, noise
        self.embodiment, self.hold, self.max_steps = scene.embodiment, scene.hold, scene.max_steps

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        """As that of the scene, which draws first."""
        observation = self.scene.reset(rng, images=images)
        self.random = np.random.default_rng(rng.integers(2**63))
        return observation

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        """As that of the scene."""
        moved = np.array(action, np.float32)
        moved[:3] += self.random.normal(0, self.noise, 3)
        return self.scene.step(moved.clip(-1, 1), images=images)


@dataclass(frozen=True)
class DisturbedScenes:
    """Scene factory around another."""

    scenes: Any
    noise: float

    def __call__(self, task: str, robot: str | None = None) -> Disturbed:
        """The scene of one task with a robot."""
        return Disturbed(self.scenes(task, robot), self.noise)


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
        scenes = DisturbedScenes(scenes, given.noise) if given.noise else scenes
        # Kept results know nothing of the scene.
        out = given.out / f"noise_{given.noise:g}" if given.noise else given.out
        print("| delay, steps (ms) | chunks | success | 95 % interval | trials |\n| ---: | --- | ---: | ---: | ---: |")
        for delay in given.delays:
            protocol = Protocol(
                tasks=tuple(given.tasks or model.metadata["training"]["tasks"]),
                trials=given.trials,
                seed=given.seed,
                replan=given.replan,
                delay=delay,
                image_every=model.spec.stride,
                record=0,
            )
            # Without a delay there is nothing that a policy could be told.
            for kind in (kind for kind in given.kinds if delay or kind != "realtime"):
                contender = Contender(
                    policy=f"{given.run.name}, {kind}, delay {delay}",
                    observes="all senses" if not given.mask else f"all but {', '.join(given.mask)}",
                    factory=factory,
                    weights=given.run,
                    realtime=delay > 0 and kind != "plain",
                    reactive=kind == "reactive",
                )
                (result,) = compare([contender], protocol, out, make_scene=scenes, workers=given.workers)
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
