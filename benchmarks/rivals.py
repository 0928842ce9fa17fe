"""LeRobot's ACT and Diffusion Policy against ours: same demonstrations, budget, inputs, start states and harness.

  python benchmarks/rivals.py DATA OUT --lerobot-python /envs/lerobot/bin/python --minutes 20 --ours runs/kairos_tiny
  python benchmarks/rivals.py DATA OUT --lerobot-python ... --steps 2510 --policies act
  python benchmarks/rivals.py NEW OUT ... --minutes 2 --policies act --episodes 5 --init OLD/act-20min-wall-0

Both get what ours is shown in the row `images`: pictures of all cameras, proprioception and the task, theirs as one-hot
numbers beside the proprioception since they read no sentences. LeRobot's sizes are cut down for a CPU unless `--full`
is given (see `rivals_lerobot.SMALL`), its settings are otherwise its own but for the length of the chunk, which is that
of the data's spec, and nothing is pretrained. It gets its batches from memory, so only its policies are compared.

`--minutes` are of the clock on a quiet machine, or of the process's CPU time with `--clock cpu`, which other programs
disturb little. Ours is a finished run with its exported artefact, trained on the same data for about as long
(`train.py` says how long each phase took); its own rows are measured here too, on the same start states. LeRobot 0.4.4
wants older torch than this package; see `rivals_lerobot.declare_operators` for what a CPU build lacks.

`--init` goes on from a trained policy of LeRobot, with its normalisation, to the demonstrations of other tasks, whose
numbers take the places of those it knew. `--episodes` takes so many of each task, the same as `data.episodes` of
train.py with the same seed.

Prints a Markdown table; trained policies and results stay in OUT and are not made twice.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.rivals_lerobot import read_arrays, write_arrays

KEPT = 2
"""Newest control steps that are handed over; Diffusion Policy looks at two."""
SCRIPT = Path(__file__).with_name("rivals_lerobot.py")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="shards to learn from")
    parser.add_argument("out", type=Path, help="folder for trained policies and results")
    parser.add_argument("--lerobot-python", required=True, help="interpreter that has lerobot installed")
    parser.add_argument("--policies", nargs="+", default=["act", "diffusion"], choices=["act", "diffusion"])
    parser.add_argument("--ours", type=Path, nargs="*", default=[], help="run folders with an `artefact`")
    parser.add_argument("--episodes", type=int, help="demonstrations of each task (default: all)")
    parser.add_argument("--init", type=Path, help="trained folder of the one policy in --policies, to go on from")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of training, each policy")
    budget.add_argument("--steps", type=int, help="of the optimiser, each policy")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what `--minutes` counts")
    parser.add_argument("--full", action="store_true", help="LeRobot's own sizes")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="of LeRobot's training, as torch names it (cuda)")
    parser.add_argument("--threads", type=int, default=2, help="of training")
    parser.add_argument("--trials", type=int, default=20, help="per task")
    parser.add_argument("--tasks", nargs="+", help="of the closed loop; default: those of the training split")
    parser.add_argument("--chunk", type=int, default=8, help="actions of a chunk of ACT; Diffusion Policy answers half")
    parser.add_argument("--replan", type=int, default=2, help="control steps between two calls of every policy")
    parser.add_argument("--ensemble", type=float, default=0.1, help="averages chunks that overlap; inf: the newest")
    parser.add_argument("--workers", type=int, default=1, help="processes of the closed loop")
    parser.add_argument("--seed", type=int, default=0, help="of training, and of the noise of ours")
    parser.add_argument("--starts", type=int, help="seed of the start states (default: --seed)")
    return parser


def main() -> None:
    """Trains what is missing, tries everything and prints."""
    from worldmodel.errors import WorldModelError

    try:
        print(table(run(arguments().parse_args())))
    except WorldModelError as error:
        sys.exit(f"rivals.py: {error}")


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table."""
    from export.drive import OnnxPolicyFactory
    from worldmodel.closed_loop import SourceScenes
    from worldmodel.comparison import Contender, Protocol, compare
    from worldmodel.data.shards import ShardReader
    from worldmodel.errors import ConfigError

    if given.init and len(given.policies) > 1:
        raise ConfigError(f"--init is one policy, --policies are {', '.join(given.policies)}: name the one it is")
    reader = ShardReader(given.data)
    entries = demonstrations(reader, given.episodes, given.seed)
    few = "" if given.episodes is None else f"-{given.episodes}"
    about = write_demonstrations(reader, entries, given.out / f"demonstrations{few}", known_state(given))
    contenders = []
    for policy in given.policies:
        budget = f"{given.minutes:g}min-{given.clock}" if given.minutes else f"{given.steps}steps"
        where = "" if given.device == "cpu" else f"-{given.device}"
        how = f"{where}{'-full' if given.full else ''}{few}{'-continued' if given.init else ''}"
        folder = given.out / f"{policy}-{budget}{how}-{given.seed}"
        said = train(given, policy, folder, about)
        factory = LeRobotFactory(given.lerobot_python, folder, tuple(about["instructions"]), about["state"])
        contenders.append((f"LeRobot {policy}", said, Contender(
            policy=folder.name, observes="images, proprioception, task", factory=factory, weights=folder)))  # fmt: skip
    for folder in given.ours:
        factory = OnnxPolicyFactory(folder / "artefact", mask=("camera", "points", "touch"), seed=given.seed)
        said = json.loads((folder / "model.json").read_text())["training"]
        said = {"steps": sum(said["phases"].values()), "parameters": None, "seconds": None}
        contenders.append((f"ours, {folder.name}, images", said, Contender(
            policy=f"{folder.resolve()}, images", observes="images, proprioception, instruction", factory=factory,
            weights=folder / "artefact")))  # fmt: skip
    protocol = Protocol(
        tasks=tuple(given.tasks or sorted({e.task for e in entries})),
        trials=given.trials,
        seed=given.seed if given.starts is None else given.starts,
        replan=given.replan,
        ensemble=None if math.isinf(given.ensemble) else given.ensemble,
        image_every=1,
        record=0,
    )
    scenes = SourceScenes(about["pixels"], tuple(about["cameras"]))
    tried = [contender for _, _, contender in contenders]
    results = compare(tried, protocol, given.out / "closed_loop", make_scene=scenes, workers=given.workers)
    return [{"name": name, **said, **result} for (name, said, _), result in zip(contenders, results, strict=True)]


