"""Attack a policy server while honest clients use it: `python tests/fuzz_server.py --minutes 10 [--artefact DIR]`.

The server is a process of its own, under an audit hook that ends it if it unpickles, runs a program, connects
somewhere or opens a file for writing. Strangers send it broken HTTP, broken frames, broken msgpack, hostile values,
pickles, floods and sudden ends. All the while three honest clients run episodes, some of them over several
connections, and every action must be the one that a policy of their own gives. The server must stay alive and well,
within a bound of memory, and count no fault of its own. Whatever else happens is printed with the number of the
attack, which determines it, and ends the run with status 1; `tests/test_fuzz.py` attacks for a few seconds.
"""

import argparse
import http.client
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_server_attacks import ATTACKS, Target
from server_fakes import WireClient, made_up_artefact

from export.runtime import OnnxPolicy

MEMORY = 256 << 20
"""Bytes that the server may grow by."""
STEPS, EPISODES = 8, 12
SERVER = """
    import os, sys, threading
    armed = []
    def hook(event, arguments):
        if not armed:
            return
        bad = event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork",
                        "socket.connect", "exec", "marshal.loads", "ctypes.dlopen")
        if event == "open" and isinstance(arguments[2], int):
            bad = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if bad:
            os.write(2, f"FORBIDDEN {event} {arguments!r}\\n".encode())
            os._exit(86)
    sys.addaudithook(hook)
    threading.Thread(target=lambda: armed.append(sys.stdin.readline()), daemon=True).start()
    from export.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


class ServerFault(AssertionError):
    """The server did what it must not."""


@contextmanager
def server(artefact: Path, log: Path) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A server under the audit hook, after an honest request has loaded all that it loads late; yields its port."""
    words = ["serve", str(artefact), "--port", "0", "workers=2", "keep_seconds=5"]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(SERVER), *words],
            stdin=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        port, deadline = None, time.monotonic() + 60
        while port is None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            port = re.search(r"serving on ws://127\.0\.0\.1:(\d+)", log.read_text())
        if port is None:
            raise ServerFault(f"did not start: {log.read_text()}")
        number = int(port[1])
        check(process, number)
        assert process.stdin is not None
        process.stdin.write("now\n")
        process.stdin.flush()
        yield process, number
    finally:
        process.kill()
        process.communicate()


def memory(process: "subprocess.Popen[str]") -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check(process: "subprocess.Popen[str]", port: int) -> None:
    """Raises ServerFault unless the server lives, answers and has counted no fault of its own."""
    if process.poll() is not None:
        raise ServerFault(f"ended with {process.returncode}")
    for path, pattern in (("/healthz", r"^OK$"), ("/metrics", r"policy_requests_total")):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path)
        text = connection.getresponse().read().decode()
        connection.close()
        if not re.search(pattern, text, re.MULTILINE):
            raise ServerFault(f"{path} answers {text[:200]!r}")
        if found := re.search(r'policy_errors_total\{reason="internal"\} .*', text):
            raise ServerFault(found[0])


def observation(shapes: dict[str, tuple[tuple[int, ...], str]], rng: np.random.Generator) -> dict[str, Any]:
    """Random values of every name that needs no geometry."""
    result: dict[str, Any] = {"instruction": "go"}
    for name, (shape, dtype) in shapes.items():
        if dtype == "uint8":
            result[name] = rng.integers(0, 256, shape, np.uint8)
        elif dtype == "float32" and name.partition(".")[0] not in ("points", "intrinsics", "camera_to_base"):
            result[name] = rng.normal(size=shape).astype(np.float32)
    return result


