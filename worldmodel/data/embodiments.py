"""The registry of robots: what the numbers of an action and of a state mean, one YAML file per embodiment.

`configs/embodiments/NAME.yaml` holds `title`, `action` and `proprio` (`names`, `units`, optional `limits` and names of
those that are `fixed`; null where nothing is measured), `gripper` (`names` of the actions that move it, values when
`open` and when `closed`) and, for what may be commanded, an optional `envelope` (see `Envelope`). Data of an embodiment
that has an entry must have these names in this order, since episodes of one embodiment share one space; a robot that is
driven in another way is another embodiment. Data of embodiments without an entry are taken as they are.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.contracts import ClipSpec
from worldmodel.errors import ConfigError

REGISTRY = Path(__file__).parents[2] / "configs" / "embodiments"
_FIELDS = {"title", "action", "gripper", "proprio"}
CONTROLS = ("position", "velocity", "effort")
"""What the number of an action commands: where its joint goes, how fast it moves, or how hard it pushes."""
_SLACK = 0.01
"""Share of its range by which a value may pass a limit: encoders overshoot."""


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The dimensions of a vector, in order."""

    names: tuple[str, ...]
    units: tuple[str, ...]
    limits: tuple[tuple[float, float], ...] | None = None  # lowest and highest value of each; None where unknown
    fixed: tuple[str, ...] = ()  # names of those that never change on this robot


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """Which actions move a gripper, and their values at the ends of its stroke."""

    names: tuple[str, ...]
    open: float
    closed: float


@dataclass(frozen=True, kw_only=True)
class Joint:
    """What one action moves and how far that may go; None where there is no limit.

    Position, velocity and acceleration are those of the joint, in the unit that `measured` has, per second and per
    second squared. `rate` is the velocity that a command of 1 stands for; joints that are sent to positions have 1.
    """

    controls: str  # one of CONTROLS
    measured: str | None = None  # the dimension of proprioception that says where it is
    rate: float = 1.0
    position: tuple[float, float] | None = None
    velocity: float | None = None
    acceleration: float | None = None
    force: float | None = None  # largest size of an effort, in the unit of the action


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What a robot may be commanded beside the `limits` of its actions."""

    source: str  # where the figures come from
    contact: float | None  # N, at any wrench sensor; above it all motion is brought to rest
    joints: Mapping[str, Joint]  # by action name; those without an entry have the limits of their action alone


@dataclass(frozen=True, kw_only=True)
class Embodiment:
    """A robot under one kind of control; None stands for what it does not have."""

    name: str
    title: str
    action: Channels | None
    gripper: Gripper | None
    proprio: Channels | None
    envelope: Envelope | None = None


@cache
def load_embodiments(folder: Path = REGISTRY) -> Mapping[str, Embodiment]:
    """Every entry of the registry by name.

    Raises:
        ConfigError: no such folder, or an entry is not of the form above; names file and field.
    """
    import yaml

    if not folder.is_dir():
        raise ConfigError(f"{folder}: no registry of embodiments; it is a folder of YAML files, one per robot")
    registry = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not readable YAML ({error})") from error
        registry[path.stem] = _entry(content, path)
    return registry


def _entry(content: Any, path: Path) -> Embodiment:
    if not isinstance(content, dict) or set(content) - {"envelope"} != _FIELDS:
        has = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: must have the fields {sorted(_FIELDS)} (null for what is absent), it has {has}")
    action, proprio = (_channels(content[name], f"{path}: {name}") for name in ("action", "proprio"))
    gripper, values = None, content["gripper"]
    if values is not None:
        known = action.names if action else ()
        if not isinstance(values, dict) or set(values) != {"names", "open", "closed"}:
            raise ConfigError(f"{path}: gripper: must have names, open and closed, or be null")
        if unknown := [name for name in values["names"] if name not in known]:
            raise ConfigError(f"{path}: gripper: {unknown} are none of the actions {list(known)}")
        gripper = Gripper(names=tuple(values["names"]), open=float(values["open"]), closed=float(values["closed"]))
    envelope = _envelope(content.get("envelope"), action, proprio, f"{path}: envelope")
    return Embodiment(
        name=path.stem,
        title=str(content["title"]),
        action=action,
        gripper=gripper,
        proprio=proprio,
        envelope=envelope,
    )


def _envelope(values: Any, action: Channels | None, proprio: Channels | None, where: str) -> Envelope | None:
    if values is None:
        return None
    if not isinstance(values, dict) or set(values) != {"source", "contact", "joints"}:
        raise ConfigError(f"{where}: must have source, contact (N or null) and joints, or be absent")
    known = action.names if action else ()
    if unknown := [name for name in values["joints"] if name not in known]:
        raise ConfigError(f"{where}: {unknown} are none of the actions {list(known)}")
    joints = {name: _joint(entry, proprio, f"{where}: {name}") for name, entry in values["joints"].items()}
    contact = None if values["contact"] is None else float(values["contact"])
    return Envelope(source=str(values["source"]), contact=contact, joints=joints)


def _joint(values: Any, proprio: Channels | None, where: str) -> Joint:
    fields = Joint.__dataclass_fields__
    if not isinstance(values, dict) or "controls" not in values or set(values) - set(fields):
        raise ConfigError(f"{where}: must have controls and otherwise some of {', '.join(fields)}")
    kind, measured, known = values["controls"], values.get("measured"), proprio.names if proprio else ()
    if kind not in CONTROLS:
        raise ConfigError(f"{where}: controls {kind!r}, expected one of {', '.join(CONTROLS)}")
    if measured is not None and measured not in known:
        raise ConfigError(f"{where}: measured {measured!r} is none of the proprioception {list(known)}")
    numbers = {name: float(values[name]) for name in ("rate", "velocity", "acceleration", "force") if name in values}
    if wrong := [name for name, value in numbers.items() if not value > 0]:
        raise ConfigError(f"{where}: {wrong} must be above 0")
    pair = None
    if "position" in values:
        low, high = (float(value) for value in values["position"])
        pair = (low, high)
        if low >= high or (kind == "velocity" and measured is None) or kind == "effort":
            raise ConfigError(f"{where}: position must be [lowest, highest] of a joint whose position is known")
    return Joint(controls=kind, measured=measured, position=pair, **numbers)


def _channels(values: Any, where: str) -> Channels | None:
    if values is None:
        return None
    if not isinstance(values, dict) or not {"names", "units"} <= set(values) <= {"names", "units", "limits", "fixed"}:
        raise ConfigError(f"{where}: must have names, units and perhaps limits and fixed, or be null")
    names, units, limits = values["names"], values["units"], values.get("limits")
    if len(set(names)) != len(names) or len(units) != len(names) or len(limits or names) != len(names):
        raise ConfigError(
            f"{where}: {len(names)} names (each once), {len(units)} units and {len(limits or names)} limits must agree"
        )
    if limits is not None:
        limits = tuple((float(low), float(high)) for low, high in limits)
        if wrong := [name for name, (low, high) in zip(names, limits, strict=True) if low >= high]:
            raise ConfigError(f"{where}: limits of {wrong} must be [lowest, highest]")
    fixed = tuple(values.get("fixed", ()))
    if unknown := [name for name in fixed if name not in names]:
        raise ConfigError(f"{where}: fixed {unknown} are none of {list(names)}")
    return Channels(names=tuple(names), units=tuple(str(unit) for unit in units), limits=limits, fixed=fixed)


_UNSAID = re.compile(r".*\.\d+|not stated")
"""Names and units that an import gives to columns whose source has none: they claim nothing."""


def metadata_faults(meta: Mapping[str, Any], registry: Mapping[str, Embodiment] | None = None) -> list[str]:
    """What in an episode's metadata contradicts the registry, as `field: what is wrong; what would be right`."""
    entry = (load_embodiments() if registry is None else registry).get(meta["embodiment"])
    if entry is None:
        return []
    found = []
    for kind in ("action", "proprio"):
        channels: Channels | None = getattr(entry, kind)
        if kind in meta.get("absent", ()):
            continue
        if channels is None:
            found.append(f"{kind}: {entry.name!r} has none by the registry; name {kind!r} in meta.json's absent")
            continue
        for field, right in (("names", channels.names), ("units", channels.units)):
            value = meta.get(f"{kind}_{field}")
            if value and tuple(value) != right and not all(_UNSAID.fullmatch(str(said)) for said in value):
                found.append(
                    f"{kind}_{field}: {list(value)}, the registry has {list(right)} for {entry.name!r}; bring the data "
                    "to that, or give the robot under this control a name of its own"
                )
    return found