def demonstrations(reader: Any, episodes: int | None, seed: int) -> list[Any]:
    """The successful training demonstrations, or `episodes` of each task as `data.episodes` of train.py has them."""
    from worldmodel.data.few import few_demonstrations

    kept = reader.entries if episodes is None else few_demonstrations(reader.entries, episodes, seed)
    return [e for e in kept if e.split == "train" and e.success and e.variant_of is None]


def known_state(given: argparse.Namespace) -> int | None:
    """How long the states are that the policy of `--init` takes; it must be one of the same kind and settings."""
    from worldmodel.errors import ConfigError

    if given.init is None:
        return None
    note = given.init / "rivals.json"
    if not note.is_file():
        raise ConfigError(f"--init {given.init} is no policy that was trained here: rivals.json is missing")
    known = json.loads(note.read_text())
    same = {"policy": given.policies[0], "small": not given.full, "chunk": given.chunk}
    if wrong := {name: known[name] for name, value in same.items() if known[name] != value}:
        raise ConfigError(f"--init {given.init} was trained with {wrong}, this run has {same}")
    return known["state"]


def write_demonstrations(reader: Any, entries: list[Any], folder: Path, state: int | None) -> dict[str, Any]:
    """Demonstrations as plain arrays, every step of them, with states of a length if it is given; returns what they
    hold. What lies in the folder is taken if it is the same."""
    from worldmodel.errors import ConfigError

    note, source = folder / "about.json", {"keys": [entry.key for entry in entries], "asked": state}
    if note.is_file():
        about = json.loads(note.read_text())
        if about["source"] != source:
            raise ConfigError(
                f"{folder} holds other demonstrations, or the same for another policy: choose another OUT"
            )
        return {**about, "folder": folder}
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {entry.key: number for number, entry in enumerate(reader.entries)}
    episodes = [reader.read(numbers[entry.key]) for entry in entries]
    instructions = sorted({episode.meta["instruction"] for episode in episodes})
    cameras = sorted(episodes[0].rgb)
    needed = episodes[0].proprio.shape[1] + len(instructions)
    if state is not None and state < needed:
        raise ConfigError(f"--init takes states of {state} numbers, {len(instructions)} tasks need {needed}")
    size = state or needed
    states = np.concatenate([with_task(e.proprio, e.meta["instruction"], instructions, size) for e in episodes])
    arrays = {camera: np.concatenate([e.rgb[camera] for e in episodes]).transpose(0, 3, 1, 2) for camera in cameras}
    arrays |= {"state": states, "action": np.concatenate([e.action for e in episodes])}
    arrays["episode"] = np.repeat(np.arange(len(episodes)), [e.length for e in episodes])
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", np.ascontiguousarray(array))
    about = {
        "cameras": cameras,
        "instructions": instructions,
        "pixels": arrays[cameras[0]].shape[-1],
        "state": size,
        "action": arrays["action"].shape[1],
        "episodes": len(episodes),
        "steps": len(states),
        "source": source,
    }
    note.write_text(json.dumps(about, indent=1))
    return {**about, "folder": folder}


