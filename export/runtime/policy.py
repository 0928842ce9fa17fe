"""The exported policy as an object that observes and acts."""

import copy
import difflib
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from .manifest import SENSES, RuntimeContractError, find_graph, load_manifest
from .observation import checked, encode_instruction, known, observation_shapes
from .session import open_session

COMMANDS = ("noise", "previous", "has_previous", "decided", "is_decided")
"""Inputs of a graph that are no observation."""
ANSWERS = ("actions", "limited", "confidence", "novelty", "out_of_distribution")


class Graph(NamedTuple):
    """One loaded graph."""

    session: onnxruntime.InferenceSession
    shapes: dict[str, tuple[list[int], str]]  # of its inputs, and their dtypes


class Report(NamedTuple):
    """What the graph says of its last answer."""

    limited: dict[str, np.ndarray]  # kind of limit -> (A,) bool, which rows it changed
    confidence: float  # 0 to 1, see `trust` in the manifest
    novelty: float  # distance from the training data; above 1 the observation is out of distribution
    out_of_distribution: bool


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
        precision: of the graph, one that the manifest lists.
        unproven: runs a graph that failed its check when it was built.

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
        precision: str = "fp32",
        unproven: bool = False,
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
        self.robot = robots[embodiment]
        self.embodiment: str = embodiment
        self.action_names: list[str] = list(self.robot["action_names"])
        self._shapes = observation_shapes(spec, self.robot["proprio_dims"])
        self._instruction = instruction
        self._allowed = known(allow_missing, [*self.cameras, *SENSES], "allow_missing")
        chosen = known(mask, [*SENSES, "touch"], "mask")
        self._masked = (chosen - {"touch"}) | ({"wrench", "taxels"} if "touch" in chosen else set())
        self._optional = set(self.manifest["optional"]) | self._allowed | self._masked
        self._seed = seed
        self._threads = threads
        self._precision, self._unproven = precision, unproven
        self._load()
        self.reset()

    def _load(self) -> None:
        """Opens the graphs that are used, and chooses the one that answers first."""
        self._graph = self._open("policy")

    def _open(self, path: str) -> Graph:
        """The graph of a path."""
        file = self.folder / find_graph(self.manifest, path, self._precision, unproven=self._unproven)
        session = open_session(file, self._threads)
        rows = self.manifest["paths"][path]["inputs"]
        return Graph(session, {row["name"]: ([1, *row["shape"][1:]], row["dtype"]) for row in rows})

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
        self._chunk: np.ndarray | None = None
        self._executed = 0
        self.report: Report | None = None

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
            step[key] = checked(key, value, *self._shapes[key])
        if ("points" in step) != ("visible" in step) or len(step.get("points", ())) != len(step.get("visible", ())):
            raise RuntimeContractError("points, visible: expected both, with one flag per point")
        self._text = text
        self._ring.append(step)
        self._executed += 1

    def load(self, history: Sequence[dict[str, np.ndarray]], instruction: str | None = None) -> None:
        """Replaces what was observed by these control steps, oldest first, each checked as `observe` does.

        What was answered before is forgotten: who loads a history says what was commanded, see `act`.
        """
        self._ring = deque(history, maxlen=self.history * self.stride)
        self._text = self._instruction if instruction is None else instruction
        self._chunk, self._executed = None, 0

    def may_lack(self, key: str) -> bool:
        """Whether an observation may come without this name; the graph then masks its sense."""
        sense, _, camera = key.partition(".")
        sense = {"intrinsics": "camera", "camera_to_base": "camera", "visible": "points"}.get(sense, sense)
        return sense in self._optional or camera in self._allowed or key.startswith("has_")

    def inputs(self) -> dict[str, np.ndarray]:
        """The graph's inputs for now, without `COMMANDS`; batch 1.

        Raises:
            RuntimeContractError: nothing observed yet, or a camera or sense is missing that must not be.
        """
        if not self._ring:
            raise RuntimeContractError("act: nothing observed yet; call observe first")
        now, shapes = len(self._ring) - 1, self._graph.shapes
        feed = {n: np.zeros(*shapes[n]) for n in shapes if n not in COMMANDS and not n.startswith("cache_")}
        # Before the start of the episode the first frame repeats, as in the training clips.
        frames = [max(0, now - back * self.stride) for back in reversed(range(feed["proprio"].shape[1]))]
        pictures = frames[-feed["rgb"].shape[1] :]
        series = [[max(0, frame - back) for back in reversed(range(self.stride))] for frame in frames]
        # Hidden views still pass through pose arithmetic on their way to the mask: identities keep it finite.
        feed["intrinsics"][...] = np.eye(3, dtype=np.float32)
        feed["camera_to_base"][...] = np.eye(4, dtype=np.float32)
        feed["embodiment"][...] = self.robot["index"]
        for view, camera in enumerate(self.cameras):
            images = self._gather(f"rgb.{camera}", pictures, "rgb", camera)
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
        felt = [index for row in series for index in row]
        wrench = self._gather("wrench", felt, "wrench")
        if wrench is not None:
            feed["wrench"][0] = wrench.reshape(feed["wrench"].shape[1:])
            feed["has_wrench"][...] = self._flags("has_wrench", felt, wrench.shape[1])
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

    def act(self, noise: np.ndarray | None = None, previous: np.ndarray | None = None) -> np.ndarray:
        """The next chunk: (A, D) float32 in the units of the manifest; row 0 is the action to execute now.

        `report` then says which limits changed it and how far to trust it.

        Args:
            noise: (A, padded D) standard normal values to start the flow from; drawn from the seed by default.
            previous: (2, D) the commands that were executed last, oldest first, for limits of velocity and
                acceleration. By default the rows of the last chunk, one for each step observed since it was answered.

        Raises:
            RuntimeContractError: see `inputs`; the noise has another shape; or the model answered non-finite values.
        """
        return self.act_after(np.zeros((0, len(self.action_names)), np.float32), noise, previous)

    def act_after(
        self, decided: np.ndarray, noise: np.ndarray | None = None, previous: np.ndarray | None = None
    ) -> np.ndarray:
        """The next chunk (A, D), of which the first rows are the `decided` (d, D) that are executed whatever it says.

        A model that was trained with a rate `decided` continues them without a jump. The limits hold for these rows
        too: where one changes them, `report` says so. `noise` and `previous` as in `act`.

        Raises:
            RuntimeContractError: as `act`; or `decided` has another shape, or more rows than a chunk.
        """
        feed = self.inputs()
        shape = (self.horizon, self._padded_action)
        if noise is None:
            noise = self._random.standard_normal(shape, dtype=np.float32)
        feed["noise"] = checked("noise", noise, shape, "float32")[None]
        feed["previous"], feed["has_previous"] = self._before(previous)
        size, count = len(self.action_names), min(len(decided), self.horizon)
        feed["decided"], feed["is_decided"] = np.zeros((1, *shape), np.float32), np.zeros((1, self.horizon), bool)
        feed["decided"][0, :count, :size] = checked("decided", decided, (count, size), "float32")
        feed["is_decided"][0, :count] = True
        actions, limited, confidence, novelty, odd = (x[0] for x in self._run(feed))
        chunk = actions[:, : len(self.action_names)]
        if not np.isfinite(chunk).all():
            raise RuntimeContractError("actions: the model answered non-finite values; do not execute them")
        kinds = {kind: limited[:, i] for i, kind in enumerate(self.manifest["limits"])}
        self.report = Report(kinds, float(confidence), float(novelty), bool(odd))
        self._chunk, self._executed = chunk, 0
        return chunk

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """`ANSWERS` to the inputs of the graph."""
        return [np.asarray(answer) for answer in self._graph.session.run(list(ANSWERS), feed)]

    def _before(self, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The two commands before now, padded (1, 2, padded D), and which of them there were (1, 2)."""
        rows, has = np.zeros((1, 2, self._padded_action), np.float32), np.zeros((1, 2), bool)
        size = len(self.action_names)
        if given is not None:
            rows[0, :, :size], has[...] = checked("previous", given, (2, size), "float32"), True
        elif self._chunk is not None:
            # A chunk that ran out is held at its last row.
            for place, row in enumerate((self._executed - 2, self._executed - 1)):
                if row >= 0:
                    rows[0, place, :size], has[0, place] = self._chunk[min(row, len(self._chunk) - 1)], True
        return rows, has

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
