"""Latency and throughput of the policy server under openpi's own client, beside the same policy called directly.

  python benchmarks/server.py ARTEFACT [--clients 8] [--ticks 10000] [--workers 1] [--rate 20]

Clients are processes that use `openpi_client.WebsocketClientPolicy` as it is on PyPI (`pip install --no-deps
openpi-client==0.1.2`), each with its own made-up episode, which it repeats. Every answer is held against that of a
policy called directly, bit for bit. First one client, then all of them, as fast as they can or at a rate; read the
ratios. Prints a Markdown table.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

EPISODE = 50
"""Ticks of an episode."""


def main() -> int:
    """Measures and prints; 1 if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artefact", type=Path, help="folder written by `python -m export build`")
    parser.add_argument("--clients", type=int, default=8, help="clients at the same time (default: 8)")
    parser.add_argument("--ticks", type=int, default=10_000, help="requests of all clients together (default: 10000)")
    parser.add_argument("--workers", type=int, default=1, help="threads of the server that run policies (default: 1)")
    parser.add_argument("--rate", type=float, default=0.0, help="requests of a client per second (default: no pause)")
    options = parser.parse_args()
    expected = [direct(options.artefact, client)[0] for client in range(options.clients)]
    rows: list[tuple[str, np.ndarray, np.ndarray, float]] = []
    wrong = 0
    with serving(options.artefact, options.workers) as port:
        for clients, ticks in ((1, max(options.ticks // 10, EPISODE)), (options.clients, options.ticks)):
            # Beside the server, so that whatever else the machine does hits both.
            _, seconds = direct(options.artefact, 0)
            rows.append(("called directly", seconds, seconds, 1 / float(np.mean(seconds))))
            started = time.perf_counter()
            with ProcessPoolExecutor(clients, mp_context=get_context("spawn")) as pool:
                share = -(-ticks // clients)
                jobs = [pool.submit(drive, port, client, share, options.rate) for client in range(clients)]
                results = [job.result() for job in jobs]
            for client, (answers, *_) in enumerate(results):
                reference = np.resize(np.arange(EPISODE), len(answers))
                wrong += int((answers != expected[client][reference]).any(axis=(1, 2)).sum())
            begun = min(result[3] for result in results)
            rate = sum(len(result[0]) for result in results) / (max(result[4] for result in results) - begun)
            latency, policy = (np.concatenate([result[i] for result in results]) for i in (1, 2))
            rows.append((f"served, {clients} client{'s' * (clients > 1)}", latency, policy, rate))
            print(f"{clients} clients: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(table(rows, wrong, options))
    return 1 if wrong else 0


def observation(shapes: dict[str, tuple[list[int], str]], rng: np.random.Generator) -> dict[str, Any]:
    """Every sense, made up."""
    result: dict[str, Any] = {"instruction": "Press the button."}
    for name, (shape, dtype) in shapes.items():
        kind = name.partition(".")[0]
        if kind == "rgb":
            result[name] = rng.integers(0, 256, shape, np.uint8)
        elif kind == "intrinsics":
            result[name] = np.diag([60.0, 60.0, 1.0]).astype(np.float32)
        elif kind == "camera_to_base":
            result[name] = np.eye(4, dtype=np.float32)
        elif dtype == "bool":
            result[name] = np.ones(shape, bool)
        else:
            result[name] = rng.uniform(0, 1, shape).astype(np.float32)
    return result


def episode(shapes: dict[str, tuple[list[int], str]], client: int) -> list[dict[str, Any]]:
    """The observations of one client's episode."""
    rng = np.random.default_rng(client)
    return [observation(shapes, rng) for _ in range(EPISODE)]


def direct(artefact: Path, client: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers (n, H, D) and seconds (n,) of a policy in this process over a client's episode."""
    from export.runtime import OnnxPolicy

    policy = OnnxPolicy(artefact)
    observations = episode({name: (list(shape), dtype) for name, (shape, dtype) in policy.shapes.items()}, client)
    policy.observe(observations[0])
    policy.act()
    policy.reset()
    actions, seconds = [], []
    for one in observations:
        started = time.perf_counter()
        policy.observe(one)
        actions.append(policy.act())
        seconds.append(time.perf_counter() - started)
    return np.stack(actions), np.array(seconds)


def drive(port: int, client: int, ticks: int, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, float]:
    """One client's answers (n, H, D), seconds per request (n,), the policy's share of them (n,), begin and end."""
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    policy = WebsocketClientPolicy("127.0.0.1", port)
    metadata = policy.get_server_metadata()
    shapes = {name: (entry["shape"], entry["dtype"]) for name, entry in metadata["observations"].items()}
    observations = episode(shapes, client)
    answers, seconds, inside = [], [], []
    begun = time.time()
    for tick in range(ticks):
        one = observations[tick % EPISODE]
        if rate:
            time.sleep(max(0.0, begun + tick / rate - time.time()))
        started = time.perf_counter()
        answer = policy.infer({**one, "reset": tick % EPISODE == 0})
        seconds.append(time.perf_counter() - started)
        answers.append(answer["actions"])
        inside.append(answer["server_timing"]["infer_ms"] / 1e3)
    return np.stack(answers), np.array(seconds), np.array(inside), begun, time.time()


@contextmanager
def serving(artefact: Path, workers: int) -> Iterator[int]:
    """A server in a process of its own; yields its port."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "export", "serve", str(artefact.resolve()), "port=0", f"workers={workers}"]
        process = subprocess.Popen(command, cwd=ROOT, stderr=log)
        try:
            found = None
            while not found and process.poll() is None:
                time.sleep(0.1)
                log.seek(0)
                found = re.search(r"serving on ws://127\.0\.0\.1:(\d+)", log.read())
            if not found:
                log.seek(0)
                raise SystemExit(f"the server did not start: {log.read()}")
            yield int(found[1])
        finally:
            process.terminate()
            process.wait()


def table(rows: list[tuple[str, np.ndarray, np.ndarray, float]], wrong: int, options: argparse.Namespace) -> str:
    """A Markdown table; the time beside the policy is what transport, encoding and waiting take."""
    import onnxruntime

    pace = f"{options.rate:g} requests per second and client" if options.rate else "as fast as they can"
    lines = [
        f"{pace}, {options.workers} worker{'s' * (options.workers > 1)}; {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, onnxruntime {onnxruntime.__version__}",
        "",
        "| policy | ticks | p50 ms | p99 ms | beside the policy, p50 ms | ticks/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, seconds, inside, rate in rows:
        median, high = 1e3 * np.quantile(seconds, (0.5, 0.99))
        beside = "" if seconds is inside else f"{1e3 * np.median(seconds - inside):.1f}"
        lines.append(f"| {name} | {len(seconds):,} | {median:.1f} | {high:.1f} | {beside} | {rate:.0f} |")
    served = sum(len(seconds) for _, seconds, inside, _ in rows if seconds is not inside)
    lines += ["", f"{served - wrong:,} of {served:,} answers equal those of the policy called directly."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
