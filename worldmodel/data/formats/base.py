"""What a reader of a foreign format offers: the fields a dataset has, its episodes, and each episode as ours."""

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from worldmodel.data.schema import Episode
from worldmodel.errors import DataError

if TYPE_CHECKING:
    from worldmodel.data.formats.mapping import Mapping


class Ref(NamedTuple):
    """One episode of a source, small and picklable: its key here and what its reader needs to find it."""

    key: str  # unique in the dataset, the same on every machine; no dot, no slash (see `episode_key`)
    place: tuple[str | int, ...]  # the reader's own, for example (file name, group)
    split: str = ""  # the source's own split, "" if it has none


@dataclass(frozen=True)
class Field:
    """One per-step array of a source."""

    shape: tuple[int, ...]  # of one step; () is a scalar
    names: tuple[str, ...] = ()  # of its columns, if the source names them
    role: str = ""  # "proprio" or "action" where the format itself defines it; "" leaves it to the alias table


@dataclass(frozen=True)
class Part:
    """A name that a source gives to some columns of a field."""

    field: str
    start: int
    stop: int


@dataclass(frozen=True)
class Fields:
    """What a source dataset has. Bookkeeping (time stamps, episode numbers, rewards) is left out."""

    where: str  # folder or file, for messages
    fps: float | None = None  # None: the format does not say
    embodiment: str = ""  # "": the format does not say
    cameras: dict[str, tuple[int, int] | None] = field(default_factory=dict)  # name -> (height, width) if known
    vectors: dict[str, Field] = field(default_factory=dict)  # float per-step arrays
    parts: dict[str, Part] = field(default_factory=dict)  # names that a mapping may use for columns of vectors
    texts: tuple[str, ...] = ()  # fields with a sentence per episode
    splits: tuple[str, ...] = ()  # the source's own split names
    missing: dict[str, str] = field(default_factory=dict)  # declared by the source but not there -> why
    questions: dict[str, str] = field(default_factory=dict)  # name in the map that the user must fill in -> why
    mapping: dict[str, Any] | None = None  # a mapping that travels with the dataset itself


@dataclass
class Recording:
    """T steps of one episode under the source's own names; `assemble.assemble` makes an `Episode` of it."""

    where: str  # file and episode, for messages
    length: int  # T
    fps: float | None = None
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (T, *shape)
    images: dict[str, np.ndarray] = field(default_factory=dict)  # camera -> (T, h, w, 3) uint8, RGB
    texts: dict[str, str] = field(default_factory=dict)  # name -> sentence of this episode
    task: str = ""  # the source's own short name of the task
    success: bool | None = None  # None: the source does not say
    meta: dict[str, Any] = field(default_factory=dict)  # goes into the episode's metadata as it is


class Source(Protocol):
    """A dataset in a foreign format; `registry.open_source` opens it for every shard, so opening must be cheap."""

    def fields(self) -> Fields:
        """What the dataset has.

        Raises:
            DataError: not a dataset of this format, or damaged.
        """
        ...

    def refs(self) -> list[Ref]:
        """Every episode, always in the same order."""
        ...

    def read(self, ref: Ref, mapping: "Mapping") -> Episode:
        """The episode of `ref` under our names; `episode_id` and `split` are the caller's to set.

        Raises:
            DataError: naming file, episode and field of what is wrong.
        """
        ...


def episode_key(*parts: str | int) -> str:
    """A key of letters, digits, - and _ from a source's own names; numbers get six digits so that keys sort."""
    words = [f"{part:06d}" if isinstance(part, int) else slug(part) for part in parts]
    return "-".join(word for word in words if word)


def slug(text: str) -> str:
    """`text` in lower-case letters, digits, - and _ only."""
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-")


def inside(root: Path, relative: str, where: str) -> Path:
    """`root / relative`, where `relative` came out of a file that others wrote.

    Links that lie in the folder are followed: download caches are made of them.

    Raises:
        DataError: the path is absolute or climbs through `..`.
    """
    parts = PurePosixPath(relative.replace("\\", "/")).parts
    named = "\0" not in relative and all(len(part.encode()) < 256 for part in parts)
    if not parts or not named or ".." in parts or parts[0] == "/" or ":" in parts[0]:
        raise DataError(f"{where}: path {relative!r} leads out of {root}; only files inside the dataset are read")
    return root.joinpath(*parts)
