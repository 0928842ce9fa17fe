"""Variants and masks: the same motion in other looks, linked, repeatable, and held to their originals."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_checks import check_page
from scene_checks import project
from test_data_generate import digests
from test_data_validate import array, rewrite

from worldmodel.contracts import ClipSpec
from worldmodel.data.__main__ import main
from worldmodel.data.checks.finding import Fault
from worldmodel.data.clip import collate
from worldmodel.data.dataset import ClipDataset
from worldmodel.data.generate import generate, make_plan
from worldmodel.data.overview_page import render
from worldmodel.data.schema import Episode, encode
from worldmodel.data.shards import ShardReader, write_index, write_shard
from worldmodel.data.sources import metaworld_tasks, robosuite_tasks
from worldmodel.data.sources.appearance import _CHANGED, ELEMENTS
from worldmodel.data.sources.looks import (
    COLOURS,
    PATTERNS,
    SURFACES,
    Light,
    Paint,
    Pattern,
    View,
    draw_look,
    named_colours,
    texture,
)
from worldmodel.data.sources.metaworld import MetaworldScene
from worldmodel.data.validate import examine, validate
from worldmodel.errors import ConfigError, DataError, SampleError

TASK = "drawer-close-v3"
SETTINGS: dict[str, Any] = {
    "tasks": [TASK],
    "episodes": 1,
    "heldout_episodes": 1,
    "heldout_task_episodes": 0,
    "workers": 1,
    "progress": False,
}
STILL = View(0, 0, 1, 0, (0, 0, 0), (0, 0, 0), 0)
KEY = f"metaworld-{TASK}-train-000000"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One episode of each of two splits with two variants each; treat it as read-only."""
    return generate("metaworld", tmp_path_factory.mktemp("variants") / "family", **SETTINGS, variants=2)


@pytest.fixture
def copy(family: Path, tmp_path: Path) -> Path:
    return shutil.copytree(family, tmp_path / "copy")


@pytest.fixture(scope="module")
def scene() -> Iterator[MetaworldScene]:
    scene = MetaworldScene("pick-place-v3")
    yield scene
    scene.close()


def run(scene: MetaworldScene, steps: int, between: Callable[[list[Any]], object] | None = None) -> list[Any]:
    """Observations of the start of an episode; `between` is called with the moments in the middle of it."""
    observation, moments, seen = scene.reset(np.random.default_rng(3)), [], []
    expert = scene.expert()
    for number in range(steps):
        seen.append(observation)
        moments.append(scene.moment())
        if between is not None and number == steps // 2:
            between(moments)
        observation, _ = scene.step(expert.act())
    return seen


