"""Egocentric human video: a folder per episode, with a camera track and tracks of hands and objects. No actions.

    <episode>/annotation.json     {"instruction": "Pour the milk.", "fps": 30}; also task, success, split, licence,
                                  person, place, source
    <episode>/video.mp4           or frames/000000.jpg ..., in the order of the numbers in their names
    <episode>/camera.npz          or camera.json: intrinsics (3, 3) or (T, 3, 3) in pixels of the pictures;
                                  camera_to_world (T, 4, 4)
    <episode>/hands.npz           points (T, K, 3), names (K,), optional visible (T, K)
    <episode>/objects.npz         the same, of objects; either file may be missing

Lengths are metres, camera axes OpenCV (x right, y down, z forward). There is no robot, so the world frame of the tracks
takes the place of the base frame: let z point up and keep it still within an episode. A point may be NaN where its
track is lost; it is then not visible and stays where it was seen last. `fps` may be left out beside a video that states
it. Splits are named as ours are: train, heldout_episodes, heldout_tasks.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.formats.assemble import assemble
from worldmodel.data.formats.base import Field, Fields, Recording, Ref, episode_key
from worldmodel.data.formats.hdf5 import numbers_last
from worldmodel.data.formats.mapping import HELDOUT, Mapping
from worldmodel.data.formats.pictures import decode_pictures, decode_video, video_rate
from worldmodel.data.plain import load_archive, read_json
from worldmodel.data.schema import Episode
from worldmodel.errors import DataError

ANNOTATION, VIDEO, FRAMES, CAMERA = "annotation.json", "video.mp4", "frames", "ego"
TRACKS = ("hands", "objects")
_PICTURES = (".jpg", ".jpeg", ".png")
_CARRIED = ("person", "place", "source")
"""Of annotation.json, what goes into the metadata as it is."""


class EgoSource:
    """The episode folders below a folder, or one of them; see the module's text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = [file.parent for file in path.rglob(ANNOTATION)]
        if not found:
            raise DataError(f"{path}: no {ANNOTATION} below it; every episode is a folder with one")
        self.folders = sorted(found, key=lambda folder: numbers_last(folder.relative_to(path).as_posix()))

    def fields(self) -> Fields:
        """What the first episode has, with a map that says all: frames and axes are part of this layout."""
        folder = self.folders[0]
        annotation, where = _annotation(folder), str(folder)
        fps, size = _rate(folder, annotation)
        track = _camera(folder)
        vectors = {name: Field(value.shape[1:]) for name, value in _camera_vectors(track, folder).items()}
        mapping: dict[str, Any] = {
            "embodiment": "human",
            "fps": fps,
            "instruction": {"field": "instruction"},
            "cameras": {CAMERA: CAMERA},
            "camera_to_base": {CAMERA: {"field": "camera_to_world", "maps": "camera_to_base", "axes": "opencv"}},
            "intrinsics": {CAMERA: "intrinsics"},
        }
        # Episodes may lack tracks; the first that has them says what they are like.
        if (points := next(filter(None, map(_points, self.folders)), None)) is not None:
            vectors |= {"points": Field(points[0].shape[1:]), "visible": Field(points[1].shape[1:])}
            mapping["points"] = {"field": "points", "visible": "visible", "frame": "base", "names": points[2]}
        if licence := annotation.get("licence"):
            mapping["licence"] = str(licence)
        splits = sorted({ref.split for ref in self.refs()} - {""})
        mapping["split"] = {"source": {name: name for name in splits}} if splits else {"heldout": HELDOUT}
        return Fields(
            where=str(self.path) if self.path != folder else where,
            fps=fps,
            embodiment="human",
            cameras={CAMERA: size},
            vectors=vectors,
            texts=("instruction", "task"),
            splits=tuple(splits),
            mapping=mapping,
        )

    def refs(self) -> list[Ref]:
        """One per folder with an annotation.json."""
        refs = []
        for folder in self.folders:
            place = folder.relative_to(self.path)
            words = place.parts or (folder.resolve().name,)
            refs.append(Ref(episode_key(*words), (place.as_posix(),), str(_annotation(folder).get("split", ""))))
        return refs

    def read(self, ref: Ref, mapping: Mapping) -> Episode:
        """The episode of the folder that `ref` names.

        Raises:
            DataError: a file is missing, damaged or of another length than the video; names folder, file and array.
        """
        folder = self.path / str(ref.place[0])
        annotation, where = _annotation(folder), str(folder)
        fps, _ = _rate(folder, annotation)
        if mapping.fps and abs(fps - mapping.fps) > 1e-3 * fps:
            raise DataError(f"{where}: {fps:g} frames per second, the map says {mapping.fps:g}; import it separately")
        track = _camera(folder)
        # One picture more than the track has poses shows that they do not belong together.
        images = _images(folder, fps, most=len(_camera_vectors(track, folder)["camera_to_world"]) + 1)
        recording = Recording(where, len(images), fps, images={CAMERA: images})
        recording.vectors = _camera_vectors(track, folder, len(images))
        if mapping.points is not None:
            # Which objects a scene has, and whether they were tracked, differs from episode to episode.
            entry = None
            if (points := _points(folder, len(images))) is not None:
                recording.vectors |= {"points": points[0], "visible": points[1]}
                entry = replace(mapping.points, names=points[2])
            mapping = replace(mapping, points=entry)
        for name in ("instruction", "task"):
            recording.texts[name] = str(annotation.get(name, ""))
        if isinstance(success := annotation.get("success"), bool):
            recording.success = success
        recording.meta |= {name: annotation[name] for name in _CARRIED if name in annotation}
        recording.meta["base_frame"] = "world frame of the camera track"
        if task := annotation.get("task"):
            mapping = replace(mapping, task=mapping.task or str(task))
        return assemble(recording, mapping)


