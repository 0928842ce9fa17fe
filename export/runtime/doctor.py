"""Checks an artefact on the machine that shall run it; needs numpy and onnxruntime only.

  python -m runtime.doctor [DIR] [ticks=1000] [warm_up=50] [threads=1] [--json]      in an artefact folder
  python -m export doctor DIR [ticks=1000] [warm_up=50] [threads=1] [--json]         in the repository

For every ONNX graph: files and their sha256, inputs and outputs, which execution providers run it (by a run, with the
nodes that each computes), how far its answers are from those of the exported model on the bundled golden observations,
latency over so many ticks after a warm-up, growth of memory, and whether that keeps the manifest's latency contract.
Paths without a contract are measured over a twentieth of the ticks. Prints a table, or JSON.

Exit status: 0 all is well, 1 there are warnings, 2 something fails.
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from .golden import FLAGS, Golden, golden_file, signature_faults
from .latency import Loop, measure, progress_bar
from .manifest import RuntimeContractError, load_manifest
from .session import CPU, open_session

STATUS = ("ok", "warning", "failure")
"""In the order of exit statuses."""
SETTINGS = {"ticks": 1000, "warm_up": 50, "threads": 1}
GROWTH = 8 << 20
"""Bytes by which the process may grow while it is measured: allocators settle, leaks go on."""
PYTHON_GROWTH = 64 << 10
"""The same of Python's objects."""


class Finding(NamedTuple):
    """One check."""

    status: str  # of `STATUS`
    subject: str  # a file, or the artefact
    check: str
    message: str
    values: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks a folder and prints what was found; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]
    settings, folders = dict(SETTINGS), []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("-"):
            folders.append(word)
        elif key not in SETTINGS or not value.isdecimal() or int(value) < 1:
            print(f"doctor: {word!r}: expected a folder, {'=N, '.join(SETTINGS)}=N above 0, or --json", file=sys.stderr)
            return 2
        else:
            settings[key] = int(value)
    if len(folders) > 1:
        print(f"doctor: got folders {folders}, expected one", file=sys.stderr)
        return 2
    findings = examine(Path(folders[0] if folders else "."), **settings)
    worst = max(STATUS.index(finding.status) for finding in findings)
    if as_json:
        found = [finding._asdict() for finding in findings]
        print(json.dumps({"status": STATUS[worst], "machine": machine(), **settings, "findings": found}, indent=1))
    else:
        print(f"{machine()}\n\n{table(findings)}\n\n{STATUS[worst]}")
    return worst


def examine(folder: Path, *, ticks: int = 1000, warm_up: int = 50, threads: int = 1) -> list[Finding]:
    """All checks of an artefact.

    Args:
        folder: the artefact folder.
        ticks: calls that latency is measured over.
        warm_up: calls before them.
        threads: CPU threads of onnxruntime.
    """
    try:
        manifest = load_manifest(folder)
    except RuntimeContractError as error:
        return [Finding("failure", folder.name or ".", "files", str(error), {})]
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    said = f"{len(manifest['files'])} files, {size / 1e6:.1f} MB, sha256 as listed"
    findings = [Finding("ok", "manifest.json", "files", said, {"bytes": size})]
    if "latency" not in manifest:
        said = "the manifest has no latency contract; export the artefact again"
        findings.append(Finding("warning", "manifest.json", "contract", said, {}))
    for graph in manifest["graphs"]:
        if graph["format"] == "onnx":
            findings += examine_graph(folder, manifest, graph, ticks, warm_up, threads)
    return findings


