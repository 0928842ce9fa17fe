"""The sources of demonstrations by name; nothing heavy is imported before a scene is built."""

from collections.abc import Sequence

from worldmodel.data.sources import metaworld_tasks, robosuite_tasks
from worldmodel.data.sources.metaworld_benchmarks import BENCHMARKS
from worldmodel.data.sources.scene import Benchmark, Scene, Source
from worldmodel.errors import ConfigError


def _metaworld(task: str, robot: str, pixels: int, cameras: tuple[str, ...]) -> Scene:
    from worldmodel.data.sources.metaworld import MetaworldScene

    return MetaworldScene(task, pixels=pixels, cameras=cameras)


def _robosuite(task: str, robot: str, pixels: int, cameras: tuple[str, ...]) -> Scene:
    from worldmodel.data.sources.robosuite import RobosuiteScene

    return RobosuiteScene(task, robot=robot, pixels=pixels, cameras=cameras)


def _pusht(task: str, robot: str, pixels: int, cameras: tuple[str, ...]) -> Scene:
    from worldmodel.data.sources.pusht import PushtScene

    return PushtScene(task, pixels=pixels, cameras=cameras)


def _choose_opengl() -> None:
    # Once, so that the workers need not probe.
    from worldmodel.data.sources.rendering import select_gl_backend

    select_gl_backend()


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="metaworld",
            tasks=tuple(metaworld_tasks.TASKS),
            benchmarks=BENCHMARKS,
            robots=("sawyer",),
            make_scene=_metaworld,
            package="metaworld",
            extra="sim",
            prepare=_choose_opengl,
        ),
        Source(
            name="robosuite",
            tasks=tuple(robosuite_tasks.TASKS),
            benchmarks={
                "single_arm": Benchmark(tuple(robosuite_tasks.TRAIN_TASKS), tuple(robosuite_tasks.HELDOUT_TASKS))
            },
            robots=tuple(robosuite_tasks.ROBOTS),
            make_scene=_robosuite,
            package="robosuite",
            extra="robosuite",
            prepare=_choose_opengl,
        ),
        Source(
            name="pusht",
            tasks=("push-t",),
            benchmarks={"pusht": Benchmark(("push-t",))},
            robots=("pusht",),
            make_scene=_pusht,
            package="gym_pusht",
            extra="pusht",
            cameras=("front",),
            dressable=False,
        ),
    )
}


def simulated(robots: Sequence[str]) -> tuple[Source, list[str]]:
    """The first source that has any of `robots`, and those of them that it has.

    Raises:
        ConfigError: none has any.
    """
    for source in SOURCES.values():
        if found := [robot for robot in robots if robot in source.robots]:
            return source, found
    known = "; ".join(f"{source.name}: {', '.join(source.robots)}" for source in SOURCES.values())
    raise ConfigError(f"closed loop: robots {list(robots)} are not simulated here ({known})")