def test_taking_pictures_again_gives_the_recorded_ones_and_changes_nothing(scene: MetaworldScene) -> None:
    taken: list[Any] = []
    model = scene.model

    def again(moments: list[Any]) -> None:
        before = {name: getattr(model, name).copy() for name in (*_CHANGED, "tex_data")}
        taken.append(scene.retake(moments))
        taken.append(scene.retake(moments, draw_look(np.random.default_rng(0))))
        taken.append(scene.retake(moments))
        for name, value in before.items():
            np.testing.assert_array_equal(getattr(model, name), value, err_msg=name)

    alone, observed = run(scene, 6), run(scene, 6, again)
    for one, two in zip(alone, observed, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    first, other, last = taken
    for camera in scene.cameras:
        recorded = np.stack([observation[f"rgb.{camera}"] for observation in observed[:4]])
        np.testing.assert_array_equal(first.rgb[camera], recorded)
        np.testing.assert_array_equal(last.rgb[camera], recorded)
        np.testing.assert_array_equal(first.masks[camera], last.masks[camera])
        poses = np.stack([observation[f"camera_to_base.{camera}"] for observation in observed[:4]])
        np.testing.assert_array_equal(first.camera_to_base[camera], poses)
        assert np.abs(other.rgb[camera].astype(int) - recorded).mean() > 10
        assert np.abs(other.camera_to_base[camera] - poses).max() > 1e-3
        assert np.abs(other.intrinsics[camera] - first.intrinsics[camera]).max() > 1e-3


def test_masks_say_what_is_painted_and_do_not_depend_on_paint(scene: MetaworldScene) -> None:
    moments: list[Any] = []
    observed = run(scene, 5, lambda found: moments.extend(found))
    look = replace(draw_look(np.random.default_rng(1)), view=STILL)

    def painted(rgb: tuple[float, float, float]) -> Any:
        return scene.retake(moments, replace(look, colours={**look.colours, "object": Paint("any", rgb)}))

    plain, blue, green = scene.retake(moments), painted((0.05, 0.1, 0.9)), painted((0.05, 0.9, 0.1))
    place, found = ELEMENTS.index("object"), 0
    for camera in scene.cameras:
        np.testing.assert_array_equal(blue.masks[camera], plain.masks[camera])
        np.testing.assert_array_equal(green.masks[camera], plain.masks[camera])
        for step, mask in enumerate(plain.masks[camera]):
            shown = mask == place
            if shown.sum() < 4:
                continue
            column, row, _ = project(observed[step], camera, observed[step]["points"][0])
            rows, columns = np.nonzero(shown)
            assert rows.min() - 1 <= row <= rows.max() + 2 and columns.min() - 1 <= column <= columns.max() + 2
            pixels = [views.rgb[camera][step].astype(int) for views in (blue, green)]
            assert pixels[0][shown].mean(0).argmax() == 2 and pixels[1][shown].mean(0).argmax() == 1
            assert np.abs(pixels[0] - pixels[1])[~shown].max() <= 2
            found += 1
    assert found >= 4
    names = {ELEMENTS[i] for masks in plain.masks.values() for i in np.unique(masks)}
    assert {"table", "robot", "gripper", "object", "goal"} <= names


def test_a_variant_shares_all_but_its_looks_with_its_original(family: Path) -> None:
    reader = ShardReader(family)
    assert [entry.key for entry in reader.entries[:3]] == [KEY, f"{KEY}-v1", f"{KEY}-v2"]
    assert reader.variants(KEY) == [1, 2] and reader.variants(f"{KEY}-v1") == []
    for first in (0, 3):
        original = reader.read(first)
        assert original.meta["variant"] == 0 and "variant_of" not in original.meta
        for i in reader.variants(original.meta["episode_id"]):
            variant, entry = reader.read(i), reader.entries[i]
            assert (entry.variant_of, entry.variant) == (original.meta["episode_id"], i - first)
            assert (entry.split, entry.initial_state) == (
                reader.entries[first].split,
                reader.entries[first].initial_state,
            )
            for name in ("points", "wrench", "taxels", "proprio", "action"):
                np.testing.assert_array_equal(getattr(variant, name), getattr(original, name))
            colour = variant.meta["look"]["colours"]["object"]["name"]
            assert variant.meta["instruction"] == original.meta["instruction"].replace("green", colour)
            changed = {name for name, value in variant.meta.items() if original.meta.get(name) != value}
            assert changed <= {"episode_id", "instruction", "variant", "variant_of", "look", "vary", "changed", "edit"}
            for camera in variant.rgb:
                assert np.abs(variant.rgb[camera].astype(int) - original.rgb[camera]).mean() > 10
    looks = [reader.read(i).meta["look"] for i in (1, 2, 4, 5)]
    assert len({json.dumps(look) for look in looks}) == 4


def test_an_original_is_what_it_would_be_alone(family: Path, tmp_path: Path) -> None:
    alone, masked = (
        ShardReader(generate("metaworld", tmp_path / name, **{**SETTINGS, "heldout_episodes": 0}, masks=name == "m"))
        for name in ("a", "m")
    )
    plain, with_variants = alone.members(0), ShardReader(family).members(0)
    meta = json.loads(with_variants.pop("meta.json"))
    assert (meta.pop("elements"), meta.pop("variant")) == (list(ELEMENTS), 0)
    assert meta == json.loads(plain.pop("meta.json"))
    assert {name: data for name, data in with_variants.items() if not name.startswith("mask.")} == plain
    found = masked.members(0)
    assert "variant" not in json.loads(found.pop("meta.json")) and found == with_variants
    assert not {"variants", "masks"} & set(alone.index["generated"])


def test_an_interrupted_run_ends_with_the_same_bytes(family: Path, copy: Path) -> None:
    for name in ("shard-000001.tar", "index.json", "stats.json"):
        (copy / name).unlink()
    generate("metaworld", copy, **SETTINGS, variants=2)
    assert digests(copy) == digests(family)
    with pytest.raises(ConfigError, match=r"other parameters \(variants: 2 there, 3 asked\)"):
        generate("metaworld", copy, **SETTINGS, variants=3)
    with pytest.raises(ConfigError, match="variants must be 0 or more, got -1"):
        generate("metaworld", copy, **SETTINGS, variants=-1)


def test_shards_hold_whole_families_of_bounded_size() -> None:
    counts = {"train": 20, "heldout_episodes": 0, "heldout_tasks": 0}
    rest: dict[str, Any] = {"benchmark": None, "tasks": [TASK], "robots": None, "heldout_robots": None, "seed": 0}
    plan = make_plan("metaworld", **rest, counts=counts, pixels=64, variants=2)
    chunks = list(plan.chunks())
    assert [(chunk.what["first"], chunk.count) for chunk in chunks] == [(0, 24), (8, 24), (16, 12)]
    (bare,) = make_plan("metaworld", **rest, counts=counts, pixels=64).chunks()
    assert bare.what.keys() == {"split", "task", "first", "seed", "pixels"}


def test_clips_have_masks_only_when_asked(family: Path, tiny_dataset: Path) -> None:
    reader, spec = ShardReader(family), ClipSpec()
    assert collate([ClipDataset(reader, spec, split="train")[9]]).masks is None
    clips = ClipDataset(reader, spec, split="train", masks=True)
    assert clips.elements == ELEMENTS
    episode, masks = reader.read(0), collate([clips[9], clips[0]]).masks
    assert masks is not None and masks.history.shape == (2, 3, 2, 64, 64) and masks.future.shape == (2, 8, 2, 64, 64)
    np.testing.assert_array_equal(masks.history[0, :, 1], episode.masks["wrist"][[1, 5, 9]])
    np.testing.assert_array_equal(masks.future[0, :, 0], episode.masks["front"][10:18])
    bare = collate([ClipDataset(reader, spec, split="train", masks=True, future=False)[9]]).masks
    assert bare is not None and bare.future.shape == (1, 8, 2, 0, 0)
    with pytest.raises(DataError, match=r"no masks; .*--masks"):
        ClipDataset(ShardReader(tiny_dataset), spec, split="train", masks=True)


def mirrored(episode: Episode) -> None:
    episode.masks["wrist"] = episode.masks["wrist"][:, ::-1, ::-1].copy()
    episode.masks["front"] = np.where(episode.masks["front"] == ELEMENTS.index("object"), 0, episode.masks["front"])
    episode.masks["front"][:, :4, :4] = ELEMENTS.index("object")


def blank(episode: Episode) -> None:
    episode.masks["front"] = np.zeros_like(episode.masks["front"])


def unknown_element(episode: Episode) -> None:
    episode.masks["front"][3, 5, 5] = 99


def smaller(episode: Episode) -> None:
    episode.masks["wrist"] = episode.masks["wrist"][:, :8].copy()


def without_names(episode: Episode) -> None:
    del episode.meta["elements"]


PLANTED: list[tuple[Callable[[Episode], Any], str, str, str]] = [
    (mirrored, "masks.front", "warning", "mask of 'object' lies"),
    (blank, "masks.front", "warning", "every pixel of all .* masks is 'background'"),
    (unknown_element, "masks.front", "error", "element 99 at step 3, meta.json names 8"),
    (smaller, "masks.wrist", "error", r"\(8, 64\) pixels, the pictures have \(64, 64\)"),
    (without_names, "mask.front.000000.png", "warning", "no `elements`"),
]


@pytest.mark.parametrize(("change", "field", "severity", "words"), PLANTED, ids=[p[0].__name__ for p in PLANTED])
def test_each_fault_of_masks_is_named(copy: Path, change: Any, field: str, severity: str, words: str) -> None:
    rewrite(copy, change)
    found = [fault for fault in validate(copy) if fault.field == field]
    assert found and {fault.severity for fault in found} == {severity} and {fault.key for fault in found} == {KEY}
    assert re.search(words, found[0].message), found[0]


def relink(root: Path, change: Callable[[str, Episode], object]) -> list[tuple[str, str, str]]:
    """Key, field and severity of the faults after `change` was made to the metadata and arrays of all episodes."""
    reader = ShardReader(root)
    shards, number = [], 0
    for shard in reader.index["shards"]:
        samples = []
        for entry in shard["entries"]:
            episode = reader.read(number)
            change(entry["key"], episode)
            samples.append((entry["key"], episode))
            number += 1
        shards.append(write_shard(root / shard["name"], samples))
    write_index(root, shards, [], {})
    main(["stats", str(root)])
    return [(fault.key, fault.field, fault.severity) for fault in of_episodes(validate(root))]


def of_episodes(faults: list[Fault]) -> list[Fault]:
    """Without those of channels: two short motions leave some sensors silent."""
    return [fault for fault in faults if fault.key]


def test_a_fresh_family_is_clean(family: Path) -> None:
    report = examine(family)
    assert (of_episodes(report.faults), report.notes) == ([], [])
    assert report.count("error") == 0


def test_variants_in_another_split_with_another_motion_or_no_original_are_faults(copy: Path) -> None:
    one, two = f"{KEY}-v1", f"{KEY}-v2"

    def leak(key: str, episode: Episode) -> None:
        if key == one:
            episode.meta["split"] = "heldout_episodes"

    def other_motion(key: str, episode: Episode) -> None:
        if key == one:
            episode.meta["split"] = "train"
            episode.action = array(episode.action) * np.float32(0.99)

    def astray(key: str, episode: Episode) -> None:
        if key == one:
            episode.action = array(episode.action) / np.float32(0.99)
            episode.meta["variant_of"] = "nothing"
        if key == two:
            episode.meta["variant_of"] = one

    def twice(key: str, episode: Episode) -> None:
        if key in (one, two):
            episode.meta |= {"variant_of": KEY, "variant": 1}

    assert relink(copy, leak) == [(one, "variant_of", "error")]
    assert relink(copy, other_motion) == [(one, "content", "error")]
    assert {(one, "variant_of", "error"), (two, "variant_of", "error")} <= set(relink(copy, astray))
    assert (two, "variant", "warning") in relink(copy, twice)


def test_a_missing_mask_and_a_wrong_link_are_named_by_the_reader(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(episode: Episode, *, pictures: str) -> dict[str, bytes]:
        return {
            name: data for name, data in encode(episode, pictures=pictures).items() if name != "mask.wrist.000002.png"
        }

    monkeypatch.setattr("worldmodel.data.shards.encode", lossy)
    rewrite(copy, lambda episode: None)
    reader = ShardReader(copy)
    with pytest.raises(SampleError, match=rf"{KEY}: mask.wrist.000002.png: member is missing"):
        reader.read(0)
    with pytest.raises(SampleError, match=r"mask.wrist.000002.png: member is missing; stored masks by camera"):
        reader.masks(0, "wrist", [2])
    assert any(fault.field == "mask.wrist.000002.png" for fault in validate(copy))
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0]["entries"][1]["variant"] = 7
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(SampleError, match=r"variant_of and variant .*, 1\), the index says .*, 7\)"):
        ShardReader(copy).read(1, images=False)
    index["shards"][0]["entries"][1]["variant"] = 0
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"variant 0 of .* must be a number from 1"):
        ShardReader(copy)


