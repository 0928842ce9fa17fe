"""The pictures of a recorded motion taken again: with masks, and in other looks as linked variants."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from worldmodel.data.schema import Episode
from worldmodel.data.sources.collect import collect_episode
from worldmodel.data.sources.looks import PAINTED, draw_look, named_colours
from worldmodel.data.sources.scene import Dressable
from worldmodel.data.sources.viewpoints import in_picture

_LARGE = 0.002
"""Share of the pixels that an element has in the mean, at least, to be the one whose colour alone changes."""


def collect_family(
    scene: Dressable,
    rng: np.random.Generator,
    looks: Sequence[tuple[np.random.Generator, Sequence[str]]],
    meta: dict[str, Any],
) -> Iterator[Episode]:
    """Record a demonstration with masks, then show it in one more look for each item of `looks`.

    The first episode is that of `collect_episode` for the same `rng`. A variant has all its streams but pictures,
    masks, cameras and visibility; its instruction calls things by their new colours. Its metadata say what it varies
    (`vary`: an item's second part, names of `looks.VARY`), which elements look different (`changed`) and the words that
    ask for it (`edit`). `meta`, with at least `episode_id` and `split`, is added to the metadata of all; the id of
    variant v ends in `-v<v>`.
    """
    moments: list[Any] = []
    original = collect_episode(scene, rng, before=lambda: moments.append(scene.moment()))
    original.meta |= {**meta, "elements": list(scene.elements)}
    if looks:
        original.meta["variant"] = 0
    original.masks = scene.retake(moments, images=False).masks
    yield original
    for number, (generator, vary) in enumerate(looks, 1):
        yield _variant(scene, moments, original, number, generator, vary)


def shares(episode: Episode) -> dict[str, float]:
    """The elements that an episode's masks show, in the order of their values, each with its share of all pixels."""
    counts = sum(
        (np.bincount(masks.ravel(), minlength=len(episode.meta["elements"])) for masks in episode.masks.values()),
        start=np.zeros(len(episode.meta["elements"]), int),
    )
    return {name: n / counts.sum() for name, n in zip(episode.meta["elements"], counts, strict=True) if n}


def _variant(
    scene: Dressable,
    moments: Sequence[Any],
    original: Episode,
    number: int,
    rng: np.random.Generator,
    vary: Sequence[str],
) -> Episode:
    points, shown = original.points, shares(original)
    assert points is not None
    painted = {name: share for name, share in shown.items() if name in PAINTED}
    # One thing of a few pixels is no change to learn from, unless there is no larger one.
    large = [name for name, share in painted.items() if share >= min(_LARGE, max(painted.values()))]
    look = draw_look(rng, vary, shown=large or PAINTED, taken=named_colours(original.meta["instruction"]))
    changed = look.changed(list(shown))
    views = scene.retake(moments, look)
    side = views.masks["front"].shape[1]
    linked = {"variant": number, "variant_of": original.meta["episode_id"], "look": look.plain()}
    linked |= {"vary": list(vary), "changed": changed, "edit": scene.edit(look, changed)}
    named = {"episode_id": f"{original.meta['episode_id']}-v{number}", "instruction": scene.instruct(look)}
    return replace(
        original,
        meta={**original.meta, **linked, **named},
        rgb=views.rgb,
        masks=views.masks,
        intrinsics=views.intrinsics,
        camera_to_base=views.camera_to_base,
        visible=original.visible
        if look.view is None
        else in_picture(points, views.camera_to_base["front"], views.intrinsics["front"], side),
    )
