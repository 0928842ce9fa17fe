"""The exported policy as an object that observes and acts."""

import copy
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime

from .manifest import RuntimeContractError, find_graph
from .observation import checked
from .observed import Observed
from .session import open_session

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


class OnnxPolicy(Observed):
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
        super().__init__(folder, instruction=instruction, allow_missing=allow_missing, mask=mask, embodiment=embodiment)
        self._seed = seed
        self._threads = threads
        self._precision, self._unproven = precision, unproven
        self._load()
        self.reset()

    def _load(self) -> None:
        """Opens the graphs that are used, and chooses the one that answers first."""
        self._graph = self._open("policy")
        # What is small gains nothing from another precision, and there may be no such graph of it.
        self._small = self._open("proposal", "fp32") if "proposal" in self.manifest["paths"] else None

    def _open(self, path: str, precision: str | None = None) -> Graph:
        """The graph of a path, in the policy's precision unless another is given."""
        file = self.folder / find_graph(self.manifest, path, precision or self._precision, unproven=self._unproven)
        session = open_session(file, self._threads)
        rows = self.manifest["paths"][path]["inputs"]
        return Graph(session, {row["name"]: ([1, *row["shape"][1:]], row["dtype"]) for row in rows})

    def fork(self) -> "OnnxPolicy":
        """A policy with an episode of its own over the same loaded network; both may act at the same time."""
        other = copy.copy(self)
        other.reset()
        return other

    def reset(self) -> None:
        """Starts an episode: forgets what was observed and starts the noise again from the seed."""
        self._forget()
        self._random = np.random.default_rng(self._seed)
        self._chunk: np.ndarray | None = None
        self._commands: list[np.ndarray] = []
        self.report: Report | None = None

    def load(self, history: Sequence[dict[str, np.ndarray]], instruction: str | None = None) -> None:
        """As that of `Observed`; what was answered before is forgotten."""
        super().load(history, instruction)
        self._chunk, self._commands = None, []

    def commanded(self, action: np.ndarray) -> None:
        """Is told what is executed (D,) at the step that was observed last, where that is not a row of the last chunk:
        one that comes late, or a mean. The robot keeps to its range of commands whatever it is told."""
        bounds = self.robot["envelope"]["command_range"]
        command = np.clip(action, *np.asarray(bounds, float).T) if bounds else action
        self._commands = [*self._commands[-1:], np.array(command, np.float32)]

    def inputs(self) -> dict[str, np.ndarray]:
        """The inputs of the graph that answers next, without `COMMANDS`; see `feed`."""
        return self.feed(self._graph.shapes)

    def act(self, noise: np.ndarray | None = None, previous: np.ndarray | None = None) -> np.ndarray:
        """The next chunk: (A, D) float32 in the units of the manifest; row 0 is the action to execute now.

        `report` then says which limits changed it and how far to trust it.

        Args:
            noise: (A, padded D) standard normal values to start the flow from; drawn from the seed by default.
            previous: (2, D) the commands that were executed last, oldest first, for limits of velocity and
                acceleration. By default what `commanded` was told, or if it never was the rows of the last chunk, one
                for each step observed since it was answered.

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
        feed["decided"], feed["is_decided"] = self._padded(decided)
        actions, limited, confidence, novelty, odd = (x[0] for x in self._run(feed))
        chunk = actions[:, : len(self.action_names)]
        if not np.isfinite(chunk).all():
            raise RuntimeContractError("actions: the model answered non-finite values; do not execute them")
        kinds = {kind: limited[:, i] for i, kind in enumerate(self.manifest["limits"])}
        self.report = Report(kinds, float(confidence), float(novelty), bool(odd))
        self._chunk, self._executed = chunk, 0
        return chunk

    @property
    def proposes(self) -> bool:
        """Whether the artefact has what `propose` asks."""
        return self._small is not None

    def propose(self, decided: np.ndarray) -> np.ndarray | None:
        """What the chunk (A, D) that begins with the `decided` (d, D) corrects, from what is measured now; fast.

        None if there is no proprioception now, or neither a point nor a picture; whatever else is missing is masked.

        Raises:
            RuntimeContractError: the artefact has no path `proposal`; `decided` has another shape or more rows than a
                chunk; or the answer is not finite.
        """
        if self._small is None:
            raise RuntimeContractError(
                f"{self.folder}: no path `proposal`; build it with paths=[policy,policy_step,proposal]"
            )
        feed = self.feed(self._small.shapes, needed=False)
        if not (feed["has_proprio"].all() and (feed["has_points"].any() or feed["has_rgb"].any())):
            return None
        feed["decided"], feed["is_decided"] = self._padded(decided)
        proposal = np.asarray(self._small.session.run(["proposed"], feed)[0])[0, :, : len(self.action_names)]
        if not np.isfinite(proposal).all():
            raise RuntimeContractError("proposed: the model answered non-finite values; do not execute them")
        return proposal

    def _padded(self, decided: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decided actions as the graphs take them, (1, A, padded D), and which rows they are (1, A)."""
        size, count = len(self.action_names), min(len(decided), self.horizon)
        rows, where = np.zeros((1, self.horizon, self._padded_action), np.float32), np.zeros((1, self.horizon), bool)
        rows[0, :count, :size] = checked("decided", decided, (count, size), "float32")
        where[0, :count] = True
        return rows, where

    def _run(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """`ANSWERS` to the inputs of the graph."""
        return [np.asarray(answer) for answer in self._graph.session.run(list(ANSWERS), feed)]

    def _before(self, given: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The two commands before now, padded (1, 2, padded D), and which of them there were (1, 2)."""
        rows, has = np.zeros((1, 2, self._padded_action), np.float32), np.zeros((1, 2), bool)
        size = len(self.action_names)
        if given is not None:
            rows[0, :, :size], has[...] = checked("previous", given, (2, size), "float32"), True
        elif self._commands:
            rows[0, -len(self._commands) :, :size], has[0, -len(self._commands) :] = self._commands, True
        elif self._chunk is not None:
            # A chunk that ran out is held at its last row.
            for place, row in enumerate((self._executed - 2, self._executed - 1)):
                if row >= 0:
                    rows[0, place, :size], has[0, place] = self._chunk[min(row, len(self._chunk) - 1)], True
        return rows, has
