"""Closed loop of an exported policy in the simulator."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.runtime import OnnxPolicy


@dataclass(frozen=True)
class OnnxPolicyFactory:
    """Builds `runtime.OnnxPolicy` in a worker of `worldmodel.closed_loop.run_closed_loop`."""

    folder: Path
    mask: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()
    """Cameras of which neither images nor poses reach the policy."""
    seed: int = 0
    threads: int = 1

    def __call__(self) -> OnnxPolicy:
        """The policy, on one thread by default since every worker has its own."""
        kind = partial(_BlindPolicy, blind=self.blind) if self.blind else OnnxPolicy
        return kind(self.folder, mask=self.mask, seed=self.seed, threads=self.threads)


class _BlindPolicy(OnnxPolicy):
    """A policy on a robot without some of the cameras."""

    def __init__(self, folder: Path, *, blind: tuple[str, ...], mask: tuple[str, ...], seed: int, threads: int) -> None:
        super().__init__(folder, mask=mask, seed=seed, threads=threads, allow_missing=blind)
        self._blind = tuple(f"{kind}.{camera}" for kind in ("rgb", "intrinsics", "camera_to_base") for camera in blind)

    def observe(self, observation: dict[str, Any]) -> None:
        super().observe({name: value for name, value in observation.items() if name not in self._blind})
