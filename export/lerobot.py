"""An exported policy behind the interface of LeRobot's policies, without importing LeRobot (or torch).

`select_action`, `predict_action_chunk` and `reset` are those of `lerobot.policies.pretrained.PreTrainedPolicy`
(https://github.com/huggingface/lerobot). Batches hold torch tensors or NumPy arrays; actions come back as the same.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from export.runtime import OnnxPolicy, RuntimeContractError

PREFIX = "observation."
NAMES = {"observation.state": "proprio", "observation.tactile": "taxels", "task": "instruction"}
"""LeRobot's names that are not ours after their prefix; `observation.images.<camera>` is `rgb.<camera>`."""


class LeRobotPolicy:
    """Runs one exported policy per row of a batch, each with its own history.

    Args:
        policy: the loaded artefact.
        action_steps: actions of a chunk that `select_action` hands out before it asks for the next chunk.
        names: our observation names by the names of the batch, where they differ from `NAMES` and its rules.

    Raises:
        RuntimeContractError: `action_steps` is not 1 to the policy's horizon.
    """

    def __init__(self, policy: OnnxPolicy, *, action_steps: int, names: Mapping[str, str] | None = None) -> None:
        if not 1 <= action_steps <= policy.horizon:
            raise RuntimeContractError(f"action_steps: got {action_steps}, expected 1 to {policy.horizon}")
        self._policy = policy
        self._action_steps = action_steps
        self._names = NAMES | dict(names or {})
        self.reset()

    def reset(self) -> None:
        """Starts an episode: call it whenever the environment is reset."""
        self._rows: list[OnnxPolicy] = []
        self._queue: deque[np.ndarray] = deque()
        self._like: Any = None

    def select_action(self, batch: Mapping[str, Any]) -> Any:
        """The action to execute now, (B, D). Call it once per control step: every call observes.

        Raises:
            RuntimeContractError: see `observe`.
        """
        self.observe(batch)
        if not self._queue:
            self._queue.extend(self._act()[:, : self._action_steps].swapaxes(0, 1))
        return self._returned(self._queue.popleft())

    def predict_action_chunk(
        self,
        batch: Mapping[str, Any] | None,
        *,
        inference_delay: int = 0,
        prev_chunk_left_over: Any = None,
    ) -> Any:
        """The next chunk, (B, H, D), whose first action belongs to the observation in `batch`.

        While the chunk is computed the robot goes on with the previous one. Of what is left over of it, the first
        `inference_delay` actions are therefore kept, and the rest is blended into the new chunk with the soft mask of
        real-time chunking (Black et al. 2025, arXiv 2506.07339, eq. 5). Here the finished actions are blended; there
        the same weights guide the flow.

        Args:
            batch: observation of this control step; None if `observe` has been told it.
            inference_delay: control steps that pass before the first new action is executed.
            prev_chunk_left_over: (B, n, D) or (n, D), actions of the previous chunk that are not yet executed, as they
                were returned.

        Raises:
            RuntimeContractError: see `observe`; or the left-over actions are fewer than the delay or of another shape.
        """
        if batch is not None:
            self.observe(batch)
        if not self._rows:
            raise RuntimeContractError("batch: None, and nothing has been observed since reset")
        rows, horizon = len(self._rows), self._policy.horizon
        if not 0 <= inference_delay <= horizon:
            raise RuntimeContractError(f"inference_delay: got {inference_delay}, expected 0 to {horizon}")
        left = np.zeros((rows, 0, len(self._policy.action_names)), np.float32)
        if prev_chunk_left_over is not None:
            left = _array(prev_chunk_left_over)
            left = np.broadcast_to(left, (rows, *left.shape)) if left.ndim == 2 else left
        if left.ndim != 3 or left.shape[0] != rows or left.shape[2] != len(self._policy.action_names):
            raise RuntimeContractError(
                f"prev_chunk_left_over: got {list(left.shape)}, expected [{rows}, n, {len(self._policy.action_names)}]"
            )
        left = left[:, :horizon].astype(np.float32)
        if left.shape[1] < inference_delay:
            raise RuntimeContractError(
                f"prev_chunk_left_over: {left.shape[1]} actions, expected at least inference_delay, {inference_delay}"
            )
        if not np.isfinite(left).all():
            raise RuntimeContractError("prev_chunk_left_over: non-finite values")
        chunk, overlap = self._act(), left.shape[1]
        weights = soft_mask(inference_delay, overlap)[:, None]
        blended = weights * left + (1 - weights) * chunk[:, :overlap]
        return self._returned(np.concatenate([blended, chunk[:, overlap:]], axis=1))

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Takes one control step.

        Names: `observation.images.<camera>` (B, 3, h, w) float in 0..1 or uint8, `observation.state` (B, P),
        `observation.wrench` (B, S, 6), `observation.tactile` (B, S, C, rows, columns), `task` B texts, and
        `observation.<name>` for every other name of `OnnxPolicy.observe`. Names without that prefix are ignored.

        Raises:
            RuntimeContractError: an unknown name, rows that differ in number, or what `OnnxPolicy.observe` refuses.
        """
        columns: dict[str, Sequence[Any] | np.ndarray] = {}
        for key, value in batch.items():
            if key not in self._names and not key.startswith(PREFIX):
                continue
            name = self._names.get(key) or key.removeprefix(PREFIX).replace("images.", "rgb.", 1)
            if isinstance(value, str):
                columns[name] = [value]
            elif isinstance(value, list | tuple):
                columns[name] = value
            else:
                self._like = value if self._like is None else self._like
                columns[name] = _picture(key, _array(value)) if name.startswith("rgb.") else _array(value)
            if isinstance(array := columns[name], np.ndarray) and array.ndim == 0:
                raise RuntimeContractError(f"{key}: got a single number, expected one row per robot")
        counts = {name: len(column) for name, column in columns.items()}
        expected = len(self._rows) or max(counts.values(), default=0)
        if not counts or set(counts.values()) != {expected}:
            raise RuntimeContractError(f"batch: rows {counts}, expected {expected or 'at least one'} of every name")
        rows = self._rows or [self._policy.fork() for _ in range(expected)]
        for i, policy in enumerate(rows):
            policy.observe({name: column[i] for name, column in columns.items()})
        self._rows = rows

    def _act(self) -> np.ndarray:
        """(B, H, D): a chunk of every row."""
        return np.stack([policy.act() for policy in self._rows])

    def _returned(self, actions: np.ndarray) -> Any:
        """Actions as what the batch brought: a float32 tensor on its device, or an array."""
        if hasattr(self._like, "new_tensor"):
            return self._like.float().new_tensor(actions)
        return np.ascontiguousarray(actions)


def soft_mask(delay: int, overlap: int) -> np.ndarray:
    """(overlap,) float32: weights of the previous chunk: 1 while it is executed anyway, then falling to 0.

    Black et al. 2025, eq. 5: `c (exp(c) - 1) / (e - 1)` with c from 1 to 0 over the steps from `delay` to the end of
    the overlap.
    """
    steps = np.arange(overlap)
    c = np.clip((overlap - steps) / (overlap - delay + 1), 0, 1)
    weights = np.where(steps < delay, 1.0, c * (np.exp(c) - 1) / (math.e - 1))
    return weights.astype(np.float32)


def _array(value: Any) -> np.ndarray:
    """A tensor of any device or an array as an array."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _picture(key: str, images: np.ndarray) -> np.ndarray:
    """(B, h, w, 3) uint8 of (B, 3, h, w) in 0..1 or 0..255."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise RuntimeContractError(f"{key}: got shape {list(images.shape)}, expected [rows, 3, height, width]")
    if images.dtype.kind == "f":
        # NaN compares false, so it is refused here too.
        if not (np.min(images, initial=0) >= 0 and np.max(images, initial=0) <= 1):
            raise RuntimeContractError(f"{key}: values outside 0..1, expected floats in 0..1 or uint8")
        images = (images * 255).round().astype(np.uint8)
    return images.transpose(0, 2, 3, 1)