def beyond_limits(embodiment: str, action: np.ndarray | None) -> list[str]:
    """Actions (T, D) outside the registry's limits, as `field: what is wrong; what would be right`."""
    entry = load_embodiments().get(embodiment)
    if entry is None or entry.action is None or entry.action.limits is None or action is None:
        return []
    limits = np.array(entry.action.limits)
    if action.shape[1:] != (len(limits),):
        return []
    slack = _SLACK * (limits[:, 1] - limits[:, 0])
    outside = (action < limits[:, 0] - slack) | (action > limits[:, 1] + slack)
    found = []
    for d in np.flatnonzero(outside.any(0)):
        step = int(np.flatnonzero(outside[:, d])[0])
        found.append(
            f"action: {entry.action.names[d]} is {action[step, d]:.4g} at step {step}, outside the registry's "
            f"{list(entry.action.limits[d])} for {embodiment!r}; bring it to the unit {entry.action.units[d]!r}"
        )
    return found


def check_embodiments(spec: ClipSpec, data: Iterable[str], where: str, *, complete: bool = True) -> None:
    """Hold the embodiments of training data against those of a spec.

    Args:
        data: embodiments that the data have.
        where: the datasets, for messages.
        complete: whether the data must have every embodiment of the spec.

    Raises:
        ConfigError: the data have one that the spec lacks or, if complete, the spec names one without data.
    """
    have = sorted(set(data))
    lacking = [name for name in have if name not in spec.embodiments]
    unused = [name for name in spec.embodiments if name not in have] if complete else []
    if lacking or unused:
        parts = [f"{lacking} of the data are not in the spec"] if lacking else []
        parts += [f"{unused} of the spec have no data"] if unused else []
        raise ConfigError(
            f"{where}: embodiments do not fit: {' and '.join(parts)}; the data have {have}, ClipSpec.embodiments is "
            f"{list(spec.embodiments)}"
        )
