"""Writes an artefact folder: exported graphs, golden observations, the runtime and the manifest; all or nothing."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from torch import nn

from export.drive import DrivenCheck
from export.envelope import Envelope
from export.evidence import fit_trust
from export.manifest import RobotNames, build_manifest, git_state, path_entry, write_manifest
from export.onnx import OnnxRunner, write_onnx
from export.parity import TOLERANCE, Example, Runner, check_handover, check_parity, make_examples, write_golden
from export.precision import PRECISIONS, bounds_of, judge, write_precision
from export.program import ProgramRunner, compiler, write_program
from export.proposal import ProposalPath
from export.runtime.doctor import machine
from export.runtime.golden import Golden, golden_file
from export.runtime.latency import Loop, measure
from export.runtime.session import open_session
from export.still import still_pictures
from export.torchscript import TorchScriptRunner, write_golden_tensors, write_torchscript
from export.trust import Trust
from export.wrappers import PATHS, ActionModel, ActionPath, Path, RolloutPath, StepPath, UnderstandingPath
from worldmodel.contracts import Batch, Observation
from worldmodel.errors import ConfigError, ExportError

FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "program": ".pt2", "aotinductor": ".aoti.pt2"}
"""Format -> ending of its files."""
BOUNDS = {"fp16": 0.01, "bf16": 0.02, "int8_dynamic": 0.05, "int8_static": 0.05}

Moments = Sequence[tuple[str, Sequence[Observation]]]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to write and how strictly to check it; the meaning of each field stands in configs/export.yaml."""

    paths: tuple[str, ...] = ("policy", "policy_step")
    formats: tuple[str, ...] = ("onnx", "torchscript")
    precisions: tuple[str, ...] = ()
    bounds: Mapping[str, float] = field(default_factory=lambda: dict(BOUNDS))
    opset: int = 18
    dynamic_batch: bool = False
    optional: tuple[str, ...] = ("camera", "points", "wrench", "taxels", "text")
    good_error: float | None = None
    quantile: float = 0.99
    tolerance: float = TOLERANCE
    golden: int = 4
    latency_ticks: int = 100
    keep_failed: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for what, chosen, known, needed in (
            ("paths", self.paths, PATHS, "policy"),
            ("formats", self.formats, tuple(FORMATS), "onnx"),
            ("precisions", self.precisions, PRECISIONS, None),
        ):
            if [name for name in chosen if name not in known] or (needed and needed not in chosen):
                among = f", {needed} among them" if needed else ""
                raise ConfigError(f"{what}: got {list(chosen)}; expected some of {known}{among}")
        if "aotinductor" in self.formats and compiler() is None:
            raise ConfigError("formats: aotinductor needs a C++ compiler (CXX, g++ or clang++); this machine has none")


