"""Generation: the same bytes whatever the workers, resumable, and refusing folders of other runs."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_COUNTS, TINY_TASKS

from worldmodel.data.__main__ import main
from worldmodel.data.generate import generate, make_plan, weak_experts
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.metaworld import MetaworldScene
from worldmodel.errors import ConfigError


def digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_workers_write_the_same_bytes_as_one(tiny_dataset: Path, tmp_path: Path) -> None:
    other = generate("metaworld", tmp_path / "two", tasks=TINY_TASKS, **TINY_COUNTS, workers=2, progress=False)
    assert digests(other) == digests(tiny_dataset)


def test_splits_and_tasks_are_the_benchmarks(tiny_dataset: Path) -> None:
    reader = ShardReader(tiny_dataset)
    assert {(e.split, e.task) for e in reader.entries} == {
        *(("train", task) for task in TINY_TASKS[:2]),
        *(("heldout_episodes", task) for task in TINY_TASKS[:2]),
        ("heldout_tasks", TINY_TASKS[2]),
    }
    assert reader.heldout_tasks == (TINY_TASKS[2],)
    assert (reader.index["generated"]["source"], reader.index["generated"]["benchmark"]) == ("metaworld", "ml10")


def test_a_killed_run_continues_and_ends_with_the_same_bytes(tiny_dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "worldmodel.data", "generate", "metaworld", str(out), "--tasks", *TINY_TASKS]
    counts = ["--episodes", "2", "--heldout-episodes", "1", "--heldout-task-episodes", "1", "--workers", "1", "--quiet"]
    process = subprocess.Popen([*command, *counts], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / ".progress" / "shard-000000.tar.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists()
    first = (out / "shard-000000.tar").stat().st_mtime_ns
    assert subprocess.run([*command, *counts], stderr=subprocess.DEVNULL, check=False).returncode == 0
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first
    assert digests(out) == digests(tiny_dataset)


def test_a_finished_dataset_is_left_alone_and_a_lost_shard_is_made_again(tiny_dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_dataset, tmp_path / "copy")
    os.unlink(copy / "shard-000004.tar")
    before = {name: (copy / name).stat().st_mtime_ns for name in digests(copy) if name.startswith("shard")}
    generate("metaworld", copy, tasks=TINY_TASKS, **TINY_COUNTS, workers=1, progress=False)
    assert {name: (copy / name).stat().st_mtime_ns for name in before} == before
    assert digests(copy) == digests(tiny_dataset)


def test_other_parameters_in_the_same_folder_are_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"other parameters \(seed: 0 there, 1 asked\)"):
        generate("metaworld", tiny_dataset, tasks=TINY_TASKS, **TINY_COUNTS, seed=1)
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(ConfigError, match="not empty"):
        generate("metaworld", tmp_path, episodes=1)
    with pytest.raises(ConfigError, match=r"unknown tasks \['fold-shirt'\].*reach-v3"):
        generate("metaworld", tmp_path / "new", tasks=["fold-shirt"])


def test_a_benchmark_names_the_tasks_and_an_episode_is_the_same_in_all_of_them() -> None:
    rest: dict[str, Any] = {"robots": None, "heldout_robots": None, "seed": 0, "pixels": 64}
    rest |= {"counts": {"train": 2, "heldout_episodes": 1, "heldout_tasks": 1}}
    plans = {name: make_plan("metaworld", benchmark=name, tasks=None, **rest) for name in ("ml10", "ml45", "mt10")}
    sizes = {name: (len(plan.tasks), len(plan.heldout_tasks)) for name, plan in plans.items()}
    assert sizes == {"ml10": (15, 5), "ml45": (50, 5), "mt10": (10, 0)}
    assert plans["ml10"] == make_plan("metaworld", benchmark=None, tasks=None, **rest)
    chunks = [{(c.what["split"], c.what["task"]): c for c in plan.chunks()} for plan in plans.values()]
    assert [len(by) for by in chunks] == [25, 95, 20]
    key = ("train", "reach-v3")
    assert chunks[0][key].what == chunks[1][key].what == chunks[2][key].what
    with pytest.raises(ConfigError, match="unknown benchmark 'ml1'; metaworld has ml10, ml45, mt10"):
        make_plan("metaworld", benchmark="ml1", tasks=None, **rest)
    with pytest.raises(ConfigError, match=r"\['hammer-v3'\]; benchmark ml45 has them; mt10 has reach-v3"):
        make_plan("metaworld", benchmark="mt10", tasks=["hammer-v3", "reach-v3"], **rest)


def test_an_expert_that_fails_is_named(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Still:
        def act(self) -> np.ndarray:
            return np.zeros(4, np.float32)

    assert weak_experts(ShardReader(tiny_dataset).entries) == []
    monkeypatch.setattr(MetaworldScene, "expert", lambda scene: Still())
    monkeypatch.setattr(MetaworldScene, "max_steps", 3)
    generate("metaworld", tmp_path / "still", tasks=TINY_TASKS[:1], **TINY_COUNTS, workers=1, progress=False)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == ["drawer-close-v3, sawyer: none of 3 demonstrations solved the task; training leaves the others out"]
    entries = ShardReader(tmp_path / "still").entries
    lucky = [replace(entry, success=number > 0) for number, entry in enumerate(entries)]
    assert weak_experts(lucky)[0].startswith("drawer-close-v3, sawyer: 2 of 3 demonstrations")
    assert weak_experts([*lucky, *lucky[1:]]) == []


def test_command_line(tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_dataset)]) == 0
    table = capsys.readouterr().out
    assert "drawer-close-v3" in table and "heldout_tasks" in table and "100%" in table
    assert main(["validate", str(tiny_dataset), "--json", "--workers", "1", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["status"], report["episodes"], report["faults"], report["not_checked"]) == ("clean", 7, [], [])
    assert main(["inspect", str(tiny_dataset / "nowhere")]) == 2
    assert "index.json" in capsys.readouterr().err


def test_help_is_instant() -> None:
    code = "import sys; from worldmodel.data.__main__ import main\n"
    code += "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'mujoco', 'lightning', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "scripted experts" in done.stdout
