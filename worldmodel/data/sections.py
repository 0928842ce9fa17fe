"""The files of a dataset, here or behind a URL, and the checked byte ranges of its samples."""

import io
import os
import tarfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldmodel.data.remote import RemoteFolder, is_url
from worldmodel.errors import SampleError

Section = tuple[bytes, dict[str, tuple[int, int]]]
"""The bytes of a sample, and offset and size in them of every member by extension."""


@dataclass(frozen=True)
class Entry:
    """One episode of a dataset, as the index knows it."""

    key: str
    shard: str
    offset: int  # bytes from the start of the shard
    size: int  # bytes of all members with their headers
    crc32: int  # of that byte range
    episode_id: str
    length: int  # steps
    task: str
    split: str
    embodiment: str
    success: bool
    initial_state: str  # digest of the first step's points and proprioception, for the leakage check
    variant_of: str | None = None  # episode_id of the episode whose motion this one shows in another look
    variant: int = 0  # its number among the variants of that one, from 1; 0 where it is none
    start: int = 0  # number of the episode's first frame, counted over the whole dataset


class ShardFiles:
    """The shards of `root`, a folder or the URL of one; `records` are those of its index by name."""

    def __init__(self, root: str | Path) -> None:
        self._remote = RemoteFolder(str(root)) if is_url(root) else None
        self.root = Path(root) if self._remote is None else self._remote.folder
        self.records: dict[str, dict[str, Any]] = {}

    @property
    def remote(self) -> bool:
        """Whether the shards are fetched."""
        return self._remote is not None

    def path(self, shard: str) -> Path:
        """Where a shard lies on this machine; one of a URL is fetched first."""
        if self._remote is None:
            return self.root / shard
        record = self.records[shard]
        return self._remote.fetch(shard, record["sha256"], record["bytes"])

    def open(self, entry: Entry) -> io.BufferedReader:
        """The shard of an entry, to read. Raises `SampleError` if it cannot be opened."""
        try:
            # Between the answer and the opening another process may have made room for its own shards.
            for _ in range(0 if self._remote is None else 3):
                with suppress(FileNotFoundError):
                    return open(self.path(entry.shard), "rb")
            return open(self.path(entry.shard), "rb")
        except OSError as error:
            raise SampleError(f"{entry.shard}: key {entry.key}: cannot be read ({error})") from error

    def section(self, entry: Entry) -> Section:
        """The byte range of an entry, held against its checksum, and where its members lie.

        Raises:
            SampleError: truncated, altered, or no plain tar of this sample.
        """
        where = f"{entry.shard}: key {entry.key}"
        try:
            with self.open(entry) as shard:
                # Asked for more than there is, a read first makes room for it.
                there = os.fstat(shard.fileno()).st_size - entry.offset
                shard.seek(entry.offset)
                data = shard.read(min(entry.size, max(there, 0)))
        except OSError as error:
            raise SampleError(f"{where}: cannot be read ({error})") from error
        if len(data) != entry.size:
            raise SampleError(f"{where}: truncated, {len(data)} of {entry.size} bytes; restore or regenerate the shard")
        if zlib.crc32(data) != entry.crc32:
            raise SampleError(f"{where}: altered, its checksum is not the index's; restore or regenerate the shard")
        places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                for member in archive:
                    key, _, extension = member.name.partition(".")
                    plain = member.isfile() and not member.issparse() and "/" not in member.name
                    # A size below zero would lead back to where the tar began.
                    within = 0 <= member.size <= len(data) - member.offset_data
                    if key != entry.key or not plain or not within or extension in places:
                        raise SampleError(
                            f"{where}: unexpected member {member.name!r}; every member must be a plain "
                            f"file named {entry.key}.<field>, and there once"
                        )
                    places[extension] = (member.offset_data, member.size)
        except (tarfile.TarError, ValueError, RecursionError) as error:
            raise SampleError(f"{where}: not a valid tar section ({error}); regenerate the shard") from error
        return data, places
