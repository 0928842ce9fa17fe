"""Meta-World's ML10 split: tasks, written instructions, and how each task reports its object's orientation."""

from typing import NamedTuple


class TaskInfo(NamedTuple):
    """What the source must know about one task beyond Meta-World's own code."""

    instruction: str
    quaternion: str | None
    """Order of `_get_quat_objects()`: Meta-World mixes MuJoCo's wxyz with SciPy's xyzw; None where it returns zeros."""
    coloured: tuple[str, ...] = ()
    """Elements whose colours the instruction names, in the order of the words."""


TRAIN_TASKS: dict[str, TaskInfo] = {
    "reach-v3": TaskInfo("Move the gripper to the red target in the air.", "xyzw", ("goal",)),
    "push-v3": TaskInfo("Push the red puck across the table to the green target.", "xyzw", ("object", "goal")),
    "pick-place-v3": TaskInfo("Pick up the red puck and carry it to the blue target.", "xyzw", ("object", "goal")),
    "door-open-v3": TaskInfo("Open the door of the safe by pulling its handle.", "xyzw"),
    "drawer-close-v3": TaskInfo("Push the open green drawer until it is closed.", None, ("object",)),
    "button-press-topdown-v3": TaskInfo("Press the red button down from above.", "wxyz", ("object",)),
    "peg-insert-side-v3": TaskInfo(
        "Pick up the green peg and insert it into the hole from the side.", "xyzw", ("object",)
    ),
    "window-open-v3": TaskInfo("Slide the window open by its handle.", None),
    "sweep-v3": TaskInfo("Sweep the wooden block off the table to the right.", "wxyz"),
    "basketball-v3": TaskInfo("Pick up the basketball and drop it through the hoop.", "wxyz"),
}
"""ML10's ten training tasks."""

HELDOUT_TASKS: dict[str, TaskInfo] = {
    "drawer-open-v3": TaskInfo("Pull the green drawer open by its handle.", "wxyz", ("object",)),
    "door-close-v3": TaskInfo("Close the door of the safe by pushing it.", "xyzw"),
    "shelf-place-v3": TaskInfo("Pick up the blue block and place it on the shelf.", "xyzw", ("object",)),
    "sweep-into-v3": TaskInfo("Sweep the wooden block into the hole in the table.", "xyzw"),
    "lever-pull-v3": TaskInfo("Pull the lever up until it points upwards.", "xyzw"),
}
"""ML10's five test tasks, which no training step may see."""

TASKS: dict[str, TaskInfo] = {**TRAIN_TASKS, **HELDOUT_TASKS}
