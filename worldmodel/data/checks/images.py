"""Pictures: black, without content, or frozen while the robot moves; and where object points fall in them."""

from collections.abc import Iterator

import numpy as np

from worldmodel.data.checks.finding import Fault, Projection, Sample
from worldmodel.data.schema import Episode

BLACK_LEVEL = 6
"""Grey levels of 255 that no pixel exceeds. JPEG noise and video black (16 decodes to 0) stay below it; a dark room
seen by a real sensor does not, since its brightest pixels do not."""
CONSTANT_SPREAD = 1.0
"""Standard deviation over a picture, grey levels. A plain wall has more from noise and shading alone."""
FROZEN_DIFFERENCE = 0.02
"""Mean absolute difference of neighbouring pictures, grey levels: less than the noise of any sensor, more than what
encoding the same picture again leaves."""
FROZEN_STEPS = 3
"""Pictures in a row that are the same. Two are usual where a 30 Hz camera is read at 50 Hz."""
FROZEN_MOTION = {"moving": 0.1, "fixed": 0.5}
"""Share of a proprioceptive channel's range in the episode that it must cross meanwhile, for a camera that moves with
the arm and for one that does not: the arm can leave the picture of a fixed camera for some steps, seen at 0.3."""
EDGE_SLACK = 0.5
"""Pixels: visibility was decided before poses were rounded to float32."""


def check_black(sample: Sample) -> Iterator[Fault]:
    """No picture is black."""
    for camera, pictures in sample.episode.rgb.items():
        black = np.flatnonzero(pictures.max(axis=(1, 2, 3)) <= BLACK_LEVEL)
        if len(black):
            message = f"{len(black)} of {len(pictures)} pictures are black, the first at step {black[0]}"
            yield sample.fault(
                f"rgb.{camera}", message, "check exposure, lens and recording; drop the episode", "warning"
            )


def check_constant(sample: Sample) -> Iterator[Fault]:
    """No picture is of one colour; black ones are another check's."""
    for camera, pictures in sample.episode.rgb.items():
        spread = np.array([picture.std(axis=(0, 1)).max() for picture in pictures])
        plain = np.flatnonzero((spread < CONSTANT_SPREAD) & (pictures.max(axis=(1, 2, 3)) > BLACK_LEVEL))
        if len(plain):
            message = f"{len(plain)} of {len(pictures)} pictures have one colour, the first at step {plain[0]}"
            yield sample.fault(f"rgb.{camera}", message, "check the camera's connection; drop the episode", "warning")


def check_frozen(sample: Sample) -> Iterator[Fault]:
    """Pictures change while the robot moves; where nothing says that it moves, this cannot be told."""
    episode = sample.episode
    if not episode.rgb or episode.proprio is None:
        if episode.rgb and "proprio" in episode.meta.get("absent", ()):
            yield sample.fault(
                "rgb", "frozen pictures not looked for: no proprioception says when the robot moves", "", "note"
            )
        return
    names = episode.meta["proprio_names"]
    positions = episode.proprio[:, [i for i, name in enumerate(names) if "velocity" not in name]]
    span = np.ptp(positions, axis=0)
    positions, span = positions[:, span > 0], span[span > 0]
    for camera, pictures in episode.rgb.items():
        # Black and plain pictures are named by their own checks.
        lively = pictures.max(axis=(1, 2, 3)) > BLACK_LEVEL
        pose = episode.camera_to_base.get(camera)
        enough = FROZEN_MOTION["moving" if pose is not None and np.ptp(pose, axis=0).any() else "fixed"]
        worst = (0, 0)
        for first, last in _same(pictures, lively):
            crossed = np.ptp(positions[first : last + 1], axis=0) / span
            moved = crossed.max(initial=0.0) >= enough
            if moved and last - first > worst[1] - worst[0]:
                worst = (first, last)
        if worst[1]:
            message = f"the picture stands still from step {worst[0]} to {worst[1]} while the robot moves"
            fix = "check the camera's rate and buffering; drop or resample the episode"
            yield sample.fault(f"rgb.{camera}", message, fix, "warning")


def _same(pictures: np.ndarray, lively: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last step of every run of at least FROZEN_STEPS equal pictures that show something."""
    first = 0
    for step in range(1, len(pictures) + 1):
        if step < len(pictures) and lively[step]:
            difference = np.abs(pictures[step].astype(np.int16) - pictures[step - 1]).mean()
            if difference < FROZEN_DIFFERENCE and pictures[step].std(axis=(0, 1)).max() >= CONSTANT_SPREAD:
                continue
        if step - first >= FROZEN_STEPS:
            yield first, step - 1
        first = step


def check_reprojection(sample: Sample) -> Iterator[Fault]:
    """Points marked visible lie in front of at least one camera and inside its picture."""
    episode = sample.episode
    if (inside := _inside(episode)) is None or episode.visible is None:
        return
    wrong = episode.visible & ~inside
    if wrong.any():
        step, point = (int(n) for n in np.argwhere(wrong)[0])
        name = episode.meta["point_names"][point]
        message = (
            f"{wrong.sum() / episode.visible.sum():.0%} of the points marked visible project into no picture, the "
            f"first is {name!r} at step {step}"
        )
        yield sample.fault(
            "visible", message, "check camera_to_base (OpenCV axes, base frame), intrinsics and the flag"
        )


def projection(episode: Episode) -> Projection | None:
    """Counts for the share of points that are marked visible and that fall into a picture; None without either."""
    if (inside := _inside(episode)) is None or episode.visible is None:
        return None
    visible = episode.visible
    return Projection(int(visible.sum()), int((visible & inside).sum()), int(inside.sum()), visible.size)


def _inside(episode: Episode) -> np.ndarray | None:
    """(T, K) bool: the point falls into some camera's picture; None where that cannot be computed."""
    cameras = [camera for camera in episode.rgb if camera in episode.camera_to_base]
    if episode.points is None or not cameras:
        return None
    # A sound picture of a camera whose pose is broken might be the one that sees the point.
    if len(cameras) < len(episode.meta["cameras"]):
        return None
    inside = np.zeros(episode.points.shape[:2], bool)
    for camera in cameras:
        pixels, depth = project(episode.points, episode.camera_to_base[camera], episode.intrinsics[camera])
        size = np.array(episode.rgb[camera].shape[2:0:-1])
        inside |= (depth > 0) & ((pixels >= -EDGE_SLACK) & (pixels <= size + EDGE_SLACK)).all(-1)
    return inside


def project(points: np.ndarray, pose: np.ndarray, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns and rows (T, K, 2) in pixels and depths (T, K) in metres of points (T, K, 3), by pose (T, 4, 4) and
    intrinsics (T, 3, 3)."""
    with np.errstate(over="ignore", invalid="ignore"):  # what lies that far away is in no picture
        in_camera = (points - pose[:, None, :3, 3]) @ pose[:, :3, :3]
        depth = in_camera[..., 2]
        pixels = in_camera / np.maximum(depth, 1e-6)[..., None] @ matrix.transpose(0, 2, 1)
    return pixels[..., :2], depth
