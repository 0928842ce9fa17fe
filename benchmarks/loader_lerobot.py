"""The LeRobot side of `loader.py`: runs in an interpreter that has lerobot and needs nothing of this repository.

Writes the demonstrations with LeRobot's writer, prints `answer MEGABYTES`, and then, for every line on standard input,
reads one pass of clips and prints `answer CLIPS_PER_SECOND`.
"""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Serves passes until standard input ends."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]
    except ImportError:  # before 0.4
        from lerobot.common.datasets.lerobot_dataset import (  # pyright: ignore[reportMissingImports]
            LeRobotDataset,
        )

    torch.set_num_threads(1)
    settings = json.loads(sys.argv[1])
    folder, cameras, fps = Path(settings["folder"]), settings["cameras"], int(settings["fps"])
    episodes = [dict(np.load(folder / f"episode-{i:03d}.npz", allow_pickle=False)) for i in range(settings["episodes"])]
    features = {
        f"observation.images.{camera}": {
            "dtype": "video",
            "shape": episodes[0][camera].shape[1:],
            "names": ["height", "width", "channels"],
        }
        for camera in cameras
    }
    for name, key in (("observation.state", "state"), ("action", "action")):
        size = episodes[0][key].shape[1]
        features[name] = {"dtype": "float32", "shape": (size,), "names": [f"{key}_{d}" for d in range(size)]}
    root = folder / "lerobot"
    dataset = LeRobotDataset.create("local/benchmark", fps, features, root=root, use_videos=True)
    for values in episodes:
        for step in range(settings["steps"]):
            frame = {f"observation.images.{camera}": values[camera][step] for camera in cameras}
            frame |= {"observation.state": values["state"][step], "action": values["action"][step]}
            dataset.add_frame({**frame, "task": "Move."})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()
    times = [i / fps for i in range(settings["frames"])]
    names = [*(f"observation.images.{camera}" for camera in cameras), "observation.state", "action"]
    dataset = LeRobotDataset("local/benchmark", root=root, delta_timestamps={name: times for name in names})
    order = [e * settings["steps"] + s for e, s in settings["starts"]]
    workers = settings["workers"]
    loader = DataLoader(
        dataset,
        batch_size=settings["batch"],
        sampler=order,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    print("answer", sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) / 1e6, flush=True)
    for _ in sys.stdin:
        begun, clips = time.perf_counter(), 0
        for batch in loader:
            clips += len(batch["action"])
        print("answer", clips / (time.perf_counter() - begun), flush=True)


if __name__ == "__main__":
    main()
