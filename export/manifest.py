"""manifest.json: all that a robot needs to know to feed an artefact and to trust it."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any

from export.envelope import LIMITS, Envelope
from export.runtime import MANIFEST_SCHEMA, SENSES
from export.runtime.latency import latency_contract
from export.tensors import TensorSpec
from export.wrappers import ActionModel, ActionPath, Path
from worldmodel.checkpoint import instructions_read
from worldmodel.errors import ExportError

FROZEN_AFTER = 5
"""Pictures of the same bytes after which a controller takes a camera for frozen."""


@dataclass(frozen=True, kw_only=True)
class RobotNames:
    """What the dimensions of one embodiment are called and measured in."""

    action_names: tuple[str, ...]
    proprio_names: tuple[str, ...]
    action_units: tuple[str, ...] = ()
    proprio_units: tuple[str, ...] = ()
    sensor_frames: dict[str, str] = field(default_factory=dict)


def build_manifest(
    model: ActionModel,
    folder: FilePath,
    *,
    paths: Sequence[Path],
    graphs: Sequence[Mapping[str, Any]],
    optional: Sequence[str],
    trust: Mapping[str, Any],
    envelope: Envelope,
    git: dict[str, Any],
    robots: Mapping[str, RobotNames],
) -> dict[str, Any]:
    """The manifest of the files that lie in `folder`.

    Args:
        model: the exported model.
        folder: where the finished files lie; each is listed with its size and sha256.
        paths: the exported paths.
        graphs: one entry for each graph: path, format, precision, file, batch, whether it is accepted and written,
            parity with the model or the check of its precision.
        optional: senses that a robot may lack, of `runtime.SENSES`; the runtime masks them instead of refusing.
        trust: report of the calibration.
        envelope: the limits inside the graphs.
        git: from `git_state`.
        robots: names and units of every embodiment of the model.

    Raises:
        ExportError: `optional` names something that is no sense; or an embodiment has no statistics, no names, or
            names that do not fit its statistics.
    """
    unknown = sorted(set(optional) - set(SENSES))
    if unknown:
        raise ExportError(f"optional: unknown senses {unknown}, expected some of {list(SENSES)}")
    spec = model.spec
    return {
        "schema_version": MANIFEST_SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "paths": {path.name: path_entry(path) for path in paths},
        "graphs": [dict(graph) for graph in graphs if graph["written"]],
        "refused": [dict(graph) for graph in graphs if not graph["written"]],
        "spec": asdict(spec),
        "control": {
            "fps": spec.fps,
            "horizon": spec.chunk,
            "history": spec.history,
            "stride": spec.stride,
            "history_steps": [-spec.stride * back for back in reversed(range(spec.history))],
            "before_start": "the first frame of the episode repeats",
            # A picture is needed once a stride, every other sense at each step; one may come late.
            "stale_after": {"images": (spec.stride + 1) / spec.fps, "sensors": 2 / spec.fps},
            "frozen_after": FROZEN_AFTER,
        },
        "latency": latency_contract(spec.fps, spec.stride, [path.name for path in paths]),
        "embodiments": [
            _embodiment(model, robots, index) | {"envelope": envelope.sources[name]}
            for index, name in enumerate(spec.embodiments)
        ],
        "limits": list(LIMITS),
        "trust": dict(trust),
        "optional": list(optional),
        "instruction": {
            "encoding": "UTF-8 byte + 1, padded with 0",
            "length": spec.text,
            # Others count as absent; null: all are read.
            "known": instructions_read(model.metadata),
        },
        "flow_steps": model.action_steps,
        "statistics": model.statistics,
        "statistics_hash": model.statistics_hash,
        "checkpoint": {key: model.metadata.get(key) for key in ("schema_version", "training")},
        "git": git,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "numpy")},
        "files": {
            str(path.relative_to(folder)): file_entry(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / "manifest.json"
        },
    }


def path_entry(path: Path) -> dict[str, Any]:
    """Inputs and outputs of one path; `cache` pairs those that go from one call to the next."""
    cache = [row.name for row in path.caches] if isinstance(path, ActionPath) else []
    pairs = {name: f"next_{name}" for name in cache}
    return {
        "description": (type(path).__doc__ or "").strip().splitlines()[0],
        "inputs": [_tensor(row) for row in path.inputs],
        "outputs": [_tensor(row) for row in path.outputs],
        "cache": {"before_first": "zeros", "next": pairs} if pairs else None,
    }


def _tensor(row: TensorSpec) -> dict[str, Any]:
    """One input or output."""
    return {
        "name": row.name,
        "shape": ["batch", *row.shape],
        "dtype": str(row.dtype).removeprefix("torch."),
        "unit": row.unit,
        "frame": row.frame,
        "description": row.description,
    }


def file_entry(path: FilePath) -> dict[str, Any]:
    """Size in bytes and sha256 of a file."""
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write_manifest(folder: FilePath, manifest: dict[str, Any]) -> None:
    """Writes manifest.json; refuses values that are no JSON, NaN among them."""
    try:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ExportError(f"manifest.json: {error}") from error
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def git_state(folder: FilePath) -> dict[str, Any]:
    """Revision of the sources and whether they were changed since; None for both outside a git checkout."""
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"])
    try:
        revision, changes = (
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}
    return {"revision": revision, "dirty": bool(changes)}


def _embodiment(model: ActionModel, robots: Mapping[str, RobotNames], index: int) -> dict[str, Any]:
    """Index, names and units of one robot."""
    name = model.spec.embodiments[index]
    for what, known in (("statistics", model.statistics), ("names of actions and proprioception", robots)):
        if name not in known:
            raise ExportError(f"embodiment {name!r}: no {what}; there are those of {sorted(known)}")
    robot, statistics = robots[name], model.statistics[name]
    for what, names in (("proprio", robot.proprio_names), ("action", robot.action_names)):
        if len(names) != len(statistics[what]["mean"]):
            raise ExportError(
                f"embodiment {name!r}: {len(names)} {what} names {list(names)}, but its statistics have "
                f"{len(statistics[what]['mean'])} dimensions"
            )
    return {"name": name, "index": index, "proprio_dims": len(robot.proprio_names), **asdict(robot)}
