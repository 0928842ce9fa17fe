"""Datasets behind a URL (`https://`, `s3://`, `gs://`, anything fsspec opens): fetched whole into a bounded cache.

The cache hands out paths of local files, so nothing else knows where a dataset lies. It is one folder for all datasets:
`$WORLDMODEL_CACHE` or `~/.cache/worldmodel`, of at most `$WORLDMODEL_CACHE_BYTES` bytes of shards (100 GB by default),
the least recently used leaving first. Shards are kept by their sha256, so an altered dataset never mixes with an old
one. Several processes may share the folder: a file is fetched by one of them under a lock and appears by rename.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worldmodel.errors import ConfigError, RemoteError, SampleError

log = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT = 0.5
"""Seconds before the second attempt; every further wait is twice as long."""
LIMIT = 100_000_000_000
_STALE = 86_400
"""Seconds after which what a killed process reserved is given back."""


def is_url(root: str | Path) -> bool:
    """Whether a dataset root is to be fetched rather than opened."""
    return "://" in str(root)


class _AbsentError(RemoteError):
    """Asking again would not help."""


class RemoteFolder:
    """A dataset behind `url`, of which files are asked for by name.

    `folder` holds its index and statistics, fetched when this is made; shards are fetched when they are asked for.

    Raises:
        RemoteError: the index cannot be had; names URL and number of attempts.
        ConfigError: no fsspec backend for the URL, or a wrong size of the cache.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.cache = Path(os.environ.get("WORLDMODEL_CACHE") or Path.home() / ".cache" / "worldmodel")
        self.limit = _limit()
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder, self.shards = self.cache / "datasets" / name, self.cache / "shards"
        for folder in (self.folder, self.shards):
            folder.mkdir(parents=True, exist_ok=True)
        self._damaged: dict[str, str] = {}
        self._plain("index.json")
        try:
            self._plain("stats.json")
        except _AbsentError:
            # Whoever needs statistics says that there are none.
            (self.folder / "stats.json").unlink(missing_ok=True)

    def fetch(self, name: str, sha256: str, size: int) -> Path:
        """Path of a local copy of shard `name`, which stays until others need its room.

        Raises:
            RemoteError: it cannot be had; names URL and number of attempts.
            SampleError: what the URL holds is not what the index says.
            ConfigError: it is larger than the whole cache.
        """
        path = self.shards / f"{sha256}.tar"
        if self._used(path):
            return path
        if name in self._damaged:
            raise SampleError(self._damaged[name])
        if size > self.limit:
            raise ConfigError(
                f"{self.url}/{name}: {size} bytes do not fit the cache of {self.limit}; raise WORLDMODEL_CACHE_BYTES"
            )
        with _lock(self.shards / f"{sha256}.lock"):
            if self._used(path):
                return path
            reserved = path.with_suffix(".reserved")
            with _lock(self.shards / "room.lock"):
                self._make_room(size)
                # A file with a hole takes no disk, and others see how much is spoken for.
                with open(reserved, "wb") as file:
                    file.truncate(size)
            try:
                self._download(name, path, sha256)
            except SampleError as error:
                self._damaged[name] = str(error)
                raise
            finally:
                reserved.unlink(missing_ok=True)
        return path

    def _used(self, path: Path) -> bool:
        """Whether the file is there; notes that it is in use."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> None:
        held = []
        for path in self.shards.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".reserved" and time.time() - status.st_mtime > _STALE:
                path.unlink(missing_ok=True)
            elif path.suffix in (".tar", ".reserved"):
                held.append((status.st_mtime, status.st_size, path))
        used = sum(bytes_ for _, bytes_, _ in held)
        for _, bytes_, path in sorted(held):
            if used + size <= self.limit:
                return
            if path.suffix == ".tar":
                path.unlink(missing_ok=True)
                used -= bytes_

    def _plain(self, name: str) -> None:
        with _lock(self.folder / f"{name}.lock"):
            self._download(name, self.folder / name, None)

    def _download(self, name: str, path: Path, sha256: str | None) -> None:
        """Bring a file here, in several attempts, each whole; `sha256` None takes what comes."""
        url, part, wait, digest = f"{self.url}/{name}", path.with_suffix(".part"), FIRST_WAIT, None
        for attempt in range(1, ATTEMPTS + 1):
            try:
                digest = _copy(url, part)
            except (FileNotFoundError, PermissionError) as error:
                raise _AbsentError(f"{url}: not there or not to be read, at attempt {attempt} ({error})") from error
            except ConfigError:
                raise
            except Exception as error:  # every fsspec backend has exceptions of its own
                failure = f"{type(error).__name__}: {error}"
                if attempt == ATTEMPTS:
                    raise RemoteError(
                        f"{url}: cannot be read, {attempt} attempts, the last: {failure}; check the address, the "
                        "network and the permissions"
                    ) from error
            else:
                if sha256 is None or digest == sha256:
                    os.replace(part, path)
                    return
                failure = f"its sha256 is {digest}, the index says {sha256}"
            finally:
                part.unlink(missing_ok=True)
            if attempt < ATTEMPTS:
                log.warning("%s: attempt %d of %d failed (%s)", url, attempt, ATTEMPTS, failure)
                time.sleep(wait)
                wait *= 2
        raise SampleError(
            f"{url}: altered, {ATTEMPTS} attempts gave sha256 {digest}, the index says {sha256}; upload the shard again"
        )


def _copy(url: str, path: Path) -> str:
    """Copies `url` to `path`; returns the sha256 of what arrived."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ConfigError(f"{url}: reading URLs needs fsspec: pip install 'worldmodel[remote]'") from error
    try:
        # Made anew each time: an fsspec file system must not cross a fork.
        system, remote = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: fsspec cannot open this kind of URL ({error}); install its backend") from error
    system.get_file(remote, str(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _limit() -> int:
    value = os.environ.get("WORLDMODEL_CACHE_BYTES", str(LIMIT))
    try:
        limit = int(value)
    except ValueError:
        limit = 0
    if limit <= 0:
        raise ConfigError(f"WORLDMODEL_CACHE_BYTES is {value!r}; it must be a whole number of bytes above 0")
    return limit


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the lock falls with its holder."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
