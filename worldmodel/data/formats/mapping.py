"""How the names of a foreign dataset become ours: a small YAML file, checked against what the dataset has.

Frames, directions and axes are never guessed: an entry that needs one says `???` until the user fills it in.

    embodiment: so100
    fps: null                       # null: as the source says
    instruction: {field: task}      # or {text: "Pick up the cube."}
    task: null                      # null: the instruction, shortened
    success: true                   # or {field: next.success}, whose last value counts; left out: the source's word
    split: {heldout: 0.1}           # share of episodes, by hash; or {source: {train: train, val: heldout_episodes}}
    cameras: {front: observation.images.front}      # ours: theirs; or {field: ..., size: [256, 256]}
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
from pathlib import Path
from typing import Any

from worldmodel.data.formats.base import Field, Fields
from worldmodel.errors import ConfigError

MAPS = ("camera_to_base", "base_to_camera")
AXES = ("opencv", "opengl")
LAYOUTS = ("matrix", "position_quaternion_xyzw", "position_quaternion_wxyz")
PAIRINGS = ("time", "number")
SPLITS = ("train", "heldout_episodes", "heldout_tasks", "heldout_robots")
HELDOUT = 0.1
"""Share of held-out episodes that a suggested map asks for."""
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
    """A camera; `size` = [height, width] resizes its pictures and scales its intrinsics."""

    field: str
    size: list[int] | None = None


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
    """See the module's text. Made by `load_mapping` or `suggest`, completed and checked by `resolve`."""

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


def load_mapping(path: str | Path) -> Mapping:
    """The mapping in a YAML file.

    Raises:
        ConfigError: unreadable, an unknown name, a value of the wrong kind, or a `???` that nobody filled in.
    """
    import yaml

    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
    return make_mapping(value, str(path))


def make_mapping(value: Any, where: str) -> Mapping:
    """The mapping that plain values describe; `where` says where they stand.

    Raises:
        ConfigError: as `load_mapping`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a mapping must be YAML of the form `embodiment: ...`, got {type(value).__name__}")
    if open_questions := _asked(value):
        raise ConfigError(
            f"{where}: {', '.join(open_questions)}: still {ASK}; fill in what is true of this dataset "
            f"(maps: {' or '.join(MAPS)}; axes: {' or '.join(AXES)}), or leave that entry out and list its field "
            "under ignore"
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Mapping), _longhand(value))
        mapping = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    assert isinstance(mapping, Mapping)
    return mapping


def _asked(value: Any, path: str = "") -> list[str]:
    """Paths of the values that are still `???`."""
    if value == ASK:
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in _asked(item, f"{path}.{key}" if path else str(key))]


def _longhand(value: dict[str, Any]) -> dict[str, Any]:
    """`front: name` may stand for `front: {field: name}`, and `success: true` for `success: {value: true}`."""
    value = dict(value)
    for name in ("cameras", "intrinsics"):
        if isinstance(value.get(name), dict):
            value[name] = {k: {"field": v} if isinstance(v, str) else v for k, v in value[name].items()}
    for name in ("proprio", "action"):
        if isinstance(value.get(name), str):
            value[name] = [value[name]]
        if isinstance(value.get(name), list):
            value[name] = [{"field": v} if isinstance(v, str) else v for v in value[name]]
    for name in ("camera_to_base", "intrinsics"):
        if isinstance(value.get(name), dict):
            value[name] = {k: _decimal(v) for k, v in value[name].items()}
    if isinstance(value.get("success"), bool):
        value["success"] = {"value": value["success"]}
    if isinstance(value.get("instruction"), str):
        value["instruction"] = {"text": value["instruction"]}
    return value


def _decimal(entry: Any) -> Any:
    """`entry` with a matrix of floats where somebody wrote whole numbers."""
    if not isinstance(entry, dict) or not isinstance(entry.get("matrix"), list):
        return entry
    rows = [[float(v) if isinstance(v, int) else v for v in r] if isinstance(r, list) else r for r in entry["matrix"]]
    return entry | {"matrix": rows}


def to_yaml(value: dict[str, Any]) -> str:
    """`value` as YAML with short lists on one line, ready to save as a map."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


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
