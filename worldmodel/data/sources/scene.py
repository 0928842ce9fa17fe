"""What a simulator must offer to become a source of demonstrations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # the command line reads the list of sources before it loads anything heavy
    import numpy as np

    from worldmodel.data.sources.looks import Look


class Views(NamedTuple):
    """What the cameras of a scene see over T moments, by camera."""

    rgb: "dict[str, np.ndarray]"  # (T, h, w, 3) uint8; empty if not asked for
    masks: "dict[str, np.ndarray]"  # (T, h, w) uint8, places in the scene's `elements`
    intrinsics: "dict[str, np.ndarray]"  # (T, 3, 3) float32
    camera_to_base: "dict[str, np.ndarray]"  # (T, 4, 4) float32


class Expert(Protocol):
    """A scripted expert that reads the scene's full state."""

    def act(self) -> "np.ndarray":
        """The action (D,) float32 for the state now, in the embodiment's units."""
        ...


class Scene(Protocol):
    """One task with one robot; used for many episodes."""

    cameras: tuple[str, ...]
    embodiment: str
    hold: "np.ndarray"
    """(D,) the action that leaves the arm where it is; where actions are places, that is another one at every step."""
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
        """Frees what the scene holds, an OpenGL context for one."""
        ...


class Dressable(Scene, Protocol):
    """A scene whose episodes can be shown again: with masks, and in other looks."""

    elements: tuple[str, ...]
    """Names of what masks tell apart."""

    def moment(self) -> Any:
        """Where everything is now, as far as pictures show it, for `retake`."""
        ...

    def retake(self, moments: Sequence[Any], look: "Look | None" = None, *, images: bool = True) -> Views:
        """The pictures of `moments` of this episode taken again, in another look, with masks; changes nothing."""
        ...

    def instruct(self, look: "Look") -> str:
        """The instruction of the task when things have the colours of `look`."""
        ...

    def edit(self, look: "Look", changed: Sequence[str]) -> str:
        """What to ask for to get `look`, which changes the elements `changed`, from a picture of this task."""
        ...


class Benchmark(NamedTuple):
    """A list of tasks."""

    train_tasks: tuple[str, ...]
    heldout_tasks: tuple[str, ...] = ()
    """Tasks that training never sees."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All of the list."""
        return self.train_tasks + self.heldout_tasks


@dataclass(frozen=True, kw_only=True)
class Source:
    """A simulator: its tasks and robots, and which of the tasks training never sees."""

    name: str
    tasks: tuple[str, ...]
    """All; an episode's random stream depends on its task's place here, so new ones go to the end."""
    benchmarks: Mapping[str, Benchmark]
    """Lists of some or all of them by name, the default first."""
    robots: tuple[str, ...]
    """Names of embodiments."""
    make_scene: Callable[[str, str, int, tuple[str, ...]], Scene]
    """Builds the scene of (task, robot, pixels, cameras)."""
    package: str
    """What is imported of it."""
    extra: str
    """What `pip install 'worldmodel[...]'` brings it with."""
    cameras: tuple[str, ...] = ("front", "wrist")
    """All that its scenes have."""
    dressable: bool = True
    """Whether its scenes are `Dressable`."""
    prepare: Callable[[], object] | None = None
    """Called once before several processes build scenes."""

    @property
    def train_tasks(self) -> tuple[str, ...]:
        """Those that training sees, of the default list."""
        return next(iter(self.benchmarks.values())).train_tasks

    def told_apart(self, robots: Sequence[str]) -> tuple[str | None, ...]:
        """`robots` as closed-loop trials name them: None where there is but one, which needs no name."""
        return tuple(robots) if len(self.robots) > 1 else (None,)
