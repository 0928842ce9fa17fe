"""Small made-up datasets of any robot, for tests that need no simulator."""

from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.contracts import SCHEMA_VERSION, Batch, Future, Observation
from worldmodel.data.clip import Clip, collate
from worldmodel.data.embodiments import load_embodiments
from worldmodel.data.schema import Episode
from worldmodel.data.shard_writer import write_index, write_shard
from worldmodel.data.statistics import write_statistics


def one(clip: Clip) -> Batch:
    """A clip's fields as arrays without the batch axis."""
    observation, future, frame, key, _ = collate([clip])
    return Batch(
        Observation(*(value[0].numpy() for value in observation)),  # pyright: ignore[reportArgumentType]
        Future(*(value[0].numpy() for value in future)),  # pyright: ignore[reportArgumentType]
        frame[0],
        key,
    )


def made_up_episode(
    key: str, embodiment: str, task: str, rng: np.random.Generator, *, length: int, pixels: int, split: str = "train"
) -> Episode:
    """Noise pictures of one camera, with the state and action of the registry's entry, else four numbers of each."""
    entry = load_embodiments().get(embodiment)
    absent = ["camera", "objects", "tactile"]
    episode = Episode(meta={"cameras": ["front"]})
    for name in ("proprio", "action"):
        channels = getattr(entry, name) if entry else None
        if entry and channels is None:
            absent.append(name)
            continue
        names = list(channels.names) if channels else [f"{name}_{d}" for d in range(4)]
        units = list(channels.units) if channels else ["m"] * 4
        episode.meta |= {f"{name}_names": names, f"{name}_units": units}
        setattr(episode, name, rng.uniform(0, 1, (length, len(names))).astype(np.float32))
    episode.rgb["front"] = rng.integers(0, 256, (length, pixels, pixels, 3), np.uint8)
    episode.meta |= {
        "schema_version": SCHEMA_VERSION,
        "episode_id": key,
        "embodiment": embodiment,
        "task": task,
        "instruction": f"{task}.",
        "split": split,
        "fps": 20.0,
        "length": length,
        "success": True,
        "absent": absent,
    }
    return episode


def made_up_dataset(root: Path, groups: dict[tuple[str, str], int], *, length: int = 6, pixels: int = 16) -> Path:
    """Writes `groups` of (embodiment, task) -> episodes, a shard each, with index and statistics."""
    root.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    for number, ((embodiment, task), count) in enumerate(groups.items()):
        samples = []
        for i in range(count):
            key = f"{root.name}-{embodiment}-{task}-{i:03d}"
            rng = np.random.default_rng([number, i])
            samples.append((key, made_up_episode(key, embodiment, task, rng, length=length + i % 3, pixels=pixels)))
        shards.append(write_shard(root / f"shard-{number:06d}.tar", samples))
    write_index(root, shards, [], {})
    write_statistics(root)
    return root
