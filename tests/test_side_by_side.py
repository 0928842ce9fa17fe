"""Runs side by side: what is best only where that can be said, and a warning where they are not alike."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from page_checks import check_page
from test_report import closed, offline

from worldmodel.errors import ConfigError, DataError
from worldmodel.report import write_report
from worldmodel.side_by_side import best_of, compare_reports, write_comparison


def value(low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": low, "low": low, "high": high}


@pytest.mark.parametrize(
    ("values", "higher", "best"),
    [
        ([value(1, 2), value(3, 4)], True, 1),
        ([value(1, 2), value(3, 4)], False, 0),
        ([value(1, 3), value(3, 4)], True, None),  # intervals that touch are not apart
        ([value(1, 2), value(5, 6), value(3, 5.5)], True, None),
        ([value(1, 2), None, value(3, 4)], True, 2),
        ([value(1, 2), value(None, None)], True, None),
        ([value(3, 4), None], True, None),  # nothing to be better than
    ],
)
def test_best_is_apart_from_all_others(values: list, higher: bool, best: int | None) -> None:
    assert best_of(values, higher) == best


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    stamp = {"protocol": {"name": "free", "sha256": "a" * 64, "departures": {}}, "data_index_sha256": "b" * 64,
             "parameters": "7", "versions": {"torch": "2"}}  # fmt: skip
    found = []
    for number, solved in enumerate((20, 2)):
        folder = tmp_path_factory.mktemp("run")
        results = {"title": "<one>", "stamp": stamp, "offline": [offline("heldout_tasks", ["door-v3"], 2)]}
        data, _ = write_report(results | {"closed_loop": [closed("ours", solved)]}, folder)
        report = json.loads(data.read_text()) | {"path": str(data)}
        if number:
            figure = report["offline"][0]["figures"][0]
            figure["ours"] = {name: figure["ours"][name] + 100 for name in ("value", "low", "high")}
            data.write_text(json.dumps(report))
        found.append(report)
    return found


def test_alike_runs_have_a_best_where_intervals_are_apart(reports: list[dict[str, Any]]) -> None:
    compared = compare_reports(reports)
    assert compared["warnings"] == [] and [run["name"] for run in compared["runs"]] == ["<one> (1)", "<one> (2)"]
    first, *others = compared["offline"]["heldout_tasks"]
    assert first["higher_is_better"] and first["best"] == 1 and all(row["best"] is None for row in others)
    mean, task = compared["closed_loop"]["rows"]
    assert (mean["task"], task["task"]) == (None, "reach-v3") and mean["best"] == task["best"] == 0


@pytest.mark.parametrize(
    ("place", "words", "table", "loop"),
    [
        (("stamp", "data_index_sha256"), "data differs", False, False),
        (("stamp", "protocol", "name"), "protocol differs", False, False),
        (("offline", 0, "settings", "seed"), "seed on held-out tasks differs: <one> (1) 0; <one> (2) 9", False, True),
        (("closed_loop", 0, "seed"), "seed of the closed loop differs", True, False),
        (("stamp", "versions", "torch"), "torch differs: <one> (1) 2; <one> (2) 9", True, True),
    ],
)
def test_what_is_not_alike_is_said_and_has_no_best(
    reports: list[dict[str, Any]], place: tuple, words: str, table: bool, loop: bool
) -> None:
    other = deepcopy(reports[1])
    part: Any = other
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = 9
    compared = compare_reports([reports[0], other])
    assert len(compared["warnings"]) == 1 and words in compared["warnings"][0]
    assert (compared["offline"]["heldout_tasks"][0]["best"] is not None) == table
    assert (compared["closed_loop"]["rows"][0]["best"] is not None) == loop


def test_page_and_json_are_written(reports: list[dict[str, Any]], tmp_path: Path) -> None:
    data, page = write_comparison([report["path"] for report in reports], tmp_path / "new")
    html = page.read_text()
    check_page(html)
    assert "&lt;one&gt; (1)" in html and html.count('<b class="yes">') == 3 and "Not alike" not in html
    assert json.loads(data.read_text())["runs"][1]["path"] == reports[1]["path"]
    beside, _ = write_comparison([reports[0]["path"], str(Path(reports[1]["path"]).parent)], None)
    assert beside.parent == Path(reports[0]["path"]).parent
    with pytest.raises(ConfigError, match="expected two or more"):
        write_comparison([reports[0]["path"]], None)
    with pytest.raises(DataError, match=r"no report\.json"):
        write_comparison([reports[0]["path"], tmp_path / "none"], None)
