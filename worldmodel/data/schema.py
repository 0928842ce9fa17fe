"""One recorded episode: its fields, the checks every reader applies, and its members in a shard.

Members of a sample: `meta.json`, `rgb.<camera>.NNNNNN.jpg`, `rgb.<camera>.mp4` or `rgb.<camera>.npy` ((T, 3, h, w)
uint8, the order in which clips are cut), `camera.npz` (`<camera>.intrinsics`, `<camera>.camera_to_base`),
`objects.npz`, `tactile.npz`, `proprio.npy`, `action.npy`, and optionally `times.npz` (stream -> (T,) seconds at which
its samples were taken; without it, step i is at i / fps). A modality that the robot lacks is named in `meta["absent"]`
and its members are missing.

Masks are not a sense, so they are there or not without being called absent: with `meta["elements"]`, names of what they
tell apart, every camera has `mask.<camera>.NNNNNN.png`, whose pixels are places in that list.

A variant is an episode that shows the motion of another in another look. `meta["variant_of"]` is that one's episode_id,
`meta["variant"]` counts from 1 (0 or nothing: no variant), `meta["look"]` says what was changed. Only pictures, masks,
cameras, visibility and colour words of the instruction differ. `meta["vary"]` names the kinds of changes,
`meta["changed"]` the elements that look different, `meta["edit"]` what to ask for to get them. Where the kinds are
neither `lights` nor `view`, raw pictures are equal at every pixel of another element, as masks are everywhere; but
glass (the window's) shows what is behind it, in the colours that has.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worldmodel.data.faults import faults
from worldmodel.data.media import decode_mask, decode_picture, decode_video
from worldmodel.data.meta import parse_meta
from worldmodel.data.plain import load_archive, load_array
from worldmodel.errors import DataError

JPEG_QUALITY = 95
JPEG, RAW = "jpeg", "raw"
PICTURES = (JPEG, RAW)
"""How pictures are stored: small, or as they are, which loses nothing and is read without decoding."""


@dataclass
class Episode:
    """T steps of one episode. Shapes use the legend of `worldmodel.contracts`; absent modalities are empty or None."""

    meta: dict[str, Any]
    rgb: dict[str, np.ndarray] = field(default_factory=dict)  # camera -> (T, h, w, 3) uint8
    intrinsics: dict[str, np.ndarray] = field(default_factory=dict)  # camera -> (T, 3, 3) float32, pixels
    camera_to_base: dict[str, np.ndarray] = field(default_factory=dict)  # camera -> (T, 4, 4) float32
    points: np.ndarray | None = None  # (T, K, 3) float32, metres, base frame
    visible: np.ndarray | None = None  # (T, K) bool
    wrench: np.ndarray | None = None  # (T, S, 6) float32, N and N·m, sensor frame
    taxels: np.ndarray | None = None  # (T, S', C, rows, columns) float32, for meta["taxel_sensors"] only
    proprio: np.ndarray | None = None  # (T, P) float32
    action: np.ndarray | None = None  # (T, D) float32; action[i] is held after observation i
    times: dict[str, np.ndarray] = field(default_factory=dict)  # stream -> (T,) float64 seconds, on one clock
    masks: dict[str, np.ndarray] = field(default_factory=dict)  # camera -> (T, h, w) uint8, places in meta["elements"]

    @property
    def length(self) -> int:
        """Number of observations, which is also the number of actions."""
        return int(self.meta["length"])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, for bounded caches."""
        series = (self.rgb, self.masks, self.intrinsics, self.camera_to_base, self.times)
        arrays = [array for arrays in series for array in arrays.values()]
        arrays += [
            a for a in (self.points, self.visible, self.wrench, self.taxels, self.proprio, self.action) if a is not None
        ]
        return sum(array.nbytes for array in arrays)


def encode(episode: Episode, *, pictures: str = JPEG) -> dict[str, bytes]:
    """Members of the sample that stores `episode`, by file extension; `pictures` is one of `PICTURES`."""
    members = {"meta.json": json.dumps(episode.meta, sort_keys=True, indent=1, ensure_ascii=False).encode()}
    for camera, images in episode.rgb.items():
        if pictures == RAW:
            members[f"rgb.{camera}.npy"] = _encode_npy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
            continue
        for step, image in enumerate(images):
            members[f"rgb.{camera}.{step:06d}.jpg"] = _encode_jpeg(image)
    for camera, masks in episode.masks.items():
        for step, mask in enumerate(masks):
            members[f"mask.{camera}.{step:06d}.png"] = _encode_png(mask)
    if episode.camera_to_base or episode.intrinsics:
        arrays = {f"{camera}.intrinsics": value for camera, value in episode.intrinsics.items()}
        arrays |= {f"{camera}.camera_to_base": value for camera, value in episode.camera_to_base.items()}
        members["camera.npz"] = _encode_npz(arrays)
    if episode.points is not None and episode.visible is not None:
        names = np.array(episode.meta["point_names"], dtype=np.str_)
        members["objects.npz"] = _encode_npz({"points": episode.points, "visible": episode.visible, "names": names})
    if episode.wrench is not None:
        arrays = {"wrench": episode.wrench, "sensors": np.array(episode.meta["sensor_names"], dtype=np.str_)}
        if episode.taxels is not None:
            arrays["taxels"] = episode.taxels
            arrays["taxel_sensors"] = np.array(episode.meta["taxel_sensors"], dtype=np.str_)
        members["tactile.npz"] = _encode_npz(arrays)
    for name, value in (("proprio", episode.proprio), ("action", episode.action)):
        if value is not None:
            members[f"{name}.npy"] = _encode_npy(value)
    if episode.times:
        members["times.npz"] = _encode_npz(episode.times)
    return members


