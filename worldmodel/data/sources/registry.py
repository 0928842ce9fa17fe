"""The sources of demonstrations by name; nothing heavy is imported before a scene is built."""

from worldmodel.data.sources import metaworld_tasks, robosuite_tasks
from worldmodel.data.sources.metaworld_benchmarks import BENCHMARKS
from worldmodel.data.sources.scene import Benchmark, Scene, Source


def _metaworld(task: str, robot: str, pixels: int) -> Scene:
    from worldmodel.data.sources.metaworld import MetaworldScene

    return MetaworldScene(task, pixels=pixels)


def _robosuite(task: str, robot: str, pixels: int) -> Scene:
    from worldmodel.data.sources.robosuite import RobosuiteScene

    return RobosuiteScene(task, robot=robot, pixels=pixels)


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="metaworld",
            tasks=tuple(metaworld_tasks.TASKS),
            benchmarks=BENCHMARKS,
            robots=("sawyer",),
            make_scene=_metaworld,
        ),
        Source(
            name="robosuite",
            tasks=tuple(robosuite_tasks.TASKS),
            benchmarks={
                "single_arm": Benchmark(tuple(robosuite_tasks.TRAIN_TASKS), tuple(robosuite_tasks.HELDOUT_TASKS))
            },
            robots=tuple(robosuite_tasks.ROBOTS),
            make_scene=_robosuite,
        ),
    )
}
