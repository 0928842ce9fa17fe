"""Closed loop of an exported policy in the simulator."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from export.runtime import OnnxPolicy, StepPolicy, load_manifest
from worldmodel.errors import ExportError


@dataclass(frozen=True)
class OnnxPolicyFactory:
    """Builds `runtime.OnnxPolicy` in a worker of `worldmodel.closed_loop.run_closed_loop`."""

    folder: Path
    mask: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()
    """Cameras of which neither images nor poses reach the policy."""
    seed: int = 0
    threads: int = 1
    precision: str = "fp32"
    unproven: bool = False
    stepping: bool = False
    """Reads every picture once, see `StepPolicy`."""

    def __post_init__(self) -> None:
        if self.blind and self.stepping:
            raise ExportError("a policy without some of the cameras reads whole histories: leave `stepping` out")

    @property
    def robots(self) -> tuple[str, ...]:
        """Those that the artefact knows."""
        return tuple(entry["name"] for entry in load_manifest(self.folder)["embodiments"])

    def __call__(self, robot: str | None = None) -> OnnxPolicy:
        """The policy for a robot, the only one by default; on one thread since every worker has its own."""
        whole = partial(_BlindPolicy, blind=self.blind) if self.blind else OnnxPolicy
        kind = StepPolicy if self.stepping else whole
        return kind(
            self.folder,
            mask=self.mask,
            embodiment=robot,
            seed=self.seed,
            threads=self.threads,
            precision=self.precision,
            unproven=self.unproven,
        )


class _BlindPolicy(OnnxPolicy):
    """A policy on a robot without some of the cameras."""

    def __init__(
        self,
        folder: Path,
        *,
        blind: tuple[str, ...],
        mask: tuple[str, ...],
        embodiment: str | None,
        seed: int,
        threads: int,
        precision: str,
        unproven: bool,
    ) -> None:
        super().__init__(
            folder,
            mask=mask,
            embodiment=embodiment,
            seed=seed,
            threads=threads,
            precision=precision,
            unproven=unproven,
            allow_missing=blind,
        )
        self._blind = tuple(f"{kind}.{camera}" for kind in ("rgb", "intrinsics", "camera_to_base") for camera in blind)

    def observe(self, observation: dict[str, Any]) -> None:
        """Takes what the robot senses without those cameras."""
        super().observe({name: value for name, value in observation.items() if name not in self._blind})


@dataclass(frozen=True, kw_only=True)
class DrivenCheck:
    """Holds the closed-loop success of one precision against that of fp32, on the same start states.

    The arms are those of the artefact that a simulator has; no `tasks` are all that it has for training.
    """

    trials: int
    tasks: tuple[str, ...]
    drop: float
    workers: int | None = None

    def __call__(self, folder: Path, precision: str) -> dict[str, Any]:
        """Successes and trials of a precision in the artefact `folder`."""
        from worldmodel.closed_loop import SourceScenes, run_closed_loop
        from worldmodel.data.sources.registry import simulated

        spec = load_manifest(folder)["spec"]
        factory = OnnxPolicyFactory(folder, precision=precision, unproven=True)
        source, robots = simulated(factory.robots)
        result = run_closed_loop(
            factory,
            self.tasks or source.train_tasks,
            robots=source.told_apart(robots),
            trials=self.trials,
            image_every=spec["stride"],
            workers=self.workers,
            make_scene=SourceScenes(spec["height"], tuple(spec["cameras"]), source.name),
            progress=False,
        )
        return {"successes": sum(t.successes for t in result.tasks), "trials": sum(t.trials for t in result.tasks)}
