"""Read a map (see `mapping`) from YAML or plain values, without trust: it may have come with the dataset."""

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from worldmodel.data.formats.mapping import ASK, AXES, MAPS, Mapping
from worldmodel.errors import ConfigError

_DEEPEST = 8
"""Lists and mappings within one another; the deepest that a map has are the rows of a matrix."""


def load_mapping(path: str | Path) -> Mapping:
    """The mapping in a YAML file.

    Raises:
        ConfigError: unreadable, an unknown name, a value of the wrong kind, or a `???` that nobody filled in.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        _check_plain(yaml.parse(text, yaml.SafeLoader), str(path))
        value = yaml.safe_load(text)
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({error})") from error
    return make_mapping(value, str(path))


def _check_plain(events: Iterable[Any], where: str) -> None:
    """Refuse what makes a few lines of YAML stand for anything: references, types by tag, endless nesting."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) or depth > _DEEPEST:
            raise ConfigError(
                f"{where}: line {event.start_mark.line + 1}: a map holds plain names, numbers, lists and mappings, "
                "without references (*), tags (!) and deep nesting"
            )


def make_mapping(value: Any, where: str) -> Mapping:
    """The mapping that plain values describe; `where` says where they stand.

    Raises:
        ConfigError: as `load_mapping`.
    """
    _check_nesting(value, where)
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a mapping must be YAML of the form `embodiment: ...`, got {type(value).__name__}")
    if open_questions := _asked(value):
        raise ConfigError(
            f"{where}: {', '.join(open_questions)}: still {ASK}; fill in what is true of this dataset "
            f"(maps: {' or '.join(MAPS)}; axes: {' or '.join(AXES)}), or leave that entry out and list its field "
            "under ignore"
        )
    return _built(_longhand(value), Mapping, where)


def _built(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`: a dataclass of `mapping`, a list, a dictionary, a plain type, or one of them or None.

    Raises:
        ConfigError: something in it is of another kind, unknown or missing; `where` grows into its place.
    """
    if isinstance(kind, UnionType):
        return None if value is None else _built(value, next(k for k in get_args(kind) if k is not NoneType), where)
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
        if unknown := [name for name in value if name not in known]:
            raise ConfigError(f"{where}: unknown name {unknown[0]!r}; known: {', '.join(known)}")
        if missing := [name for name, needed in known.items() if needed and name not in value]:
            raise ConfigError(f"{where}: {missing[0]} is missing; it must be given")
        hints = get_type_hints(kind)
        return kind(**{name: _built(item, hints[name], f"{where}: {name}") for name, item in value.items()})
    if get_origin(kind) is list and isinstance(value, list):
        return [_built(item, get_args(kind)[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _built(item, get_args(kind)[1], f"{where}.{key}") for key, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    if kind is float and number and isinstance(value, int | float):
        return float(value)
    if kind is str and (number or isinstance(value, str)):
        return str(value)
    if kind in (bool, int) and type(value) is kind and abs(value) < 1e15:
        return value
    # Not the value itself where it may be endless: not even a whole number can always be written out.
    shown = repr(value) if number or isinstance(value, str | bool | None) else f"a {type(value).__name__}"
    wanted = "a mapping" if is_dataclass(kind) else getattr(get_origin(kind) or kind, "__name__", kind)
    raise ConfigError(f"{where}: {shown[:80]} must be {wanted}")


def _check_nesting(value: Any, where: str) -> None:
    """Refuse plain values that are nested too deeply for what follows, and names that are no texts."""
    inner = [value]
    for _ in range(_DEEPEST + 1):
        named = [v for v in inner if isinstance(v, dict)]
        if any(not isinstance(key, str) for mapping in named for key in mapping):
            raise ConfigError(f"{where}: every name in a map must be text; put it in quotes")
        inner = [i for v in named for i in v.values()] + [i for v in inner if isinstance(v, list) for i in v]
    if inner:
        raise ConfigError(f"{where}: nested more than {_DEEPEST} deep, which no map is")


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
    if isinstance(value.get("success"), bool):
        value["success"] = {"value": value["success"]}
    if isinstance(value.get("instruction"), str):
        value["instruction"] = {"text": value["instruction"]}
    return value


def to_yaml(value: dict[str, Any]) -> str:
    """`value` as YAML with short lists on one line, ready to save as a map."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
