"""Variants that change one thing at a time, and the pairs of clips that they make."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_data_generate import digests
from test_data_variants import SETTINGS, TASK, of_episodes

from worldmodel.contracts import PAIR_KINDS, ClipSpec
from worldmodel.data.__main__ import main
from worldmodel.data.generate import generate, make_plan
from worldmodel.data.pairs import PairDataset, collate_pairs
from worldmodel.data.schema import Episode
from worldmodel.data.shards import ShardReader
from worldmodel.data.sources import metaworld_tasks, robosuite_tasks
from worldmodel.data.sources.appearance import ELEMENTS
from worldmodel.data.sources.edits import colour_name, edit_words, pattern_words
from worldmodel.data.sources.looks import COLOURS, EVERYTHING, PAINTED, Look, Pattern, draw_look, named_colours
from worldmodel.data.validate import examine
from worldmodel.errors import ConfigError, DataError

VARIED = [["element"], ["surfaces"], ["view"], ["lights", "surfaces"]]
PLACES = {name: place for place, name in enumerate(ELEMENTS)}


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An episode of each of two splits with four variants each, raw pictures; treat it as read-only."""
    out = tmp_path_factory.mktemp("pairs") / "varied"
    return generate("metaworld", out, **SETTINGS, vary=VARIED, pictures="raw")


@pytest.fixture(scope="module")
def episodes(varied: Path) -> list[Episode]:
    reader = ShardReader(varied)
    return [reader.read(i) for i in range(5)]


def outside(original: Episode, variant: Episode, camera: str) -> np.ndarray:
    """Differences of the pixels that show none of the changed elements."""
    changed = np.isin(original.masks[camera], [PLACES[name] for name in variant.meta["changed"]])
    return np.abs(variant.rgb[camera].astype(int) - original.rgb[camera]).max(-1)[~changed]


def test_what_a_variant_does_not_vary_is_equal_to_the_last_bit(episodes: list[Episode]) -> None:
    original, element, surfaces, view, lit = episodes
    assert len(element.meta["changed"]) == 1 and element.meta["changed"][0] in PAINTED
    assert surfaces.meta["changed"] == ["background", "table"] and view.meta["changed"] == []
    assert set(lit.meta["changed"]) == {ELEMENTS[i] for m in original.masks.values() for i in np.unique(m)}
    for variant in (element, surfaces, view, lit):
        for name in ("points", "wrench", "taxels", "proprio", "action"):
            np.testing.assert_array_equal(getattr(variant, name), getattr(original, name))
    for variant in (element, surfaces, lit):
        np.testing.assert_array_equal(variant.visible, original.visible)
        for camera in original.rgb:
            for name in ("masks", "intrinsics", "camera_to_base"):
                np.testing.assert_array_equal(getattr(variant, name)[camera], getattr(original, name)[camera])
            assert not outside(original, variant, camera).any()
            inside = np.isin(original.masks[camera], [PLACES[name] for name in variant.meta["changed"]])
            change = np.abs(variant.rgb[camera].astype(int) - original.rgb[camera]).max(-1)
            assert change[inside].mean() > 10
    for camera in original.rgb:
        assert np.abs(view.camera_to_base[camera] - original.camera_to_base[camera]).max() > 1e-3
    # Through moved cameras things have the colours of before, as they have not with other surfaces.
    colours = [
        np.median(e.rgb["front"][e.masks["front"] == PLACES["table"]], axis=0) for e in (original, view, surfaces)
    ]
    assert np.abs(colours[1] - colours[0]).max() < 10 < np.abs(colours[2] - colours[0]).max()


def test_the_instruction_says_what_changed(episodes: list[Episode]) -> None:
    original, element, surfaces, view, lit = episodes
    (name,) = element.meta["changed"]
    paint = element.meta["look"]["colours"][name]["name"]
    assert set(element.meta["look"]["colours"]) == {name} and element.meta["look"]["view"] is None
    noun = metaworld_tasks.TASKS[TASK].things[name]
    assert element.meta["edit"] == f"Make the {noun} {paint}."
    assert paint not in named_colours(original.meta["instruction"])
    assert surfaces.meta["instruction"] == view.meta["instruction"] == original.meta["instruction"]
    assert (
        surfaces.meta["edit"].startswith("Replace the background by ") and " and the table by " in surfaces.meta["edit"]
    )
    assert view.meta["edit"] == "Look from another place." and lit.meta["edit"].endswith("Change the lights.")
    assert [e.meta["vary"] for e in episodes[1:]] == [["element"], ["surfaces"], ["view"], ["surfaces", "lights"]]
    assert "edit" not in original.meta


