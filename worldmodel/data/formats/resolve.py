"""Check a map against what a dataset has and complete it, so that nothing is left to find out while reading."""

import copy
import re
from collections.abc import Iterator
from typing import Any

from worldmodel.data.formats.base import Fields
from worldmodel.data.formats.map_file import make_mapping, to_yaml
from worldmodel.data.formats.mapping import (
    AXES,
    COLORS,
    LAYOUTS,
    MAPS,
    PAIRINGS,
    SPLITS,
    WIDEST,
    Columns,
    Mapping,
    ignored,
    listing,
    width,
)
from worldmodel.data.formats.suggest import suggest
from worldmodel.errors import ConfigError

_SIDE = 8192
"""Pixels of a picture that a map may ask for."""
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_POSE_WIDTHS = {"matrix": (12, 16), "position_quaternion_xyzw": (7,), "position_quaternion_wxyz": (7,)}


def resolve(fields: Fields, mapping: Mapping | None = None) -> Mapping:
    """`mapping`, or the dataset's own, or the suggested one, complete: slices, column names, rate.

    Raises:
        ConfigError: something is unmapped, unknown, ambiguous or does not fit; the message says each, lists what the
            dataset has and prints a suggested map.
    """
    if mapping is None and fields.mapping is not None:
        mapping = make_mapping(fields.mapping, f"{fields.where}: its own map")
    if mapping is None:
        suggestion = suggest(fields)
        if suggestion.remarks:
            raise ConfigError(_message("the names of this dataset do not say everything", suggestion.remarks, fields))
        mapping = make_mapping(suggestion.mapping, f"{fields.where}: suggested map")
    mapping = copy.deepcopy(mapping)
    if problems := list(_problems(mapping, fields)):
        raise ConfigError(_message("the map does not fit this dataset", problems, fields))
    return mapping


def _message(headline: str, problems: list[str], fields: Fields) -> str:
    lines = [f"{fields.where}: {headline}:", *(f"  - {problem}" for problem in problems), listing(fields)]
    lines += ["a suggested map; save it, answer every ???, and give it with --map:", to_yaml(suggest(fields).mapping)]
    return "\n".join(lines)


def _problems(mapping: Mapping, fields: Fields) -> Iterator[str]:
    """Every problem of `mapping`; completes it on the way."""
    mapping.fps = mapping.fps or fields.fps
    if not mapping.embodiment:
        yield "embodiment: empty; name the robot"
    if not mapping.fps or not 0 < mapping.fps < 1e5:
        yield f"fps: {mapping.fps}; the source does not say, so the map must (steps per second)"
    if mapping.pair_video not in PAIRINGS:
        yield f"pair_video: {mapping.pair_video!r} is none of {', '.join(PAIRINGS)}"
    yield from _texts(mapping, fields)
    yield from _split(mapping, fields)
    for name, camera in mapping.cameras.items():
        yield from _own_name(f"cameras.{name}", name)
        if camera.field not in fields.cameras:
            yield _no_such(f"cameras.{name}", camera.field, fields, list(fields.cameras))
        if camera.size is not None and (
            len(camera.size) != 2 or not 1 <= min(camera.size) <= max(camera.size) <= _SIDE
        ):
            yield f"cameras.{name}: size {camera.size} must be [height, width], each from 1 to {_SIDE}"
        if camera.color not in COLORS:
            yield f"cameras.{name}: color {camera.color!r} is none of {', '.join(COLORS)}"
    for kind in ("proprio", "action"):
        columns: list[Columns] = getattr(mapping, kind)
        for i, entry in enumerate(columns):
            yield from _columns(f"{kind}[{i}]", entry, fields)
        names = [name for entry in columns for name in entry.names]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"{kind}: names {twice} are used twice; give names of your own"
    yield from _touch(mapping, fields)
    yield from _poses(mapping, fields)
    yield from _points(mapping, fields)
    if mapping.success.field is not None and mapping.success.field not in fields.vectors:
        yield _no_such("success", mapping.success.field, fields, list(fields.vectors))
    used = mapping.vectors() | mapping.images()
    for name in (*fields.cameras, *fields.vectors):
        if name not in used and not ignored(name, mapping):
            yield f"{name}: not used by the map; use it, or list it under ignore"
    if not (mapping.cameras or mapping.proprio or mapping.action):
        yield "the map uses no camera, no proprio and no action"


