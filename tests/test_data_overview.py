"""The page about a dataset: self-contained, escaped, naming every task, with scenes that are true to the data."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from page_checks import check_page

from worldmodel.data.__main__ import USAGE, main
from worldmodel.data.overview import rows, tracks
from worldmodel.data.overview_page import render
from worldmodel.data.schema import Episode
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.plots import histogram, orbit

NASTY = 'push <b>"it"</b> & stop'


def test_the_page_is_self_contained_and_names_every_task(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "page.html"
    assert main(["inspect", str(tiny_dataset), "--html", str(file)]) == 0
    out = capsys.readouterr().out
    assert "drawer-close-v3" in out and f"page: {file}" in out
    page = file.read_text(encoding="utf-8")
    check_page(page)
    reader = ShardReader(tiny_dataset)
    for task in reader.index["tasks"]:
        assert f"<b>{task}</b>" in page
    for words in (*reader.index["splits"], "gripper_effort", "left_finger", "end effector", "in every episode"):
        assert words in page
    assert page.count("data:video/mp4") == 2 * len(reader.index["tasks"])
    assert page.count('svg class="chart scene orbit"') == 2 * len(reader.index["tasks"])
    # The encoder of videos does not give the same bytes every time, not even for the same frames.
    without = [re.sub(r"data:video/mp4;base64,[^\"]+", "", text) for text in (page, render(reader))]
    assert without[0] == without[1]
    assert main(["inspect", str(tiny_dataset), "--html", str(tmp_path)]) == USAGE


def test_rows_add_up(tiny_dataset: Path) -> None:
    reader = ShardReader(tiny_dataset)
    totals = [row for row in rows(reader) if row.task == "all"]
    assert sum(row.episodes for row in totals) == len(reader) and sum(row.steps for row in totals) == reader.frames
    assert {row.split: row.episodes for row in totals} == {"train": 4, "heldout_episodes": 2, "heldout_tasks": 1}


def test_data_without_senses_and_with_hostile_names(tiny_dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    meta = {**ShardReader(copy).read(0).meta, "instruction": NASTY, "task": NASTY, "action_names": [NASTY]}
    meta["embodiment"] = "gantry"
    meta |= {"absent": ["rgb", "camera", "objects", "tactile", "proprio"]}
    del meta["action_units"]
    bare = Episode(meta=meta, action=np.zeros((meta["length"], 1), np.float32))
    write_index(copy, [write_shard(copy / "shard-000000.tar", [("bare", bare)])], [], {})
    page = render(ShardReader(copy))
    check_page(page)
    assert NASTY not in page and "push &lt;b&gt;" in page
    for words in ("No pictures.", "No pose or track to draw.", "<b>absent</b>", "Absent."):
        assert words in page


def test_tracks_take_the_end_effector_by_name(tiny_dataset: Path) -> None:
    episode = ShardReader(tiny_dataset).read(0, images=False)
    found = tracks(episode)
    assert list(found) == ["end effector", "object", "goal"] and episode.proprio is not None
    np.testing.assert_array_equal(found["end effector"], episode.proprio[:, :3])


def test_a_scene_fits_its_picture_however_it_is_turned() -> None:
    rng = np.random.default_rng(0)
    svg = orbit([(np.eye(4), 1.0, 1.5)], {"hand": rng.normal(size=(9, 3))}, "scene")
    x0, y0, scale = (float(value) for value in re.findall(r'data-view="([^"]*)"', svg)[0].split())
    for text in re.findall(r'data-xyz="([^"]*)"', svg):
        offsets = np.array(text.split(), float).reshape(-1, 3)
        assert (np.linalg.norm(offsets, axis=1) * scale <= min(x0, y0)).all()


def test_histograms_count_every_value() -> None:
    svg = histogram({"a": np.array([0.0, 0.0, 1.0]), "b": np.array([1.0])}, "x", "title", bins=2)
    heights = [float(h) for h in re.findall(r'<rect[^>]*height="([^"]*)"', svg)]
    assert len(heights) == 3 and heights[0] == pytest.approx(2 * heights[1], abs=0.2)
    assert "Nothing was recorded" in histogram({"a": np.zeros(0)}, "x", "title")
    assert "<rect" in histogram({"a": np.ones(3)}, "x", "constant", log=True)