def decode(members: dict[str, bytes], where: str, *, images: bool = True, check: bool = True) -> Episode:
    """The episode stored in `members`.

    Args:
        members: bytes by extension, as in the shard.
        where: file and key, for messages.
        images: False leaves `rgb` and `masks` empty, which is many times faster.
        check: False skips `check_episode`.

    Raises:
        DataError: a member is missing or unreadable, or `check_episode` found a fault.
    """
    meta = parse_meta(_member(members, "meta.json", where), where)
    absent = set(meta.get("absent", ()))
    episode = Episode(meta=meta)
    if "camera" not in absent:
        for name, value in _decode_npz(members, "camera.npz", where).items():
            camera, _, kind = name.rpartition(".")
            if kind not in ("intrinsics", "camera_to_base"):
                raise DataError(
                    f"{where}: camera.npz: unknown array {name!r}; expected <camera>.intrinsics and "
                    "<camera>.camera_to_base"
                )
            if kind == "intrinsics" and value.shape == (3, 3):
                value = np.broadcast_to(value, (episode.length, 3, 3))
            getattr(episode, kind)[camera] = value
    if "objects" not in absent:
        arrays = _decode_npz(members, "objects.npz", where)
        episode.points = _array(arrays, "points", "objects.npz", where)
        episode.visible = _array(arrays, "visible", "objects.npz", where)
    if "tactile" not in absent:
        arrays = _decode_npz(members, "tactile.npz", where)
        episode.wrench, episode.taxels = _array(arrays, "wrench", "tactile.npz", where), arrays.get("taxels")
    if "proprio" not in absent:
        episode.proprio = _decode_npy(members, "proprio.npy", where)
    if "action" not in absent:
        episode.action = _decode_npy(members, "action.npy", where)
    if "times.npz" in members:
        episode.times = _decode_npz(members, "times.npz", where)
    if images and "rgb" not in absent:
        for camera in meta["cameras"]:
            episode.rgb[camera] = _decode_images(members, camera, meta["length"], where)
    if images and "elements" in meta:
        for camera in meta["cameras"]:
            episode.masks[camera] = _decode_numbered(
                members, f"mask.{camera}", "png", decode_mask, meta["length"], where
            )
    if check:
        check_episode(episode, where)
    return episode


def check_episode(episode: Episode, where: str) -> None:
    """Raise `DataError` naming file, key and field for the first fault of `episode`; return if it is sound."""
    for message in faults(episode):
        raise DataError(f"{where}: {message}")


def _member(members: dict[str, bytes], name: str, where: str) -> bytes:
    if name not in members:
        raise DataError(f"{where}: {name}: member is missing; store it, or name its modality in meta.json's absent")
    return members[name]


def _array(arrays: dict[str, np.ndarray], name: str, member: str, where: str) -> np.ndarray:
    if name not in arrays:
        raise DataError(f"{where}: {member}: array {name!r} is missing; it has {sorted(arrays)}")
    return arrays[name]


def _decode_npy(members: dict[str, bytes], name: str, where: str) -> np.ndarray:
    data = _member(members, name, where)
    try:
        return load_array(data)
    except ValueError as error:
        raise DataError(f"{where}: {name}: not a plain numpy array ({error})") from error


def _decode_npz(members: dict[str, bytes], name: str, where: str) -> dict[str, np.ndarray]:
    data = _member(members, name, where)
    try:
        return load_archive(io.BytesIO(data))
    except ValueError as error:
        raise DataError(f"{where}: {name}: not a plain numpy archive ({error})") from error


def _encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _encode_npz(arrays: dict[str, np.ndarray]) -> bytes:
    # Older versions of numpy take savez's `allow_pickle` for one more array.
    assert not any(array.dtype.hasobject for array in arrays.values())
    named: dict[str, Any] = dict(arrays)
    buffer = io.BytesIO()
    np.savez(buffer, **named)
    return buffer.getvalue()


def _encode_jpeg(image: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _encode_png(mask: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _decode_images(members: dict[str, bytes], camera: str, length: int, where: str) -> np.ndarray:
    """(T, h, w, 3) uint8 from the camera's video, its array or its numbered pictures."""
    if (video := members.get(f"rgb.{camera}.mp4")) is not None:
        return decode_video(video, f"{where}: rgb.{camera}.mp4", most=length + 1)
    if (name := f"rgb.{camera}.npy") in members:
        pictures = _decode_npy(members, name, where)
        if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.dtype != np.uint8:
            raise DataError(f"{where}: {name}: shape {pictures.shape} of {pictures.dtype}; store (T, 3, h, w) of uint8")
        return np.ascontiguousarray(np.moveaxis(pictures, 1, -1))
    return _decode_numbered(members, f"rgb.{camera}", "jpg", decode_picture, length, where)


def _decode_numbered(
    members: dict[str, bytes], stem: str, suffix: str, read: Callable[[bytes, str], np.ndarray], length: int, where: str
) -> np.ndarray:
    """(T, h, w, ...) uint8 from one picture file per step."""
    images = []
    for step in range(length):
        name = f"{stem}.{step:06d}.{suffix}"
        images.append(read(_member(members, name, where), f"{where}: {name}"))
        if images[-1].shape != images[0].shape:
            raise DataError(f"{where}: {name}: size {images[-1].shape}, the first picture has {images[0].shape}")
    return np.stack(images)
