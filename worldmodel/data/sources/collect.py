"""Record one demonstration by running a scene's scripted expert."""

from collections.abc import Callable
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.schema import Episode
from worldmodel.data.sources.scene import Scene


def collect_episode(
    scene: Scene, rng: np.random.Generator, *, tail: int = 4, before: Callable[[], object] | None = None
) -> Episode:
    """Run the expert until `tail` steps after its first success, or for the scene's `max_steps`.

    T observations and T actions: action i is the one held after observation i. Failed episodes are returned too, with
    `meta["success"]` False. The caller adds `episode_id` and `split` to the metadata. `before` is called at each of the
    T steps before its action. Touch that the scene's metadata call absent is not recorded.
    """
    observation = scene.reset(rng)
    expert = scene.expert()
    observations, actions = [], []
    remaining, success = scene.max_steps, False
    while remaining:
        action = expert.act()
        observations.append(observation)
        if before is not None:
            before()
        actions.append(action)
        remaining -= 1
        if remaining:
            observation, done = scene.step(action)
            if done and not success:
                success, remaining = True, min(remaining, tail)
    return _episode(scene, observations, np.stack(actions), success)


def _episode(scene: Scene, observations: list[dict[str, Any]], actions: np.ndarray, success: bool) -> Episode:
    def series(name: str) -> np.ndarray:
        return np.stack([observation[name] for observation in observations])

    meta = {**scene.metadata(), "schema_version": SCHEMA_VERSION, "length": len(actions), "success": success}
    feels = "tactile" not in meta["absent"]
    return Episode(
        meta=meta,
        rgb={camera: series(f"rgb.{camera}") for camera in scene.cameras},
        intrinsics={camera: series(f"intrinsics.{camera}") for camera in scene.cameras},
        camera_to_base={camera: series(f"camera_to_base.{camera}") for camera in scene.cameras},
        points=series("points"),
        visible=series("visible"),
        wrench=series("wrench") if feels else None,
        taxels=series("taxels")[:, observations[0]["has_taxels"]] if feels else None,
        proprio=series("proprio"),
        action=actions,
    )