class Honest(threading.Thread):
    """A client that runs episodes until it is stopped, and compares every answer."""

    def __init__(self, port: int, episodes: list[tuple[list[dict[str, Any]], list[np.ndarray]]], number: int) -> None:
        super().__init__(daemon=True)
        self._port, self._episodes = port, episodes
        self._random = np.random.default_rng(number)
        self.stopped = threading.Event()
        self.answers = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                self._episode()
        except BaseException as error:
            self.error = error

    def _episode(self) -> None:
        observations, actions = self._episodes[self._random.integers(len(self._episodes))]
        breaks, session = self._random.integers(0, STEPS), None
        client = WireClient(self._port)
        try:
            for step, (one, expected) in enumerate(zip(observations, actions, strict=True)):
                if step == breaks:
                    session = client.metadata["session_id"]
                    client.__exit__()
                    client = WireClient(self._port)
                resume = {"session_id": session} if step == breaks and step else {}
                answer = client.infer(one | resume)["actions"]
                if not np.array_equal(answer, expected):
                    raise ServerFault(f"step {step}: {answer} instead of {expected}")
                self.answers += 1
        finally:
            client.__exit__()


def campaign(artefact: Path, seconds: float, first: int = 0) -> tuple[Counter[str], Counter[str], int, int]:
    """Attacks for that long: attacks by name, their outcomes, honest answers, and bytes the server grew by.

    Raises:
        ServerFault: what the server did wrong, and the number of the last attack.
    """
    policy = OnnxPolicy(artefact)
    shapes = policy.shapes
    episodes = []
    for number in range(EPISODES):
        rng = np.random.default_rng(number)
        observations = [observation(shapes, rng) for _ in range(STEPS)]
        policy.reset()
        actions = []
        for one in observations:
            policy.observe(one)
            actions.append(policy.act())
        episodes.append((observations, actions))
    attacks, outcomes = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        log = Path(folder) / "log"
        with server(artefact, log) as (process, port):
            clients = [Honest(port, episodes, number) for number in range(3)]
            for client in clients:
                client.start()
            start = memory(process)
            peak, number, end = start, first, time.monotonic() + seconds
            try:
                while time.monotonic() < end:
                    name = list(ATTACKS)[number % len(ATTACKS)]
                    with ExitStack() as sockets:
                        target = Target(port, observation(shapes, np.random.default_rng(number)), sockets)
                        try:
                            outcomes[ATTACKS[name](target, np.random.default_rng(number))] += 1
                        except ConnectionError:
                            outcomes["closed early"] += 1
                            check(process, port)
                    attacks[name] += 1
                    number += 1
                    peak = max(peak, memory(process)) if process.poll() is None else peak
                    if process.poll() is not None or number % 50 == 0:
                        check(process, port)
                    if error := next((client.error for client in clients if client.error), None):
                        raise ServerFault(f"an honest client: {type(error).__name__}: {error}") from error
                    if peak - start > MEMORY:
                        raise ServerFault(f"grew by {peak - start} bytes")
                for client in clients:
                    client.stopped.set()
                for client in clients:
                    client.join(60)
                    if client.is_alive() or client.error:
                        raise ServerFault(f"an honest client does not end: {client.error}")
                check(process, port)
            except (ServerFault, OSError) as error:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise ServerFault(f"attack {number}: {error}\n{tail}") from error
            finally:
                process.kill()
                for client in clients:
                    client.join(60)
            text = log.read_text(errors="replace")
            if "Traceback" in text or "FORBIDDEN" in text:
                raise ServerFault(f"in the log: {text[text.index('Traceback') if 'Traceback' in text else 0 :][:3000]}")
    return attacks, outcomes, sum(client.answers for client in clients), peak - start


def main() -> int:
    """Attack for the given time; 1 if the server did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0, help="of attacks (default: %(default)s)")
    parser.add_argument("--artefact", type=Path, help="folder to serve (default: a made-up small one)")
    parser.add_argument("--first", type=int, default=0, help="number of the first attack (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="artefact") as folder:
        try:
            artefact = options.artefact or made_up_artefact(Path(folder) / "artefact")
            attacks, outcomes, answers, grown = campaign(artefact, 60 * options.minutes, options.first)
        except ServerFault as error:
            print(error)
            return 1
    print(f"{sum(attacks.values())} attacks {dict(attacks)}\noutcomes {dict(outcomes)}")
    print(f"{answers} honest answers, all as expected; the server grew by {grown / 1e6:.0f} MB at most")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main())
