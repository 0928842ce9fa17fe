"""Masks: there for every picture, with something in them, and each thing beside its point."""

from collections.abc import Iterator

import numpy as np

from worldmodel.data.checks.finding import Fault, Sample
from worldmodel.data.checks.images import project

NEAR = 0.15
"""Share of the picture's side within which a thing's mask lies from its point: points are at handles and centres, and
a hand may hide the part that is nearest."""
LEAST_NEAR = 0.5
"""Share of the steps at which that must be so."""
LEAST_STEPS = 5
"""Steps with point and mask in one picture before a verdict."""


def check_blank(sample: Sample) -> Iterator[Fault]:
    """No camera's masks show one element alone from the first step to the last."""
    names = sample.episode.meta.get("elements", ())
    for camera, masks in sample.episode.masks.items():
        if masks.size and (masks == masks.flat[0]).all():
            message = f"every pixel of all {len(masks)} masks is {names[masks.flat[0]]!r}"
            yield sample.fault(f"masks.{camera}", message, "render the masks again, or remove them", "warning")


def check_points(sample: Sample) -> Iterator[Fault]:
    """A visible point that has the name of an element lies near that element's mask, where there is one."""
    episode = sample.episode
    if episode.points is None or episode.visible is None:
        return
    names, elements = episode.meta["point_names"], list(episode.meta.get("elements", ()))
    for camera, masks in episode.masks.items():
        if camera not in episode.camera_to_base or camera not in episode.intrinsics:
            continue
        pixels, depth = project(episode.points, episode.camera_to_base[camera], episode.intrinsics[camera])
        inside = (depth > 0) & ((pixels >= 0) & (pixels < masks.shape[:0:-1])).all(-1)
        for k, name in enumerate(names):
            if name not in elements:
                continue
            steps = np.flatnonzero(inside[:, k] & episode.visible[:, k])
            gaps = [_gap(masks[step] == elements.index(name), pixels[step, k]) for step in steps]
            known = [gap for gap in gaps if gap is not None]
            near = np.array(known) <= NEAR * min(masks.shape[1:])
            if len(known) >= LEAST_STEPS and near.mean() < LEAST_NEAR:
                message = (
                    f"the mask of {name!r} lies {np.median(known):.0f} pixels away from its point, the median of "
                    f"{len(known)} steps"
                )
                fix = "check the order of `elements`, of the pictures and of the points, and that none is mirrored"
                yield sample.fault(f"masks.{camera}", message, fix, "warning")


def _gap(shown: np.ndarray, point: np.ndarray) -> float | None:
    """Pixels from `point` (column, row) to the nearest pixel of a mask; None where it has none."""
    places = np.argwhere(shown)
    if not len(places):
        return None
    return float(np.linalg.norm(places[:, ::-1] + 0.5 - point, axis=1).min())