def examine_graph(
    folder: Path, manifest: dict[str, Any], graph: dict[str, Any], ticks: int, warm_up: int, threads: int
) -> list[Finding]:
    """The checks of one graph, up to the first that makes the others pointless."""
    name, path = graph["file"], graph["path"]
    try:
        golden = Golden(folder / golden_file(path), manifest["paths"][path])
        session = open_session(folder / name, threads, [CPU])
        findings = [signature(name, session, manifest["paths"][path], graph)]
        if findings[0].status == "failure":
            return findings
        findings += providers(folder / name, golden, threads)
        findings.append(parity(name, graph, golden.compare(session, action_units(manifest))))
        contract = manifest.get("latency") if path in manifest.get("latency", {}).get("paths", ()) else None
        count = ticks if contract else max(1, ticks // 20)
        values = measure(Loop(session, golden), count, min(warm_up, count), progress_bar(name))
    except RuntimeContractError as error:
        return [Finding("failure", name, "golden", str(error), {})]
    except Exception as error:  # onnxruntime has an exception of its own for each kind of fault
        return [Finding("failure", name, "run", f"{type(error).__name__}: {str(error).splitlines()[0][:300]}", {})]
    return [*findings, latency(name, values, contract), memory(name, values)]


def signature(
    name: str, session: onnxruntime.InferenceSession, entry: dict[str, Any], graph: dict[str, Any]
) -> Finding:
    """Whether inputs and outputs are those of the manifest, and the graph passed its check."""
    faults = signature_faults(session, entry)
    if faults:
        return Finding("failure", name, "schema", "; ".join(faults), {"faults": faults})
    if not graph["accepted"]:
        return Finding("warning", name, "schema", f"failed its check when it was built: {graph['reason']}", {})
    return Finding("ok", name, "schema", f"{len(entry['inputs'])} inputs, {len(entry['outputs'])} outputs", {})


def providers(file: Path, golden: Golden, threads: int) -> list[Finding]:
    """By one profiled run with each provider that onnxruntime offers: how many nodes it computes."""
    findings = []
    for provider in onnxruntime.get_available_providers():
        counts: dict[str, int] = {}
        chosen = [provider] if provider == CPU else [provider, CPU]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                session = open_session(file, threads, chosen, Path(scratch) / "profile")
                next(golden.run(session))
                notes = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            except Exception as error:  # a provider without its device or library raises whatever it likes
                status = "failure" if provider == CPU else "warning"
                said = f"{provider} does not run it: {str(error).splitlines()[0][:200]}"
                findings.append(Finding(status, file.name, "providers", said, {"provider": provider, "nodes": {}}))
                continue
        for note in notes:
            if note.get("cat") == "Node" and (by := note.get("args", {}).get("provider")):
                counts[by] = counts.get(by, 0) + 1
        total, own = sum(counts.values()), counts.get(provider, 0)
        said = f"{provider} computes {own} of {total} nodes" + ("" if own else "; it is listed and does nothing")
        findings.append(Finding("ok", file.name, "providers", said, {"provider": provider, "nodes": counts}))
    return findings


def action_units(manifest: dict[str, Any]) -> np.ndarray | None:
    """Standard deviations of the first embodiment's actions, infinite in padding; None where there are none."""
    first = manifest["embodiments"][0]["name"]
    std = manifest.get("statistics", {}).get(first, {}).get("action", {}).get("std", ())
    units = np.full(manifest["spec"]["action"], np.inf)
    units[: len(std)] = std
    return units if len(std) else None


def parity(name: str, graph: dict[str, Any], found: dict[str, Any]) -> Finding:
    """fp32 within the tolerance that it was built with; other precisions no further off than they were then."""
    faults = [] if found["finite"] else ["answers are not finite"]
    if "parity" in graph:
        kind, limits = "max_error", dict.fromkeys(found["max_error"], graph["parity"]["tolerance"])
        if found["flags_that_differ"] > FLAGS:
            faults.append(f"{100 * found['flags_that_differ']:.1f} % of flags differ")
    else:
        # Golden observations are among those of the build's check, where no tick's mean was above its largest.
        kind, check = "mean_difference", graph["check"]
        limits = {n: max(check["bound"], v) for n, v in check["largest_difference"].items()}
    for output, value in found[kind].items():
        # Written so that a NaN, which compares false with everything, fails too.
        if not value <= limits[output]:
            faults.append(f"{output} differs by {value:.3g}, at most {limits[output]:.3g} is allowed")
    said = f"{kind.replace('_', ' ')} {max(found[kind].values()):.2g} on golden observations"
    return Finding("failure" if faults else "ok", name, "parity", "; ".join(faults) or said, found)


def latency(name: str, values: dict[str, Any], contract: dict[str, Any] | None) -> Finding:
    """The verdict: a failure where an answer cannot be used in time, a warning where it is late more than rarely."""
    said = f"p50 {values['p50_ms']:.1f}, p99 {values['p99_ms']:.1f}, p99.9 {values['p99_9_ms']:.1f} ms"
    said += f" over {values['ticks']} ticks"
    if contract is None:
        return Finding("ok", name, "latency", f"{said}; no contract", values)
    limits = contract["limits"]
    over = [key for key, limit in limits.items() if not values[key] <= limit]
    if not over:
        said += f"; p99 within the control period of {limits['p99_ms']:.0f} ms"
        return Finding("ok", name, "latency", said, values)
    # Where half the answers are late, lateness is the rule.
    fails = "p99_9_ms" in over or values["p50_ms"] > limits["p99_ms"]
    asked = " and ".join(f"{key.removesuffix('_ms').replace('_', '.')} at most {limits[key]:.0f} ms" for key in over)
    return Finding("failure" if fails else "warning", name, "latency", f"{said}; the contract asks {asked}", values)


def memory(name: str, values: dict[str, Any]) -> Finding:
    """Whether the loop keeps allocating after its warm-up."""
    growth, objects = values["growth_bytes"], values["python_growth_bytes"]
    process = "unknown" if growth is None else f"{growth / 1024:.0f} KiB"
    said = f"process {process}, Python objects {objects / 1024:.1f} KiB more after the ticks"
    grows = objects > PYTHON_GROWTH or (growth or 0) > GROWTH
    return Finding("warning" if grows else "ok", name, "memory", said, {"process": growth, "python": objects})


def table(findings: Sequence[Finding]) -> str:
    """One line for each finding."""
    rows = [(f.status, f.subject, f.check, f.message) for f in findings]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def machine() -> str:
    """Processor, cores and versions in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, onnxruntime {onnxruntime.__version__}"
    return f"{platform.system()} {platform.machine()}, {cores} cores; {versions}"


if __name__ == "__main__":
    sys.exit(main())
