"""A map for a foreign dataset from the names it uses, with `???` and a remark wherever a person must decide."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from worldmodel.data.formats.base import Fields, slug
from worldmodel.data.formats.mapping import ASK, HELDOUT, width

_PREFIX = r"(?:observations?[./])?(?:obs[./])?"
ALIASES: dict[str, str] = {
    "wrench": _PREFIX + r"(?:ee_|eef_)?(?:wrench|force_torque|force|ft)(?:[./_](?P<name>.+))?",
    "tactile": _PREFIX + r"(?:tactile|taxels|touch)(?:[./_](?P<name>.+))?",
    "camera_to_base": r"(?:observations?[./])?(?:camera_)?(?:extrinsics?|pose)[./](?P<name>.+)",
    "intrinsics": r"(?:observations?[./])?(?:camera_)?(?:intrinsics?)[./](?P<name>.+)",
    "points": _PREFIX + r"(?:object_)?(?:points|keypoints)",
    "visible": _PREFIX + r"(?:points_|object_)?(?:visible|visibility)",
    "proprio": _PREFIX + r"(?:state|qpos|proprio|proprioception|robot_state|joint_positions?)",
    "proprio_also": _PREFIX + r"(?:qvel|effort|velocity|joint_velocit(?:y|ies)|joint_efforts?)",
    "action": r"actions?",
    "success": r"next[./]success|success",
}
"""What a source's field is, by its whole name (lower case); `name` becomes the sensor's or the camera's."""
_CAMERA_PREFIX = re.compile(rf"^{_PREFIX}(?:(?:images?|rgb|cameras?)[./])?")
_HELDOUT_SPLITS = ("val", "valid", "validation", "test", "eval")


class Suggestion(NamedTuple):
    """A map in plain values, and what keeps it from being used as it is."""

    mapping: dict[str, Any]
    remarks: list[str]


def suggest(fields: Fields) -> Suggestion:
    """The best map for `fields`; with remarks it is for the user to finish and save."""
    found: dict[str, list[tuple[str, str]]] = {kind: [] for kind in ALIASES}
    unknown: list[str] = []
    for name, vector in fields.vectors.items():
        kind, own = (vector.role, "") if vector.role else _kind(name)
        if kind:
            found[kind].append((name, own))
        else:
            unknown.append(name)
    remarks = [f"{name}: matches no known name; use it where it belongs, or leave it under ignore" for name in unknown]
    out: dict[str, Any] = {"embodiment": slug(fields.embodiment) or ASK, "fps": fields.fps or ASK}
    out["instruction"] = _instruction(fields, remarks)
    if found["success"]:
        out["success"] = {"field": found["success"][0][0]}
    out["split"] = _split(fields)
    cameras = _cameras(fields, remarks)
    out["cameras"] = {ours: {"field": theirs} for ours, theirs in cameras.items()}
    ignore = list(unknown)
    for kind in ("proprio", "action"):
        names = [name for name, _ in found[kind]]
        chosen = names if all(fields.vectors[name].role == kind for name in names) else names[:1]
        if len(chosen) < len(names):
            remarks.append(f"{', '.join(names)}: several fields look like {kind}; name the right one")
            ignore += names[1:]
        out[kind] = [{"field": name} for name in chosen]
    out["proprio"] += [{"field": name} for name, _ in found["proprio_also"]]
    out["wrench"] = {
        slug(own or name.split(".")[-1]): {"field": name, "frame": ASK}
        | ({} if width(fields.vectors[name]) == 6 else {"slice": ASK})
        for name, own in found["wrench"]
    }
    out["tactile"] = {
        slug(own or name.split(".")[-1]): {"field": name, "shape": list(shape) if len(shape) == 3 else ASK}
        for name, own in found["tactile"]
        for shape in [fields.vectors[name].shape]
    }
    out["camera_to_base"] = {
        _camera(own, cameras): {"field": name, "maps": ASK, "axes": ASK} for name, own in found["camera_to_base"]
    }
    out["intrinsics"] = {_camera(own, cameras): {"field": name} for name, own in found["intrinsics"]}
    for camera in out["camera_to_base"]:
        out["intrinsics"].setdefault(camera, {"matrix": ASK})
    if found["points"]:
        out["points"] = {"field": found["points"][0][0], "frame": ASK}
        if found["visible"]:
            out["points"]["visible"] = found["visible"][0][0]
        ignore += [name for kind in ("points", "visible") for name, _ in found[kind][1:]]
    else:
        ignore += [name for name, _ in found["visible"]]
    out["ignore"] = ignore
    out |= dict.fromkeys(fields.questions, ASK)
    remarks += [f"{name}: {why}" for name, why in fields.questions.items()]
    out = {name: value for name, value in out.items() if value not in ([], {})}
    return Suggestion(
        out, remarks + [f"{path}: {ASK}, only you know" for path in _open(out) if path not in fields.questions]
    )


def _kind(name: str) -> tuple[str, str]:
    for kind, pattern in ALIASES.items():
        if match := re.fullmatch(pattern, name.lower()):
            return kind, match.groupdict().get("name") or ""
    return "", ""


def _open(value: Any, path: str = "") -> Iterator[str]:
    if value == ASK:
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _open(item, f"{path}.{key}" if path else key)


def _instruction(fields: Fields, remarks: list[str]) -> dict[str, str]:
    texts = list(fields.texts)
    if not texts:
        return {"text": ASK}
    if len(texts) > 1 and "task" not in texts:
        remarks.append(f"{', '.join(texts)}: several fields could be the instruction; name the right one")
    return {"field": "task" if "task" in texts else texts[0]}


def _split(fields: Fields) -> dict[str, Any]:
    if len(fields.splits) < 2:
        return {"heldout": HELDOUT}
    ours = {name: "heldout_episodes" if name.lower() in _HELDOUT_SPLITS else ASK for name in fields.splits}
    return {"source": ours | {name: "train" for name in fields.splits if name.lower() in ("train", "training")}}


def _cameras(fields: Fields, remarks: list[str]) -> dict[str, str]:
    """Our name -> theirs: without the prefix they all share."""
    out: dict[str, str] = {}
    for theirs in fields.cameras:
        ours = slug(_CAMERA_PREFIX.sub("", theirs))
        if ours in out:
            remarks.append(f"{out[ours]}, {theirs}: both would be camera {ours!r}; name them")
            ours = slug(theirs)
        out[ours] = theirs
    return out


def _camera(name: str, cameras: dict[str, str]) -> str:
    """Our name of the camera that an extrinsics or intrinsics field is called after."""
    return next((ours for ours, theirs in cameras.items() if slug(name) in (ours, slug(theirs))), slug(name))
