"""The robosuite tasks and robots that demonstrations are made of: names, written instructions, what is held out."""

from typing import NamedTuple


class TaskInfo(NamedTuple):
    """What the source must know about one task beyond robosuite's own code."""

    instruction: str
    max_steps: int
    """Control steps after which an episode has failed."""
    coloured: tuple[str, ...] = ()
    """Elements whose colours the instruction names, in the order of the words."""


TRAIN_TASKS: dict[str, TaskInfo] = {
    "Lift": TaskInfo("Pick up the red cube and lift it off the table.", 120, ("object",)),
    "Stack": TaskInfo("Put the red cube on top of the green cube.", 200, ("object", "object2")),
    "Door": TaskInfo("Turn the handle down and pull the door open.", 250),
    "PickPlaceBread": TaskInfo("Pick up the loaf of bread and put it into its compartment.", 250),
    "PickPlaceCereal": TaskInfo("Pick up the box of cereal and put it into its compartment.", 250),
    "PickPlaceCan": TaskInfo("Pick up the red can and put it into its compartment.", 250, ("object",)),
}

HELDOUT_TASKS: dict[str, TaskInfo] = {
    "PickPlaceMilk": TaskInfo("Pick up the carton of milk and put it into its compartment.", 250),
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
