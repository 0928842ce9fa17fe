"""The pictures of a recorded motion taken again: with masks, and in other looks as linked variants."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from worldmodel.data.schema import Episode
from worldmodel.data.sources.collect import collect_episode
from worldmodel.data.sources.looks import draw_look
from worldmodel.data.sources.scene import Scene
from worldmodel.data.sources.viewpoints import in_picture


def collect_family(
    scene: Scene, rng: np.random.Generator, looks: Sequence[np.random.Generator], meta: dict[str, Any]
) -> Iterator[Episode]:
    """Record a demonstration with masks, then show it in one more look for each generator of `looks`.

    The first episode is that of `collect_episode` for the same `rng`. A variant has all its streams but pictures,
    masks, cameras and visibility; its instruction calls things by their new colours. `meta`, with at least `episode_id`
    and `split`, is added to the metadata of all; the id of variant v ends in `-v<v>`.
    """
    moments: list[Any] = []
    original = collect_episode(scene, rng, moments=moments)
    original.meta |= {**meta, "elements": list(scene.elements)}
    if looks:
        original.meta["variant"] = 0
    original.masks = scene.retake(moments, images=False).masks
    yield original
    for number, generator in enumerate(looks, 1):
        yield _variant(scene, moments, original, number, generator)


def _variant(scene: Scene, moments: Sequence[Any], original: Episode, number: int, rng: np.random.Generator) -> Episode:
    look, points = draw_look(rng), original.points
    assert points is not None
    views = scene.retake(moments, look)
    side = views.masks["front"].shape[1]
    linked = {"variant": number, "variant_of": original.meta["episode_id"], "look": look.plain()}
    named = {"episode_id": f"{original.meta['episode_id']}-v{number}", "instruction": scene.instruct(look)}
    return replace(
        original,
        meta={**original.meta, **linked, **named},
        rgb=views.rgb,
        masks=views.masks,
        intrinsics=views.intrinsics,
        camera_to_base=views.camera_to_base,
        visible=in_picture(points, views.camera_to_base["front"], views.intrinsics["front"], side),
    )
