"""The robosuite tasks and robots that demonstrations are made of: names, written instructions, what is held out."""

from collections.abc import Mapping
from typing import NamedTuple


class TaskInfo(NamedTuple):
    """What the source must know about one task beyond robosuite's own code."""

    instruction: str
    max_steps: int
    """Control steps after which an episode has failed."""
    coloured: tuple[str, ...] = ()
    """Elements whose colours the instruction names, in the order of the words."""
    things: Mapping[str, str] = {}
    """What the task's elements are called, where other than their names."""


TRAIN_TASKS: dict[str, TaskInfo] = {
    "Lift": TaskInfo("Pick up the red cube and lift it off the table.", 120, ("object",), things={"object": "cube"}),
    "Stack": TaskInfo(
        "Put the red cube on top of the green cube.",
        200,
        ("object", "object2"),
        things={"object": "upper cube", "object2": "lower cube"},
    ),
    "Door": TaskInfo(
        "Turn the handle down and pull the door open.",
        250,
        things={"object": "handle", "object2": "door", "fixture": "door frame"},
    ),
    "PickPlaceBread": TaskInfo(
        "Pick up the loaf of bread and put it into its compartment.", 250, things={"object": "bread"}
    ),
    "PickPlaceCereal": TaskInfo(
        "Pick up the box of cereal and put it into its compartment.", 250, things={"object": "box of cereal"}
    ),
    "PickPlaceCan": TaskInfo(
        "Pick up the red can and put it into its compartment.", 250, ("object",), things={"object": "can"}
    ),
}

HELDOUT_TASKS: dict[str, TaskInfo] = {
    "PickPlaceMilk": TaskInfo(
        "Pick up the carton of milk and put it into its compartment.", 250, things={"object": "carton of milk"}
    ),
}
"""An object that training never sees, in a skill that it does."""

TASKS: dict[str, TaskInfo] = {**TRAIN_TASKS, **HELDOUT_TASKS}

ROBOTS: dict[str, str] = {
    "panda": "Panda",
    "ur5e": "UR5e",
    "sawyer_osc": "Sawyer",
    "kinova3": "Kinova3",
    "iiwa": "IIWA",
}
"""Embodiments and robosuite's names of their arms. `sawyer` is Meta-World's, which is driven in another way."""