def test_inspection_shows_masks_and_variants(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(family)]) == 0
    assert "4 of the episodes are variants" in capsys.readouterr().out
    page = render(ShardReader(family))
    check_page(page)
    assert page.count("data:video/mp4") == 2 + 2 + 4
    for words in ("front, masks", "variant 2, wrist", "in other looks: 2 of 2", "&#9632;</span> gripper"):
        assert words in page


def test_an_export_to_lerobot_keeps_the_link_and_says_that_masks_are_lost(
    family: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyarrow")
    from worldmodel.data.formats.lerobot_export import export_lerobot
    from worldmodel.data.importing import import_dataset

    export_lerobot(family, tmp_path / "out", progress=False)
    assert "masks of 6 episodes are left out" in caplog.text
    back = ShardReader(import_dataset("lerobot", tmp_path / "out", tmp_path / "back", workers=1, progress=False))
    assert [(e.variant_of, e.variant) for e in back.entries[:3]] == [(None, 0), (KEY, 1), (KEY, 2)]
    assert not back.read(1).masks and back.read(1).meta["look"] == ShardReader(family).read(1).meta["look"]


def test_a_look_is_a_function_of_its_generator_and_its_plain_form_says_all_of_it() -> None:
    looks = [draw_look(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert looks[0] == looks[1] != looks[2]
    for look in looks:
        names = [paint.name for paint in look.colours.values()]
        assert len(set(names)) == len(names) and set(names) <= set(COLOURS)
        values = json.loads(json.dumps(look.plain()))
        assert values["colours"]["object"] == {"name": names[0], "rgb": list(look.colours["object"].rgb)}
        assert Light(**{**values["light"], "diffuse": tuple(values["light"]["diffuse"])}) == look.light
        assert values["view"].keys() == vars(STILL).keys() and values["surfaces"].keys() == set(SURFACES)


@pytest.mark.parametrize("kind", PATTERNS)
def test_textures_lie_between_their_two_colours(kind: str) -> None:
    image = texture(Pattern(kind, ((0.2, 0.4, 0.6), (0.8, 0.4, 0.0)), 4, 7), 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert image[..., 0].min() >= 51 and image[..., 0].max() <= 204 and (image[..., 1] == 102).all()
    assert (len(np.unique(image[..., 0])) > 1) == (kind != "plain")


def test_every_colour_that_an_instruction_names_has_an_element() -> None:
    for tasks in (metaworld_tasks.TASKS, robosuite_tasks.TASKS):
        for task, info in tasks.items():
            assert len(named_colours(info.instruction)) == len(info.coloured), task
            assert set(info.coloured) <= set(ELEMENTS)
