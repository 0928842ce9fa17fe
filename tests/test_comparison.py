"""Closed-loop results of several policies are kept, and run again only when something changed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from worldmodel.comparison import Contender, Protocol, compare, result_key
from worldmodel.errors import ConfigError


@dataclass(frozen=True)
class Still:
    """A policy that stays where it is."""

    folder: Path
    chunk: int = 4

    def __call__(self, robot: str) -> "Still":
        return self

    def reset(self) -> None: ...

    def observe(self, observation: dict) -> None: ...

    def act(self) -> np.ndarray:
        return np.zeros((self.chunk, 4))


class Room:
    """A scene that is solved after six steps, and counts how often it starts."""

    starts = 0
    embodiment, hold, max_steps = "sawyer", np.zeros(4, np.float32), 125

    def reset(self, rng: np.random.Generator, images: bool = True) -> dict[str, Any]:
        Room.starts += 1
        self.steps = 0
        return {"rgb.front": np.zeros((64, 64, 3), np.uint8)} if images else {}

    def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
        self.steps += 1
        return ({"rgb.front": np.zeros((64, 64, 3), np.uint8)} if images else {}), self.steps >= 6


def test_closed_loop_results_are_kept_until_something_changes(tmp_path: Path, monkeypatch: Any) -> None:
    weights = tmp_path / "artefact"
    weights.mkdir()
    (weights / "policy.onnx").write_bytes(b"one")
    contender = Contender(policy="still", observes="nothing", factory=Still(weights), weights=weights)
    protocol = Protocol(tasks=("a", "b"), trials=2)

    def run() -> list[dict]:
        return compare([contender], protocol, tmp_path / "kept", make_scene=lambda *_: Room(), workers=0)

    first = run()[0]
    starts = Room.starts
    assert first["mean_success"] == 1 and not first["reused"] and starts
    assert first["rollouts"]["a"][0]["video"].startswith("data:video/mp4;base64,")
    again = run()[0]
    assert again["reused"] and Room.starts == starts
    assert {k: v for k, v in again.items() if k != "reused"} == {k: v for k, v in first.items() if k != "reused"}
    key = result_key(contender, protocol)
    assert result_key(contender, replace(protocol, seed=1)) != key
    with monkeypatch.context() as later:
        later.setattr("worldmodel.comparison.RULES", 99)
        assert result_key(contender, protocol) != key, "another way of executing chunks"
    assert result_key(replace(contender, factory=Still(weights, chunk=8)), protocol) != key
    (weights / "policy.onnx").write_bytes(b"two")
    assert result_key(contender, protocol) != key
    contender = replace(contender, trials=1)
    assert len(run()[0]["rollouts"]["a"]) == 1 and run()[0]["reused"]
    contender = replace(contender, trials=5)
    assert sum(task["trials"] for task in run()[0]["tasks"]) == 4, "never more than the protocol's"


def test_comparison_needs_weights_and_names(tmp_path: Path) -> None:
    contender = Contender(policy="still", observes="nothing", factory=Still(tmp_path), weights=tmp_path)
    with pytest.raises(ConfigError, match="no weights"):
        result_key(contender, Protocol(tasks=("a",)))
    with pytest.raises(ConfigError, match="names must differ"):
        compare([contender, contender], Protocol(tasks=("a",)), tmp_path, make_scene=lambda *_: Room())


def test_overlapping_chunks_are_averaged_unless_a_policy_continues_or_scripts_them(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Rising(Still):
        """Answers ever larger actions."""

        calls: int = 0

        def act(self) -> np.ndarray:
            object.__setattr__(self, "calls", self.calls + 1)
            return np.full((self.chunk, 4), float(self.calls))

    done: list[float] = []  # after the step that finds out whether a start state is solved

    class Watched(Room):
        def step(self, action: np.ndarray, images: bool = True) -> tuple[dict[str, Any], bool]:
            done.append(float(action[0]))
            return super().step(action, images)

    weights = tmp_path / "artefact"
    weights.mkdir()
    (weights / "policy.onnx").write_bytes(b"one")
    contender = Contender(policy="rising", observes="nothing", factory=Rising(weights), weights=weights)
    protocol = Protocol(tasks=("a",), trials=1, replan=2, image_every=2, ensemble=0.0)

    def run(contender: Contender, protocol: Protocol) -> dict[str, Any]:
        done.clear()
        folder = tmp_path / contender.policy / str(protocol.ensemble)
        return compare([contender], protocol, folder, make_scene=lambda *_: Watched(), workers=0)[0]

    assert run(contender, protocol)["ensemble"] == 0.0 and done[1:] == [1, 1, 1.5, 1.5, 2.5, 2.5]
    plain = replace(contender, factory=Rising(weights))
    assert run(plain, replace(protocol, ensemble=None))["ensemble"] is None and done[1:] == [1, 1, 2, 2, 3, 3]
    scripted = replace(contender, policy="expert", factory=Rising(weights), weights=None, replan=1, images=False)
    assert run(scripted, protocol)["ensemble"] is None and done[1:] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="ensemble 0: chunks that continue what is decided are not averaged"):
        run(replace(contender, policy="told", realtime=True), protocol)
