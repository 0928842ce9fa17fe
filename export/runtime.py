"""Runs an exported policy on a robot: numpy, onnxruntime and the standard library, nothing else of this repository.

A copy of this file lies in every artefact folder, so that the folder alone is enough:

    policy = OnnxPolicy("artefact", instruction="Press the red button.")
    policy.reset()
    while running:
        policy.observe(observation)          # every control step; see `OnnxPolicy.observe` for the names
        if step % policy.stride == 0:
            chunk = policy.act()             # (A, D) actions in the robot's own units, chunk[0] is executed now
        execute(chunk[step % policy.stride])
"""

import copy
import difflib
import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

MANIFEST_SCHEMA = 1
"""Version of manifest.json that this file reads."""

SENSES = ("rgb", "camera", "points", "wrench", "taxels", "proprio", "text")
"""What a presence mask can hide. `touch` is accepted as a short name for wrench and taxels."""

ROTATION_TOLERANCE = 1e-3


class RuntimeContractError(ValueError):
    """An artefact or an observation is not what the manifest says."""


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads manifest.json and checks its version and the size and sha256 of every file it lists.

    Raises:
        RuntimeContractError: no manifest, another schema version, or a file that is missing or altered.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise RuntimeContractError(f"{folder}: no manifest.json; expected a folder written by `python -m export build`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeContractError(f"{path}: not valid JSON ({error})") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != MANIFEST_SCHEMA:
        raise RuntimeContractError(f"{path}: schema_version is {version!r}, this runtime reads {MANIFEST_SCHEMA}")
    needed = {"control", "embodiments", "files", "inputs", "onnx", "optional", "spec"}
    if lacking := sorted(needed - set(manifest)):
        raise RuntimeContractError(f"{path}: has no {lacking}")
    if manifest["onnx"] not in manifest["files"]:
        raise RuntimeContractError(f"{path}: onnx is {manifest['onnx']!r}, expected one of {sorted(manifest['files'])}")
    for name, entry in manifest["files"].items():
        if Path(name).name != name:
            raise RuntimeContractError(f"{path}: file {name!r} does not lie in the artefact folder")
        if not (folder / name).is_file():
            raise RuntimeContractError(f"{folder / name}: missing, but listed in manifest.json")
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if len(content) != entry["bytes"] or digest != entry["sha256"]:
            raise RuntimeContractError(
                f"{folder / name}: altered since export: {len(content)} bytes, sha256 {digest[:12]}...; "
                f"manifest.json says {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}..."
            )
    return manifest


def encode_instruction(text: str, length: int) -> np.ndarray:
    """UTF-8 bytes plus one, padded with 0 to `length`: (L,) int64.

    Raises:
        RuntimeContractError: the text is longer than the model reads.
    """
    if not isinstance(text, str):
        raise RuntimeContractError(f"instruction: got {type(text).__name__}, expected str")
    encoded = text.encode("utf-8")
    if len(encoded) > length:
        raise RuntimeContractError(f"instruction: {len(encoded)} bytes, expected at most {length}: {text!r}")
    row = np.zeros(length, np.int64)
    row[: len(encoded)] = np.frombuffer(encoded, np.uint8).astype(np.int64) + 1
    return row


class OnnxPolicy:
    """The exported policy as an object with `reset`, `observe` and `act`.

    Args:
        folder: the artefact folder.
        instruction: what to do, unless each episode's first observation brings it.
        seed: of the noise that the flow starts from; every `reset` starts the same noise again.
        threads: CPU threads of onnxruntime.
        allow_missing: cameras that may be absent (`front`), or senses that the manifest does not list as optional.
        mask: senses to hide although they are observed, of `SENSES` or `touch`.
        embodiment: name of the robot; needed only where the artefact knows several.

    Raises:
        RuntimeContractError: see `load_manifest`; or an argument names something the artefact does not have.
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
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        spec = self.manifest["spec"]
        self.cameras: list[str] = list(spec["cameras"])
        self.history: int = spec["history"]
        self.stride: int = spec["stride"]
        self.horizon: int = spec["chunk"]
        self.fps: float = spec["fps"]
        self._padded_action: int = spec["action"]
        self._text_length: int = spec["text"]
        robots = {entry["name"]: entry for entry in self.manifest["embodiments"]}
        if embodiment is None and len(robots) == 1:
            embodiment = next(iter(robots))
        if embodiment is None or embodiment not in robots:
            raise RuntimeContractError(f"embodiment: got {embodiment!r}, expected one of {sorted(robots)}")
        self._robot = robots[embodiment]
        self.embodiment: str = embodiment
        self.action_names: list[str] = list(self._robot["action_names"])
        self._shapes = _observation_shapes(spec, self._robot["proprio_dims"])
        self._instruction = instruction
        self._allowed = _known(allow_missing, [*self.cameras, *SENSES], "allow_missing")
        chosen = _known(mask, [*SENSES, "touch"], "mask")
        self._masked = (chosen - {"touch"}) | ({"wrench", "taxels"} if "touch" in chosen else set())
        self._optional = set(self.manifest["optional"]) | self._allowed | self._masked
        self._seed = seed
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        path = self.folder / self.manifest["onnx"]
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.reset()

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array that `observe` takes, by name."""
        return dict(self._shapes)

    def fork(self) -> "OnnxPolicy":
        """A policy with an episode of its own over the same loaded network; both may act at the same time."""
        other = copy.copy(self)
        other.reset()
        return other

    def reset(self) -> None:
        """Starts an episode: forgets what was observed and starts the noise again from the seed."""
        self._ring: deque[dict[str, np.ndarray]] = deque(maxlen=self.history * self.stride)
        self._text = self._instruction
        self._random = np.random.default_rng(self._seed)

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes the observation of one control step. Call it once per step, 1/fps seconds apart.

        Names: `rgb.<camera>` (h, w, 3) uint8, `intrinsics.<camera>` (3, 3) pixels, `camera_to_base.<camera>` (4, 4)
        metres with OpenCV axes, `points` (k, 3) metres in the base frame and `visible` (k,) bool with k at most the
        manifest's, `wrench` (S, 6) N and N·m, `taxels` (S, C, rows, columns) N, `proprio` (P,), `instruction` str;
        `has_points` (k,), `has_wrench` (S,) and `has_taxels` (S,) bool where only some points or sensors are there.
        Images and poses may be missing on steps that are not a multiple of `stride` away from a call of `act`.

        Raises:
            RuntimeContractError: an unknown name, or a value of the wrong shape, type or range.
        """
        step: dict[str, np.ndarray] = {}
        text = self._text
        for key, value in observation.items():
            if key == "instruction":
                encode_instruction(value, self._text_length)
                text = value
                continue
            if key not in self._shapes:
                near = difflib.get_close_matches(key, self._shapes, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise RuntimeContractError(f"{key}: unknown; {hint}expected names {sorted(self._shapes)}")
            step[key] = _checked(key, value, *self._shapes[key])
        if ("points" in step) != ("visible" in step) or len(step.get("points", ())) != len(step.get("visible", ())):
            raise RuntimeContractError("points, visible: expected both, with one flag per point")
        self._text = text
        self._ring.append(step)

    def inputs(self) -> dict[str, np.ndarray]:
        """The graph's inputs for now, without the noise; batch 1.

        Raises:
            RuntimeContractError: nothing observed yet, or a camera or sense is missing that must not be.
        """
        if not self._ring:
            raise RuntimeContractError("act: nothing observed yet; call observe first")
        now = len(self._ring) - 1
        # Before the start of the episode the first frame repeats, as in the training clips.
        frames = [max(0, now - back * self.stride) for back in reversed(range(self.history))]
        series = [[max(0, frame - back) for back in reversed(range(self.stride))] for frame in frames]
        feed = {
            entry["name"]: np.zeros([1, *entry["shape"][1:]], entry["dtype"])
            for entry in self.manifest["inputs"]
            if entry["name"] != "noise"
        }
        # Hidden views still pass through pose arithmetic on their way to the mask: identities keep it finite.
        feed["intrinsics"][...] = np.eye(3, dtype=np.float32)
        feed["camera_to_base"][...] = np.eye(4, dtype=np.float32)
        feed["embodiment"][...] = self._robot["index"]
        for view, camera in enumerate(self.cameras):
            images = self._gather(f"rgb.{camera}", frames, "rgb", camera)
            if images is not None:
                feed["rgb"][0, :, view] = images.transpose(0, 3, 1, 2)
                feed["has_rgb"][0, view] = True
            # Where a camera may be absent, so may its pose.
            intrinsics = self._gather(f"intrinsics.{camera}", frames, "camera", camera)
            poses = self._gather(f"camera_to_base.{camera}", frames, "camera", camera)
            if intrinsics is not None and poses is not None:
                feed["intrinsics"][0, :, view], feed["camera_to_base"][0, :, view] = intrinsics, poses
                feed["has_camera"][0, view] = True
        points, visible = self._gather("points", frames, "points"), self._gather("visible", frames, "points")
        if points is not None and visible is not None:
            count = points.shape[1]
            feed["points"][0, :, :count], feed["visible"][0, :, :count] = points, visible
            feed["has_points"][0, :count] = self._flags("has_points", frames, count)
        wrench = self._gather("wrench", [index for row in series for index in row], "wrench")
        if wrench is not None:
            feed["wrench"][0] = wrench.reshape(feed["wrench"].shape[1:])
            feed["has_wrench"][...] = self._flags("has_wrench", frames, wrench.shape[1])
        taxels = self._gather("taxels", frames, "taxels")
        if taxels is not None:
            feed["taxels"][0] = taxels
            feed["has_taxels"][...] = self._flags("has_taxels", frames, taxels.shape[1])
        proprio = self._gather("proprio", frames, "proprio")
        if proprio is not None:
            feed["proprio"][0, :, : proprio.shape[1]] = proprio
            feed["has_proprio"][...] = True
        if self._text is not None and "text" not in self._masked:
            feed["text"][0] = encode_instruction(self._text, self._text_length)
            feed["has_text"][...] = True
        elif "text" not in self._optional:
            raise RuntimeContractError("instruction: missing; give it to OnnxPolicy(instruction=...) or to observe")
        return feed

    def act(self, noise: np.ndarray | None = None) -> np.ndarray:
        """The next chunk: (A, D) float32 in the units of the manifest; row 0 is the action to execute now.

        Args:
            noise: (A, padded D) standard normal values to start the flow from; drawn from the seed by default.

        Raises:
            RuntimeContractError: see `inputs`; the noise has another shape; or the model answered non-finite values.
        """
        feed = self.inputs()
        shape = (self.horizon, self._padded_action)
        if noise is None:
            noise = self._random.standard_normal(shape, dtype=np.float32)
        feed["noise"] = _checked("noise", noise, shape, "float32")[None]
        (actions,) = self._session.run(["actions"], feed)
        chunk = np.asarray(actions)[0, :, : len(self.action_names)]
        if not np.isfinite(chunk).all():
            raise RuntimeContractError("actions: the model answered non-finite values; do not execute them")
        return chunk

    def _flags(self, key: str, frames: list[int], count: int) -> np.ndarray:
        """(count,) bool: which points or sensors are there, all of them unless the observations say otherwise."""
        flags = [self._ring[index][key] for index in frames if key in self._ring[index]]
        if any(len(flag) != count for flag in flags):
            raise RuntimeContractError(f"{key}: got {[len(flag) for flag in flags]} flags, expected {count}")
        return np.all(np.stack(flags), axis=0) if flags else np.ones(count, bool)

    def _gather(self, key: str, steps: list[int], sense: str, camera: str | None = None) -> np.ndarray | None:
        """Stacks `key` over ring positions; None where the sense is hidden or absent and may be."""
        if sense in self._masked:
            return None
        missing = [len(self._ring) - 1 - index for index in steps if key not in self._ring[index]]
        if not missing:
            rows = [self._ring[index][key] for index in steps]
            if len({row.shape for row in rows}) > 1:
                raise RuntimeContractError(f"{key}: its length changed within the history; expected one per episode")
            return np.stack(rows)
        # A sense counts as present only if the whole history has it: the masks know no time.
        if sense in self._optional or camera in self._allowed:
            return None
        shape, dtype = self._shapes[key]
        where = "now" if 0 in missing else f"{missing[-1]} steps ago (needed every {self.stride} steps)"
        raise RuntimeContractError(
            f"{key}: missing {where}, expected {dtype} {list(shape)}; a robot without it says so with "
            f"OnnxPolicy(allow_missing={{{camera or sense!r}}})"
        )


def _observation_shapes(spec: dict[str, Any], proprio: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every observation name of one control step."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for camera in spec["cameras"]:
        shapes[f"rgb.{camera}"] = ((spec["height"], spec["width"], 3), "uint8")
        shapes[f"intrinsics.{camera}"] = ((3, 3), "float32")
        shapes[f"camera_to_base.{camera}"] = ((4, 4), "float32")
    sensors = len(spec["sensors"])
    return shapes | {
        "points": ((spec["points"], 3), "float32"),
        "visible": ((spec["points"],), "bool"),
        "wrench": ((sensors, 6), "float32"),
        "taxels": ((sensors, *spec["taxels"]), "float32"),
        "proprio": ((proprio,), "float32"),
        "has_points": ((spec["points"],), "bool"),
        "has_wrench": ((sensors,), "bool"),
        "has_taxels": ((sensors,), "bool"),
    }


def _known(names: Iterable[str], valid: list[str], argument: str) -> set[str]:
    """The names as a set, all of them valid."""
    if isinstance(names, str):
        raise RuntimeContractError(f"{argument}: got the text {names!r}, expected a collection of names")
    for name in (chosen := set(names)):
        if name not in valid:
            raise RuntimeContractError(f"{argument}: unknown name {name!r}, expected some of {valid}")
    return chosen


def _checked(key: str, value: Any, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """A private copy of `value` in the expected type, after checking shape, type, finiteness and geometry."""
    array = np.asarray(value)
    # A scene with fewer tracked points than the model knows brings fewer rows.
    fits = array.shape == shape
    if key in ("points", "visible", "has_points"):
        fits = array.ndim == len(shape) and array.shape[0] <= shape[0] and array.shape[1:] == shape[1:]
    if not fits or (array.dtype.kind != "f" if dtype == "float32" else array.dtype != dtype):
        raise RuntimeContractError(f"{key}: got {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}")
    array = array.astype(dtype)
    if dtype == "float32" and not np.isfinite(array).all():
        index = [int(i) for i in np.argwhere(~np.isfinite(array))[0]]
        raise RuntimeContractError(f"{key}: non-finite value at {index}, expected finite {dtype} {list(shape)}")
    if key.startswith("camera_to_base."):
        rotation = array[:3, :3].astype(np.float64)
        error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
        if error > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0 or not np.array_equal(array[3], (0, 0, 0, 1)):
            raise RuntimeContractError(
                f"{key}: not a rigid transform (max |R Rᵀ - I| {error:.2g}, det {np.linalg.det(rotation):.3f}, "
                f"last row {array[3].tolist()}); expected det +1, at most {ROTATION_TOLERANCE}, [0, 0, 0, 1]"
            )
    if key.startswith("intrinsics.") and (array[0, 0] <= 0 or array[1, 1] <= 0 or array[2, 2] != 1):
        raise RuntimeContractError(
            f"{key}: focal lengths {array[0, 0]:g}, {array[1, 1]:g}, last entry {array[2, 2]:g}; expected > 0, > 0, 1"
        )
    return array