def _texts(mapping: Mapping, fields: Fields) -> Iterator[str]:
    field = mapping.instruction.field
    if field is not None and field not in fields.texts:
        yield f"instruction: no text field {field!r}; the data has {list(fields.texts)}, or give {{text: ...}}"
    if field is None and not mapping.instruction.text and not mapping.task:
        yield "instruction: the source has none, so the map must give {text: ...} or at least a task"


def _split(mapping: Mapping, fields: Fields) -> Iterator[str]:
    split = mapping.split
    if split.source is None:
        if not 0 <= split.heldout < 1:
            yield f"split: heldout {split.heldout} must be at least 0 and below 1"
        return
    if split.heldout:
        yield "split: give either heldout or source, not both"
    if set(split.source) != set(fields.splits):
        yield f"split: source names {sorted(split.source)}, the data has {sorted(fields.splits)}; both must agree"
    if wrong := sorted(set(split.source.values()) - set(SPLITS)):
        yield f"split: {wrong} are no splits of ours; those are {', '.join(SPLITS)}"


def _columns(where: str, entry: Any, fields: Fields) -> Iterator[str]:
    """Replace a part by its field, check the slice, and fill in the names of `Columns`."""
    start, stop = 0, None
    if (part := fields.parts.get(entry.field)) is not None and entry.field not in fields.vectors:
        entry.field, start, stop = part.field, part.start, part.stop
    if entry.field not in fields.vectors:
        yield _no_such(where, entry.field, fields, [*fields.vectors, *fields.parts])
        return
    field = fields.vectors[entry.field]
    if width(field) > WIDEST:
        yield f"{where}: {entry.field} has {width(field)} columns, at most {WIDEST} are read"
        return
    count = (width(field) if stop is None else stop) - start
    first, last = (0, count) if entry.slice is None else [*entry.slice, 0, 0][:2]
    if not 0 <= first < last <= count or (entry.slice is not None and len(entry.slice) != 2):
        yield f"{where}: slice {entry.slice} must be [first, last + 1] within the {count} columns of {entry.field}"
        return
    entry.slice = [start + first, start + last]
    if not isinstance(entry, Columns):
        return
    theirs = field.names if len(field.names) == width(field) else ()
    theirs = theirs or tuple(f"{entry.field}.{i}" for i in range(width(field)))
    entry.names = entry.names or list(theirs[entry.slice[0] : entry.slice[1]])
    entry.units = entry.units or ["not stated"] * (last - first)
    for kind, values in (("names", entry.names), ("units", entry.units)):
        if len(values) != last - first:
            yield f"{where}: {len(values)} {kind} for {last - first} columns of {entry.field}"


def _touch(mapping: Mapping, fields: Fields) -> Iterator[str]:
    for name, wrench in mapping.wrench.items():
        yield from _own_name(f"wrench.{name}", name)
        yield from _columns(f"wrench.{name}", wrench, fields)
        if wrench.slice is not None and wrench.slice[1] - wrench.slice[0] != 6:
            yield f"wrench.{name}: {wrench.slice[1] - wrench.slice[0]} columns; a wrench has 6: fx fy fz tx ty tz"
        if not wrench.frame:
            yield f"wrench.{name}: frame is empty; name the frame the six numbers are expressed in"
    if len(shapes := {tuple(tactile.shape) for tactile in mapping.tactile.values()}) > 1:
        yield f"tactile: grids of several shapes {sorted(shapes)}; all taxel sensors must have one"
    for name, tactile in mapping.tactile.items():
        yield from _own_name(f"tactile.{name}", name)
        yield from _columns(f"tactile.{name}", tactile, fields)
        cells = 1
        for size in tactile.shape:
            cells *= size
        if (
            len(tactile.shape) != 3
            or min(tactile.shape) < 1
            or (tactile.slice is not None and tactile.slice[1] - tactile.slice[0] != cells)
        ):
            yield f"tactile.{name}: shape {tactile.shape} must be [channels, rows, columns] of {tactile.field}"
        elif tactile.channels and len(tactile.channels) != tactile.shape[0]:
            yield f"tactile.{name}: {len(tactile.channels)} channel names for {tactile.shape[0]} channels"


