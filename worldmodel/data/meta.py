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
    "elements",
    "vary",
    "changed",
)
MOST_ELEMENTS = 256
"""Names that the pixels of a mask, of 8 bits, can stand for."""


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
    if message := _extras_fault(meta):
        raise DataError(f"{where}: meta.json: {message}")
    if type(meta["length"]) is not int or not 1 <= meta["length"] <= LONGEST:
        raise DataError(f"{where}: meta.json: length must be a positive integer, got {meta['length']!r}")
    return meta


def _extras_fault(meta: dict[str, Any]) -> str | None:
    """What is wrong with the fields of masks and variants, which episodes need not have."""
    if "elements" in meta:
        names = meta["elements"]
        if not 1 <= len(names) <= MOST_ELEMENTS or len(set(names)) < len(names):
            return f"elements must be 1 to {MOST_ELEMENTS} different names, got {len(names)}: {names[:20]}"
        if "cameras" not in meta:
            return "cameras must list the cameras of the masks, since elements says that there are masks"
    if "elements" in meta and (unknown := sorted(set(meta.get("changed", ())) - set(meta["elements"]))):
        return f"changed names {unknown}, which are none of the elements {meta['elements']}"
    if not isinstance(meta.get("edit", ""), str):
        return f"edit must be text, got {meta['edit']!r}"
    number, original = meta.get("variant", 0), meta.get("variant_of")
    if type(number) is not int or not 0 <= number <= LONGEST:
        return f"variant must be a whole number of 0 or more, got {number!r}"
    if (number > 0) != isinstance(original, str) or not isinstance(original, str | None):
        return (
            f"variant_of must be the episode_id of the original of variant {number}, and only there, got {original!r}"
        )
    return None
