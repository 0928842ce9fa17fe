"""Closed loop of an exported policy in the simulator."""

from dataclasses import dataclass
from pathlib import Path

from export.runtime import OnnxPolicy


@dataclass(frozen=True)
class OnnxPolicyFactory:
    """Builds `runtime.OnnxPolicy` in a worker of `worldmodel.closed_loop.run_closed_loop`."""

    folder: Path
    mask: tuple[str, ...] = ()
    seed: int = 0
    threads: int = 1

    def __call__(self) -> OnnxPolicy:
        """The policy, on one thread by default since every worker has its own."""
        return OnnxPolicy(self.folder, mask=self.mask, seed=self.seed, threads=self.threads)
