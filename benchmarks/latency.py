"""Latency of one answer on the CPU: the checkpoint as it is, every graph of its artefact, and LeRobot's ACT.

  python benchmarks/latency.py CHECKPOINT ARTEFACT [--ticks 1000] [--threads 1 2] [--compile] [--only TEXT ...]
      [--clock cpu] [--lerobot-python PYTHON]

Forms take turns within each tick, so that whatever else the machine does hits all alike; read the ratios. `eager
policy` is `WorldModel.act`, without envelope and confidence, which all other forms have inside. `--compile` adds
torch.compile and, unless the artefact has it, AOTInductor, which take minutes to build. ACT has LeRobot's default
configuration for the same cameras and state, one chunk per tick, random weights. On a machine that others
use too, `--clock cpu` counts processor time in place of time. Prints a Markdown table for each number of threads.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from torch import Tensor

    from export.wrappers import Path as ExportedPath

Runners = dict[str, Callable[[], object]]
REFERENCE = "eager policy"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder with model.safetensors and model.json")
    parser.add_argument("artefact", type=Path, help="folder written by `python -m export build`")
    parser.add_argument("--ticks", type=int, default=1000, help="measured answers of each (default: 1000)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--compile", action="store_true", help="adds torch.compile and AOTInductor")
    parser.add_argument("--lerobot-python", help="an interpreter that has lerobot; adds its ACT")
    parser.add_argument("--only", nargs="+", help="only forms whose name contains one of these, beside the reference")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: processor time, of one thread")
    given = parser.parse_args()
    if given.clock == "cpu" and given.threads != [1]:
        parser.error("--clock cpu: the processor time of several threads is their sum; expected --threads 1")
    for threads in given.threads:
        with tempfile.TemporaryDirectory() as scratch:
            runners, sizes = load(given.checkpoint, given.artefact, threads, Path(scratch) if given.compile else None)
            rival = None
            if given.lerobot_python:
                rival = lerobot_act(given.lerobot_python, given.artefact, threads, given.clock)
            if given.only:
                runners = {n: r for n, r in runners.items() if n == REFERENCE or any(text in n for text in given.only)}
            if rival is not None:
                runners["LeRobot ACT, its default"] = partial(ask, rival)
            seconds = measure(runners, given.ticks, clock=CLOCKS[given.clock])
            if rival is not None:
                rival.communicate()
        plural = "one thread" if threads == 1 else f"{threads} threads"
        print(
            f"{given.ticks} ticks, batch 1, {plural}, {given.clock} clock; {machine()}\n\n{table(seconds, sizes)}\n",
            flush=True,
        )


def load(checkpoint: Path, artefact: Path, threads: int, scratch: Path | None) -> tuple[Runners, dict[str, int]]:
    """What to run, on the first golden observation, and its size in bytes, by name.

    Args:
        checkpoint: run folder.
        artefact: artefact folder.
        threads: CPU threads of each.
        scratch: where to build what is compiled here; None compiles nothing.
    """
    import torch

    from export.build import graph_runner, make_path
    from export.envelope import Envelope
    from export.parity import shortened
    from export.runtime import load_manifest
    from export.runtime.golden import golden_file
    from export.trust import Trust, no_trust
    from export.wrappers import SENSES, StepPath
    from worldmodel.checkpoint import WEIGHTS, load_model
    from worldmodel.contracts import Observation

    torch.set_num_threads(threads)
    manifest, model = load_manifest(artefact), load_model(checkpoint)
    model.eval()
    names = [entry["name"] for entry in manifest["paths"]["policy"]["inputs"]]
    with np.load(artefact / golden_file("policy"), allow_pickle=False) as golden:
        inputs = tuple(torch.from_numpy(golden[name][:1]) for name in names)
    now, rest = Observation(*inputs[:SENSES]), inputs[SENSES:]

    def eager() -> object:
        with torch.inference_mode():
            return model.act(now, rest[0])

    with torch.no_grad():
        width = model.decide(now, rest[0]).features.shape[1]
    # What confidence was calibrated to does not change what it costs.
    parts = (Envelope(model.spec, model.statistics), Trust(no_trust(width, model.spec.proprio)))
    runners: Runners = {REFERENCE: eager}
    sizes = {REFERENCE: (checkpoint / WEIGHTS).stat().st_size}
    for name in ("policy", "policy_step"):
        if name not in manifest["paths"]:
            continue
        path, feed = make_path(name, model, *parts, list(manifest["paths"])).eval(), inputs
        if isinstance(path, StepPath):
            feed = (*shortened(now, path), *rest, *path.empty(1))
            runners["eager policy_step"] = partial(without_gradients, path, feed)
        graphs = [graph for graph in manifest["graphs"] if graph["path"] == name]
        for graph in graphs:
            label = f"{name} {graph['format']} {graph['precision']}"
            runners[label] = partial(graph_runner(artefact, graph, threads), feed)
            sizes[label] = manifest["files"][graph["file"]]["bytes"]
        if scratch is not None:
            runners |= compiled(path, feed, scratch, all(graph["format"] != "aotinductor" for graph in graphs))
    return runners, sizes


def compiled(path: "ExportedPath", feed: Sequence["Tensor"], scratch: Path, package: bool) -> Runners:
    """A path as torch.compile makes it, and with `package` as AOTInductor does; those that build here."""
    import torch

    from export.program import ProgramRunner, write_program
    from export.still import still_pictures
    from worldmodel.errors import ConfigError, ExportError

    made: Runners = {f"{path.name} torch.compile": partial(without_gradients, torch.compile(path), feed)}
    try:
        made[f"{path.name} torch.compile"]()
    except Exception as error:  # the compiler and its tools each raise families of their own
        print(f"{path.name}: torch.compile fails: {type(error).__name__}", file=sys.stderr)
        made = {}
    if package:
        file = scratch / f"{path.name}.aoti.pt2"
        try:
            with still_pictures(path.model):
                write_program(path, file, dynamic=False, compiled=True)
            made[f"{path.name} aotinductor fp32"] = partial(ProgramRunner(file, compiled=True), feed)
        except (ConfigError, ExportError) as error:
            print(f"{path.name}: AOTInductor does not build: {error}", file=sys.stderr)
    return made


def without_gradients(call: Callable[..., object], feed: Sequence["Tensor"]) -> object:
    """Calls a module for its answer alone."""
    import torch

    with torch.no_grad():
        return call(*feed)


def lerobot_act(python: str, artefact: Path, threads: int, clock: str) -> "subprocess.Popen[str]":
    """ACT in an interpreter of its own, ready to be asked."""
    from export.runtime import load_manifest

    manifest = load_manifest(artefact)
    spec, robot = manifest["spec"], manifest["embodiments"][0]
    sizes = [spec["height"], len(spec["cameras"]), robot["proprio_dims"], len(robot["action_names"]), threads]
    script = Path(__file__).with_name("latency_lerobot.py")
    command = [python, str(script), *map(str, sizes), clock]
    rival = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ask(rival)
    return rival


def ask(rival: "subprocess.Popen[str]") -> float:
    """Lets the other interpreter make one chunk; returns the seconds that it took by its own clock."""
    assert rival.stdin is not None and rival.stdout is not None
    rival.stdin.write("chunk\n")
    rival.stdin.flush()
    for line in rival.stdout:
        if line.startswith("seconds "):
            return float(line.split()[1])
    raise SystemExit(f"{rival.args}: ended with {rival.wait()}")


def measure(
    runners: Runners, ticks: int, warm_up: int = 20, clock: Callable[[], float] = time.perf_counter
) -> dict[str, np.ndarray]:
    """Seconds per call (ticks,) of each runner, which take turns; a runner may return its own as a float."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for tick in tqdm(range(warm_up + ticks), unit="tick", disable=None):
        for name, run in runners.items():
            started = clock()
            said = run()
            took = said if isinstance(said, float) else clock() - started
            if tick >= warm_up:
                seconds[name].append(took)
    return {name: np.array(values) for name, values in seconds.items()}


def table(seconds: dict[str, np.ndarray], sizes: dict[str, int]) -> str:
    """A Markdown table with ratios to the eager policy."""
    reference = float(np.median(seconds[REFERENCE]))
    lines = [
        f"| form | p50 ms | p99 ms | p99.9 ms | {REFERENCE} / this, p50 | MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, values in seconds.items():
        p50, p99, p999 = 1e3 * np.quantile(values, (0.5, 0.99, 0.999))
        size = f"{sizes[name] / 1e6:.1f}" if name in sizes else ""
        lines.append(f"| {name} | {p50:.1f} | {p99:.1f} | {p999:.1f} | {1e3 * reference / p50:.2f} | {size} |")
    return "\n".join(lines)


def machine() -> str:
    """Processor, cores and versions in one line."""
    import onnxruntime
    import torch

    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        names = [
            line.partition(":")[2].strip() for line in information.read_text().splitlines() if "model name" in line
        ]
        name = names[0] if names else name
    load_average = os.getloadavg()[0]
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    return f"{name}, {os.cpu_count()} cores, load {load_average:.1f}; {versions}"


if __name__ == "__main__":
    main()
