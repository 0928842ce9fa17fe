"""What a simulator must offer to become a source of demonstrations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the command line reads the list of sources before it loads anything heavy
    import numpy as np


class Expert(Protocol):
    """A scripted expert that reads the scene's full state."""

    def act(self) -> "np.ndarray":
        """The action (D,) float32 for the state now, in the embodiment's units."""
        ...


class Scene(Protocol):
    """One task with one robot; used for many episodes."""

    cameras: tuple[str, ...]
    max_steps: int
    """Control steps after which an episode has failed."""

    def reset(self, rng: "np.random.Generator", images: bool = True) -> dict[str, Any]:
        """Draws a start state from `rng` alone and observes it, names as in `contracts.Policy`."""
        ...

    def step(self, action: "np.ndarray", images: bool = True) -> tuple[dict[str, Any], bool]:
        """Holds `action` for one control step; the observation after it and whether the task is solved."""
        ...

    def expert(self) -> Expert:
        """An expert for the episode that began with the last reset."""
        ...

    def metadata(self) -> dict[str, Any]:
        """Names, frames and units of everything that an episode records."""
        ...

    def close(self) -> None:
        """Frees the OpenGL context."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """A simulator: its tasks, which of them training never sees, and its robots."""

    name: str
    benchmark: str
    """Name of the list of tasks."""
    train_tasks: tuple[str, ...]
    heldout_tasks: tuple[str, ...]
    robots: tuple[str, ...]
    """Names of embodiments."""
    make_scene: Callable[[str, str, int], Scene]
    """Builds the scene of (task, robot, pixels)."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks; an episode's random stream depends on its task's place here."""
        return self.train_tasks + self.heldout_tasks
