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


FORMATS: dict[str, Callable[[Path], "Source"]] = {"lerobot": _lerobot}
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
