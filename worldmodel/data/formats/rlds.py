"""RLDS datasets as TFDS writes them: a folder of TFRecords, one episode per record, read without TensorFlow.

    features.json          names, shapes and types; see `tfds_features`
    dataset_info.json      name and splits with the number of episodes per file
    <name>-<split>.tfrecord-00000-of-00008

Names are those of the record without `steps/`: `observation/image`, `action`, `language_instruction`; what holds for a
whole episode keeps its own, `episode_metadata/file_path`. RLDS (https://github.com/google-research/rlds) states no
rate, and calls the action of the step with `is_last` invalid: that step is left out when actions are imported.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.formats.assemble import assemble
from worldmodel.data.formats.base import Field, Fields, Recording, Ref, episode_key
from worldmodel.data.formats.mapping import Mapping
from worldmodel.data.formats.tfds_features import FLAT, ROWS, Feature, decode, leaves
from worldmodel.data.formats.tfrecord import parse_example, read_record, record_offsets
from worldmodel.data.plain import read_json
from worldmodel.data.schema import Episode
from worldmodel.errors import DataError

FEATURES, INFO = "features.json", "dataset_info.json"
STEPS = "steps/"
_BOOKKEEPING = ("is_first", "is_last", "is_terminal", "reward", "discount")
_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<shard>\d{5})-of-(?P<shards>\d{5})")


class RldsSource:
    """Episodes of one TFDS version folder; a folder above it will do if it is the only one below."""

    def __init__(self, path: Path) -> None:
        found = [path] if (path / FEATURES).is_file() else sorted(p.parent for p in path.rglob(FEATURES))
        if len(found) != 1:
            listed = f": {', '.join(map(str, found))}; give one of them" if found else ""
            raise DataError(
                f"{path}: {len(found)} folders with {FEATURES} below it{listed or '; a TFDS version folder has one'}"
            )
        self.root = found[0]
        declared = read_json(self.root / FEATURES, "TFDS writes it beside the records")
        self.features: dict[str, Feature] = dict(leaves(declared, str(self.root / FEATURES)))
        if not any(name.startswith(STEPS) and feature.sequences for name, feature in self.features.items()):
            raise DataError(f"{self.root / FEATURES}: no sequence 'steps', so no RLDS; it has {sorted(self.features)}")

    def fields(self) -> Fields:
        """What features.json declares."""
        fields = Fields(
            where=str(self.root),
            # The likeliest instruction first: that is the one a suggested map takes.
            texts=tuple(sorted(map(_short, self._texts()), key=lambda name: "instruction" not in name)),
            splits=tuple(dict.fromkeys(split for split, _ in self._files())),
        )
        for name, feature in self.features.items():
            short = _short(name)
            if not feature.readable:
                fields.missing[short] = f"{feature.kind} is not supported"
            elif name.startswith(STEPS) and short not in _BOOKKEEPING:
                known = tuple(size for size in feature.shape if size is not None)
                if feature.kind == "image":
                    fields.cameras[short] = (known[0], known[1]) if len(known) == 3 else None
                elif feature.kind == "number" and len(known) == len(feature.shape):
                    fields.vectors[short] = Field(known, role="action" if short == "action" else "")
                elif feature.kind == "number":
                    fields.missing[short] = f"shape {feature.shape} is not the same in all episodes"
        return fields

    def refs(self) -> list[Ref]:
        """One per record, file by file; reads the lengths of all records."""
        refs: list[Ref] = []
        for (split, path), count in self._files().items():
            offsets = list(record_offsets(path))
            if count is not None and len(offsets) != count:
                raise DataError(f"{path}: {len(offsets)} records, {INFO} says {count}; restore the file")
            match = _SHARD.fullmatch(path.name)
            assert match is not None
            for i, offset in enumerate(offsets):
                key = episode_key(match["name"], split, int(match["shard"]), i)
                refs.append(Ref(key, (path.name, offset), split))
        return refs

    def read(self, ref: Ref, mapping: Mapping) -> Episode:
        """The episode of the record that `ref` names.

        Raises:
            DataError: the record is damaged, or a feature is missing, of another size or length; names file, offset and
                feature.
        """
        path, offset = self.root / str(ref.place[0]), int(ref.place[1])
        where = f"{path}: offset {offset}"
        texts = self._texts()
        wanted = [STEPS + name for name in sorted(mapping.vectors() | mapping.images())]
        names = {*wanted, *texts, STEPS + "is_first", STEPS + "is_last"}
        values = parse_example(read_record(path, offset), where, {n + end for n in names for end in ("", FLAT, ROWS)})
        stated = _length(values, self.features, wanted, where)
        length = stated
        if mapping.action and _last_is_final(values, stated):
            length -= 1
            if not length:
                raise DataError(f"{where}: one step only, whose action is_last makes invalid; leave the episode out")
        recording = Recording(where, length)
        for name in wanted:
            kind = "images" if self.features[name].kind == "image" else "vectors"
            decoded = decode(values, name, self.features[name], stated, where)
            getattr(recording, kind)[_short(name)] = decoded[:length]
        for name in sorted(texts):
            value: Any = values.get(name)
            if isinstance(value, list) and value:
                recording.texts[_short(name)] = value[0].decode("utf-8", "replace")
        recording.meta["record"] = {"file": path.name, "offset": offset, "steps": stated}
        return assemble(recording, mapping)

    def _texts(self) -> list[str]:
        return [name for name, feature in self.features.items() if feature.kind == "text"]

    def _files(self) -> dict[tuple[str, Path], int | None]:
        """The records' files by split, in order, with the number of episodes that each should have if that is known."""
        found: dict[tuple[str, Path], int | None] = {}
        shards: dict[tuple[str, str], dict[int, Path]] = {}
        counts: dict[tuple[str, str], int] = {}
        for path in sorted(self.root.glob("*.tfrecord-*")):
            if match := _SHARD.fullmatch(path.name):
                group = (match["name"], match["split"])
                shards.setdefault(group, {})[int(match["shard"])] = path
                counts[group] = int(match["shards"])
        if not shards:
            raise DataError(f"{self.root}: no records named <name>-<split>.tfrecord-00000-of-00001 beside {FEATURES}")
        lengths = self._lengths()
        for (name, split), paths in shards.items():
            if absent := sorted(set(range(counts[name, split])) - set(paths)):
                raise DataError(
                    f"{self.root}: split {split!r}: files {absent[:8]} of {counts[name, split]} are missing; "
                    "get them, or set the dataset up with fewer files"
                )
            stated = lengths.get(split)
            for number, path in sorted(paths.items()):
                found[split, path] = stated[number] if stated and len(stated) == counts[name, split] else None
        return found

    def _lengths(self) -> dict[str, list[int]]:
        """Episodes per file by split, as dataset_info.json says; empty without one."""
        if not (self.root / INFO).is_file():
            return {}
        splits = read_json(self.root / INFO, "TFDS writes it beside the records").get("splits", [])
        try:
            return {split["name"]: [int(n) for n in split.get("shardLengths", ())] for split in splits}
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"{self.root / INFO}: splits must list name and shardLengths ({error!r})") from error


def _short(name: str) -> str:
    return name.removeprefix(STEPS)


def _length(values: dict[str, Any], features: dict[str, Feature], wanted: list[str], where: str) -> int:
    """Steps of the episode: values of is_first or is_last, otherwise of a feature with one value per step."""
    one_each = [STEPS + "is_first", STEPS + "is_last"]
    one_each += [name for name in wanted if features[name].kind == "image" and name.startswith(STEPS)]
    for name in one_each:
        if name in values and len(values[name]):
            return len(values[name])
    for name in wanted:
        if name in values and not features[name].ragged:
            width = 1 if isinstance(values[name], list) else math.prod(size or 1 for size in features[name].shape)
            return len(values[name]) // max(width, 1)
    raise DataError(f"{where}: the record has no steps; it is damaged or no RLDS episode")


def _last_is_final(values: dict[str, Any], length: int) -> bool:
    flags = values.get(STEPS + "is_last")
    return isinstance(flags, np.ndarray) and len(flags) == length and bool(flags[-1])