def _poses(mapping: Mapping, fields: Fields) -> Iterator[str]:
    for name, pose in mapping.camera_to_base.items():
        where = f"camera_to_base.{name}"
        if name not in mapping.intrinsics:
            yield f"{where}: a pose needs intrinsics.{name} too: {{field: ...}} or {{matrix: [[fx, 0, cx], ...]}}"
        for value, known in ((pose.maps, MAPS), (pose.axes, AXES), (pose.layout, LAYOUTS)):
            if value not in known:
                yield f"{where}: {value!r} is none of {', '.join(known)}"
        yield from _either(where, pose, (4, 4), _POSE_WIDTHS.get(pose.layout, ()), fields)
    for name, intrinsics in mapping.intrinsics.items():
        yield from _either(f"intrinsics.{name}", intrinsics, (3, 3), (4, 9), fields)
    for name in dict.fromkeys((*mapping.camera_to_base, *mapping.intrinsics)):
        if name not in mapping.cameras:
            yield f"camera_to_base and intrinsics: no camera {name!r}; the map has {list(mapping.cameras)}"


def _either(where: str, entry: Any, size: tuple[int, int], widths: tuple[int, ...], fields: Fields) -> Iterator[str]:
    if (entry.field is None) == (entry.matrix is None):
        yield f"{where}: give either field or matrix"
    elif entry.matrix is not None:
        if [len(row) for row in entry.matrix] != [size[1]] * size[0]:
            yield f"{where}: matrix must be {size[0]}x{size[1]}"
    elif entry.field not in fields.vectors:
        yield _no_such(where, entry.field, fields, list(fields.vectors))
    elif (count := width(fields.vectors[entry.field])) not in widths:
        yield f"{where}: {entry.field} has {count} columns; expected {' or '.join(str(n) for n in widths)}"


def _points(mapping: Mapping, fields: Fields) -> Iterator[str]:
    points = mapping.points
    if points is None:
        return
    if points.frame != "base":
        yield f"points: frame {points.frame!r}; they must be in the robot's base frame (frame: base)"
    if points.field not in fields.vectors or width(fields.vectors[points.field]) % 3:
        yield _no_such("points", points.field, fields, list(fields.vectors)) + ", with columns x y z per point"
        return
    if (count := width(fields.vectors[points.field]) // 3) > WIDEST:
        yield f"points: {points.field} has {count} points, at most {WIDEST} are read"
        return
    points.names = points.names or [f"point_{i}" for i in range(count)]
    if len(points.names) != count:
        yield f"points: {len(points.names)} names for {count} points"
    if points.visible is not None and points.visible not in fields.vectors:
        yield _no_such("points.visible", points.visible, fields, list(fields.vectors))
    elif points.visible is not None and (flags := width(fields.vectors[points.visible])) != count:
        yield f"points.visible: {points.visible} has {flags} columns for {count} points"


def _own_name(where: str, name: str) -> Iterator[str]:
    if not _NAME.fullmatch(name):
        yield f"{where}: our names hold letters, digits, _ and - only"


def _no_such(where: str, name: str, fields: Fields, known: list[str]) -> str:
    if name in fields.missing:
        return f"{where}: {name!r} is declared but missing: {fields.missing[name]}"
    return f"{where}: the data has no {name!r}; it has {known}"
