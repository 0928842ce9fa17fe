"""The formats that can be imported. Readers are imported when used, so that the command line's help stays instant."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from worldmodel.errors import ConfigError, DataError

if TYPE_CHECKING:
    from worldmodel.data.formats.base import Source


def _lerobot(path: Path) -> "Source":
    from worldmodel.data.formats.lerobot import LeRobotSource

    return LeRobotSource(path)


def _aloha(path: Path) -> "Source":
    from worldmodel.data.formats.aloha import AlohaSource

    return AlohaSource(path)


def _robomimic(path: Path) -> "Source":
    from worldmodel.data.formats.robomimic import RobomimicSource

    return RobomimicSource(path)


def _rlds(path: Path) -> "Source":
    from worldmodel.data.formats.rlds import RldsSource

    return RldsSource(path)


def _ego(path: Path) -> "Source":
    from worldmodel.data.formats.ego import EgoSource

    return EgoSource(path)


FORMATS: dict[str, Callable[[Path], "Source"]] = {
    "lerobot": _lerobot,
    "aloha": _aloha,
    "robomimic": _robomimic,
    "rlds": _rlds,
    "ego": _ego,
}
"""Format name -> opener."""


def open_source(name: str, path: str | Path) -> "Source":
    """The dataset at `path` in format `name`.

    Raises:
        ConfigError: unknown format.
        DataError: nothing at `path`, or not a dataset of that format.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown format {name!r}; known: {', '.join(sorted(FORMATS))}")
    if not Path(path).exists():
        raise DataError(f"{path}: no such file or folder; give the {name} dataset's path")
    return FORMATS[name](Path(path))
