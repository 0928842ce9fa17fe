"""Recorded episodes behind the policy server: answers without a model, to wire up a robot."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from export.onnx_source import observation_bytes
from worldmodel.data.schema import Episode
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, ContractError

Shapes = dict[str, tuple[tuple[int, ...], str]]


class ReplaySession:
    """One episode: observations are checked against the recorded ones and counted, not otherwise read.

    Args:
        key: the episode's, told with every answer.
        episode: with actions.
        shapes: of its observations.
        horizon: actions of an answer.
    """

    def __init__(self, key: str, episode: Episode, shapes: Shapes, horizon: int) -> None:
        assert episode.action is not None
        self._key, self._actions, self._shapes, self._horizon = key, episode.action, shapes, horizon
        self.reset()

    def reset(self) -> None:
        """Starts the episode again."""
        self._step = -1

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes one control step, of which any recorded observation may be missing.

        Raises:
            ContractError: a name that was not recorded, or a value of another shape, type or range.
        """
        for name, value in observation.items():
            if name == "instruction" and isinstance(value, str):
                continue
            if name not in self._shapes:
                expected = [*sorted(self._shapes), "instruction"]
                raise ContractError(f"{name}: not recorded, or not of that type; expected names {expected}")
            _check(name, np.asarray(value), *self._shapes[name])
        self._step += 1

    def act(self) -> dict[str, Any]:
        """`actions` (H, D) as recorded from this step on, the last one repeated after the end, and where that is.

        Raises:
            ContractError: nothing observed yet.
        """
        if self._step < 0:
            raise ContractError("act: nothing observed yet")
        length = len(self._actions)
        rows = np.minimum(np.arange(self._step, self._step + self._horizon), length - 1)
        finished = self._step >= length
        return {"actions": self._actions[rows], "episode": self._key, "step": self._step, "finished": finished}


class ReplaySource:
    """Sessions that replay the episodes of a dataset in turn.

    Args:
        root: dataset folder.
        split: only episodes of this one; None replays all.
        horizon: actions of an answer.

    Raises:
        DataError: the folder is no dataset.
        ConfigError: no episode with actions in that split, or a horizon below 1.
    """

    def __init__(self, root: str | Path, *, split: str | None = None, horizon: int = 8) -> None:
        if horizon < 1:
            raise ConfigError(f"horizon: got {horizon}, expected at least 1")
        self._reader = ShardReader(root)
        self._horizon = horizon
        entries = self._reader.entries
        self._episodes = [i for i, entry in enumerate(entries) if split in (None, entry.split)]
        if not self._episodes:
            splits = sorted({entry.split for entry in entries})
            raise ConfigError(f"{root}: no episode of split {split!r}; there are {splits}")
        self._next = 0
        self._lock = threading.Lock()
        first = self._read(0)
        self._shapes = _shapes(first)
        self.observation_bytes: int = observation_bytes(self._shapes)
        self.metadata: dict[str, Any] = _metadata(first, self._shapes, horizon)

    def new(self) -> ReplaySession:
        """A session over the next episode."""
        with self._lock:
            place = self._next % len(self._episodes)
            self._next += 1
            episode = self._read(place)
        key = self._reader.entries[self._episodes[place]].key
        return ReplaySession(key, episode, _shapes(episode), self._horizon)

    def _read(self, place: int) -> Episode:
        """The episode at a place of those that are replayed."""
        entry = self._reader.entries[self._episodes[place]]
        episode = self._reader.read(self._episodes[place])
        if episode.action is None:
            raise ConfigError(
                f"{entry.shard}: key {entry.key}: recorded without actions, so there is nothing to answer"
            )
        return episode


def _shapes(episode: Episode) -> Shapes:
    """Shape and dtype of one step of every recorded observation."""
    shapes: Shapes = {}
    for name in ("rgb", "intrinsics", "camera_to_base"):
        for camera, series in getattr(episode, name).items():
            shapes[f"{name}.{camera}"] = (series.shape[1:], str(series.dtype))
    for name in ("points", "visible", "wrench", "taxels", "proprio"):
        if (series := getattr(episode, name)) is not None:
            shapes[name] = (series.shape[1:], str(series.dtype))
    return shapes


def _check(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: str) -> None:
    """Refuses arrays that the recorded ones are unlike."""
    if array.shape != shape or (array.dtype.kind != "f" if dtype == "float32" else array.dtype != dtype):
        raise ContractError(f"{name}: got {array.dtype} {list(array.shape)}, expected {dtype} {list(shape)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ContractError(f"{name}: non-finite value, expected finite {dtype} {list(shape)}")


def _metadata(episode: Episode, shapes: Shapes, horizon: int) -> dict[str, Any]:
    """What clients are told, from the first episode; other robots of the same dataset may differ."""
    meta, action = episode.meta, episode.action
    assert action is not None
    observations = {
        name: {"shape": list(shape), "dtype": dtype, "required": False} for name, (shape, dtype) in shapes.items()
    }
    if "proprio" in observations:
        observations["proprio"] |= {"names": meta["proprio_names"], "units": meta.get("proprio_units", [])}
    return {
        "policy": "replay",
        "embodiment": meta["embodiment"],
        "observations": observations,
        "actions": {
            "shape": [horizon, action.shape[1]],
            "dtype": "float32",
            "names": meta["action_names"],
            "units": meta.get("action_units", []),
        },
        "cameras": list(episode.rgb),
        "sensors": meta.get("sensor_names", []),
        "sensor_frames": meta.get("sensor_frames", {}),
        "rate_hz": meta["fps"],
        "horizon": horizon,
        "instruction": {"name": "instruction", "required": False, "default": meta["instruction"]},
    }
