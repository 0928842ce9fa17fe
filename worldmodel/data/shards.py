"""Random access to the episodes of a dataset: a reader that seeks in the shards by their index."""

import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.cache import ByteCache
from worldmodel.data.few import few_demonstrations
from worldmodel.data.frames import FrameTable
from worldmodel.data.index import INDEX, check_index
from worldmodel.data.plain import read_json
from worldmodel.data.schema import Episode, decode
from worldmodel.data.sections import Entry, Section, ShardFiles
from worldmodel.errors import DataError, RemoteError, SampleError

_TABLE_BYTES = 1 << 26
"""Bound of the memory for places of pictures; an episode of 100 steps and two cameras takes under 2 kB of it."""


class ShardReader:
    """Random access to the episodes of a dataset folder.

    Args:
        root: folder with `index.json` and shards, or the URL of one (see `remote`).
        cache_bytes: bound of the cache of decoded episodes.
        check_sizes: False opens a damaged dataset too, to examine it.
        episodes: leaves so many training demonstrations per task (see `few`); None leaves all.
        seed: of their choice.

    Raises:
        DataError: no index, another schema version, a shard whose size is not the index's, or fewer demonstrations than
            `episodes` asks for.
    """

    root: Path
    """The folder, or where the index of a URL was fetched to."""

    def __init__(
        self,
        root: str | Path,
        *,
        cache_bytes: int = 1 << 30,
        check_sizes: bool = True,
        episodes: int | None = None,
        seed: int = 0,
    ) -> None:
        self._files = ShardFiles(root)
        self.root = self._files.root
        self.index = read_json(
            self.root / INDEX,
            "the index of a dataset; `python -m worldmodel.data generate` writes it when all shards are finished",
        )
        check_index(self.index, str(self.root / INDEX))
        self._cache = ByteCache(cache_bytes)
        self._tables = ByteCache(_TABLE_BYTES)
        self.entries: list[Entry] = []
        self.heldout_tasks: tuple[str, ...] = tuple(self.index["heldout_tasks"])
        start = 0
        for shard in self.index["shards"]:
            self._files.records[shard["name"]] = shard
            # Of a URL, sizes and checksums are checked when a shard is fetched.
            if check_sizes and not self._files.remote:
                self.check_size(shard)
            for fields in shard["entries"]:
                self.entries.append(Entry(**fields, shard=shard["name"], start=start))
                start += fields["length"]
        self.frames = start
        """Frames of the whole dataset: `Entry.start` counts up to it."""
        self.chosen = None if episodes is None else f"{episodes} per task, seed {seed}"
        """Which training demonstrations were left, in words; None for all."""
        if episodes is not None:
            self.entries = few_demonstrations(self.entries, episodes, seed)
        self._variants: dict[str, list[int]] = {}
        for i, entry in enumerate(self.entries):
            if entry.variant_of is not None:
                self._variants.setdefault(entry.variant_of, []).append(i)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, i: int, *, images: bool = True) -> Episode:
        """Episode `i`, checked; without `images` its `rgb` and `masks` may be empty. Do not write to its arrays.

        Raises:
            SampleError: naming shard, key and field of what is wrong.
        """
        return self._cache.get((i, images), lambda: self._decode(i, images), lambda episode: episode.nbytes)

    def pictures(self, i: int, camera: str, steps: Sequence[int]) -> np.ndarray:
        """(n, 3, h, w) uint8: pictures of `camera` at `steps` of episode `i`; no others are decoded.

        Raises:
            SampleError: naming shard, key and member of what is wrong.
        """
        return self._frames(i, "rgb", camera, steps)

    def masks(self, i: int, camera: str, steps: Sequence[int]) -> np.ndarray:
        """(n, h, w) uint8: masks of `camera` at `steps` of episode `i`; what their values mean is in `schema`.

        Raises:
            SampleError: naming shard, key and member of what is wrong.
        """
        return self._frames(i, "mask", camera, steps)

    def variants(self, episode_id: str) -> list[int]:
        """The episodes that show the motion of the one with that id in another look, in the order of the index."""
        return list(self._variants.get(episode_id, ()))

    def _frames(self, i: int, kind: str, camera: str, steps: Sequence[int]) -> np.ndarray:
        entry = self.entries[i]
        with ExitStack() as stack:
            file: list[io.BufferedReader] = []

            def at(offset: int) -> io.BufferedReader:
                if not file:
                    file.append(stack.enter_context(self._files.open(entry)))
                file[0].seek(entry.offset + offset)
                return file[0]

            def read(offset: int, size: int) -> bytes:
                return at(offset).read(size)

            def fill(offset: int, out: np.ndarray) -> None:
                if (count := at(offset).readinto(out.data)) != out.nbytes:
                    raise DataError(f"rgb.{camera}.npy: truncated, {count} of {out.nbytes} bytes at {offset}")

            try:
                table = self._table(i)
                if kind == "rgb" and camera in table.raw:
                    return table.raw[camera].read(camera, steps, fill)  # the system caches what needs no decoding
                if kind == "rgb" and camera in table.videos:
                    video = self._cache.get((i, camera), partial(table.video, camera, entry.length, read), _nbytes)
                    if max(steps) >= len(video):
                        raise DataError(f"rgb.{camera}.mp4: {len(video)} frames, step {max(steps)} is asked for")
                    return video[steps]
                one = table.picture if kind == "rgb" else table.mask
                found = [
                    self._cache.get((i, kind, camera, step), partial(one, camera, step, read), _nbytes)
                    for step in steps
                ]
                if len(sizes := {frame.shape for frame in found}) > 1:
                    raise DataError(f"{kind}.{camera}: pictures of several sizes {sorted(sizes)}; all must be one size")
            except (RemoteError, SampleError):
                raise
            except (DataError, OSError) as error:
                raise SampleError(f"{entry.shard}: key {entry.key}: {error}") from error
        return np.stack(found)

    def _table(self, i: int, section: Section | None = None) -> FrameTable:
        """Where the pictures of episode `i` lie; found once by reading its section, which checks that too."""

        def make() -> FrameTable:
            return FrameTable.of(*(section or self._files.section(self.entries[i])))

        return self._tables.get(i, make, lambda table: table.nbytes)

    def members(self, i: int) -> dict[str, bytes]:
        """The stored members of episode `i` by extension."""
        data, places = self._files.section(self.entries[i])
        return {name: data[offset : offset + size] for name, (offset, size) in places.items()}

    def path(self, shard: str) -> Path:
        """Where a shard lies on this machine; one of a URL is fetched first."""
        return self._files.path(shard)

    def records(self) -> list[dict[str, Any]]:
        """The entries as plain dictionaries."""
        return [asdict(entry) for entry in self.entries]

    def _decode(self, i: int, images: bool) -> Episode:
        entry = self.entries[i]
        where = f"{entry.shard}: key {entry.key}"
        data, places = self._files.section(entry)
        members = {
            name: data[offset : offset + size]
            for name, (offset, size) in places.items()
            if images or not name.startswith(("rgb.", "mask."))
        }
        try:
            episode = decode(members, where, images=images)
        except DataError as error:
            raise SampleError(str(error)) from error
        self._table(i, (data, places))
        for name in ("episode_id", "length", "task", "split", "embodiment", "success"):
            if episode.meta[name] != getattr(entry, name):
                raise SampleError(
                    f"{where}: meta.json: {name} {episode.meta[name]!r}, the index says "
                    f"{getattr(entry, name)!r}; write the index again"
                )
        linked = (episode.meta.get("variant_of"), episode.meta.get("variant", 0))
        if linked != (entry.variant_of, entry.variant):
            raise SampleError(
                f"{where}: meta.json: variant_of and variant {linked}, the index says "
                f"{(entry.variant_of, entry.variant)}; write the index again"
            )
        return episode

    def check_size(self, shard: dict[str, Any]) -> None:
        """Raise `DataError` if the file of `shard` (a record of the index) is not as long as the index says."""
        path = self.path(shard["name"])
        size = path.stat().st_size if path.is_file() else -1
        if size == shard["bytes"]:
            return
        if size < 0:
            raise DataError(f"{path}: shard is missing; the index lists it with {shard['bytes']} bytes")
        lost = [e["key"] for e in shard["entries"] if e["offset"] + e["size"] > size]
        first = f", first damaged key {lost[0]}" if lost else ""
        raise DataError(
            f"{path}: {size} bytes, the index says {shard['bytes']}{first}: the shard is truncated or "
            "altered; restore it or generate it again"
        )


def _nbytes(array: np.ndarray) -> int:
    return array.nbytes
