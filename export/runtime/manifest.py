"""manifest.json as the robot reads it: versions, checksums, which graph is in which file."""

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST_SCHEMA = 3
"""Version of manifest.json that this file reads."""

SENSES = ("rgb", "camera", "points", "wrench", "taxels", "proprio", "text")
"""What a presence mask can hide. `touch` is accepted as a short name for wrench and taxels."""


class RuntimeContractError(ValueError):
    """An artefact or an observation is not what the manifest says."""


def load_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads manifest.json and checks its version and the size and sha256 of every file it lists.

    Raises:
        RuntimeContractError: no manifest, another schema version, or a file that is missing or altered.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise RuntimeContractError(f"{folder}: no manifest.json; expected a folder written by `python -m export build`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RuntimeContractError(f"{path}: not valid JSON ({error})") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != MANIFEST_SCHEMA:
        raise RuntimeContractError(f"{path}: schema_version is {version!r}, this runtime reads {MANIFEST_SCHEMA}")
    needed = {"control", "embodiments", "files", "graphs", "limits", "optional", "paths", "spec"}
    if lacking := sorted(needed - set(manifest)):
        raise RuntimeContractError(f"{path}: has no {lacking}")
    for graph in manifest["graphs"]:
        if graph["file"] not in manifest["files"]:
            known = sorted(manifest["files"])
            raise RuntimeContractError(f"{path}: a graph is in {graph['file']!r}, expected one of {known}")
    for name, entry in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise RuntimeContractError(f"{path}: file {name!r} does not lie in the artefact folder")
        if not (folder / name).is_file():
            raise RuntimeContractError(f"{folder / name}: missing, but listed in manifest.json")
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if len(content) != entry["bytes"] or digest != entry["sha256"]:
            raise RuntimeContractError(
                f"{folder / name}: altered since export: {len(content)} bytes, sha256 {digest[:12]}...; "
                f"manifest.json says {entry['bytes']} bytes, sha256 {entry['sha256'][:12]}..."
            )
    return manifest


def find_graph(manifest: dict[str, Any], path: str, precision: str = "fp32", *, unproven: bool = False) -> str:
    """The ONNX file of a path in a precision.

    Raises:
        RuntimeContractError: there is none, or it was written although it failed its check and `unproven` is not set.
    """
    graphs = [g for g in manifest["graphs"] if g["format"] == "onnx"]
    found = [g for g in graphs if (g["path"], g["precision"]) == (path, precision)]
    if not found:
        there = sorted(f"{g['path']} in {g['precision']}" for g in graphs)
        raise RuntimeContractError(f"{path} in {precision}: no such ONNX graph; the artefact has {', '.join(there)}")
    if not found[0]["accepted"] and not unproven:
        raise RuntimeContractError(
            f"{found[0]['file']}: failed its check when it was built ({found[0].get('reason')}); "
            "OnnxPolicy(unproven=True) runs it all the same"
        )
    return str(found[0]["file"])
