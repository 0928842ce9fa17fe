"""What a model loses with a sense: nothing of it reaches the model, and differences are paired."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import Copycat

from worldmodel.closed_loop import PolicyFactory
from worldmodel.comparison import Contender
from worldmodel.contracts import ClipSpec
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.shards import ShardReader
from worldmodel.errors import ConfigError
from worldmodel.evaluation import evaluate_offline
from worldmodel.missing import ROOTED, Absent, Without, absences, compare_success, drop_rootless, evaluate_missing
from worldmodel.protocol import lesser_contenders, make_contenders
from worldmodel.trials import wilson_interval

CAMERAS = ("front", "wrist")


@pytest.fixture(scope="module")
def reader(tiny_dataset: Path) -> ShardReader:
    return ShardReader(tiny_dataset)


def test_names_of_what_is_missing() -> None:
    found = absences(["touch", "one_camera"], CAMERAS)
    assert found == {
        "touch": Absent(senses=("touch",)),
        "all cameras but front": Absent(cameras=("wrist",)),
        "all cameras but wrist": Absent(cameras=("front",)),
    }
    assert absences(["one_camera"], ("front",)) == {}
    with pytest.raises(ConfigError, match=r"unknown 'smell'; valid: rgb, camera, .*one_camera"):
        absences(["smell"], CAMERAS)


@pytest.mark.parametrize(
    "absent",
    [Absent(senses=(s,)) for s in ("rgb", "camera", "points", "touch", "proprio", "text")]
    + [Absent(cameras=("wrist",))],
)
def test_nothing_of_what_is_absent_reaches_the_model(reader: ShardReader, absent: Absent) -> None:
    """Two observations that differ in an absent sense alone become the same, and the rest stays as it is."""
    batch = collate([ClipDataset(reader, ClipSpec(), split="heldout_episodes")[3]])
    observation, future = batch.observation, batch.future
    fields = {
        "rgb": ("rgb",), "camera": ("camera_to_base", "intrinsics"), "points": ("points", "visible"),
        "touch": ("wrench", "taxels"), "proprio": ("proprio",), "text": ("text",),
    }  # fmt: skip
    views = [CAMERAS.index(camera) for camera in absent.cameras] or [0, 1]
    touched = [name for sense in absent.senses or ("rgb", "camera") for name in fields[sense]]
    changed = {}
    for name in touched:
        value = getattr(observation, name).clone()
        part = (slice(None), slice(None), views) if absent.cameras else ...
        value[part] = ~value[part] if value.dtype == torch.bool else value[part] + 1
        changed[name] = value
    without = Without(Copycat(reader, ClipSpec()), absent)
    left, other = without.shown(observation), without.shown(observation._replace(**changed))
    for name in observation._fields:
        assert torch.equal(getattr(left, name), getattr(other, name)), name
        if name not in touched and not name.startswith("has_"):
            assert torch.equal(getattr(left, name), getattr(observation, name)), name
    known = without.recorded(left, future)
    if "points" in absent.senses:
        assert not known.points.any() and torch.equal(known.rgb, future.rgb)
    if absent.cameras:
        assert not known.rgb[:, :, 1].any() and torch.equal(known.rgb[:, :, 0], future.rgb[:, :, 0])
        assert left.has_rgb.tolist() == [[True, False]] and left.has_camera.tolist() == [[True, False]]


def test_table_of_a_model_that_answers_what_it_sees(reader: ShardReader) -> None:
    """The copycat says where points are now: without them it says the origin, and the rest does not change."""
    model = Copycat(reader, ClipSpec())
    how = {"clips_per_episode": 2, "batch_size": 4, "seed": 0, "sampler_steps": None, "max_clips": 8}
    table = evaluate_missing(model, reader, "heldout_episodes", absences(["points", "one_camera"], CAMERAS), **how)
    whole = evaluate_offline(model, reader, "heldout_episodes", **how)
    figures = {figure["name"]: figure["ours"] for figure in whole["figures"]}
    assert repr({figure["name"]: figure["ours"] for figure in table["complete"]}) == repr(figures)
    blind, front, wrist = (row["figures"] for row in table["rows"])
    assert blind["trajectory_ade"]["clearly"] and not blind["trajectory_ade"]["better"]
    change = blind["trajectory_ade"]["difference"]
    assert change["value"] == pytest.approx(blind["trajectory_ade"]["value"] - figures["trajectory_ade"]["value"])
    assert change["low"] > 0.1 and blind["video_psnr"]["difference"]["value"] == 0
    assert front["video_psnr/front"]["difference"]["value"] == 0 > front["video_psnr/wrist"]["difference"]["value"]
    assert wrist["video_psnr/wrist"]["difference"]["value"] == 0 > wrist["video_psnr/front"]["difference"]["value"]


def test_figures_without_a_place_to_start_from_are_left_out(reader: ShardReader) -> None:
    result = evaluate_offline(Copycat(reader, ClipSpec()), reader, "heldout_episodes", max_clips=4, batch_size=4)
    left = drop_rootless(result, ["points"])
    gone = {f["name"] for f in result["figures"]} - {f["name"] for f in left["figures"]}
    assert gone and {name.split("/")[0] for name in gone} <= set(ROOTED["points"])
    assert not gone & set(left["per_task"]) and not gone & set(left["horizons"])
    assert drop_rootless(result, []) == result


@dataclass(frozen=True)
class Hiding:
    folder: Path
    mask: tuple[str, ...] = ()
    blind: tuple[str, ...] = ()

    def __call__(self, robot: str) -> object: ...


def contender(factory: object) -> Contender:
    made: PolicyFactory = factory  # type: ignore
    return Contender(policy="ours", observes="all", factory=made, weights=Path("x"), trials=3)


def test_the_first_policy_is_tried_without_each_sense() -> None:
    missing = absences(["camera", "one_camera"], CAMERAS)
    first = contender(Hiding(Path("x"), mask=("touch",)))
    lesser = lesser_contenders([first, replace(first, policy="another")], missing, 5)
    assert list(lesser) == list(missing)
    factories = [made.factory for made in lesser.values()]
    assert factories == [
        Hiding(Path("x"), ("touch", "camera")), Hiding(Path("x"), ("touch",), ("wrist",)),
        Hiding(Path("x"), ("touch",), ("front",)),
    ]  # fmt: skip
    assert {made.trials for made in lesser.values()} == {3} and "without camera poses" in next(
        iter(lesser.values())
    ).policy
    assert lesser_contenders([first], missing, 0) == {} == lesser_contenders([], missing, 5)
    with pytest.raises(ConfigError, match="has no `mask` and `blind`"):
        lesser_contenders([contender(object())], missing, 5)


def test_senses_that_a_protocol_leaves_out_are_hidden_from_policies_too() -> None:
    factory = {"_target_": "test_missing.Hiding", "folder": "x", "mask": ["touch"]}
    (made,) = make_contenders([{"policy": "p", "observes": "o", "factory": factory}], ("touch", "points"))
    assert made.factory == Hiding("x", ("touch", "points"))  # type: ignore
    assert made.observes == "o; the protocol hides touch, points"


def test_what_needs_a_sense_that_is_left_out_is_left_out_and_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    baseline = {"policy": "MLP", "observes": "o", "factory": {"_target_": "worldmodel.baselines.BCMLPFactory"}}
    baseline["factory"] |= {"folder": "x"}
    assert make_contenders([baseline], ("points", "touch")) == []
    assert "MLP: left out, it needs points" in capsys.readouterr().out
    (kept,) = make_contenders([baseline], ("touch",))
    assert kept.policy == "MLP" and not capsys.readouterr().out
    unknown = {"policy": "p", "observes": "o", "factory": {"_target_": "types.SimpleNamespace", "folder": "x"}}
    with pytest.raises(ConfigError, match="SimpleNamespace of 'p' cannot be denied touch"):
        make_contenders([unknown], ("touch",))


def test_success_is_compared_over_common_start_states() -> None:
    def result(outcomes: list[bool]) -> dict:
        rate = float(np.mean(outcomes))
        low, high = wilson_interval(sum(outcomes), len(outcomes))
        return {"tasks": [{"task": "a", "outcomes": outcomes}], "mean_success": rate, "interval": [low, high]}

    whole = result([True] * 10 + [False] * 10)
    lesser = {"touch": result([True] * 10), "camera poses": result([False] * 9 + [True])}
    same, worse = compare_success([whole], lesser, {"seed": 0})
    assert same["difference"] == {"value": 0, "low": 0, "high": 0} and not same["clearly"]
    assert worse["trials"] == 10 and worse["difference"]["value"] == pytest.approx(-0.9)
    assert worse["clearly"] and not worse["better"]
