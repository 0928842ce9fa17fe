"""A plain behaviour-cloning baseline: what a small network reaches on the low-dimensional state alone.

It reads proprioception, object points, the task and the robot of one moment and answers a chunk of actions. A policy
that sees the same senses and more has no excuse to succeed less often.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from worldmodel.contracts import SCHEMA_VERSION, ClipSpec
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ContractError, DataError

WEIGHTS, DESCRIPTION = "bc_mlp.safetensors", "bc_mlp.json"


class BCMLP(nn.Module):
    """Three hidden layers from the standardised state of one moment to a chunk of actions.

    Args:
        instructions: of the tasks it knows; their order is that of the one-hot input.
        robots: that it knows, with the width of the state of each; their order is that of the input that tells them
            apart, where there are several.
        points: most tracked points of any task (K).
        proprio: width of the state vector (P), the widest of any robot.
        action: action dimensions (D).
        chunk: actions per chunk (A).
        hidden: width of the hidden layers; 512 makes 0.57 M parameters.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        instructions: tuple[str, ...],
        *,
        robots: Mapping[str, int],
        points: int,
        proprio: int,
        action: int,
        chunk: int,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        self.instructions, self.robots = instructions, dict(robots)
        self.sizes = {"points": points, "proprio": proprio, "action": action, "chunk": chunk, "hidden": hidden}
        state = proprio + 3 * points
        self.register_buffer("mean", torch.zeros(state))
        self.register_buffer("std", torch.ones(state))
        layers: list[nn.Module] = []
        width = state + points + len(instructions) + (len(robots) if len(robots) > 1 else 0)
        for _ in range(3):
            layers += [nn.Linear(width, hidden), nn.GELU()]
            width = hidden
        self.net = nn.Sequential(*layers, nn.Linear(width, chunk * action))

    def forward(self, state: Tensor, present: Tensor, task: Tensor, robot: Tensor) -> Tensor:
        """Actions (B, A, D).

        Args:
            state: (B, P + 3 K) proprioception, padded with zeros, then points in the base frame.
            present: (B, K) which points the task has.
            task: (B,) index into `instructions`.
            robot: (B, R) share of each of `robots`; read only where there are several.
        """
        known = torch.cat([torch.ones_like(state[:, : self.sizes["proprio"]]), present.repeat_interleave(3, 1)], 1)
        state = (state - self.mean) / self.std * known
        one_hot = nn.functional.one_hot(task, len(self.instructions))
        told = [robot.to(state.dtype)] if len(self.robots) > 1 else []
        answer = self.net(torch.cat([state, present.to(state.dtype), one_hot.to(state.dtype), *told], 1))
        return answer.unflatten(1, (self.sizes["chunk"], self.sizes["action"]))

    def save(self, folder: str | Path) -> None:
        """Writes weights (safetensors) and description (JSON) into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS)
        text = {
            "schema_version": SCHEMA_VERSION,
            "instructions": list(self.instructions),
            "robots": self.robots,
            "sizes": self.sizes,
        }
        (folder / DESCRIPTION).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def load_bc_mlp(folder: str | Path) -> BCMLP:
    """Reads what `BCMLP.save` wrote.

    Raises:
        DataError: a file is missing, damaged or of another schema version.
    """
    folder = Path(folder)
    try:
        text = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if text.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{folder / DESCRIPTION}: schema_version {text.get('schema_version')!r}, expected {SCHEMA_VERSION}"
            )
        model = BCMLP(tuple(text["instructions"]), robots=text["robots"], **text["sizes"])
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"{folder}: no readable behaviour-cloning baseline: {error}") from error
    return model.eval()


class Samples(NamedTuple):
    """Every step of the demonstrations."""

    state: Tensor  # (N, P + 3 K)
    present: Tensor  # (N, K) bool
    task: Tensor  # (N,) int64
    robot: Tensor  # (N, R) bool
    actions: Tensor  # (N, A, D)
    valid: Tensor  # (N, A) bool, False past the end of the episode


def train_bc_mlp(
    reader: ShardReader,
    spec: ClipSpec,
    *,
    steps: int = 4000,
    seconds: float | None = None,
    batch: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> BCMLP:
    """Trains the baseline on the successful demonstrations of the training split.

    Args:
        reader: the dataset.
        spec: sizes of points and chunk.
        steps: optimiser steps; the learning rate falls to zero along a cosine over them.
        seconds: where given, training ends after that long instead, with the cosine over the time.
        batch: samples per step.
        learning_rate: at the start.
        seed: of initialisation and batches.
        progress: shows a bar.

    Raises:
        DataError: no usable demonstrations; they lack actions, points or proprioception, have more points than the
            spec, or robots with actions of several widths.
    """
    samples, instructions, robots = gather_samples(reader, spec)
    torch.manual_seed(seed)
    model = BCMLP(
        instructions,
        robots=robots,
        points=spec.points,
        proprio=samples.state.shape[1] - 3 * spec.points,
        action=samples.actions.shape[-1],
        chunk=spec.chunk,
    )
    known = torch.ones_like(samples.state, dtype=torch.bool)
    known[:, -3 * spec.points :] = samples.present.repeat_interleave(3, 1)
    mean = torch.where(known, samples.state, 0).sum(0) / known.sum(0).clamp(min=1)
    spread = torch.where(known, samples.state - mean, 0).square().sum(0) / known.sum(0).clamp(min=1)
    model.mean.copy_(mean)
    # A coordinate that hardly moves would explode when divided by its own spread.
    model.std.copy_(spread.sqrt().clamp(min=1e-2))
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    started, step = time.monotonic(), 0
    with tqdm(total=steps, desc="behaviour-cloning baseline", unit="step", disable=not progress) as bar:
        while (done := _share_done(step, steps, started, seconds)) < 1:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + np.cos(np.pi * done))
            rows = torch.randint(len(samples.state), (batch,), generator=generator)
            *told, actions, valid = (tensor[rows] for tensor in samples)
            error = (model(*told) - actions).abs().mean(-1)
            loss = (error * valid).sum() / valid.sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            step += 1
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            bar.update()
    return model.eval()


def gather_samples(reader: ShardReader, spec: ClipSpec) -> tuple[Samples, tuple[str, ...], dict[str, int]]:
    """All steps of the successful training demonstrations, the instructions in one-hot order, and the robots in theirs
    with the width of the state of each.

    Raises:
        DataError: see `train_bc_mlp`.
    """
    numbers = [i for i, entry in enumerate(reader.entries) if entry.split == "train" and entry.success]
    # Variants are the same states and actions once more.
    numbers = [i for i in numbers if reader.entries[i].variant_of is None]
    if not numbers:
        raise DataError(f"{reader.root}: no successful episodes in the split 'train'")
    instructions: dict[str, int] = {}
    episodes = [reader.read(number, images=False) for number in numbers]
    robots = {e.meta["embodiment"]: e.proprio.shape[1] for e in episodes if e.proprio is not None}
    if len(widths := {e.action.shape[1] for e in episodes if e.action is not None}) > 1:
        raise DataError(
            f"{reader.root}: actions of {sorted(widths)} dimensions; the behaviour-cloning baseline answers one width "
            "for all robots: leave it out of `policies`"
        )
    parts: list[tuple[np.ndarray, ...]] = []
    for number, episode in zip(numbers, episodes, strict=True):
        if episode.points is None or episode.proprio is None or episode.action is None:
            raise DataError(f"{reader.root}: {reader.entries[number].key}: needs points, proprioception and actions")
        length, count = episode.points.shape[:2]
        if count > spec.points:
            raise DataError(
                f"{reader.root}: {reader.entries[number].key}: {count} points, expected at most {spec.points}"
            )
        wide = max(robots.values())
        state = np.zeros((length, wide + 3 * spec.points), np.float32)
        state[:, : episode.proprio.shape[1]] = episode.proprio
        state[:, wide:][:, : 3 * count] = episode.points.reshape(length, -1)
        present = np.broadcast_to(np.arange(spec.points) < count, (length, spec.points))
        task = np.full(length, instructions.setdefault(episode.meta["instruction"], len(instructions)), np.int64)
        robot = np.tile([name == episode.meta["embodiment"] for name in robots], (length, 1))
        ahead = np.arange(length)[:, None] + np.arange(spec.chunk)
        parts.append((state, present, task, robot, episode.action[np.minimum(ahead, length - 1)], ahead < length))
    columns = [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]
    return Samples(*columns), tuple(instructions), robots


class BCMLPPolicy:
    """The baseline behind `contracts.Policy`: it needs `points`, `proprio` and, once per episode, `instruction`.

    Args:
        model: what drives.
        robot: which of those that it knows; one that it does not know is in equal shares all with as wide a state.
    """

    def __init__(self, model: BCMLP, robot: str | None = None) -> None:
        self.model, self.robot = model, robot
        self.reset()

    def reset(self) -> None:
        """Forgets the observation and the instruction."""
        self._observation: dict[str, Any] = {}

    def observe(self, observation: dict[str, Any]) -> None:
        """Keeps the newest values."""
        self._observation |= {
            key: observation[key] for key in ("points", "proprio", "instruction") if key in observation
        }

    def act(self) -> np.ndarray:
        """Actions (A, D) in the robot's units.

        Raises:
            ContractError: something is not observed yet, or the instruction is none it was trained on.
        """
        missing = [key for key in ("points", "proprio", "instruction") if key not in self._observation]
        if missing:
            raise ContractError(f"behaviour-cloning baseline: {', '.join(missing)} not observed yet")
        instruction = self._observation["instruction"]
        if instruction not in self.model.instructions:
            raise ContractError(
                f"instruction: {instruction!r} was not in training, expected one of {list(self.model.instructions)}"
            )
        points, proprio = (np.asarray(self._observation[key], np.float32) for key in ("points", "proprio"))
        size = self.model.sizes["points"]
        if points.ndim != 2 or points.shape[1] != 3 or len(points) > size:
            raise ContractError(f"points: got {list(points.shape)}, expected [at most {size}, 3]")
        wide, robots = self.model.sizes["proprio"], self.model.robots
        able = {self.robot: robots[self.robot]} if self.robot in robots else robots
        alike = [able.get(name) == proprio.size for name in robots]
        if proprio.ndim != 1 or not any(alike):
            raise ContractError(f"proprio: got {list(proprio.shape)}, expected {[[width] for width in able.values()]}")
        state = np.zeros(wide + 3 * size, np.float32)
        state[: len(proprio)], state[wide : wide + points.size] = proprio, points.ravel()
        shares = torch.tensor([alike]) / sum(alike)
        present = (torch.arange(size) < len(points))[None]
        task = torch.tensor([self.model.instructions.index(instruction)])
        with torch.inference_mode():
            return self.model(torch.from_numpy(state)[None], present, task, shares)[0].numpy()


@dataclass(frozen=True)
class BCMLPFactory:
    """Builds the baseline's policy in a worker of `closed_loop.run_closed_loop`."""

    folder: Path
    needs: ClassVar = ("points", "proprio", "text")
    """Senses without which it cannot act."""

    def __call__(self, robot: str | None = None) -> BCMLPPolicy:
        """The policy read from `folder`, for a robot."""
        return BCMLPPolicy(load_bc_mlp(self.folder), robot)


def _share_done(step: int, steps: int, started: float, seconds: float | None) -> float:
    """Part of the training that is behind us."""
    return step / steps if seconds is None else (time.monotonic() - started) / seconds
