"""ALOHA and ACT demonstrations: one HDF5 file per episode.

    action (T, D)                    base_action (T, 2)
    observations/qpos, qvel, effort (T, D)
    observations/images/<camera>     (T, h, w, 3) uint8, or JPEG files: (T, bytes) padded with zeros, or T strings
    compress_len (cameras, T)        bytes of each JPEG file, in an order of cameras that the file does not state

The layout is that of https://github.com/tonyzhaozh/act and https://github.com/MarkFzp/mobile-aloha. It states neither
rate (50 Hz on the first robots) nor task; the name of the folder is offered as text `folder`. JPEG files are decoded as
their standard says: where a recorder gave RGB to an encoder that expects BGR, red and blue come out exchanged, and the
map must say so: `cameras: {top: {field: top, color: bgr}}`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.formats.assemble import assemble
from worldmodel.data.formats.base import Field, Fields, Recording, Ref, episode_key
from worldmodel.data.formats.hdf5 import check_rows, dataset, datasets, hdf5_files, opened, pictures, text, vector
from worldmodel.data.formats.mapping import Mapping
from worldmodel.data.formats.pictures import decode_pictures
from worldmodel.data.schema import Episode
from worldmodel.errors import DataError

IMAGES = "observations/images/"
ROLES = {"observations/qpos": "proprio", "action": "action"}
FOLDER = "folder"
"""Text that holds the name of the folder an episode lies in: ACT keeps one folder per task."""
_LENGTHS = "compress_len"
_DEPTH = ("observations/depth", "observations/images_depth", "depth_compress_len")


class AlohaSource:
    """Episodes of a folder, or of one file; see the module's text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = path.parent if path.is_file() else path
        self.files = hdf5_files(path, "ALOHA episodes")

    def fields(self) -> Fields:
        """What the first episode has; the others are checked when they are read."""
        path = self.files[0]
        fields, texts = Fields(where=str(self.path)), []
        with opened(path) as file:
            length = _steps(file, str(path))
            for name, item in datasets(file).items():
                if name.startswith(IMAGES):
                    fields.cameras[name.removeprefix(IMAGES)] = item.shape[1:3] if item.ndim == 4 else None
                elif name.startswith(_DEPTH):
                    fields.missing[name] = "depth pictures are not read"
                elif not item.shape and text(item[()]) is not None:
                    texts.append(name)
                elif name != _LENGTHS and item.dtype.kind in "fiub":
                    if item.shape[:1] == (length,):
                        fields.vectors[name] = Field(item.shape[1:], role=ROLES.get(name, ""))
                    else:
                        fields.missing[name] = f"shape {item.shape} in {path.name}, which has {length} steps"
            texts += [name for name, value in file.attrs.items() if text(value)]
        return replace(fields, texts=(*texts, FOLDER))

    def refs(self) -> list[Ref]:
        """One per file."""
        places = [file.relative_to(self.root) for file in self.files]
        return [Ref(episode_key(*_words(place)), (place.as_posix(),)) for place in places]

    def read(self, ref: Ref, mapping: Mapping) -> Episode:
        """The episode of the file that `ref` names.

        Raises:
            DataError: a dataset is missing, damaged or of another length; names file and dataset.
        """
        path = self.root / str(ref.place[0])
        where = str(path)
        with opened(path) as file:
            length = _steps(file, where)
            recording = Recording(where, length, texts={FOLDER: path.resolve().parent.name})
            for name in sorted(mapping.vectors()):
                recording.vectors[name] = vector(file, name, length, where)
            for camera in sorted(mapping.images()):
                recording.images[camera] = _images(file, camera, length, where)
            recording.texts |= {name: found for name, value in file.attrs.items() if (found := text(value))}
            for name, item in datasets(file).items():
                if not item.shape and (found := text(item[()])) is not None:
                    recording.texts[name] = found
            if "sim" in file.attrs:
                recording.meta["simulated"] = bool(np.all(file.attrs["sim"]))
        return assemble(recording, mapping)


def _words(place: Path) -> list[str | int]:
    """Parts of a key: folders, then the file's name with its number apart so that it is padded."""
    stem = place.stem.rstrip("0123456789")
    number = place.stem[len(stem) :]
    return [*place.parts[:-1], stem.rstrip("_"), *([int(number)] if number else [])]


def _steps(file: Any, where: str) -> int:
    """Steps of the episode: rows of `action`, or of `observations/qpos` in a file without actions."""
    name = "action" if "action" in file else "observations/qpos"
    item = dataset(file, name, where)
    if not item.shape or not item.shape[0]:
        raise DataError(f"{where}: {name}: shape {item.shape}; must be (T, D) with at least one step")
    return int(item.shape[0])


def _images(file: Any, camera: str, length: int, where: str) -> np.ndarray:
    """(T, h, w, 3) uint8 RGB of one camera, compressed or not."""
    name = IMAGES + camera
    item = dataset(file, name, where)
    if item.ndim == 4:
        return pictures(file, name, length, where)
    check_rows(item, name, length, where)
    encoded = list(_encoded(item, f"{where}: {name}"))
    if _LENGTHS in file:
        stated = np.atleast_2d(dataset(file, _LENGTHS, where)[()]).tolist()
        # Its rows follow the recorder's list of cameras, not the alphabetical order of the file.
        if [len(data) for data in encoded] not in stated:
            raise DataError(
                f"{where}: {_LENGTHS}: no row holds the lengths of the JPEG files of {name}; the pictures are cut off "
                "or belong to another episode"
            )
    return decode_pictures(encoded, f"{where}: {name}")


def _encoded(item: Any, where: str) -> Iterator[bytes]:
    """The JPEG files of a dataset without their padding; a JPEG file never ends with zeros."""
    for row in item[()]:
        if isinstance(row, bytes):
            yield row.rstrip(b"\0")
        elif isinstance(row, np.ndarray) and row.dtype == np.uint8 and row.ndim == 1:
            yield row.tobytes().rstrip(b"\0")
        else:
            raise DataError(f"{where}: {item.dtype} of shape {item.shape}; must be uint8 (T, h, w, 3) or JPEG files")
