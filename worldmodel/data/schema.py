"""One recorded episode: its fields, the checks every reader applies, and its members in a shard.

Members of a sample: `meta.json`, `rgb.<camera>.NNNNNN.jpg` or `rgb.<camera>.mp4`, `camera.npz`
(`<camera>.intrinsics`, `<camera>.camera_to_base`), `objects.npz`, `tactile.npz`, `proprio.npy`, `action.npy`, and
optionally `times.npz` (stream -> (T,) seconds at which its samples were taken; without it, step i is at i / fps).
A modality that the robot lacks is named in `meta["absent"]` and its members are missing.
"""

import io
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.embodiments import metadata_faults
from worldmodel.errors import DataError

META_FIELDS = ("schema_version", "episode_id", "embodiment", "task", "instruction", "split", "fps", "length", "success")
MODALITIES = ("rgb", "camera", "objects", "tactile", "proprio", "action")
"""Names that `meta["absent"]` may hold."""
JPEG_QUALITY = 95


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

    @property
    def length(self) -> int:
        """Number of observations, which is also the number of actions."""
        return int(self.meta["length"])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, for bounded caches."""
        arrays = [*self.rgb.values(), *self.intrinsics.values(), *self.camera_to_base.values(), *self.times.values()]
        arrays += [
            a for a in (self.points, self.visible, self.wrench, self.taxels, self.proprio, self.action) if a is not None
        ]
        return sum(array.nbytes for array in arrays)


def encode(episode: Episode) -> dict[str, bytes]:
    """Members of the sample that stores `episode`, by file extension."""
    members = {"meta.json": json.dumps(episode.meta, sort_keys=True, indent=1, ensure_ascii=False).encode()}
    for camera, images in episode.rgb.items():
        for step, image in enumerate(images):
            members[f"rgb.{camera}.{step:06d}.jpg"] = _encode_jpeg(image)
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
            buffer = io.BytesIO()
            np.save(buffer, value, allow_pickle=False)
            members[f"{name}.npy"] = buffer.getvalue()
    if episode.times:
        members["times.npz"] = _encode_npz(episode.times)
    return members


def decode(members: dict[str, bytes], where: str, *, images: bool = True, check: bool = True) -> Episode:
    """The episode stored in `members`.

    Args:
        members: bytes by extension, as in the shard.
        where: file and key, for messages.
        images: False leaves `rgb` empty, which is many times faster.
        check: False skips `check_episode`.

    Raises:
        DataError: a member is missing or unreadable, or `check_episode` found a fault.
    """
    meta = _meta(members, where)
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
            if kind == "intrinsics" and value.ndim == 2:
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
    if check:
        check_episode(episode, where)
    return episode


def check_episode(episode: Episode, where: str) -> None:
    """Raise `DataError` naming file, key and field for the first fault of `episode`; return if it is sound."""
    for message in faults(episode):
        raise DataError(f"{where}: {message}")


def faults(episode: Episode) -> list[str]:
    """Every fault of `episode`, each as `field: what is wrong; what would be right`."""
    found = metadata_faults(episode.meta)
    t = episode.length
    arrays: dict[str, np.ndarray] = {}
    for group, values in (("intrinsics", episode.intrinsics), ("camera_to_base", episode.camera_to_base)):
        arrays |= {f"{group}.{camera}": value for camera, value in values.items()}
    for name in ("points", "visible", "wrench", "taxels", "proprio", "action"):
        value = getattr(episode, name)
        if value is not None:
            arrays[name] = value
    arrays |= {f"rgb.{camera}": value for camera, value in episode.rgb.items()}
    arrays |= {f"times.{stream}": value for stream, value in episode.times.items()}
    for name, value in arrays.items():
        if len(value) != t:
            found.append(f"{name}: {len(value)} steps, meta.json says length {t}; both must agree")
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            step = int(np.argwhere(~np.isfinite(value))[0][0])
            found.append(f"{name}: NaN or infinity at step {step}; every value must be finite")
    tails = {
        "points": (len(episode.meta.get("point_names", ())), 3),
        "wrench": (len(episode.meta.get("sensor_names", ())), 6),
    }
    for name, tail in tails.items():
        if name in arrays and arrays[name].shape[1:] != tail:
            found.append(f"{name}: shape {arrays[name].shape}, meta.json names make it (T, {tail[0]}, {tail[1]})")
    for name, names in (("proprio", "proprio_names"), ("action", "action_names")):
        if name in arrays and arrays[name].shape[1:] != (len(episode.meta.get(names, ())),):
            found.append(
                f"{name}: shape {arrays[name].shape}, but meta.json has {len(episode.meta.get(names, ()))} {names}"
            )
    for camera, pose in episode.camera_to_base.items():
        if message := _pose_fault(pose):
            found.append(f"camera_to_base.{camera}: {message}")
    for camera, matrix in episode.intrinsics.items():
        if matrix.shape[1:] != (3, 3) or (matrix[:, 0, 0] <= 0).any() or (matrix[:, 1, 1] <= 0).any():
            found.append(f"intrinsics.{camera}: must be (T, 3, 3) with positive focal lengths, got {matrix.shape}")
    return found


def _pose_fault(pose: np.ndarray) -> str | None:
    if pose.shape[1:] != (4, 4):
        return f"shape {pose.shape}, must be (T, 4, 4)"
    rotation = pose[:, :3, :3].astype(np.float64)
    deviation = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    determinant = np.linalg.det(rotation)
    bad = np.flatnonzero(~((deviation < 1e-3) & (determinant > 0)))
    if len(bad):
        step = int(bad[0])
        return (
            f"no rotation at step {step} (determinant {determinant[step]:.3g}, off orthonormal by "
            f"{deviation[step]:.3g}); the upper left 3x3 must be orthonormal with determinant +1"
        )
    if not np.allclose(pose[:, 3], [0, 0, 0, 1], atol=1e-6):
        return "the last row must be [0, 0, 0, 1]"
    return None


def _meta(members: dict[str, bytes], where: str) -> dict[str, Any]:
    try:
        meta = json.loads(_member(members, "meta.json", where))
    except ValueError as error:
        raise DataError(f"{where}: meta.json: not valid JSON ({error})") from error
    if not isinstance(meta, dict):
        raise DataError(f"{where}: meta.json: must be an object, got {type(meta).__name__}")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{where}: meta.json: schema_version {meta.get('schema_version')!r}, this version reads "
            f"{SCHEMA_VERSION}; generate or convert the data again"
        )
    if missing := [name for name in META_FIELDS if name not in meta]:
        raise DataError(f"{where}: meta.json: missing {missing}; required: {list(META_FIELDS)}")
    absent = meta.get("absent", [])
    if unknown := sorted(set(absent) - set(MODALITIES)):
        raise DataError(f"{where}: meta.json: absent names unknown modalities {unknown}; known: {list(MODALITIES)}")
    needed = {
        "rgb": "cameras",
        "objects": "point_names",
        "tactile": "sensor_names",
        "proprio": "proprio_names",
        "action": "action_names",
    }
    for modality, name in needed.items():
        if modality not in absent and not isinstance(meta.get(name), list):
            raise DataError(f"{where}: meta.json: {name} must list the names of {modality!r}, which is not absent")
    if not isinstance(meta["length"], int) or meta["length"] < 1:
        raise DataError(f"{where}: meta.json: length must be a positive integer, got {meta['length']!r}")
    return meta


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
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{where}: {name}: not a plain numpy array ({error})") from error


def _decode_npz(members: dict[str, bytes], name: str, where: str) -> dict[str, np.ndarray]:
    data = _member(members, name, where)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile and numpy raise half a dozen types for a damaged archive
        raise DataError(f"{where}: {name}: not a plain numpy archive ({error})") from error


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


def _decode_images(members: dict[str, bytes], camera: str, length: int, where: str) -> np.ndarray:
    """(T, h, w, 3) uint8 from the camera's video or its numbered pictures."""
    if (video := members.get(f"rgb.{camera}.mp4")) is not None:
        return decode_video(video, f"{where}: rgb.{camera}.mp4")
    images = []
    for step in range(length):
        name = f"rgb.{camera}.{step:06d}.jpg"
        images.append(decode_picture(_member(members, name, where), f"{where}: {name}"))
        if images[-1].shape != images[0].shape:
            raise DataError(f"{where}: {name}: size {images[-1].shape}, the first picture has {images[0].shape}")
    return np.stack(images)


def decode_picture(data: bytes, where: str) -> np.ndarray:
    """(h, w, 3) uint8 from a JPEG file. Raises `DataError` if it is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            # Converting what is RGB already would copy it.
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{where}: not a readable JPEG picture ({error})") from error


def decode_video(data: bytes, where: str) -> np.ndarray:
    """(T, h, w, 3) uint8 from a video file. Raises `DataError` if it is none."""
    import av
    import av.error

    try:
        with av.open(io.BytesIO(data), mode="r") as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        raise DataError(f"{where}: not a readable video ({error})") from error
