"""What a policy has observed of an episode, and the inputs that a graph reads of it."""

import difflib
import logging
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import SENSES, RuntimeContractError, load_manifest
from .observation import checked, encode_instruction, known, observation_shapes

log = logging.getLogger(__name__)
COMMANDS = ("noise", "previous", "has_previous", "decided", "is_decided")
"""Inputs of a graph that are no observation."""


class Observed:
    """The newest control steps of an episode, checked against the manifest of an artefact.

    Args and errors: see `OnnxPolicy`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        instruction: str | None,
        allow_missing: Collection[str],
        mask: Iterable[str],
        embodiment: str | None,
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
        self._unknown: set[str] = set()
        self._allowed = known(allow_missing, [*self.cameras, *SENSES], "allow_missing")
        chosen = known(mask, [*SENSES, "touch"], "mask")
        self._masked = (chosen - {"touch"}) | ({"wrench", "taxels"} if "touch" in chosen else set())
        self._optional = set(self.manifest["optional"]) | self._allowed | self._masked
        self._forget()

    def _forget(self) -> None:
        """Starts an episode."""
        self._ring: deque[dict[str, np.ndarray]] = deque(maxlen=self.history * self.stride)
        self._text = self._instruction
        self._executed = 0

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array that `observe` takes, by name."""
        return dict(self._shapes)

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

        Who loads a history says what was commanded, see `act`.
        """
        self._ring = deque(history, maxlen=self.history * self.stride)
        self._text = self._instruction if instruction is None else instruction
        self._executed = 0

    def may_lack(self, key: str) -> bool:
        """Whether an observation may come without this name; the graph then masks its sense."""
        sense, _, camera = key.partition(".")
        sense = {"intrinsics": "camera", "camera_to_base": "camera", "visible": "points"}.get(sense, sense)
        return sense in self._optional or camera in self._allowed or key.startswith("has_")

    def feed(self, shapes: Mapping[str, tuple[list[int], str]], *, needed: bool = True) -> dict[str, np.ndarray]:
        """The inputs of a graph for now, given its `shapes` and dtypes, without `COMMANDS`; batch 1.

        Without `needed` a camera or sense that is missing is absent, whatever the manifest says.

        Raises:
            RuntimeContractError: nothing observed yet, or a camera or sense is missing that must not be.
        """
        if not self._ring:
            raise RuntimeContractError("act: nothing observed yet; call observe first")
        gather = partial(self._gather, needed=needed)
        now = len(self._ring) - 1
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
            images = gather(f"rgb.{camera}", pictures, "rgb", camera)
            if images is not None:
                feed["rgb"][0, :, view] = images.transpose(0, 3, 1, 2)
                feed["has_rgb"][0, view] = True
            # Where a camera may be absent, so may its pose.
            intrinsics = gather(f"intrinsics.{camera}", frames, "camera", camera)
            poses = gather(f"camera_to_base.{camera}", frames, "camera", camera)
            if intrinsics is not None and poses is not None:
                feed["intrinsics"][0, :, view], feed["camera_to_base"][0, :, view] = intrinsics, poses
                feed["has_camera"][0, view] = True
        points, visible = gather("points", frames, "points"), gather("visible", frames, "points")
        if points is not None and visible is not None:
            count = points.shape[1]
            feed["points"][0, :, :count], feed["visible"][0, :, :count] = points, visible
            feed["has_points"][0, :count] = self._flags("has_points", frames, count)
        felt = [index for row in series for index in row]
        wrench = gather("wrench", felt, "wrench")
        if wrench is not None:
            feed["wrench"][0] = wrench.reshape(feed["wrench"].shape[1:])
            feed["has_wrench"][...] = self._flags("has_wrench", felt, wrench.shape[1])
        taxels = gather("taxels", frames, "taxels")
        if taxels is not None:
            feed["taxels"][0] = taxels
            feed["has_taxels"][...] = self._flags("has_taxels", frames, taxels.shape[1])
        proprio = gather("proprio", frames, "proprio")
        if proprio is not None:
            feed["proprio"][0, :, : proprio.shape[1]] = proprio
            feed["has_proprio"][...] = True
        if self._text is not None and "text" not in self._masked:
            feed["text"][0] = encode_instruction(self._text, self._text_length)
            self._warn_of_unknown(self._text)
            feed["has_text"][...] = True
        elif needed and "text" not in self._optional:
            raise RuntimeContractError("instruction: missing; give it to OnnxPolicy(instruction=...) or to observe")
        return feed

    def _warn_of_unknown(self, instruction: str) -> None:
        """Says once of an instruction that the graph takes for absent, as nothing like it was trained on."""
        sentences = self.manifest["instruction"].get("known")
        if sentences is None or instruction in sentences or instruction in self._unknown:
            return
        self._unknown.add(instruction)
        close = difflib.get_close_matches(instruction, sentences, n=1, cutoff=0.0)
        log.warning(
            "%s: instruction %r is none of the %d trained on and counts as absent; the policy acts on what it senses. "
            "The closest is %r.",
            self.folder,
            instruction,
            len(sentences),
            close[0] if close else None,
        )

    def _flags(self, key: str, frames: list[int], count: int) -> np.ndarray:
        """(count,) bool: which points or sensors are there, all of them unless the observations say otherwise."""
        flags = [self._ring[index][key] for index in frames if key in self._ring[index]]
        if any(len(flag) != count for flag in flags):
            raise RuntimeContractError(f"{key}: got {[len(flag) for flag in flags]} flags, expected {count}")
        return np.all(np.stack(flags), axis=0) if flags else np.ones(count, bool)

    def _gather(
        self, key: str, steps: list[int], sense: str, camera: str | None = None, *, needed: bool
    ) -> np.ndarray | None:
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
        if not needed or sense in self._optional or camera in self._allowed:
            return None
        shape, dtype = self._shapes[key]
        where = "now" if 0 in missing else f"{missing[-1]} steps ago (needed every {self.stride} steps)"
        raise RuntimeContractError(
            f"{key}: missing {where}, expected {dtype} {list(shape)}; a robot without it says so with "
            f"OnnxPolicy(allow_missing={{{camera or sense!r}}})"
        )