def test_varied_data_are_valid_repeatable_and_ask_for_what_exists(varied: Path, tmp_path: Path) -> None:
    report = examine(varied)
    assert (of_episodes(report.faults), report.count("error")) == ([], 0)
    again = generate("metaworld", tmp_path / "again", **SETTINGS, vary=VARIED, pictures="raw")
    assert digests(again) == digests(varied)
    rest: dict[str, Any] = {"benchmark": None, "tasks": [TASK], "robots": None, "heldout_robots": None, "seed": 0}
    rest |= {"counts": {"train": 1, "heldout_episodes": 0, "heldout_tasks": 0}, "pixels": 64}
    for wrong, message in (
        (["colour"], r"unknown \['colour'\]; known: element, objects"),
        (["element", "objects"], "not both"),
        ([], "must name something"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_plan("metaworld", **rest, vary=[wrong])
    assert make_plan("metaworld", **rest, vary=[["view"]], variants=3).extras == {
        "variants": 3,
        "vary": [["view"]],
        "masks": True,
    }
    with pytest.raises(ConfigError, match="unknown"):
        generate("metaworld", tmp_path / "no", **SETTINGS, vary=[["weather"]])
    assert main(["generate", "metaworld", str(tmp_path / "cli"), "--vary", "weather"]) == 64


def test_a_look_is_the_same_in_what_it_varies_whatever_else_it_varies() -> None:
    whole = draw_look(np.random.default_rng(5))
    part = draw_look(np.random.default_rng(5), ["surfaces", "view"])
    assert part == Look({}, whole.surfaces, None, whole.view) and whole == draw_look(
        np.random.default_rng(5), EVERYTHING
    )
    for seed in range(30):
        look = draw_look(np.random.default_rng(seed), ["element"], shown=["goal", "fixture"], taken=["red", "green"])
        ((name, paint),) = look.colours.items()
        assert name in ("goal", "fixture") and paint.name not in ("red", "green")
        assert look.changed(["table", name, "robot"]) == [name] and look.changed(["table"]) == []


def test_words_of_looks_fit_the_instruction_and_name_colours_as_they_are_drawn() -> None:
    for seed in range(200):
        look = draw_look(np.random.default_rng(seed))
        for paint in look.colours.values():
            if paint.name not in ("white", "black", "brown"):
                assert colour_name(paint.rgb) == paint.name, (paint, seed)
    assert colour_name((0.5, 0.5, 0.52)) == "grey" and colour_name((0.9, 0.1, 0.12)) == "red"
    striped = Pattern("stripes", ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9)), 4, 0)
    assert pattern_words(striped) == "red and blue stripes"
    assert pattern_words(Pattern("checker", (striped.rgb[0],) * 2, 4, 0)) == "red checks"
    longest = max(COLOURS, key=len)
    for tasks in (metaworld_tasks.TASKS, robosuite_tasks.TASKS):
        for task, info in tasks.items():
            assert set(info.things) <= set(ELEMENTS), task
            words = edit_words(draw_look(np.random.default_rng(0), ["surfaces"]), ["table", "background"], info.things)
            assert len(words) + 4 * len(longest) <= ClipSpec().text + 24, words
    worst = Pattern("stripes", ((0.95, 0.5, 0.1), (0.6, 0.1, 0.9)), 4, 0)
    both = edit_words(Look({}, {"table": worst, "background": worst}, None, None), ["background", "table"], {})
    assert "orange and purple stripes" in both and len(both) <= ClipSpec().text


def test_pairs_are_the_same_steps_of_original_and_variant(varied: Path) -> None:
    reader, spec = ShardReader(varied), ClipSpec()
    pairs = PairDataset(reader, spec, split="train")
    length = reader.entries[0].length
    assert [link.kind for link in pairs.links] == ["element", "element", "view"] and len(pairs) == 3 * length
    batch = collate_pairs([pairs[9], pairs[length + 9], pairs[2 * length + 9]])
    assert batch.mask.shape == (3, 11, 2, 64, 64) and batch.mask.dtype == torch.bool
    assert [PAIR_KINDS[int(k)] for k in batch.kind] == ["element", "element", "view"]
    assert torch.equal(batch.source.frame, batch.source.frame[:1].expand(3, -1))
    assert torch.equal(batch.source.future.actions, batch.target.future.actions)
    assert batch.source.masks is not None and batch.target.masks is not None
    assert torch.equal(batch.source.masks.history[:2], batch.target.masks.history[:2])
    before = torch.cat([batch.source.observation.rgb, batch.source.future.rgb], 1)
    after = torch.cat([batch.target.observation.rgb, batch.target.future.rgb], 1)
    changed = (before != after).any(3)
    assert torch.equal(changed[:2] & ~batch.mask[:2], torch.zeros_like(changed[:2]))
    assert (changed[:2] & batch.mask[:2]).sum() > 0.9 * batch.mask[:2].sum() and batch.mask[2].all()
    assert bytes((batch.text[2][batch.text[2] > 0] - 1).tolist()).decode() == "Look from another place."
    poses = [part.observation.camera_to_base for part in (batch.source, batch.target)]
    assert torch.equal(poses[0][:2], poses[1][:2]) and not torch.equal(poses[0][2], poses[1][2])


def test_the_order_of_pairs_is_a_function_of_the_seed(varied: Path, tiny_dataset: Path) -> None:
    reader, spec = ShardReader(varied), ClipSpec()
    one, two, other, plain = (PairDataset(reader, spec, split="train", seed=s) for s in (1, 1, 2, None))
    found = [[p.locate(i) for i in range(len(p))] for p in (one, two, other, plain)]
    assert found[0] == found[1] != found[2] and sorted(found[0]) == sorted(found[3]) != found[0]
    views = PairDataset(reader, spec, split="heldout_episodes", kinds=["view"])
    assert {link.kind for link in views.links} == {"view"}
    with pytest.raises(ConfigError, match="known: element, view"):
        PairDataset(reader, spec, split="train", kinds=["lights"])
    with pytest.raises(DataError, match="--masks"):
        PairDataset(ShardReader(tiny_dataset), spec, split="train")
    with pytest.raises(IndexError):
        plain.locate(len(plain))


def test_points_of_clips_with_masks_know_their_elements(varied: Path) -> None:
    reader, spec = ShardReader(varied), ClipSpec()
    batch = collate_pairs([PairDataset(reader, spec, split="train")[0]])
    names = reader.read(0, images=False).meta["point_names"]
    assert batch.source.masks is not None and batch.source.masks.elements == ELEMENTS
    known = [ELEMENTS[int(e)] if e >= 0 else None for e in batch.source.masks.points[0]]
    assert known == [*names, *[None] * (spec.points - len(names))]
    assert json.loads(json.dumps(names)) == ["object", "goal"]