def with_task(proprio: Any, instruction: str, instructions: list[str] | tuple[str, ...], size: int) -> np.ndarray:
    """Proprioception (T, P) with the task beside it, one number for each known one: (T, size)."""
    one_hot = np.zeros((len(proprio), size - proprio.shape[1]), np.float32)
    one_hot[:, instructions.index(instruction)] = 1
    return np.concatenate([proprio, one_hot], 1).astype(np.float32)


def train(given: argparse.Namespace, policy: str, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Trains one policy of LeRobot unless the folder holds it; returns steps, seconds, parameters and last loss."""
    from worldmodel.errors import ConfigError

    settings = {
        **{name: about[name] for name in ("cameras", "pixels", "state", "action")},
        "data": str(about["folder"]),
        "init": given.init and str(given.init),
        "out": str(folder),
        "policy": policy,
        "small": not given.full,
        "chunk": given.chunk,
        "seconds": given.minutes * 60 if given.minutes else None,
        "steps": given.steps,
        "clock": given.clock,
        "batch": given.batch,
        "threads": given.threads,
        "device": given.device,
        "seed": given.seed,
    }
    if (folder / "rivals.json").is_file():
        known = json.loads((folder / "rivals.json").read_text())
        # What it took stands in place of the budget, which is in the name of the folder.
        same = {name: value for name, value in settings.items() if name not in ("seconds", "steps")}
        if other := {name: known.get(name) for name, value in same.items() if known.get(name) != value}:
            raise ConfigError(f"{folder} was trained with {other}: choose another OUT")
        return known
    done = subprocess.run(
        [given.lerobot_python, str(SCRIPT), "train", json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        check=True,
    )
    return json.loads(done.stdout.rpartition("answer ")[2])


def environment() -> dict[str, str]:
    """Of the other interpreter: nothing of this repository, and no network."""
    return {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}


class LeRobotPolicy:
    """A policy of LeRobot behind `contracts.Policy`, in an interpreter of its own."""

    def __init__(self, python: str, folder: Path, instructions: tuple[str, ...], state: int) -> None:
        self.instructions, self.state = instructions, state
        self.process = subprocess.Popen(
            [python, str(SCRIPT), "serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment(), "OMP_NUM_THREADS": "1"},
        )
        self.reset()

    def reset(self) -> None:
        """Forgets the episode."""
        self.seen: list[dict[str, np.ndarray]] = []
        self.instruction = ""

    def observe(self, observation: dict[str, Any]) -> None:
        """Keeps the newest steps."""
        self.instruction = observation.get("instruction", self.instruction)
        proprio = np.asarray(observation["proprio"])[None]
        state = with_task(proprio, self.instruction, self.instructions, self.state)[0]
        pictures = {name: value for name, value in observation.items() if name.startswith("rgb.")}
        self.seen = [*self.seen, {**pictures, "state": state}][-KEPT:]

    def act(self) -> np.ndarray:
        """Actions (A, D) in the robot's units."""
        assert self.process.stdin is not None and self.process.stdout is not None
        rows = {name: np.stack([step[name] for step in self.seen]) for name in self.seen[-1]}
        write_arrays(self.process.stdin, rows)  # pyright: ignore[reportArgumentType]
        answer = read_arrays(self.process.stdout)  # pyright: ignore[reportArgumentType]
        if answer is None:
            raise RuntimeError(f"the LeRobot interpreter ended with status {self.process.wait()}; its error is above")
        return answer["actions"]


@dataclass(frozen=True)
class LeRobotFactory:
    """Builds `LeRobotPolicy` in a worker of the closed loop."""

    python: str
    folder: Path
    instructions: tuple[str, ...]
    state: int

    def __call__(self, robot: str) -> LeRobotPolicy:
        """The policy saved in `folder`, which knows one robot."""
        return LeRobotPolicy(self.python, self.folder, self.instructions, self.state)


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of all figures."""
    lines = ["| policy | M parameters | steps | minutes | success | 95 % interval | trials |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        low, high = row["interval"]
        size, minutes = (
            "–" if row[key] is None else f"{row[key] / scale:.1f}"
            for key, scale in (("parameters", 1e6), ("seconds", 60))
        )
        trials = sum(task["trials"] for task in row["tasks"])
        lines.append(
            f"| {row['name']} | {size} | {row['steps']} | {minutes} | {row['mean_success']:.1%} | "
            f"{low:.0%}-{high:.0%} | {trials} |"
        )
    tasks = [task["task"] for task in rows[0]["tasks"]]
    lines += ["", f"| task | {' | '.join(row['name'] for row in rows)} |", f"| --- |{' ---: |' * len(rows)}"]
    for number, task in enumerate(tasks):
        cells = (f"{row['tasks'][number]['successes']}/{row['tasks'][number]['trials']}" for row in rows)
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
