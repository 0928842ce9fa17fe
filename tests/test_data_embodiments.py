"""The registry of robots, and several of them in one padded space."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import made_up_dataset

from worldmodel.contracts import ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.datamodule import ClipDataModule
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.embodiments import beyond_limits, load_embodiments, metadata_faults
from worldmodel.data.shard_writer import write_shard
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources import metaworld
from worldmodel.data.statistics import load_statistics
from worldmodel.errors import ConfigError, DataError
from worldmodel.normalise import Normaliser

SPEC = ClipSpec(
    cameras=("front",), embodiments=("aloha", "human", "toy"), height=16, width=16, action=16, proprio=16, future=1
)


def test_the_registry_is_that_of_the_sources() -> None:
    registry = load_embodiments()
    assert set(registry) >= {"sawyer", "panda", "ur5e", "aloha", "gr1", "human"}
    sawyer, aloha = registry["sawyer"], registry["aloha"]
    assert sawyer.action and sawyer.proprio and sawyer.gripper and aloha.action and aloha.gripper
    assert (sawyer.action.names, sawyer.action.units) == (metaworld.ACTION_NAMES, metaworld.ACTION_UNITS)
    assert (sawyer.proprio.names, sawyer.proprio.units) == (metaworld.PROPRIO_NAMES, metaworld.PROPRIO_UNITS)
    assert (sawyer.gripper.open, sawyer.gripper.closed) == (-1, 1)
    assert len(aloha.action.names) == 14 and aloha.gripper.open > aloha.gripper.closed
    assert registry["human"].action is None and registry["human"].proprio is None


def test_metadata_that_contradict_the_registry_are_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    episode = ShardReader(tiny_dataset).read(0)
    assert metadata_faults(episode.meta) == []
    assert metadata_faults({**episode.meta, "embodiment": "no-such-robot", "action_names": ["a"]}) == []
    swapped = {**episode.meta, "action_names": ["delta_y", "delta_x", "delta_z", "gripper_effort"]}
    assert "the registry has ['delta_x', 'delta_y'" in metadata_faults(swapped)[0]
    assert metadata_faults({**episode.meta, "embodiment": "human"})[0].startswith("action: 'human' has none")
    with pytest.raises(DataError, match=r"shard.tar: key a: action_names: \['delta_y', 'delta_x'"):
        write_shard(tmp_path / "shard.tar", [("a", replace(episode, meta=swapped))])
    assert episode.action is not None and beyond_limits("sawyer", episode.action) == []
    found = beyond_limits("sawyer", episode.action + np.array([0, 0, 3, 0], np.float32))
    assert len(found) == 1 and "delta_z is " in found[0] and "[-1.0, 1.0]" in found[0]


ARM = "{title: x, gripper: null, proprio: {names: [p], units: [m]}, action: {names: [a], units: [m]}, envelope: "
BROKEN: dict[str, tuple[str, str]] = {
    "not yaml": ("a: [", "not readable YAML"),
    "fields": ("title: x", r"must have the fields \['action', 'gripper', 'proprio', 'title'\]"),
    "counts": ("{title: x, action: {names: [a, b], units: [m]}, gripper: null, proprio: null}", "2 names .*1 units"),
    "limits": (
        "{title: x, action: {names: [a], units: [m], limits: [[1, 0]]}, gripper: null, proprio: null}",
        r"limits of \['a'\]",
    ),
    "gripper": (
        "{title: x, action: {names: [a], units: [m]}, gripper: {names: [b], open: 0, closed: 1}, proprio: null}",
        r"gripper: \['b'\] are none of the actions \['a'\]",
    ),
    "envelope fields": (
        ARM + "{joints: {}}}",
        "envelope: must have source, contact",
    ),
    "envelope joint": (
        ARM + "{source: s, contact: 1, joints: {b: {controls: position}}}}",
        r"envelope: \['b'\] are none of the actions",
    ),
    "envelope kind": (
        ARM + "{source: s, contact: 1, joints: {a: {controls: torque}}}}",
        "envelope: a: controls 'torque', expected one of position, velocity, effort",
    ),
    "envelope measured": (
        ARM + "{source: s, contact: 1, joints: {a: {controls: position, measured: q}}}}",
        "envelope: a: measured 'q' is none of",
    ),
    "envelope position": (
        ARM + "{source: s, contact: 1, joints: {a: {controls: velocity, position: [0, 1]}}}}",
        "envelope: a: position must be",
    ),
    "envelope sign": (
        ARM + "{source: s, contact: 1, joints: {a: {controls: position, velocity: -1}}}}",
        r"envelope: a: \['velocity'\] must be above 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_entry_is_refused_by_file_and_field(tmp_path: Path, case: str) -> None:
    text, message = BROKEN[case]
    (tmp_path / "robot.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"robot\.yaml.*{message}"):
        load_embodiments(tmp_path)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("robots") / "several"
    return made_up_dataset(root, {("aloha", "lift"): 2, ("human", "lift"): 2, ("toy", "lift"): 1})


def module(root: Path, spec: ClipSpec, **settings: Any) -> ClipDataModule:
    return ClipDataModule(root=str(root), spec=spec, batch_size=2, seed=0, **settings)


def test_embodiments_of_data_and_spec_must_agree(several: Path) -> None:
    assert len(module(several, SPEC).train_clips) > 0
    with pytest.raises(
        ConfigError, match=r"\['panda'\] of the spec have no data; the data have \['aloha', 'human', 't"
    ):
        module(several, replace(SPEC, embodiments=("aloha", "human", "toy", "panda")))
    with pytest.raises(
        ConfigError, match=r"\['human', 'toy'\] of the data are not in the spec.*ClipSpec.embodiments is \['aloha'\]"
    ):
        module(several, replace(SPEC, embodiments=("aloha",)))


def test_actions_share_one_padded_space_with_a_mask(several: Path) -> None:
    clips = ClipDataset(ShardReader(several), SPEC, split="train")
    first = {e.embodiment: sum(x.length for x in clips.entries()[:i]) for i, e in enumerate(clips.entries())}
    batch = collate([clips[first[name]] for name in SPEC.embodiments])
    assert batch.observation.embodiment.tolist() == [0, 1, 2]
    assert batch.future.action_dims.sum(-1).tolist() == [14, 0, 4]
    assert batch.future.action_valid.any(-1).tolist() == [True, False, True]
    assert batch.observation.has_proprio.tolist() == [True, False, True]
    statistics = load_statistics(several)["embodiments"]
    normaliser = Normaliser(spec=SPEC, statistics=statistics, effector=(0, 1, 2))
    there = normaliser.standardise("action", batch.future.actions, batch.observation.embodiment)
    back = normaliser.restore("action", there, batch.observation.embodiment)
    torch.testing.assert_close(back, batch.future.actions)
    assert not there[1].any() and not there[2, :, 4:].any()


def test_a_still_dimension_is_floored_and_stats_json_says_so(several: Path, tiny_dataset: Path) -> None:
    measured = load_statistics(tiny_dataset)["embodiments"]["sawyer"]["proprio"]
    std, floored = np.array(measured["std"]), np.array(measured["floored"])
    assert measured["floor"] > 0 and (std[floored] == measured["floor"]).all() and (std[~floored] > 0).all()
    assert not np.any(load_statistics(several)["embodiments"]["aloha"]["action"]["floored"])
