"""What readers of HDF5 datasets share: opening, finding and reading, with our errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import ConfigError, DataError, WorldModelError

SUFFIXES = (".hdf5", ".h5")
_RATIO = 1100
"""No filter of HDF5's own compresses better: what exceeds it is made up from a fill value when it is read."""


def hdf5_files(path: Path, what: str) -> list[Path]:
    """`path` itself, or the HDF5 files below it, numbers in their names in numerical order.

    Raises:
        DataError: there are none; `what` says what they should hold.
    """
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()]
    if not files:
        raise DataError(f"{path}: no file named *.hdf5 or *.h5 below it; expected {what}")
    return sorted(files, key=lambda file: numbers_last(file.relative_to(path).as_posix()))


def numbers_last(name: str) -> list[tuple[str, int, str]]:
    """Sort key under which `demo_2` comes before `demo_10`."""
    parts = [(text, digits.lstrip("0")) for text, digits in re.findall(r"(\D*)(\d*)", name)]
    return [(text, len(digits), digits) for text, digits in parts]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The HDF5 file at `path`, for reading.

    Raises:
        ConfigError: h5py is not installed.
        DataError: the file, or what is read of it inside the block, is damaged.
    """
    try:
        import h5py
    except ImportError as error:
        raise ConfigError('reading HDF5 needs the extra "formats": pip install "worldmodel[formats]"') from error
    try:
        # Without locks: datasets often lie on read-only or network folders that refuse them.
        with h5py.File(path, "r", locking=False) as file:
            _check_links(path, path.stat().st_mtime_ns)
            yield file
    except WorldModelError:
        raise
    # What h5py raises for a damaged object depends on the kind of damage.
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a readable HDF5 file ({error}); restore it from a copy") from error


@cache
def _check_links(path: Path, changed: int) -> None:
    """Refuse a file with links into other files, once for each state of it: every shard of an import opens it."""
    import h5py

    def fault(name: str, link: Any) -> str | None:
        if isinstance(link, h5py.ExternalLink):
            return f"{path}: {name!r} is a link to {link.filename!r}; copy what it leads to into this file"
        return None if name.encode("utf-8", "ignore").decode() == name else f"{path}: name {name!r} is no UTF-8"

    with h5py.File(path, "r", locking=False) as file:
        # An error raised inside would not come through; what is returned ends the visit.
        if (message := file.visititems_links(fault)) is not None:
            raise DataError(message)


def subgroup(parent: Any, name: str, where: str) -> Any:
    """The group `name` of `parent`, or None if there is nothing of that name.

    Raises:
        DataError: it is a dataset.
    """
    import h5py

    item = parent.get(name)
    if item is not None and not isinstance(item, h5py.Group):
        raise DataError(f"{where}: {name} must be a group, got {type(item).__name__}")
    return item


def strings(group: Any, name: str, where: str) -> list[str]:
    """The list of strings in the dataset `name`.

    Raises:
        DataError: missing, or not strings.
    """
    values = [text(value) for value in np.atleast_1d(dataset(group, name, where)[()]).tolist()]
    if None in values:
        raise DataError(f"{where}: {name}: must hold names")
    return [value for value in values if value is not None]


def datasets(group: Any) -> dict[str, Any]:
    """All datasets with a shape below `group` by path."""
    import h5py

    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape is not None:
            found[name] = item

    group.visititems(note)
    return found


def dataset(group: Any, name: str, where: str) -> Any:
    """The dataset `name` of `group`.

    Raises:
        DataError: it is missing; lists what is there.
    """
    import h5py

    item = group.get(name)
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        raise DataError(f"{where}: dataset {name!r} is missing; it has {sorted(datasets(group))}")
    if item.external or item.is_virtual:
        raise DataError(f"{where}: {name}: its values lie in other files; copy them into this one")
    if item.nbytes > _RATIO * max(item.id.get_storage_size(), 1 << 16):
        raise DataError(f"{where}: {name}: {item.nbytes} bytes, most of which were never written; record it again")
    return item


def vector(group: Any, name: str, length: int, where: str) -> np.ndarray:
    """(length, ...) float32, the numeric dataset `name`.

    Raises:
        DataError: missing, not numeric or of another length.
    """
    item = dataset(group, name, where)
    if item.dtype.kind not in "fiub":
        raise DataError(f"{where}: {name}: type {item.dtype}, must be numeric")
    check_rows(item, name, length, where)
    with np.errstate(over="ignore"):  # what becomes infinite is named when the episode is checked
        return np.asarray(item[()], np.float32)


def pictures(group: Any, name: str, length: int, where: str) -> np.ndarray:
    """(length, h, w, 3) uint8, the uncompressed pictures `name`.

    Raises:
        DataError: missing, of another length, or no RGB pictures of 8 bits.
    """
    item = dataset(group, name, where)
    if item.ndim != 4 or item.shape[3] != 3 or item.dtype != np.uint8:
        raise DataError(f"{where}: {name}: {item.dtype} of shape {item.shape}; pictures must be uint8 (T, h, w, 3)")
    check_rows(item, name, length, where)
    return item[()]


def check_rows(item: Any, name: str, length: int, where: str) -> None:
    """Raise `DataError` unless the dataset has one row per step."""
    if not item.shape or item.shape[0] != length:
        rows = item.shape[0] if item.shape else "no"
        raise DataError(f"{where}: {name}: {rows} rows, the episode has {length} steps; both must agree")


def text(value: Any) -> str | None:
    """The string in an attribute or scalar dataset, or None if it holds something else."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(-1)[0]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None
