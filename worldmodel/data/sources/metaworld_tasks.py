"""Meta-World's ML10 split: tasks, written instructions, and how each task reports its object's orientation."""

from collections.abc import Mapping
from typing import NamedTuple


class TaskInfo(NamedTuple):
    """What the source must know about one task beyond Meta-World's own code."""

    instruction: str
    quaternion: str | None
    """Order of `_get_quat_objects()`: Meta-World mixes MuJoCo's wxyz with SciPy's xyzw; None where it returns zeros."""
    coloured: tuple[str, ...] = ()
    """Elements whose colours the instruction names, in the order of the words."""
    things: Mapping[str, str] = {}
    """What the task's elements are called, where other than their names."""


TRAIN_TASKS: dict[str, TaskInfo] = {
    "reach-v3": TaskInfo(
        "Move the gripper to the red target in the air.", "xyzw", ("goal",), things={"object": "puck"}
    ),
    "push-v3": TaskInfo(
        "Push the red puck across the table to the green target.", "xyzw", ("object", "goal"), things={"object": "puck"}
    ),
    "pick-place-v3": TaskInfo(
        "Pick up the red puck and carry it to the blue target.", "xyzw", ("object", "goal"), things={"object": "puck"}
    ),
    "door-open-v3": TaskInfo(
        "Open the door of the safe by pulling its handle.", "xyzw", things={"object": "door", "fixture": "safe"}
    ),
    "drawer-close-v3": TaskInfo(
        "Push the open green drawer until it is closed.",
        None,
        ("object",),
        things={"object": "drawer", "fixture": "cabinet"},
    ),
    "button-press-topdown-v3": TaskInfo(
        "Press the red button down from above.", "wxyz", ("object",), things={"object": "button", "fixture": "box"}
    ),
    "peg-insert-side-v3": TaskInfo(
        "Pick up the green peg and insert it into the hole from the side.",
        "xyzw",
        ("object",),
        things={"object": "peg", "fixture": "wall with the hole"},
    ),
    "window-open-v3": TaskInfo(
        "Slide the window open by its handle.", None, things={"object": "window", "fixture": "frame"}
    ),
    "sweep-v3": TaskInfo("Sweep the wooden block off the table to the right.", "wxyz", things={"object": "block"}),
    "basketball-v3": TaskInfo(
        "Pick up the basketball and drop it through the hoop.",
        "wxyz",
        things={"object": "basketball", "fixture": "hoop"},
    ),
}
"""ML10's ten training tasks."""

HELDOUT_TASKS: dict[str, TaskInfo] = {
    "drawer-open-v3": TaskInfo(
        "Pull the green drawer open by its handle.",
        "wxyz",
        ("object",),
        things={"object": "drawer", "fixture": "cabinet"},
    ),
    "door-close-v3": TaskInfo(
        "Close the door of the safe by pushing it.", "xyzw", things={"object": "door", "fixture": "safe"}
    ),
    "shelf-place-v3": TaskInfo(
        "Pick up the blue block and place it on the shelf.",
        "xyzw",
        ("object",),
        things={"object": "block", "fixture": "shelf"},
    ),
    "sweep-into-v3": TaskInfo("Sweep the wooden block into the hole in the table.", "xyzw", things={"object": "block"}),
    "lever-pull-v3": TaskInfo(
        "Pull the lever up until it points upwards.", "xyzw", things={"object": "lever", "fixture": "stand"}
    ),
}
"""ML10's five test tasks, which no training step may see."""

TASKS: dict[str, TaskInfo] = {**TRAIN_TASKS, **HELDOUT_TASKS}
