"""Latency of one action chunk on one CPU thread: the checkpoint as it is, and every graph of its artefact.

  python benchmarks/action_latency.py CHECKPOINT ARTEFACT [--ticks 300]

They take turns within each tick, so that whatever else the machine does hits all of them alike; read the ratios. Eager
is `WorldModel.act`, without envelope and confidence, which the graphs have inside. Prints a Markdown table.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="run folder with model.safetensors and model.json")
    parser.add_argument("artefact", type=Path, help="folder written by `python -m export build`")
    parser.add_argument("--ticks", type=int, default=300, help="measured chunks of each (default: 300)")
    arguments = parser.parse_args()
    runners, sizes = load(arguments.checkpoint, arguments.artefact)
    print(table(measure(runners, arguments.ticks), sizes, arguments.ticks))


def load(checkpoint: Path, artefact: Path) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What to run, on the same golden observation, and its size in bytes, by name."""
    import torch

    from export.build import GOLDEN_FILE, graph_runner
    from export.envelope import Envelope
    from export.parity import shortened
    from export.runtime import load_manifest
    from export.trust import Trust, no_trust
    from export.wrappers import SENSES, StepPath
    from worldmodel.checkpoint import WEIGHTS, load_model
    from worldmodel.contracts import Observation

    torch.set_num_threads(1)
    manifest, model = load_manifest(artefact), load_model(checkpoint)
    names = [entry["name"] for entry in manifest["paths"]["policy"]["inputs"]]
    with np.load(artefact / GOLDEN_FILE, allow_pickle=False) as golden:
        inputs = tuple(torch.from_numpy(golden[name][:1]) for name in names)
    now, rest = Observation(*inputs[:SENSES]), inputs[SENSES:]
    feeds = {"policy": inputs}
    if "policy_step" in manifest["paths"]:
        nothing = Trust(no_trust(1, 1))
        step = StepPath(model, Envelope(model.spec, model.statistics), nothing)
        feeds["policy_step"] = (*shortened(now, step), *rest, *step.empty(1))

    def eager() -> object:
        with torch.inference_mode():
            return model.act(now, rest[0])

    runners: dict[str, Callable[[], object]] = {"eager": eager}
    sizes = {"eager": (checkpoint / WEIGHTS).stat().st_size}
    for graph in manifest["graphs"]:
        if graph["path"] in feeds:
            name = f"{graph['path']} {graph['format']} {graph['precision']}"
            runners[name] = partial(graph_runner(artefact, graph), feeds[graph["path"]])
            sizes[name] = manifest["files"][graph["file"]]["bytes"]
    return runners, sizes


def measure(runners: dict[str, Callable[[], object]], ticks: int, warm_up: int = 20) -> dict[str, np.ndarray]:
    """Seconds per call (ticks,) of each runner, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for tick in range(warm_up + ticks):
        for name, run in runners.items():
            started = time.perf_counter()
            run()
            if tick >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def table(seconds: dict[str, np.ndarray], sizes: dict[str, int], ticks: int) -> str:
    """A Markdown table with ratios to eager."""
    reference = float(np.median(seconds["eager"]))
    lines = [
        f"{ticks} chunks, batch 1, one thread; {machine()}",
        "",
        "| form | median ms | p99 ms | eager / this, median | MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in seconds.items():
        median, p99 = np.quantile(values, (0.5, 0.99))
        ratio, size = reference / median, sizes[name] / 1e6
        lines.append(f"| {name} | {1e3 * median:.1f} | {1e3 * p99:.1f} | {ratio:.2f} | {size:.1f} |")
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
