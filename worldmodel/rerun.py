"""A published result once more from its stamp, held against what its report says."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from worldmodel.checkpoint import WEIGHTS
from worldmodel.data.index import INDEX
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError, DataError
from worldmodel.protocol import evaluate
from worldmodel.trials import row_name

PLACES = ("checkpoint", "data", "artefact", "out", "workers")
"""Settings that say where things are and how many work on them, and so may differ from the stamp's."""
RESULTS = ("offline", "missing", "closed_loop", "missing_closed_loop", "edits")
_CHANCE = ("seconds", "reused")


def read_report(path: str | Path) -> dict[str, Any]:
    """A report.json, by itself, by the folder it is in, or by the run folder that holds `evaluation`.

    Raises DataError if there is none or it has no stamp.
    """
    path = Path(path)
    places = [path, path / "report.json", path / "evaluation" / "report.json"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(f"{path}: no report.json here; `python eval.py checkpoint=RUN` writes one")
    try:
        report = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{found}: not a report of eval.py ({error})") from None
    if not isinstance(report, dict) or not {"stamp", "offline", "closed_loop"} <= set(report):
        raise DataError(f"{found}: not a report of eval.py: it must have stamp, offline and closed_loop")
    return report | {"path": str(found)}


def rerun(path: str | Path, places: Mapping[str, Any]) -> list[str]:
    """Evaluate what a report is of as its stamp says, and return one line for each number that came out otherwise.

    `places` are settings of `PLACES` that are not the stamp's; `out` is by default the folder `rerun` beside the
    report. The same numbers are to be expected on the same kind of processor with the same versions of packages. Raises
    ConfigError for other settings, and DataError if the weights or the data are not those of the stamp.
    """
    if unknown := sorted(set(places) - set(PLACES)):
        raise ConfigError(f"rerun: {unknown} come from the stamp; only {', '.join(PLACES)} may be others")
    report = read_report(path)
    stamp = report["stamp"]
    if lacking := [name for name in ("config", "protocol", "weights_sha256", "threads") if name not in stamp]:
        raise DataError(f"{report['path']}: its stamp has no {lacking}; evaluate once more with this version")
    if "robots" not in stamp["config"]:
        raise DataError(f"{report['path']}: its stamp says nothing of robots; evaluate once more with this version")
    settings = {
        **stamp["config"],
        "data": stamp["data"],
        "out": str(Path(report["path"]).parent / "rerun"),
        "threads": stamp["threads"],
        **places,
    }
    weights = Path(settings["checkpoint"]) / WEIGHTS
    if not weights.is_file():
        raise DataError(f"{weights} is missing; checkpoint=FOLDER says where the run folder is now")
    index = ShardReader(settings["data"]).root / INDEX
    for name, file in (("weights_sha256", weights), ("data_index_sha256", index)):
        if (found := sha256(file.read_bytes()).hexdigest()) != stamp[name]:
            raise DataError(
                f"{file} is not what the report is of: sha256 {found[:12]}, in the stamp {stamp[name][:12]}"
            )
    data, _ = evaluate(settings)
    again = read_report(data)
    return [line for name in RESULTS for line in differences(report.get(name), again.get(name), name)]


def differences(before: Any, after: Any, where: str) -> list[str]:
    """One line for each value of a JSON tree that is not the same in another; durations aside."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in dict.fromkeys([*before, *after]) if name not in _CHANCE]
        return [line for n in names for line in differences(before.get(n), after.get(n), f"{where}.{n}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = zip(before, after, strict=True)
        return [line for i, pair in enumerate(pairs) for line in differences(*pair, f"{where}[{_name(before[i], i)}]")]
    return [] if before == after else [f"{where}: {before} before, {after} now"]


def _name(item: Any, number: int) -> str:
    """What an item of a list is called, if it says so."""
    if isinstance(item, dict) and item.get("robot"):
        return row_name(item)
    keys = ("split", "policy", "task", "missing", "name")
    return next((str(item[key]) for key in keys if isinstance(item, dict) and key in item), str(number))