def build_artefact(
    model: ActionModel,
    out: str | FilePath,
    moments: Moments,
    recorded: Mapping[str, Sequence[Batch]],
    robots: Mapping[str, RobotNames],
    options: BuildOptions,
    drive: DrivenCheck | None = None,
) -> dict[str, dict[str, Any]]:
    """Exports a model and proves every artefact equal to it before anything appears at `out`.

    Args:
        model: in any mode; it is switched to inference.
        out: the artefact folder.
        moments: held-out observations, consecutive ticks of batch 1, with a name each, for messages.
        recorded: clips with actions by split, which confidence and novelty are calibrated on.
        robots: names and units of every embodiment of the model.
        options: what to write.
        drive: the closed-loop check of precisions of `policy`, if there shall be one.

    Returns:
        The manifest's entry of each graph by its file's name, those that were not written among them.

    Raises:
        ExportError: `out` holds something that may not be replaced; an exporter failed; or parity did.
    """
    out = FilePath(out)
    check_target(out, options.force)
    model.eval()
    assert isinstance(model, nn.Module)
    bounds = bounds_of(options.bounds, options.precisions)
    calibration = fit_trust(model, recorded, good_error=options.good_error, quantile=options.quantile)
    envelope, trust = Envelope(model.spec, model.statistics), Trust(calibration)
    paths = [make_path(name, model, envelope, trust, options.paths).eval() for name in options.paths]
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = FilePath(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        graphs: list[dict[str, Any]] = []
        for path in paths:
            examples = make_examples(path, moments)
            own = write_path(path, folder, examples, options)
            for precision in options.precisions:
                own.append(write_reduced(path, folder, precision, examples, recorded, bounds[precision], options))
            graphs += own
            spread = max(1, len(examples) // max(1, options.golden))
            file = folder / golden_file(path.name)
            write_golden(file, path, examples[::spread][: options.golden])
            if "torchscript" in options.formats:
                write_golden_tensors(file.with_suffix(".pt"), Golden(file, path_entry(path)))
        copy_runtime(folder)
        report = calibration.report | {"handover_error": handover(paths, moments, options.tolerance)}
        describe = partial(
            build_manifest,
            model,
            folder,
            paths=paths,
            optional=options.optional,
            trust=report,
            envelope=envelope,
            git=git_state(FilePath(__file__).parent),
            robots=robots,
        )
        if drive is not None:
            write_manifest(folder, describe(graphs=graphs))  # what is driven loads it
            drive_reduced(graphs, folder, drive, options.keep_failed)
        manifest = describe(graphs=graphs)
        manifest["latency"]["measured"] = measured(folder, manifest, options.latency_ticks)
        write_manifest(folder, manifest)
        folder.chmod(0o755)
        move_into_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {graph["file"]: graph for graph in graphs}


def make_path(name: str, model: Any, envelope: Envelope, trust: Trust, chosen: Sequence[str] = ()) -> Path:
    """The module of a path; `policy` fills the cache of `policy_step` where that is exported too."""
    if name == "policy":
        return ActionPath(model, envelope, trust, caches="policy_step" in chosen)
    if name == "policy_step":
        return StepPath(model, envelope, trust)
    others: dict[str, Callable[[Any], Path]] = {"proposal": ProposalPath, "understanding": UnderstandingPath}
    return others.get(name, RolloutPath)(model)


def write_path(
    path: Path, folder: FilePath, examples: Sequence[Example], options: BuildOptions
) -> list[dict[str, Any]]:
    """Every format of a path in fp32, proved equal to the model."""
    runners: dict[str, Runner] = {}
    entries = []
    for form in options.formats:
        file = folder / f"{path.name}{FORMATS[form]}"
        dynamic = options.dynamic_batch
        entry: dict[str, Any] = {"path": path.name, "format": form, "precision": "fp32", "file": file.name}
        entry |= {"batch": "any" if dynamic else 1, "accepted": True, "written": True, "reason": None}
        with still_pictures(path.model):
            if form == "onnx":
                write_onnx(path, file, opset=options.opset, dynamic=dynamic)
                entry["opset"] = options.opset
            elif form == "torchscript":
                write_torchscript(path, file)
            else:
                write_program(path, file, dynamic=dynamic, compiled=form == "aotinductor")
        runners[file.name] = graph_runner(folder, entry)
        entries.append(entry)
    batches = (1, 3) if options.dynamic_batch else (1,)
    parity = check_parity(path, runners, examples, tolerance=options.tolerance, batches=batches)
    return [entry | {"parity": asdict(parity[entry["file"]])} for entry in entries]


def graph_runner(folder: FilePath, graph: Mapping[str, Any], threads: int = 1) -> Runner:
    """Runs a graph that the manifest lists; `threads` are those of onnxruntime, torch has a setting of its own."""
    file, form = folder / graph["file"], graph["format"]
    if form == "onnx":
        return OnnxRunner(file, threads)
    return TorchScriptRunner(file) if form == "torchscript" else ProgramRunner(file, compiled=form == "aotinductor")


def write_reduced(
    path: Path,
    folder: FilePath,
    precision: str,
    examples: Sequence[Example],
    recorded: Mapping[str, Sequence[Batch]],
    bound: float,
    options: BuildOptions,
) -> dict[str, Any]:
    """One precision of a path's ONNX graph; where it fails its check it is removed, or kept and marked."""
    file = folder / f"{path.name}.{precision}.onnx"
    entry: dict[str, Any] = {"path": path.name, "format": "onnx", "precision": precision, "file": file.name}
    entry |= {"batch": "any" if options.dynamic_batch else 1, "opset": options.opset}
    try:
        write_precision(folder / f"{path.name}.onnx", file, precision, path, examples[:: max(1, len(examples) // 24)])
        runner = OnnxRunner(file)
        clips = recorded["heldout_episodes"][:3]
        check: dict[str, Any] = judge(path, runner, examples, clips, bound=bound)
    except Exception as error:  # onnxruntime refuses a graph with an exception of its own for each kind of fault
        file.unlink(missing_ok=True)
        cause = str(error).splitlines()[0][:300]
        return entry | {
            "accepted": False,
            "written": False,
            "reason": f"{type(error).__name__}: {cause}",
            "check": None,
        }
    accepted = check["reason"] is None
    if not accepted and not options.keep_failed:
        file.unlink()
    return entry | {
        "accepted": accepted,
        "written": accepted or options.keep_failed,
        "reason": check.pop("reason"),
        "check": check,
    }


def drive_reduced(graphs: list[dict[str, Any]], folder: FilePath, drive: DrivenCheck, keep_failed: bool) -> None:
    """Adds closed-loop success to the entries of `policy`'s precisions."""
    reduced = [g for g in graphs if g["path"] == "policy" and g["written"] and g["precision"] != "fp32"]
    if not reduced:
        return
    full = drive(folder, "fp32")
    for graph in reduced:
        found = drive(folder, graph["precision"])
        graph["check"]["closed_loop"] = found | {"fp32": full, "largest_drop": drive.drop}
        if found["successes"] / found["trials"] < full["successes"] / full["trials"] - drive.drop:
            said = f"it succeeds in {found['successes']} of {found['trials']} trials, fp32 in {full['successes']}"
            reasons = [graph["reason"]] if graph["reason"] else []
            graph |= {"accepted": False, "written": keep_failed, "reason": " and ".join([*reasons, said])}
    for graph in reduced:  # when all have been driven: whoever drives reads the manifest, which lists them
        if not graph["written"]:
            (folder / graph["file"]).unlink()


def measured(folder: FilePath, manifest: Mapping[str, Any], ticks: int) -> dict[str, Any]:
    """Latency on this machine of the ONNX graphs that have a contract, on one thread; for information."""
    found: dict[str, Any] = {"machine": machine(), "threads": 1, "graphs": {}}
    for graph in manifest["graphs"]:
        if graph["format"] == "onnx" and graph["path"] in manifest["latency"]["paths"]:
            session = open_session(folder / graph["file"])
            loop = Loop(session, Golden(folder / golden_file(graph["path"]), manifest["paths"][graph["path"]]))
            found["graphs"][graph["file"]] = measure(loop, ticks, max(1, ticks // 10))
    return found


def handover(paths: Sequence[Path], moments: Moments, tolerance: float) -> float | None:
    """How far steps after `policy` are from the model's own memory; None without steps.

    Raises:
        ExportError: farther than the tolerance.
    """
    policy = next(path for path in paths if path.name == "policy")
    step = next((path for path in paths if isinstance(path, StepPath)), None)
    if step is None:
        return None
    assert isinstance(policy, ActionPath)
    error = check_handover(policy, step, moments)
    if not error <= tolerance:
        raise ExportError(f"policy_step: after policy its actions differ from the model's memory by {error:.3g}")
    return error


def copy_runtime(folder: FilePath) -> None:
    """The runtime, which needs nothing else of this repository."""
    source = FilePath(__file__).parent / "runtime"
    shutil.copytree(source, folder / "runtime", ignore=shutil.ignore_patterns("__pycache__"))


def check_target(out: FilePath, force: bool) -> None:
    """Refuses to replace what is no artefact, and an artefact unless asked to."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise ExportError(f"{out}: exists and is no artefact folder (it has no manifest.json); choose another out=")
    if not force:
        raise ExportError(f"{out}: there is an artefact already; force=true replaces it")


def move_into_place(folder: FilePath, out: FilePath) -> None:
    """Renames the finished folder to its name; an older one steps aside first, so no mixture is ever seen."""
    older = FilePath(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        if out.exists():
            out.rename(older / out.name)
        folder.rename(out)
    finally:
        shutil.rmtree(older, ignore_errors=True)
