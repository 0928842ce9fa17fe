"""From shards to a driven arm: held-out observations, an artefact, and the artefact in the simulator."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from export_fakes import FakeModel

from export.__main__ import main
from export.build import BuildOptions, build_artefact
from export.drive import OnnxPolicyFactory
from export.observations import held_out_moments, recorded_clips, robot_names
from worldmodel.closed_loop import Rollout
from worldmodel.contracts import ClipSpec
from worldmodel.controllers import EagerPolicy, ExpertPolicy
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources.metaworld import MetaworldScene
from worldmodel.errors import ContractError, DataError
from worldmodel.model import WorldModel

torch.set_num_threads(1)

SPEC = ClipSpec()


@pytest.fixture(scope="module")
def artefact(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    reader = ShardReader(tiny_dataset)
    moments = held_out_moments(reader, SPEC, 2, ticks=3)
    assert [key.split()[0] for key, _ in moments] == ["heldout_episodes"] * 2 + ["heldout_tasks"] * 2
    assert "@0" in moments[0][0] and len(moments[0][1]) == 3 and len(moments[1][1]) == 1
    out = tmp_path_factory.mktemp("artefacts") / "fake"
    options = BuildOptions(paths=("policy",), formats=("onnx",))
    build_artefact(FakeModel(SPEC), out, moments, recorded_clips(reader, SPEC, 12), robot_names(reader, SPEC), options)
    return out


def test_manifest_carries_names_and_units_of_the_data(artefact: Path) -> None:
    (robot,) = json.loads((artefact / "manifest.json").read_text())["embodiments"]
    assert robot["action_names"] == ["delta_x", "delta_y", "delta_z", "gripper_effort"]
    assert len(robot["proprio_units"]) == SPEC.proprio and robot["sensor_frames"]["wrist"] == "hand"


@pytest.mark.parametrize(("mask", "realtime"), [((), 0), (("camera", "points", "touch"), 0), ((), 2)])
def test_artefact_and_checkpoint_drive_alike(artefact: Path, mask: tuple[str, ...], realtime: int) -> None:
    exported = OnnxPolicyFactory(artefact, mask=mask)()
    eager = EagerPolicy(cast(WorldModel, FakeModel(SPEC).eval()), mask=mask)
    scene = MetaworldScene("drawer-close-v3", pixels=SPEC.height, cameras=SPEC.cameras)
    observation: dict[str, Any] = scene.reset(np.random.default_rng(0))
    chunk, free = np.zeros((0, 4)), 0
    for step in range(14):
        for policy in (exported, eager):
            policy.observe(observation)
        if step % 4 == 0:
            # What is decided need not be what was done: it only has to reach both alike.
            decided = np.full((realtime, 4), 0.1, np.float32)
            chunk, wanted = exported.act_after(decided), eager.act_after(decided).clip(-1, 1)
            assert exported.report is not None and 0 < exported.report.confidence < 1
            # The command range is the eager policy's too; nothing else may change an action unsaid.
            held = np.any([rows for kind, rows in exported.report.limited.items() if kind != "command"], axis=0)
            np.testing.assert_allclose(chunk[~held], wanted[~held], atol=1e-4)
            free += int((~held).sum())
        observation, _ = scene.step(chunk[step % 4], images=(step + 1) % 4 == 0)
    assert free > 16
    scene.close()


def test_drive_command_writes_a_result(artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loop.json"
    words = ["drive", str(artefact), "tasks=[drawer-close-v3]", "trials=1", "workers=0", f"out={out}"]
    words += ["delay=2", "realtime=true"]
    assert main(words) == 0
    assert "| drawer-close-v3 |" in capsys.readouterr().out
    assert json.loads(out.read_text())["tasks"][0]["trials"] == 1


def test_expert_solves_the_task() -> None:
    scene = MetaworldScene("drawer-close-v3")
    with pytest.raises(ContractError, match="no scene attached"):
        ExpertPolicy().act()
    assert Rollout(replan=1, image_every=0)(scene, ExpertPolicy(), "drawer-close-v3", 0).success


def test_a_robot_without_data_is_that_of_the_registry_or_named(tiny_dataset: Path) -> None:
    names = robot_names(ShardReader(tiny_dataset), ClipSpec(embodiments=("panda", "sawyer")))
    assert names["panda"].action_names[-1] == "gripper" and len(names["panda"].action_units) == 7
    assert names["sawyer"].action_names[-1] == "gripper_effort"
    with pytest.raises(DataError, match=r"no episode of embodiment 'robot_x'; there are \['sawyer'\], and .* no entry"):
        robot_names(ShardReader(tiny_dataset), ClipSpec(embodiments=("robot_x",)))
