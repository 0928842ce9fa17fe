"""Feed spoilt datasets to everything that reads: `python tests/fuzz_shards.py --minutes 10 [--targets NAME ...]`.

Only the errors of `worldmodel.errors` may come out, within seconds, without a warning, a file outside of the target
folder that is written or read, a connection, or memory beyond a bound. Whatever else happens is printed with the
smallest example that hypothesis finds and ends the run with status 1; `tests/test_fuzz.py` tries a few examples of
every target. The run is cut into slices; before each, it waits while the file named by --wait-while exists.
"""

import argparse
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from worldmodel.errors import WorldModelError

SECONDS = 20
"""For one example; the slowest sound ones take a fraction of one."""
MEMORY = 3 << 30
"""Bytes of address space that examples may take beyond what the process has when it starts."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MOVES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
_watched: list[tuple[Path, list[str]]] = []


class EscapeError(AssertionError):
    """Something left the folder that an example may touch, or took too long."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    folder, found = _watched[-1]
    if any(isinstance(a, str) and ("__pycache__" in a or ".hypothesis" in a) for a in arguments[:1]):
        return
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        path, writes = Path(os.path.realpath(os.fsdecode(arguments[0]))), bool(int(arguments[2] or 0) & _WRITING)
        inside = path.is_relative_to(folder / "example")
        if (writes and not inside and not str(path).startswith("/dev/")) or path.is_relative_to(folder / "outside"):
            found.append(f"{'wrote' if writes else 'read'} {path}")
    elif event in _MOVES:
        for name in [a for a in arguments[:2] if isinstance(a, str | os.PathLike)]:
            if not Path(os.path.abspath(name)).is_relative_to(folder / "example"):
                found.append(f"{event} {name}")
    elif event in ("socket.connect", "subprocess.Popen", "os.system"):
        found.append(event)


sys.addaudithook(_audit)


@contextmanager
def contained() -> Iterator[Path]:
    """A folder for one example beside one that it must not touch; only our own errors are let pass."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name).resolve()
        (folder / "example").mkdir()
        (folder / "outside").mkdir()
        for secret in ("secret.hdf5", "secret.mp4", "secret.bin"):
            (folder / "outside" / secret).write_bytes(b"secret" * 50)
        before = _listing(folder)
        found: list[str] = []

        def late(*_: object) -> None:
            raise EscapeError(f"still not done after {SECONDS} s")

        old = signal.signal(signal.SIGALRM, late)
        signal.alarm(SECONDS)
        started = time.monotonic()
        _watched.append((folder, found))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                yield folder / "example"
        except WorldModelError:
            pass
        finally:
            _watched.pop()
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)
        if found or _listing(folder) != before:
            raise EscapeError(f"outside of the folder: {found or 'a file was made or changed'}")
        if time.monotonic() - started > SECONDS:
            raise EscapeError(f"took {time.monotonic() - started:.0f} s")


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    paths = [*folder.iterdir(), *(folder / "outside").rglob("*")]
    return sorted((str(p), 0, 0) if p.is_dir() else (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


def attempt(target: Callable[[st.DataObject, Path], None], data: st.DataObject) -> None:
    """One example of `target`. Raises what must not come out."""
    with contained() as folder:
        target(data, folder)


def slice_of(target: Callable[[st.DataObject, Path], None], seconds: float, number: int) -> int:
    """Examples of `target` until the time is over, and how many. Raises the error of the smallest that fails."""
    end, count = time.monotonic() + seconds, 0

    def example(data: st.DataObject) -> None:
        nonlocal count
        count += 1
        attempt(target, data)

    rules = settings(
        max_examples=40,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    while time.monotonic() < end:
        number += 1
        seed(f"{target.__name__} {number}")(rules(given(st.data())(example)))()
    return count


def main() -> int:
    """Fuzz for the given time; 1 if something came out."""
    from fuzz_targets import TARGETS, prepare

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="of fuzzing (default: %(default)s)")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--wait-while", type=Path, default=None, help="a file during whose life nothing is done")
    options = parser.parse_args()
    import logging

    logging.disable(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare()
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, resource.RLIM_INFINITY))
    left, count, escapes = 60 * options.minutes, Counter[str](), 0
    seconds = min(60.0, max(left / len(options.targets), 1.0)) / 2
    while left > 0:
        for name in options.targets:
            while options.wait_while is not None and options.wait_while.exists():
                time.sleep(2)
            started = time.monotonic()
            try:
                count[name] += slice_of(TARGETS[name], min(seconds, left), round(1000 * left))
            except Exception:
                escapes += 1
                print(f"--- {name}\n{traceback.format_exc(limit=-12)}", flush=True)
            left -= time.monotonic() - started
            if left <= 0:
                break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{sum(count.values())} examples {dict(count)}, {escapes} escapes, peak {peak:.0f} MB")
    return 1 if escapes else 0


if __name__ == "__main__":
    sys.exit(main())
