"""Closed loop of several policies under one protocol, with results kept so that only what changed runs again."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.baselines import train_bc_mlp
from worldmodel.closed_loop import PolicyFactory, Rollout, SceneFactory, run_closed_loop
from worldmodel.contracts import ClipSpec
from worldmodel.data.index import INDEX
from worldmodel.data.shard_writer import write_json
from worldmodel.data.shards import ShardReader
from worldmodel.ensemble import averaged
from worldmodel.errors import ConfigError
from worldmodel.schedule import RULES
from worldmodel.stamp import package_versions
from worldmodel.viz import encode_mp4, enlarged

WEIGHTS = (".onnx", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One policy of a comparison: its name, what it observes in words, and how a worker builds it."""

    policy: str
    observes: str
    factory: PolicyFactory
    weights: Path | None
    """Folder with its weights, None for a scripted one; their content decides whether a kept result still holds."""
    images: bool = True
    """False for a policy that reads no pictures: none are rendered for it."""
    realtime: bool = False
    """Whether it is told what is done while it thinks; see `closed_loop.Rollout`."""
    reactive: bool = False
    """Whether its actions follow what is measured when they are executed; see `closed_loop.Rollout`."""
    trials: int | None = None
    """At most so many per task and robot, for a control that need not be known as closely as the rest."""
    replan: int | None = None
    """Control steps between two calls, where not the protocol's: a scripted expert answers one action at a time, and
    at once, whatever the protocol says of delay and of averages."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How every policy of a comparison is tried."""

    tasks: tuple[str, ...]
    robots: tuple[str | None, ...] = (None,)
    trials: int = 20
    seed: int = 0
    replan: int = 4
    ensemble: float | None = None
    """Weighs chunks that overlap by exp(-ensemble age) and executes their mean; None executes the newest alone."""
    delay: int = 0
    max_steps: int | None = None
    image_every: int = 4
    record: int = 1
    """Trials per task and robot whose pictures are kept for the report."""


def compare(
    contenders: Sequence[Contender],
    protocol: Protocol,
    folder: Path,
    *,
    make_scene: SceneFactory,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Try each policy, or read its kept result from `folder`; one dict of plain values per policy.

    Each holds what `ClosedLoopResult.to_json` gives, with `policy`, `observes`, `reused` and `rollouts` (per row of
    `tasks`, by its `trials.row_name`, a list of `success` and `video`, a data URI). Raises ConfigError if two policies
    have one name or weights are absent.
    """
    names = [contender.policy for contender in contenders]
    if len(set(names)) < len(names):
        raise ConfigError(f"closed loop: policy names must differ, got {names}")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for contender in contenders:
        own = own_protocol(contender, protocol)
        path = folder / f"{result_key(contender, own)}.json"
        reused = path.is_file()
        if not reused:
            print(f"{contender.policy}:", flush=True)
            write_json(path, _try(contender, own, make_scene, workers))
        results.append(
            json.loads(path.read_text(encoding="utf-8"))
            | {"policy": contender.policy, "observes": contender.observes, "reused": reused}
        )
    return results


def own_protocol(contender: Contender, protocol: Protocol) -> Protocol:
    """The protocol as one policy is tried by it; raises ConfigError if its settings do not fit together."""
    own = replace(
        protocol,
        trials=min(protocol.trials, contender.trials or protocol.trials),
        replan=contender.replan or protocol.replan,
        delay=0 if contender.replan else protocol.delay,
        ensemble=None if contender.replan or contender.weights is None else protocol.ensemble,
        image_every=protocol.image_every if contender.images else 0,
    )
    # Refuses what does not fit together before anything runs.
    Rollout(replan=own.replan, max_steps=own.max_steps, image_every=own.image_every, delay=own.delay)
    _averaged(contender, own)
    return own


def _averaged(contender: Contender, own: Protocol) -> PolicyFactory:
    return averaged(
        contender.factory,
        own.ensemble,
        realtime=contender.realtime,
        reactive=contender.reactive,
        delay=own.delay,
    )


def result_key(contender: Contender, protocol: Protocol) -> str:
    """Digest of the weights, the policy's settings, the protocol, `RULES` and the simulator's version."""
    files = sorted(path for path in contender.weights.glob("*") if path.suffix in WEIGHTS) if contender.weights else []
    if contender.weights and not files:
        raise ConfigError(f"{contender.policy}: no weights ({', '.join(WEIGHTS)}) in {contender.weights}")
    how = (contender.factory, contender.images, contender.realtime, contender.reactive, protocol, RULES)
    digest = sha256(repr((*how, sorted(package_versions().items()))).encode())
    for path in files:
        digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]


def _try(contender: Contender, protocol: Protocol, make_scene: SceneFactory, workers: int | None) -> dict[str, Any]:
    result = run_closed_loop(
        _averaged(contender, protocol),
        protocol.tasks,
        robots=protocol.robots,
        trials=protocol.trials,
        seed=protocol.seed,
        replan=protocol.replan,
        delay=protocol.delay,
        max_steps=protocol.max_steps,
        realtime=contender.realtime,
        reactive=contender.reactive,
        image_every=protocol.image_every,
        record=protocol.record,
        workers=workers,
        make_scene=make_scene,
    )
    outcomes = {task.name: task.outcomes for task in result.tasks}
    rollouts = {
        name: [
            {"success": outcomes[name][trial], "video": _video(frames)}
            for trial, frames in enumerate(recorded)
            if frames
        ]
        for name, recorded in result.frames.items()
    }
    return result.to_json() | {"ensemble": protocol.ensemble, "rollouts": rollouts}


def _video(frames: list[np.ndarray]) -> str:
    """A data URI of the recorded pictures, five a second: one per replanning step, so at about real speed."""
    data = encode_mp4(enlarged(np.stack(frames).transpose(0, 3, 1, 2)))
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


def train_baseline(reader: ShardReader, spec: ClipSpec, folder: Path, *, steps: int, seed: int) -> None:
    """Train the behaviour-cloning baseline into `folder`, unless it holds one of the same data and settings."""
    data = sha256((reader.root / INDEX).read_bytes()).hexdigest()
    wanted = {"data": data, "steps": steps, "seed": seed, "points": spec.points, "chunk": spec.chunk}
    note = folder / "trained_on.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == wanted:
        return
    train_bc_mlp(reader, spec, steps=steps, seed=seed).save(folder)
    write_json(note, wanted)