def _annotation(folder: Path) -> dict[str, Any]:
    return read_json(folder / ANNOTATION, 'it holds {"instruction": ..., "fps": ...}')


def _rate(folder: Path, annotation: dict[str, Any]) -> tuple[float, tuple[int, int] | None]:
    """Frames per second and the pictures' (height, width) if the head of a video says it."""
    stated = annotation.get("fps")
    if stated is not None and not (isinstance(stated, int | float) and 0 < stated < 1e4):
        raise DataError(f"{folder / ANNOTATION}: fps {stated!r} must be a positive number")
    if not (folder / VIDEO).is_file():
        if stated is None:
            raise DataError(f"{folder / ANNOTATION}: no fps; a folder of frames does not say it, so this file must")
        return float(stated), None
    rate, size = video_rate(folder / VIDEO, str(folder))
    if stated is not None and abs(rate - stated) > 0.01 * rate:
        raise DataError(f"{folder}: {VIDEO} has {rate:g} frames per second, {ANNOTATION} says {stated:g}; correct one")
    return float(stated or rate), size


def _images(folder: Path, fps: float, *, most: int) -> np.ndarray:
    """(T, h, w, 3) uint8, at most the first `most`."""
    if (folder / VIDEO).is_file():
        return decode_video(folder / VIDEO, fps, str(folder), most=most)
    files = [file for file in (folder / FRAMES).glob("*") if file.suffix.lower() in _PICTURES]
    if not files:
        raise DataError(f"{folder}: neither {VIDEO} nor pictures in {FRAMES}; an episode needs one of them")
    files.sort(key=lambda file: numbers_last(file.name))
    return decode_pictures((file.read_bytes() for file in files[:most]), f"{folder}: {FRAMES}")


def _arrays(path: Path, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an npz or JSON file."""
    try:
        if path.suffix == ".json":
            values = read_json(path, "see the layout of egocentric folders")
            arrays = {name: np.asarray(values[name], np.float64) for name in needed if name in values}
        else:
            with open(path, "rb") as file:
                arrays = load_archive(file)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a readable file of plain arrays ({error})") from error
    if missing := [name for name in needed if name not in arrays]:
        raise DataError(f"{path}: arrays {missing} are missing; it has {sorted(arrays)}")
    return arrays


def _camera(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    for name in ("camera.npz", "camera.json"):
        if (folder / name).is_file():
            return folder / name, _arrays(folder / name, ("intrinsics", "camera_to_world"))
    raise DataError(f"{folder}: no camera.npz or camera.json; every frame needs a camera pose")


def _camera_vectors(
    track: tuple[Path, dict[str, np.ndarray]], folder: Path, length: int | None = None
) -> dict[str, np.ndarray]:
    """`camera_to_world` (T, 4, 4) and `intrinsics` (T, 3, 3)."""
    path, arrays = track
    pose = _steps(arrays["camera_to_world"], path, "camera_to_world", (4, 4), length)
    matrix = arrays["intrinsics"]
    if matrix.shape == (3, 3):
        matrix = np.broadcast_to(matrix, (len(pose), 3, 3))
    return {"camera_to_world": pose, "intrinsics": _steps(matrix, path, "intrinsics", (3, 3), len(pose))}


def _points(folder: Path, length: int | None = None) -> tuple[np.ndarray, np.ndarray, list[str]] | None:
    """Points (T, K, 3), visible (T, K) and names of both tracks, hands first; None if there is neither file."""
    points, visible, names = [], [], []
    for track in TRACKS:
        path = folder / f"{track}.npz"
        if not path.is_file():
            continue
        arrays = _arrays(path, ("points", "names"))
        own = [str(name) for name in np.atleast_1d(arrays["names"])]
        value = _steps(arrays["points"], path, "points", (len(own), 3), length)
        length = len(value)
        seen = _steps(arrays.get("visible", np.ones(value.shape[:2], bool)), path, "visible", (len(own),), length)
        value, found = _held(value)
        points.append(value)
        visible.append((seen > 0.5) & found)
        names += own
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"{folder}: names {twice} are used twice in hands.npz and objects.npz; give every point its own"
        )
    return (np.concatenate(points, 1), np.concatenate(visible, 1), names) if names else None


def _held(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`points` with lost ones at their last known place (before the first, there), and which were known (T, K)."""
    known: np.ndarray = np.asarray(np.isfinite(points).all(-1))
    steps = np.arange(len(points))[:, None]
    last = np.maximum.accumulate(np.where(known, steps, -1), 0)
    last = np.where(last < 0, known.argmax(0), last)
    held = np.take_along_axis(points, last[..., None], 0)
    # A point that is never seen has no place at all; it stays invisible.
    return np.where(np.isfinite(held), held, 0.0), known


def _steps(value: np.ndarray, path: Path, name: str, tail: tuple[int, ...], length: int | None) -> np.ndarray:
    """`value` as float64 if it is (T, *tail) and numeric."""
    if value.dtype.kind not in "fiub" or value.shape[1:] != tail or not len(value):
        raise DataError(f"{path}: {name}: {value.dtype} of shape {value.shape}; must be numbers (T, {str(tail)[1:-1]})")
    if length is not None and len(value) != length:
        raise DataError(f"{path}: {name}: {len(value)} steps, the episode has {length}; both must agree")
    return np.asarray(value, np.float64)
