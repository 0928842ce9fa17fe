"""Turn a dataset in a foreign format into shards: over processes, resumable, the same bytes on every run."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from worldmodel.contracts import SCHEMA_VERSION
from worldmodel.data.formats.base import Ref
from worldmodel.data.formats.map_file import load_mapping, make_mapping, to_yaml
from worldmodel.data.formats.mapping import SPLITS, Mapping, Split
from worldmodel.data.formats.registry import open_source
from worldmodel.data.formats.resolve import resolve
from worldmodel.data.jobs import Chunk, claim, fill, stored_as
from worldmodel.data.schema import JPEG, Episode
from worldmodel.errors import ConfigError, DataError

log = logging.getLogger(__name__)

EPISODES_PER_SHARD = 25
_KEY = re.compile(r"[^\0-\37\\./]{1,200}")


def import_dataset(
    format: str,
    src: str | Path,
    out: str | Path,
    *,
    mapping: Mapping | str | Path | None = None,
    workers: int | None = None,
    ray: str | None = None,
    progress: bool = True,
    pictures: str = JPEG,
    episodes_per_shard: int = EPISODES_PER_SHARD,
) -> Path:
    """Import or finish importing the dataset `src` into `out` and return its path.

    An interrupted run continues where it stopped; a finished one is left as it is.

    Args:
        format: one of `formats.registry.FORMATS`.
        src: the dataset, a folder or a file as the format has it.
        out: folder for shards, index.json and stats.json.
        mapping: names and frames (see `formats.mapping`), or the YAML file that holds them; None takes the dataset's
            own map or the suggested one, where that leaves nothing open.
        workers: processes; None is one per core, 1 works in this process.
        ray: address of a Ray cluster to work on instead; it must see `source` and `out`.
        progress: show a bar.
        pictures: how they are stored, one of `schema.PICTURES`.
        episodes_per_shard: the last shard of a split may hold fewer.

    Raises:
        ConfigError: the map does not fit (the message lists what the data has and a suggested map), unknown format, or
            `out` holds something else.
        DataError: the source is not of this format, or damaged.
    """
    if episodes_per_shard < 1:
        raise ConfigError(f"episodes_per_shard must be at least 1, got {episodes_per_shard}")
    source = open_source(format, src)
    fields = source.fields()
    for name, why in fields.missing.items():
        log.warning("%s: %s: %s", src, name, why)
    resolved = resolve(fields, load_mapping(mapping) if isinstance(mapping, str | Path) else mapping)
    refs = source.refs()
    check_refs(refs, str(src))
    placed = assign_splits(refs, resolved.split)
    plain = resolved.as_dict()
    parameters = {
        "format": format,
        "source": Path(src).resolve().name,
        "episodes": hashlib.sha256(json.dumps(refs).encode()).hexdigest(),
        "mapping": to_yaml(plain),  # as text: the order of cameras and sensors counts
        "episodes_per_shard": episodes_per_shard,
        "schema_version": SCHEMA_VERSION,
        **stored_as(pictures),
    }
    root = Path(out)
    claim(root, parameters)
    heldout = resolved.split.heldout_tasks
    fill(
        root,
        list(plan(refs, placed, episodes_per_shard)),
        partial(read_chunk, format, str(Path(src).resolve()), plain),
        heldout_tasks=lambda entries: heldout_tasks(entries, heldout),
        extra={"imported": parameters},
        workers=workers,
        ray=ray,
        progress=progress,
        pictures=pictures,
    )
    log.info("%s: %s", root, ", ".join(f"{n} {split}" for split, n in sorted(Counter(placed).items())))
    return root


def check_refs(refs: Sequence[Ref], where: str) -> None:
    """Raise `DataError` if there is no episode, or keys cannot be keys of a shard."""
    if not refs:
        raise DataError(f"{where}: no episodes")
    seen: set[str] = set()
    for ref in refs:
        if not _KEY.fullmatch(ref.key) or ref.key in seen:
            raise DataError(f"{where}: episode key {ref.key!r} must be unique and hold no dot and no slash")
        seen.add(ref.key)


def assign_splits(refs: Sequence[Ref], split: Split) -> list[str]:
    """Our split of every episode. A share is taken by hash, so an episode stays where it is when others are added."""
    if split.source is not None:
        if unknown := sorted({ref.split for ref in refs} - set(split.source)):
            raise DataError(f"split: episodes of source splits {unknown}, the map has {sorted(split.source)}")
        return [split.source[ref.split] for ref in refs]
    draws = [int.from_bytes(hashlib.sha256(ref.key.encode()).digest()[:8], "big") / 2**64 for ref in refs]
    held = {i for i, draw in enumerate(draws) if draw < split.heldout}
    if split.heldout and not held and len(refs) > 1:
        held = {draws.index(min(draws))}  # the one that any share would hold out first
    return ["heldout_episodes" if i in held else "train" for i in range(len(refs))]


def plan(refs: Sequence[Ref], splits: Sequence[str], episodes_per_shard: int) -> Iterator[Chunk]:
    """Shards of episodes of one split each, in the source's order."""
    number = 0
    for split in SPLITS:
        chosen = [ref for ref, own in zip(refs, splits, strict=True) if own == split]
        for first in range(0, len(chosen), episodes_per_shard):
            part = chosen[first : first + episodes_per_shard]
            yield Chunk(f"shard-{number:06d}.tar", len(part), {"split": split, "refs": [list(ref) for ref in part]})
            number += 1


def heldout_tasks(entries: list[dict[str, Any]], named: Sequence[str]) -> list[str]:
    """Tasks of split `heldout_tasks`, and those that the map names."""
    return sorted({entry["task"] for entry in entries if entry["split"] == "heldout_tasks"} | set(named))


def read_chunk(format: str, src: str, mapping: dict[str, Any], chunk: Chunk) -> Iterator[tuple[str, Episode]]:
    """The episodes of `chunk` with their keys; runs in a worker process."""
    source, names = open_source(format, src), make_mapping(mapping, "the import's map")
    for key, place, split in chunk.what["refs"]:
        episode = source.read(Ref(key, tuple(place), split), names)
        ours = "heldout_tasks" if episode.meta["task"] in names.split.heldout_tasks else chunk.what["split"]
        episode.meta |= {"episode_id": key, "split": ours}
        episode.meta.setdefault("source", f"{format}:{Path(src).resolve().name}")
        yield key, episode
