"""Meta-World's tasks: written instructions, what each is about, and how it reports its object's orientation."""

from collections.abc import Mapping
from typing import NamedTuple


class TaskInfo(NamedTuple):
    """What the source must know about one task beyond Meta-World's own code."""

    instruction: str
    quaternion: str | None
    """Order of `_get_quat_objects()`: Meta-World mixes MuJoCo's wxyz with SciPy's xyzw; None where it returns zeros, or
    the orientation of a part against which the object turns."""
    coloured: tuple[str, ...] = ()
    """Elements whose colours the instruction names, in the order of the words."""
    things: Mapping[str, str] = {}
    """What the task's elements are called, where other than their names."""
    bodies: Mapping[str, str] = {}
    """Elements of bodies and all that hangs on them, where what moves is not the object or what stands no fixture."""
    goals: tuple[str, ...] = ("goal",)
    """Sites that mark the goal."""
    pace: float = 1.0
    """Share of full speed that the expert moves at: actions are held four times as long as it was written for, and some
    things it misses at full speed."""


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

OTHER_TASKS: dict[str, TaskInfo] = {
    "assembly-v3": TaskInfo(
        "Lift the wrench by its green handle and put its ring over the peg.",
        "wxyz",
        ("object",),
        things={"object": "wrench", "fixture": "peg"},
        goals=("pegTop",),
    ),
    "bin-picking-v3": TaskInfo(
        "Pick up the green block and put it into the blue bin.",
        "wxyz",
        ("object", "goal"),
        things={"object": "block", "goal": "target bin", "fixture": "other bin"},
        bodies={"bin_goal": "goal"},
        pace=0.5,
    ),
    "box-close-v3": TaskInfo(
        "Pick up the lid by its handle and close the box with it.",
        "wxyz",
        things={"object": "lid", "fixture": "box"},
    ),
    "button-press-topdown-wall-v3": TaskInfo(
        "Reach over the wall and press the red button down from above.",
        "wxyz",
        ("object",),
        things={"object": "button", "fixture": "box and the wall"},
    ),
    "button-press-v3": TaskInfo(
        "Press the red button on the front of the box.",
        "wxyz",
        ("object",),
        things={"object": "button", "fixture": "box"},
    ),
    "button-press-wall-v3": TaskInfo(
        "Reach over the wall and press the red button on the front of the box.",
        "wxyz",
        ("object",),
        things={"object": "button", "fixture": "box and the wall"},
    ),
    "coffee-button-v3": TaskInfo(
        "Press the button of the coffee machine.",
        "wxyz",
        things={"object": "button", "object2": "mug", "fixture": "coffee machine"},
        bodies={"obj": "object2"},
        goals=("coffee_goal",),
    ),
    "coffee-pull-v3": TaskInfo(
        "Pull the white mug away from the coffee machine to the green target.",
        "xyzw",
        ("object", "goal"),
        things={"object": "mug", "fixture": "coffee machine"},
        bodies={"cmbutton": "fixture"},
        goals=("mug_goal",),
    ),
    "coffee-push-v3": TaskInfo(
        "Push the white mug under the spout of the coffee machine.",
        "xyzw",
        ("object",),
        things={"object": "mug", "fixture": "coffee machine"},
        bodies={"cmbutton": "fixture"},
        goals=("mug_goal", "coffee_goal"),
    ),
    "dial-turn-v3": TaskInfo("Turn the dial by a quarter of a turn.", None, things={"object": "dial"}),
    "disassemble-v3": TaskInfo(
        "Pull the wrench off the peg by its green handle.",
        "wxyz",
        ("object",),
        things={"object": "wrench", "fixture": "peg"},
        goals=("pegTop",),
    ),
    "door-lock-v3": TaskInfo(
        "Lock the door of the safe by turning its lock down.",
        None,
        things={"object": "lock", "fixture": "safe"},
        goals=("goal_lock",),
    ),
    "door-unlock-v3": TaskInfo(
        "Unlock the door of the safe by turning its lock to the right.",
        None,
        things={"object": "lock", "fixture": "safe"},
        goals=("goal_unlock",),
    ),
    "faucet-close-v3": TaskInfo(
        "Close the faucet by turning its handle to the left.",
        None,
        things={"object": "handle", "fixture": "faucet"},
        goals=("goal_close",),
    ),
    "faucet-open-v3": TaskInfo(
        "Open the faucet by turning its handle to the right.",
        None,
        things={"object": "handle", "fixture": "faucet"},
        goals=("goal_open",),
    ),
    "hammer-v3": TaskInfo(
        "Pick up the hammer and drive the nail into the wooden block.",
        "wxyz",
        things={"object": "hammer", "object2": "nail", "fixture": "block"},
        bodies={"nail_link": "object2"},
    ),
    "hand-insert-v3": TaskInfo("Insert the gripper into the hole in the table.", "wxyz", things={"object": "block"}),
    "handle-press-side-v3": TaskInfo(
        "Press down the red handle of the box on the left.",
        None,
        ("object",),
        things={"object": "handle", "fixture": "box"},
    ),
    "handle-press-v3": TaskInfo(
        "Press down the red handle of the box in front.",
        None,
        ("object",),
        things={"object": "handle", "fixture": "box"},
    ),
    "handle-pull-side-v3": TaskInfo(
        "Pull up the red handle of the box on the left.",
        None,
        ("object",),
        things={"object": "handle", "fixture": "box"},
        pace=0.5,
    ),
    "handle-pull-v3": TaskInfo(
        "Pull up the red handle of the box in front.",
        None,
        ("object",),
        things={"object": "handle", "fixture": "box"},
    ),
    "peg-unplug-side-v3": TaskInfo(
        "Pull the plug out of its socket to the right.", "wxyz", things={"object": "plug", "fixture": "socket"}
    ),
    "pick-out-of-hole-v3": TaskInfo(
        "Pick the red puck out of the hole and lift it into the air.",
        "wxyz",
        ("object",),
        things={"object": "puck", "fixture": "board with the hole"},
        goals=(),
    ),
    "pick-place-wall-v3": TaskInfo(
        "Pick up the red puck and carry it over the wall to the blue target.",
        "xyzw",
        ("object", "goal"),
        things={"object": "puck", "fixture": "wall"},
    ),
    "plate-slide-back-side-v3": TaskInfo(
        "Slide the black puck out of the net to the right.",
        "xyzw",
        ("object",),
        things={"object": "puck", "fixture": "net"},
    ),
    "plate-slide-back-v3": TaskInfo(
        "Slide the black puck out of the net towards the robot.",
        "xyzw",
        ("object",),
        things={"object": "puck", "fixture": "net"},
    ),
    "plate-slide-side-v3": TaskInfo(
        "Slide the black puck to the left into the net.",
        "xyzw",
        ("object",),
        things={"object": "puck", "fixture": "net"},
    ),
    "plate-slide-v3": TaskInfo(
        "Slide the black puck forwards into the net.",
        "xyzw",
        ("object",),
        things={"object": "puck", "fixture": "net"},
    ),
    "push-back-v3": TaskInfo(
        "Pull the wooden block back to the green target.", "xyzw", ("goal",), things={"object": "block"}
    ),
    "push-wall-v3": TaskInfo(
        "Push the red puck around the wall to the green target.",
        "xyzw",
        ("object", "goal"),
        things={"object": "puck", "fixture": "wall"},
    ),
    "reach-wall-v3": TaskInfo(
        "Move the gripper over the wall to the red target.",
        "xyzw",
        ("goal",),
        things={"object": "puck", "fixture": "wall"},
    ),
    "soccer-v3": TaskInfo(
        "Push the soccer ball into the goal.", "xyzw", things={"object": "soccer ball", "fixture": "goal"}
    ),
    "stick-pull-v3": TaskInfo(
        "Put the blue stick through the handle of the thermos and pull it to the green target.",
        "xyzw",
        ("object", "goal"),
        things={"object": "stick", "object2": "thermos"},
        bodies={"object": "object2"},
    ),
    "stick-push-v3": TaskInfo(
        "Pick up the blue stick and push the thermos to the green target with it.",
        "xyzw",
        ("object", "goal"),
        things={"object": "stick", "object2": "thermos"},
        bodies={"object": "object2"},
    ),
    "window-close-v3": TaskInfo(
        "Slide the window closed by its handle.", None, things={"object": "window", "fixture": "frame"}
    ),
}
"""All others of Meta-World's fifty."""

TASKS: dict[str, TaskInfo] = {**TRAIN_TASKS, **HELDOUT_TASKS, **OTHER_TASKS}
