"""The import rule: data flows one way, stages meet only in `contracts` and `model`, the robot side stands alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIERS = [
    {"errors", "contracts", "config", "cluster"},
    {"geometry", "nn", "draws", "ranks", "page", "plots", "trials", "viz"},
    {"data"},
    {"normalise"},
    {"encoders"},
    {"synthesis"},
    {"policy"},
    {"guess", "joint", "conditioning", "editing"},
    {"model", "fitting"},
    {"acceleration", "adapters", "checkpoint", "convert", "flops", "schedule", "sized", "streaming"},
    {
        "losses",
        "editing_losses",
        "metrics",
        "motion_loss",
        "compositor_loss",
        "picture_loss",
        "proposal_loss",
        "closed_loop",
        "controllers",
        "ensemble",
        "baselines",
        "holdout",
        "figures",
    },
    {
        "evaluation",
        "evaluation_given",
        "imagination",
        "missing",
        "motion_evaluation",
        "edit_evaluation",
        "distillation",
        "finetune",
    },
    {"report_samples", "report_closed_loop", "report_motion", "report_edits", "report_missing"},
    {"report", "stamp", "comparison", "published"},
    {"model_card"},
    {"averaging", "phases"},
    {"sharding", "telemetry", "watch"},
    {"parallel", "prepare", "progress"},
    {"protocol", "training", "samples", "run_folder", "curves", "rollout", "drift", "edit"},
    {"phase_run"},
    {"curriculum", "features", "plan", "rerun", "side_by_side"},
    {"export"},
]
STAGES = {"encoders", "synthesis", "policy"}
RANK = {name: rank for rank, names in enumerate(TIERS) for name in names}


def layer(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "export" if parts[0] == "export" else parts[1]


def imports(path: Path) -> set[str]:
    """Layers of this repository that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "worldmodel":
                names = [f"worldmodel.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "export":
                found.add("export")
            elif parts[0] == "worldmodel" and len(parts) > 1:
                found.add(parts[1])
    return found


def files() -> list[Path]:
    found = sorted((ROOT / "worldmodel").rglob("*.py")) + sorted((ROOT / "export").rglob("*.py"))
    return [path for path in found if path != ROOT / "worldmodel" / "__init__.py"]


def test_nothing_imports_rightward():
    assert len(files()) > 30
    for path in files():
        own = layer(path)
        assert own in RANK, f"{path}: layer {own!r} has no place in the import order"
        for name in imports(path):
            assert RANK[name] <= RANK[own], f"{path} ({own}) imports {name}, which is to its right"


def test_stages_do_not_import_each_other():
    for path in files():
        own = layer(path)
        if own in STAGES:
            assert not imports(path) & (STAGES - {own}), path


def test_runtime_needs_numpy_and_onnxruntime_only():
    allowed = set(sys.stdlib_module_names) | {"numpy", "onnxruntime"}
    files = sorted((ROOT / "export" / "runtime").glob("*.py"))
    assert len(files) > 2
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            # Its own files, under whatever name the folder lies.
            assert node.level == 1 and (ROOT / "export" / "runtime" / f"{node.module}.py").is_file()
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in allowed


def test_files_stay_readable():
    for path in files():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 380, f"{path} is long; is it still one thing?"


SERVER = ("openpi", "sessions", "onnx_source", "server")


@pytest.mark.parametrize("name", [*SERVER, "lerobot"])
def test_the_server_needs_little_beside_the_runtime(name: str):
    allowed = set(sys.stdlib_module_names) | {"numpy"}
    allowed |= {"msgpack", "websockets", "prometheus_client"} if name != "lerobot" else set()
    own = {f"export.{other}" for other in ("runtime", *SERVER)}
    for node in ast.walk(ast.parse((ROOT / "export" / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert node.module in own or (node.module or "").split(".")[0] in allowed
