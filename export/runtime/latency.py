"""Latency of a graph in a control loop: percentiles, growth of memory, and what the contract of the artefact says."""

import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .golden import Feed, Golden

PERCENTILES = {"p50_ms": 50.0, "p99_ms": 99.0, "p99_9_ms": 99.9}

DRIVING = ("policy", "policy_step", "proposal")
"""Paths that a control loop waits for."""


def latency_contract(fps: float, replan: int, paths: Sequence[str]) -> dict[str, Any]:
    """What a control loop asks of those paths that answer with actions, called every `replan` control steps or oftener.

    The answer of a call is executed from the control step on in which its observation was made, so 99 of 100 calls must
    end within one control period. One that takes longer than the time between two calls can never be used.
    """
    period = 1000.0 / fps
    limits = {"p99_ms": period, "p99_9_ms": period * replan}
    driving = [name for name in paths if name in DRIVING]
    return {"control_period_ms": period, "replan": replan, "limits": limits, "paths": driving}


class Loop:
    """Calls a graph tick after tick on golden observations, its cache handed on as on a robot."""

    def __init__(self, session: onnxruntime.InferenceSession, golden: Golden) -> None:
        self._session = session
        self._feeds: list[Feed] = [feed for i in range(golden.examples) for feed in golden.feeds(i)]
        names = [row.name for row in session.get_outputs()]
        self._next = [(name, names.index(after)) for name, after in golden.next.items()]
        self._cache = golden.empty_cache()
        for feed in self._feeds:
            feed.update(self._cache)
        self._tick = 0

    def __call__(self) -> None:
        """One tick."""
        feed = self._feeds[self._tick % len(self._feeds)]
        feed.update(self._cache)
        answer = self._session.run(None, feed)
        for name, place in self._next:
            self._cache[name] = answer[place]
        self._tick += 1


def measure(
    tick: Callable[[], None], ticks: int, warm_up: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Percentiles of `ticks` calls in ms after `warm_up`, and how much memory they kept.

    `growth_bytes` is of the whole process over the measured calls, None where the system does not tell;
    `python_growth_bytes` is of Python's own objects over as many calls as the warm-up, which are not timed.
    """
    for _ in range(warm_up):
        tick()
    seconds = np.zeros(ticks)
    before = resident()
    for number in range(ticks):
        started = time.perf_counter()
        tick()
        seconds[number] = time.perf_counter() - started
        if progress is not None:
            progress(number + 1, ticks)
    after = resident()
    result: dict[str, Any] = {name: float(np.percentile(1000 * seconds, q)) for name, q in PERCENTILES.items()}
    growth = None if before is None or after is None else after - before
    return {"ticks": ticks, **result, "max_ms": 1000 * float(seconds.max()), "growth_bytes": growth} | {
        "python_growth_bytes": python_growth(tick, warm_up)
    }


def python_growth(tick: Callable[[], None], ticks: int) -> int:
    """Bytes of Python objects that `ticks` calls leave behind."""
    if tracemalloc.is_tracing():
        return 0
    tracemalloc.start()
    try:
        tick()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(ticks):
            tick()
        return max(0, tracemalloc.get_traced_memory()[0] - before)
    finally:
        tracemalloc.stop()


def resident() -> int | None:
    """Bytes of memory that the process holds; None where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def progress_bar(label: str) -> Callable[[int, int], None] | None:
    """Draws a bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        return None
    begun = time.monotonic()

    def draw(done: int, total: int) -> None:
        step = max(1, total // 100)
        if done % step and done != total:
            return
        filled = 30 * done // total
        left = (time.monotonic() - begun) / done * (total - done)
        end = "\n" if done == total else ""
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r{label} [{bar}] {done}/{total}, {left:4.0f} s left", end=end, file=sys.stderr, flush=True)

    return draw
