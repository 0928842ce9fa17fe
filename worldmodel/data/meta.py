"""The metadata of one episode: which fields there are, of which kind, and reading them from `meta.json`."""

from typing import Any

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.plain import loads
from worldmodel.errors import DataError

META_FIELDS = ("schema_version", "episode_id", "embodiment", "task", "instruction", "split", "fps", "length", "success")
MODALITIES = ("rgb", "camera", "objects", "tactile", "proprio", "action")
"""Names that `meta["absent"]` may hold."""
LONGEST = 10_000_000
"""Steps of one episode: days at any rate. What a number says must not decide how much memory is asked for."""
_TEXTS = ("episode_id", "embodiment", "task", "instruction", "split")
_NEEDED = {
    "rgb": "cameras",
    "objects": "point_names",
    "tactile": "sensor_names",
    "proprio": "proprio_names",
    "action": "action_names",
}
_LISTS = (
    *_NEEDED.values(),
    "absent",
    "action_units",
    "proprio_units",
    "taxel_sensors",
    "taxel_channels",
)


def parse_meta(data: bytes, where: str) -> dict[str, Any]:
    """The metadata in `data`, with every field that readers rely on there and of its kind.

    Raises:
        DataError: naming the first field that is not.
    """
    try:
        meta = loads(data)
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
    for name in _TEXTS:
        if not isinstance(meta[name], str):
            raise DataError(f"{where}: meta.json: {name} must be text, got {meta[name]!r}")
    if not isinstance(meta["success"], bool):
        raise DataError(f"{where}: meta.json: success must be true or false, got {meta['success']!r}")
    for name in _LISTS:
        names = meta.get(name, [])
        if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
            raise DataError(f"{where}: meta.json: {name} must be a list of texts, got {names!r}")
    if not isinstance(meta.get("sensor_frames", {}), dict):
        raise DataError(f"{where}: meta.json: sensor_frames must map sensors to frames, got {meta['sensor_frames']!r}")
    absent = meta.get("absent", [])
    if unknown := sorted(set(absent) - set(MODALITIES)):
        raise DataError(f"{where}: meta.json: absent names unknown modalities {unknown}; known: {list(MODALITIES)}")
    for modality, name in _NEEDED.items():
        if modality not in absent and name not in meta:
            raise DataError(f"{where}: meta.json: {name} must list the names of {modality!r}, which is not absent")
    if type(meta["length"]) is not int or not 1 <= meta["length"] <= LONGEST:
        raise DataError(f"{where}: meta.json: length must be a positive integer, got {meta['length']!r}")
    return meta
