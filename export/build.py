"""Writes an artefact folder: exported graphs, golden observations, the runtime and the manifest; all or nothing."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from export.manifest import RobotNames, build_manifest, git_state, write_manifest
from export.onnx import OnnxRunner, write_onnx
from export.parity import TOLERANCE, Runner, check_parity, make_examples, write_golden
from export.torchscript import TorchScriptRunner, write_torchscript
from export.wrappers import ActionModel, ActionPath, random_inputs
from worldmodel.contracts import Observation
from worldmodel.errors import ConfigError, ExportError

FORMATS = ("onnx", "torchscript")
ONNX_FILE, TORCHSCRIPT_FILE, GOLDEN_FILE = "policy.onnx", "policy.pt", "golden.npz"


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What to write and how strictly to check it; the meaning of each field stands in configs/export.yaml."""

    formats: tuple[str, ...] = FORMATS
    opset: int = 18
    dynamic_batch: bool = False
    optional: tuple[str, ...] = ("camera", "points", "wrench", "taxels", "text")
    tolerance: float = TOLERANCE
    golden: int = 4
    force: bool = False

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or "onnx" not in self.formats:
            raise ConfigError(f"formats: got {list(self.formats)}; expected some of {FORMATS}, onnx among them")


def build_artefact(
    model: ActionModel,
    out: str | Path,
    observations: Sequence[tuple[str, Observation]],
    robots: Mapping[str, RobotNames],
    options: BuildOptions,
) -> dict[str, float]:
    """Exports a model and proves every artefact equal to it before anything appears at `out`.

    Args:
        model: in any mode; it is switched to inference.
        out: the artefact folder.
        observations: held-out observations of batch 1 with a name each, for messages.
        robots: names and units of every embodiment of the model.
        options: formats and checks.

    Returns:
        The largest absolute error of each artefact.

    Raises:
        ExportError: `out` holds something that may not be replaced; an exporter failed; or parity did.
    """
    out = Path(out)
    _check_target(out, options.force)
    model.eval()
    assert isinstance(model, nn.Module)
    path_module = ActionPath(model).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        runners: dict[str, Runner] = {}
        dynamic = options.dynamic_batch
        example = random_inputs(model.spec, batch=2 if dynamic else 1)
        write_onnx(path_module, example, folder / ONNX_FILE, opset=options.opset, dynamic=dynamic)
        runners[ONNX_FILE] = OnnxRunner(folder / ONNX_FILE)
        if "torchscript" in options.formats:
            write_torchscript(path_module, random_inputs(model.spec, batch=1), folder / TORCHSCRIPT_FILE)
            runners[TORCHSCRIPT_FILE] = TorchScriptRunner(folder / TORCHSCRIPT_FILE)
        eager = eager_runner(path_module)
        examples = make_examples(observations, (model.spec.chunk, model.spec.action))
        parity = check_parity(eager, runners, examples, options.tolerance)
        spread = max(1, len(examples) // max(1, options.golden))
        write_golden(folder / GOLDEN_FILE, eager, examples[::spread][: options.golden])
        package = Path(__file__).parent
        shutil.copyfile(package / "runtime.py", folder / "runtime.py")
        manifest = build_manifest(
            model,
            folder,
            onnx=ONNX_FILE,
            opset=options.opset,
            dynamic=dynamic,
            optional=options.optional,
            parity=parity,
            git=git_state(package),
            robots=robots,
        )
        write_manifest(folder, manifest)
        folder.chmod(0o755)
        _move_into_place(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return parity.max_abs_error


def eager_runner(path_module: ActionPath) -> Runner:
    """The unexported model behind the interface of the artefacts' runners."""

    def run(inputs: Sequence[Tensor]) -> np.ndarray:
        with torch.no_grad():
            return path_module(*inputs).numpy()

    return run


def _check_target(out: Path, force: bool) -> None:
    """Refuses to replace what is no artefact, and an artefact unless asked to."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise ExportError(f"{out}: exists and is no artefact folder (it has no manifest.json); choose another out=")
    if not force:
        raise ExportError(f"{out}: there is an artefact already; force=true replaces it")


def _move_into_place(folder: Path, out: Path) -> None:
    """Renames the finished folder to its name; an older one steps aside first, so no mixture is ever seen."""
    older = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    try:
        if out.exists():
            out.rename(older / out.name)
        folder.rename(out)
    finally:
        shutil.rmtree(older, ignore_errors=True)
