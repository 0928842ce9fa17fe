"""Sessions of the policy server over one loaded artefact, and what clients are told of it."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from export.runtime import OnnxPolicy


class OnnxSession:
    """An `OnnxPolicy` as a session."""

    def __init__(self, policy: OnnxPolicy) -> None:
        self._policy = policy

    def reset(self) -> None:
        """See `OnnxPolicy.reset`."""
        self._policy.reset()

    def observe(self, observation: dict[str, Any]) -> None:
        """See `OnnxPolicy.observe`."""
        # What overflows in float32 is refused as non-finite; the warning of the cast would say no more.
        with np.errstate(over="ignore"):
            self._policy.observe(observation)

    def act(self) -> dict[str, Any]:
        """`actions` (H, D) float32 in the units of the metadata."""
        return {"actions": self._policy.act()}


class OnnxSource:
    """One network, loaded once, and a policy with its own history and noise for every session.

    Args:
        folder: the artefact folder.
        instruction: what to do, unless observations bring it.
        seed: of the noise; every episode starts with the same.
        threads: CPU threads of one inference.
        allow_missing: cameras and senses that may be absent, beside those that the manifest lets be.
        mask: senses to hide although they are observed.
        embodiment: name of the robot; needed only where the artefact knows several.

    Raises:
        RuntimeContractError: see `OnnxPolicy`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        instruction: str | None = None,
        seed: int = 0,
        threads: int = 1,
        allow_missing: Collection[str] = (),
        mask: Iterable[str] = (),
        embodiment: str | None = None,
    ) -> None:
        mask = tuple(mask)
        self._policy = OnnxPolicy(
            folder,
            instruction=instruction,
            seed=seed,
            threads=threads,
            allow_missing=allow_missing,
            mask=mask,
            embodiment=embodiment,
        )
        self.observation_bytes: int = observation_bytes(self._policy.shapes)
        optional = {*self._policy.manifest["optional"], *allow_missing, *mask}
        optional |= {"wrench", "taxels"} if "touch" in mask else set()
        self.metadata: dict[str, Any] = _metadata(self._policy, optional, instruction)

    def new(self) -> OnnxSession:
        """A session at the start of an episode."""
        return OnnxSession(self._policy.fork())


def observation_bytes(shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """Bytes of an observation that has every array, its floats in double precision."""
    sizes = {"float32": 8}
    return sum(sizes.get(dtype, np.dtype(dtype).itemsize) * int(np.prod(shape)) for shape, dtype in shapes.values())


def _metadata(policy: OnnxPolicy, optional: set[str], instruction: str | None) -> dict[str, Any]:
    """What clients are told, msgpack values only."""
    manifest = policy.manifest
    robot = next(row for row in manifest["embodiments"] if row["name"] == policy.embodiment)
    inputs = {entry["name"]: entry for entry in manifest["paths"]["policy"]["inputs"]}
    observations: dict[str, Any] = {}
    for name, (shape, dtype) in policy.shapes.items():
        kind, _, camera = name.partition(".")
        sense = {"intrinsics": "camera", "camera_to_base": "camera", "visible": "points"}.get(kind, kind)
        observations[name] = {
            "shape": list(shape),
            "dtype": dtype,
            "unit": inputs[kind]["unit"],
            "frame": inputs[kind]["frame"],
            "required": not (optional & {sense, camera} or kind.startswith("has_")),
        }
    observations["proprio"] |= {"names": robot["proprio_names"], "units": robot["proprio_units"]}
    return {
        "policy": "onnx",
        "embodiment": policy.embodiment,
        "observations": observations,
        "actions": {
            "shape": [policy.horizon, len(policy.action_names)],
            "dtype": "float32",
            "names": list(policy.action_names),
            "units": robot["action_units"],
        },
        "cameras": list(policy.cameras),
        "sensors": list(manifest["spec"]["sensors"]),
        "sensor_frames": robot["sensor_frames"],
        "rate_hz": policy.fps,
        "horizon": policy.horizon,
        "history": policy.history,
        "stride": policy.stride,
        "instruction": {
            "name": "instruction",
            "max_bytes": manifest["instruction"]["length"],
            "required": instruction is None and "text" not in optional,
            "default": instruction,
        },
    }
