"""Clips per second of this reader against webdataset, raw HDF5 and LeRobot, on the same demonstrations.

  python benchmarks/loader.py [--pixels 64 256] [--episodes 8] [--steps 60] [--clips 200] [--rounds 3]
  python benchmarks/loader.py --lerobot-python /envs/lerobot/bin/python

A clip is 9 frames of 2 cameras with state and action, or as many as --cameras, --history and --future make. Made-up
demonstrations (moving shapes on a gradient) are written once in each format; readers then take turns, so that whatever
else the machine does hits all of them alike; read the ratios. `first` is a reader's first pass, with empty caches of
its own and files in the page cache, `later` the median of the passes after it. LeRobot runs in the interpreter that is
named, by its own writer and reader.

  ours            JPEG in our shards, random clips, decoded frames cached within --cache-bytes
  ours, no cache  the same, every frame decoded each time
  ours, raw       pictures stored as they are (`--pictures raw`), random clips
  webdataset      JPEG, each clip stored as a sample of its own, read in sequence, shuffled in a buffer of 100
  hdf5            uint8 arrays without compression, a chunk per frame, random clips
  lerobot         its video format, random clips
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

CAMERAS = ("front", "wrist", "side", "left_wrist", "right_wrist", "top")
STRIDE, FPS, STATE, ACTION = 4, 20.0, 18, 8

Reader = Callable[[], Iterator[int]]
"""One pass: yields the number of clips in each batch."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[64, 256], help="image sizes (default: 64 256)")
    parser.add_argument("--episodes", type=int, default=8, help="demonstrations (default: 8)")
    parser.add_argument("--steps", type=int, default=60, help="steps of each (default: 60)")
    parser.add_argument("--clips", type=int, default=200, help="clips of a pass (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, help="passes of each reader (default: 3)")
    parser.add_argument("--batch", type=int, default=8, help="clips of a batch (default: 8)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default: 0)")
    parser.add_argument("--cameras", type=int, default=2, help="views (default: 2)")
    parser.add_argument("--history", type=int, default=1, help="history frames of a clip (default: 1)")
    parser.add_argument("--future", type=int, default=2, help=f"its latent frames, of {STRIDE} frames (default: 2)")
    parser.add_argument("--only-ours", action="store_true", help="leave the other formats out")
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU, not of the clock: for a busy machine")
    parser.add_argument("--cache-bytes", type=int, default=1 << 30, help="bound of our cache (default: 1 GiB)")
    parser.add_argument("--lerobot-python", help="interpreter that has lerobot installed")
    options = parser.parse_args()
    if options.cpu and (options.workers or options.lerobot_python):
        parser.error("--cpu counts this process alone: leave --workers and --lerobot-python out")
    if not 1 <= options.cameras <= len(CAMERAS):
        parser.error(f"--cameras {options.cameras}: 1 to {len(CAMERAS)}")
    options.cameras = CAMERAS[: options.cameras]
    options.frames = options.history + STRIDE * options.future
    for pixels in options.pixels:
        with tempfile.TemporaryDirectory() as folder:
            print(table(measure(Path(folder), pixels, options), pixels, options), flush=True)


def demonstration(number: int, steps: int, pixels: int, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Pictures (T, h, w, 3) by camera, `state` and `action` of one made-up episode."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:pixels, :pixels] / pixels
    episode = {}
    for camera in cameras:
        base = np.stack([rows, columns, 0.5 * (rows + columns)], -1) * rng.uniform(60, 200, 3)
        base = base + rng.normal(0, 3, base.shape)  # a camera's noise, or JPEG has nothing to do
        centres, colours = rng.uniform(0.2, 0.8, (4, 2)), rng.uniform(0, 255, (4, 3))
        pictures = np.repeat(base[None], steps, 0)
        for step in range(steps):
            for (y, x), colour in zip(centres + 0.15 * np.sin(step / 9 + centres[::-1]), colours, strict=True):
                pictures[step][(rows - y) ** 2 + (columns - x) ** 2 < 0.01] = colour
        episode[camera] = pictures.clip(0, 255).astype(np.uint8)
    for name, size in (("state", STATE), ("action", ACTION)):
        episode[name] = rng.normal(0, 1, (steps, size)).astype(np.float32).cumsum(0) / 10
    return episode


def measure(folder: Path, pixels: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Clips per second, first and later, and megabytes on disk, by reader."""
    import torch

    torch.set_num_threads(1)
    episodes = [demonstration(i, options.steps, pixels, options.cameras) for i in range(options.episodes)]
    starts = clip_starts(options)
    readers: dict[str, Reader] = {}
    sizes: dict[str, float] = {}
    others = {} if options.only_ours else {"webdataset": webdataset, "hdf5": hdf5}
    for name, make in {"ours": ours, **others}.items():
        (folder / name).mkdir()
        readers |= make(folder / name, episodes, starts, options)
    for name in ("ours", "ours, raw", *others):
        sizes[name] = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file()) / 1e6
    clock = time.process_time if options.cpu else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in readers}
    other = LeRobot(folder, episodes, starts, options) if options.lerobot_python else None
    for _ in range(options.rounds):
        for name, reader in readers.items():
            begun, clips = clock(), sum(reader())
            rates[name].append(clips / (clock() - begun))
        if other is not None:
            rates.setdefault("lerobot", []).append(other.rate())
    if other is not None:
        sizes["lerobot"] = other.close()
    return {
        name: {
            "first": found[0],
            "later": statistics.median(found[1:] or found),
            "MB": sizes.get(name, sizes["ours"]),
        }
        for name, found in rates.items()
    }


def clip_starts(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Episode and first frame of every clip of a pass, in random order."""
    rng = np.random.default_rng(0)
    places = [(e, s) for e in range(options.episodes) for s in range(options.steps - options.frames + 1)]
    return [places[i] for i in rng.choice(len(places), options.clips, replace=options.clips > len(places))]


def ours(folder: Path, episodes: list[Any], starts: list[tuple[int, int]], options: Any) -> dict[str, Reader]:
    """Our shards and data set; the clip's history is one frame, its future eight."""
    from torch.utils.data import DataLoader

    from worldmodel.contracts import SCHEMA_VERSION, ClipSpec
    from worldmodel.data.clip import collate
    from worldmodel.data.dataset import ClipDataset
    from worldmodel.data.schema import Episode
    from worldmodel.data.shard_writer import write_index, write_shard
    from worldmodel.data.shards import ShardReader

    samples = []
    for i, values in enumerate(episodes):
        meta = {"schema_version": SCHEMA_VERSION, "episode_id": f"e{i:03d}", "embodiment": "made-up", "task": "move"}
        meta |= {"instruction": "Move.", "split": "train", "fps": FPS, "length": options.steps, "success": True}
        meta |= {"cameras": list(options.cameras), "absent": ["camera", "objects", "tactile"]}
        meta |= {"proprio_names": [f"s{d}" for d in range(STATE)], "action_names": [f"a{d}" for d in range(ACTION)]}
        rgb = {camera: values[camera] for camera in options.cameras}
        samples.append((f"e{i:03d}", Episode(meta, rgb=rgb, proprio=values["state"], action=values["action"])))
    raw = folder.with_name("ours, raw")
    raw.mkdir()
    for root, pictures in ((folder, "jpeg"), (raw, "raw")):
        write_index(root, [write_shard(root / "shard-000000.tar", samples, pictures=pictures)], [], {})
    pixels = episodes[0][options.cameras[0]].shape[1]
    spec = ClipSpec(
        cameras=options.cameras,
        embodiments=("made-up",),
        height=pixels,
        width=pixels,
        fps=FPS,
        history=options.history,
        stride=STRIDE,
        future=options.future,
    )

    def reader(root: Path, cache_bytes: int) -> Reader:
        dataset = ClipDataset(ShardReader(root, cache_bytes=cache_bytes), spec, split="train")
        order = [e * options.steps + s for e, s in starts]
        loader = DataLoader(
            dataset,
            batch_size=options.batch,
            sampler=order,
            collate_fn=collate,
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
        )

        def once() -> Iterator[int]:
            for batch in loader:
                assert batch.observation.rgb.shape[1] + batch.future.rgb.shape[1] == options.frames
                yield len(batch.key)

        return once

    return {
        "ours": reader(folder, options.cache_bytes),
        "ours, no cache": reader(folder, 0),
        "ours, raw": reader(raw, 0),
    }


def webdataset(folder: Path, episodes: list[Any], starts: list[tuple[int, int]], options: Any) -> dict[str, Reader]:
    """Clips stored one by one, in the pipeline that its documentation shows."""
    import torch
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset
    from webdataset.writer import TarWriter

    from worldmodel.data.schema import JPEG_QUALITY

    def jpeg(image: np.ndarray) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue()

    count = max(options.workers, 1)
    for shard in range(count):
        with TarWriter(str(folder / f"clips-{shard:03d}.tar")) as writer:
            for number, (e, s) in list(enumerate(starts))[shard::count]:
                values = episodes[e]
                pictures = {
                    f"{camera}{i}.jpg": jpeg(values[camera][s + i])
                    for camera in options.cameras
                    for i in range(options.frames)
                }
                rest = {f"{name}.npy": values[name][s : s + options.frames] for name in ("state", "action")}
                writer.write({"__key__": f"{number:06d}", **pictures, **rest})

    def tensors(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        frames = np.stack([[sample[f"{camera}{i}.jpg"] for camera in options.cameras] for i in range(options.frames)])
        rgb = torch.from_numpy(frames.transpose(0, 1, 4, 2, 3).copy())
        return {
            "rgb": rgb,
            "state": torch.from_numpy(sample["state.npy"]),
            "action": torch.from_numpy(sample["action.npy"]),
        }

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset: Any = WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(100).decode("rgb8").map(tensors)
    loader = DataLoader(
        dataset, batch_size=options.batch, num_workers=options.workers, persistent_workers=options.workers > 0
    )

    def once() -> Iterator[int]:
        for batch in loader:
            yield len(batch["rgb"])

    return {"webdataset": once}


def hdf5(folder: Path, episodes: list[Any], starts: list[tuple[int, int]], options: Any) -> dict[str, Reader]:
    """Arrays as they are, as robomimic and ALOHA store them."""
    import h5py
    import torch
    from torch.utils.data import DataLoader, Dataset

    path = folder / "data.hdf5"
    with h5py.File(path, "w") as file:
        for i, values in enumerate(episodes):
            for name, value in values.items():
                chunks = (1, *value.shape[1:]) if value.ndim == 4 else None
                file.create_dataset(f"{i}/{name}", data=value, chunks=chunks)

    class Clips(Dataset[dict[str, torch.Tensor]]):
        file: Any = None

        def __len__(self) -> int:
            return len(starts)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if self.file is None:
                self.file = h5py.File(path, "r")
            e, s = starts[index]
            group = self.file[str(e)]
            frames = np.stack([group[camera][s : s + options.frames] for camera in options.cameras], 1)
            rgb = torch.from_numpy(frames.transpose(0, 1, 4, 2, 3).copy())
            rest = {name: torch.from_numpy(group[name][s : s + options.frames]) for name in ("state", "action")}
            return {"rgb": rgb, **rest}

    loader = DataLoader(
        Clips(), batch_size=options.batch, num_workers=options.workers, persistent_workers=options.workers > 0
    )

    def once() -> Iterator[int]:
        for batch in loader:
            yield len(batch["rgb"])

    return {"hdf5": once}


class LeRobot:
    """LeRobot's writer and reader in an interpreter of their own, one pass at a time on request."""

    def __init__(self, folder: Path, episodes: list[Any], starts: list[tuple[int, int]], options: Any) -> None:
        for i, values in enumerate(episodes):
            np.savez(folder / f"episode-{i:03d}.npz", **values)
        settings = {
            "folder": str(folder),
            "episodes": len(episodes),
            "steps": options.steps,
            "starts": [[int(e), int(s)] for e, s in starts],
            "frames": options.frames,
            "fps": FPS,
            "cameras": list(options.cameras),
            "batch": options.batch,
            "workers": options.workers,
        }
        script = Path(__file__).with_name("loader_lerobot.py")
        self._process = subprocess.Popen(
            [options.lerobot_python, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )
        self.megabytes = float(self._answer())

    def rate(self) -> float:
        """Clips per second of one pass."""
        assert self._process.stdin is not None
        self._process.stdin.write("pass\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> float:
        """Ends the interpreter; returns the megabytes that it wrote."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        return self.megabytes

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                return line.split()[1]
        raise RuntimeError(f"the LeRobot interpreter ended with status {self._process.wait()}; its error is above")


def table(found: dict[str, dict[str, float]], pixels: int, options: argparse.Namespace) -> str:
    """A Markdown table with ratios to ours."""
    lines = [
        f"{pixels} px, {options.frames} frames, {len(options.cameras)} cameras, {options.episodes} episodes of "
        f"{options.steps} steps, {options.clips} clips a pass, batches of {options.batch}, {options.workers} workers, "
        f"{platform.machine()}{', seconds of CPU' * options.cpu}",
        "",
        "| reader | first, clips/s | later, clips/s | ours is, first | ours is, later | MB on disk |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    own = found["ours"]
    for name, row in found.items():
        ratios = [f"{own[kind] / row[kind]:.2f}x" for kind in ("first", "later")]
        lines.append(
            f"| {name} | {row['first']:.0f} | {row['later']:.0f} | {ratios[0]} | {ratios[1]} | {row['MB']:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
