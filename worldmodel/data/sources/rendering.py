"""Choose an off-screen OpenGL back end by trying, so that machines without a display can render."""

import atexit
import logging
import os
import subprocess
import sys
import weakref
from typing import Any, Protocol

from worldmodel.errors import DataError

log = logging.getLogger(__name__)

BACKENDS = ("egl", "osmesa")
_PROBE = "import mujoco; c = mujoco.GLContext(32, 32); c.make_current(); c.free()"


class Closable(Protocol):
    """Something that holds an OpenGL context."""

    def close(self) -> None:
        """Frees it."""
        ...


_open: "weakref.WeakSet[Closable]" = weakref.WeakSet()


def select_gl_backend() -> str:
    """Set `MUJOCO_GL` to a back end that works here and return its name.

    A value the user has set is honoured as it is. Otherwise EGL and OSMesa are tried in that order, each in a process
    of its own, because a failed attempt cannot be undone once mujoco is imported.

    Raises:
        DataError: neither works; the message names the packages to install.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen:
        return chosen
    failures = []
    for backend in BACKENDS:
        environment = {**os.environ, "MUJOCO_GL": backend}
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60, check=False
            )
        except subprocess.TimeoutExpired:
            failures.append(f"{backend}: no answer in 60 s")
            continue
        if probe.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            log.info("rendering with %s", backend)
            return backend
        lines = probe.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        failures.append(f"{backend}: {lines[-1]}")
    raise DataError(
        "no off-screen OpenGL works here (" + "; ".join(failures) + "). Install one of: "
        "`apt-get install libegl1 libgl1-mesa-dri` (EGL) or `apt-get install libosmesa6` (OSMesa)"
    )


def mujoco_module() -> Any:
    """mujoco, imported only after a back end was chosen; its names are made at import, hidden from type checkers."""
    import mujoco

    return mujoco


def close_at_exit(resource: Closable) -> None:
    """Close `resource`, whose context exists, before the interpreter unloads OpenGL: later it prints exceptions."""
    # Exit handlers run last in, first out: registered now, when the context exists, ours runs before OpenGL's own.
    if not _open:
        atexit.register(_close_all)
    _open.add(resource)


def _close_all() -> None:
    for resource in list(_open):
        resource.close()
