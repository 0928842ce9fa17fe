"""How the names of a foreign dataset become ours: a small YAML file, checked against what the dataset has.

Frames, directions and axes are never guessed: an entry that needs one says `???` until the user fills it in.

    embodiment: so100
    fps: null                       # null: as the source says
    instruction: {field: task}      # or {text: "Pick up the cube."}
    task: null                      # null: the instruction, shortened
    success: true                   # or {field: next.success}, whose last value counts; left out: the source's word
    split: {heldout: 0.1}           # share of episodes, by hash; or {source: {train: train, val: heldout_episodes}}
    cameras: {front: observation.images.front}      # ours: theirs; or {field: ..., size: [256, 256], color: bgr}
    proprio: [{field: observation.state, slice: [0, 6], names: [...], units: [...]}]
    action: [{field: action}]
    wrench: {wrist: {field: observation.wrench.wrist, frame: hand}}
    tactile: {left: {field: observation.tactile.left, shape: [3, 4, 4], channels: [...]}}
    camera_to_base: {front: {field: observation.extrinsics.front, maps: camera_to_base, axes: opencv}}
    intrinsics: {front: {matrix: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]}}
    points: {field: observation.points, visible: observation.visible, names: [...], frame: base}
    pair_video: time                # the frame at a row's time stamp; number: the frame of the same number
    ignore: [observation.temperature]               # fields left out on purpose; * and ? are wildcards
"""

import dataclasses
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from worldmodel.data.formats.base import Field, Fields

MAPS = ("camera_to_base", "base_to_camera")
AXES = ("opencv", "opengl")
LAYOUTS = ("matrix", "position_quaternion_xyzw", "position_quaternion_wxyz")
PAIRINGS = ("time", "number")
COLORS = ("rgb", "bgr")
SPLITS = ("train", "heldout_episodes", "heldout_tasks", "heldout_robots")
HELDOUT = 0.1
"""Share of held-out episodes that a suggested map asks for."""
WIDEST = 1 << 16
"""Columns of one field: each gets a name."""
ASK = "???"
"""What stands in a suggested map where only the user knows the answer."""


@dataclass
class Columns:
    """A field of the source, or the columns `slice` = [first, last + 1] of it when flattened per step."""

    field: str
    slice: list[int] | None = None
    names: list[str] = dataclasses.field(default_factory=list)
    units: list[str] = dataclasses.field(default_factory=list)


@dataclass
class Camera:
    """A camera; `size` = [height, width] resizes its pictures and scales its intrinsics, `color` is their order."""

    field: str
    size: list[int] | None = None
    color: str = "rgb"


@dataclass
class Wrench:
    """Six columns fx, fy, fz, tx, ty, tz in N and N·m, in the frame `frame`; `sign` says what acts on what."""

    field: str
    frame: str
    slice: list[int] | None = None
    sign: str = ""


@dataclass
class Tactile:
    """A taxel grid of `shape` = [channels, rows, columns] per step."""

    field: str
    shape: list[int]
    slice: list[int] | None = None
    channels: list[str] = dataclasses.field(default_factory=list)


@dataclass
class Pose:
    """A camera pose per step (`field`) or one for all (`matrix`, 4x4); the user says what it maps and its axes."""

    maps: str
    axes: str
    field: str | None = None
    matrix: list[list[float]] | None = None
    layout: str = "matrix"


@dataclass
class Intrinsics:
    """A 3x3 matrix in pixels of the source's picture, per step (`field`, also fx, fy, cx, cy) or one for all."""

    field: str | None = None
    matrix: list[list[float]] | None = None


@dataclass
class Points:
    """Tracked points (K, 3) in metres; `frame` must be the robot's base. Without `visible` all count as visible."""

    field: str
    frame: str
    names: list[str] = dataclasses.field(default_factory=list)
    visible: str | None = None


@dataclass
class Text:
    """A sentence per episode from `field`, or the same for all."""

    field: str | None = None
    text: str | None = None


@dataclass
class Success:
    """Whether an episode succeeded: the last value of `field`, or one for all, or the source's word (else yes)."""

    field: str | None = None
    value: bool | None = None


@dataclass
class Split:
    """Either a share of held-out episodes or the source's own splits, and tasks that training must not see."""

    heldout: float = 0.0
    source: dict[str, str] | None = None
    heldout_tasks: list[str] = dataclasses.field(default_factory=list)


@dataclass
class Mapping:
    """See the module's text. Made by `map_file`, suggested by `suggest`, completed and checked by `resolve`."""

    embodiment: str
    fps: float | None = None
    task: str | None = None
    instruction: Text = dataclasses.field(default_factory=Text)
    success: Success = dataclasses.field(default_factory=Success)
    split: Split = dataclasses.field(default_factory=Split)
    cameras: dict[str, Camera] = dataclasses.field(default_factory=dict)
    proprio: list[Columns] = dataclasses.field(default_factory=list)
    action: list[Columns] = dataclasses.field(default_factory=list)
    wrench: dict[str, Wrench] = dataclasses.field(default_factory=dict)
    tactile: dict[str, Tactile] = dataclasses.field(default_factory=dict)
    camera_to_base: dict[str, Pose] = dataclasses.field(default_factory=dict)
    intrinsics: dict[str, Intrinsics] = dataclasses.field(default_factory=dict)
    points: Points | None = None
    ignore: list[str] = dataclasses.field(default_factory=list)
    pair_video: str = "time"
    licence: str = ""

    def vectors(self) -> set[str]:
        """Names of the per-step arrays that a reader must load for this mapping."""
        entries: list[Any] = [*self.proprio, *self.action, *self.wrench.values(), *self.tactile.values()]
        entries += [*self.camera_to_base.values(), *self.intrinsics.values(), self.success]
        names = {entry.field for entry in entries if entry.field is not None}
        if self.points is not None:
            names |= {name for name in (self.points.field, self.points.visible) if name is not None}
        return names

    def images(self) -> set[str]:
        """Names of the source's cameras that a reader must load for this mapping."""
        return {camera.field for camera in self.cameras.values()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the empty ones, as YAML holds them."""
        return {name: value for name, value in asdict(self).items() if value not in (None, [], {}, "")}


def ignored(name: str, mapping: Mapping) -> bool:
    """True if `name` is left out on purpose."""
    return any(fnmatchcase(name, pattern) for pattern in mapping.ignore)


def width(shape: Field) -> int:
    """Columns of a field when flattened per step."""
    count = 1
    for size in shape.shape:
        count *= size
    return count


def listing(fields: Fields) -> str:
    """What the dataset has, one line per name, for messages."""
    lines = [f"{fields.where} has:"]
    for name, size in fields.cameras.items():
        lines.append(f"  camera  {name}" + (f"  {size[0]}x{size[1]}" if size else ""))
    for name, vector in fields.vectors.items():
        names = f"  [{', '.join(vector.names[:8])}{', ...' if len(vector.names) > 8 else ''}]" if vector.names else ""
        lines.append(f"  vector  {name}  {vector.shape}{names}")
    lines += [f"  part    {name}  = {p.field}[{p.start}:{p.stop}]" for name, p in fields.parts.items()]
    lines += [f"  text    {name}" for name in fields.texts]
    lines += [f"  split   {name}" for name in fields.splits]
    lines += [f"  missing {name}: {why}" for name, why in fields.missing.items()]
    return "\n".join(lines)
