"""How far predicted streams go from now where the task is unknown: errors at several shares (`model.unread_share`).

  python benchmarks/unread_share.py RUN DATA [--split heldout_episodes] [--shares 0 0.4 0.5 0.6 0.75 1]

DATA are shards with tasks that RUN was not trained on; tasks that they hold out are left to be judged by and not looked
at. RUN must read known instructions only (model.normaliser.known_text_only). Prints a Markdown table of errors on clips
of those tasks; a share of 0 says that all stays as it is now.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("data", type=Path, help="folder of shards")
    parser.add_argument("--split", default="heldout_episodes")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0])
    parser.add_argument("--clips", type=int, default=200, help="at most, spread over tasks and episodes")
    parser.add_argument("--camera", default="wrist", help="the camera whose path is predicted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    """Measures and prints."""
    from worldmodel.errors import WorldModelError

    parser = arguments()
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        measure(parser, given)
    except WorldModelError as error:
        sys.exit(f"unread_share.py: {error}")


def measure(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Predicts every clip at every share, from the same noise."""
    from worldmodel.checkpoint import instructions_read, load_model
    from worldmodel.data.dataset import ClipDataset
    from worldmodel.data.shards import ShardReader
    from worldmodel.evaluation import collate
    from worldmodel.holdout import choose_clips

    model, reader = load_model(given.run), ShardReader(given.data)
    known = instructions_read(model.metadata)
    if known is None or given.camera not in model.spec.cameras:
        parser.error(f"{given.run} reads every instruction, or has no camera {given.camera!r}")
    dataset = ClipDataset(reader, model.spec, split=given.split)
    clips = choose_clips(dataset, 3, len(dataset), given.seed)
    aside = {*known, *(clip.instruction for clip in clips if clip.task in reader.index["heldout_tasks"])}
    clips = [clip for clip in clips if clip.instruction not in aside][: given.clips]
    if not clips:
        parser.error(f"{given.data}: no task in {given.split} that {given.run} does not know and that is not held out")
    sums: dict[float, list[list[float]]] = {share: [] for share in given.shares}
    for start in tqdm(range(0, len(clips), 20), unit="batch"):
        part = clips[start : start + 20]
        batch = collate([dataset[clip.item] for clip in part])
        movable = torch.stack([clip.movable for clip in part])
        for share in given.shares:
            model.unread_share = share
            generator = torch.Generator().manual_seed(given.seed + start)
            with torch.inference_mode():
                ends = model.predict(batch.observation, None, "video_prediction", generator=generator)
            sums[share].append(errors(ends, batch, movable, model.spec.cameras.index(given.camera)))
    print(f"{len(clips)} clips of {len({clip.task for clip in clips})} tasks\n")
    print(f"| share | objects, ADE mm | objects, FDE mm | {given.camera} camera, mm | force, N |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for share, rows in sums.items():
        total = torch.tensor(rows).sum(0)
        print(f"| {share:g} | {' | '.join(f'{x:.2f}' for x in (total[::2] / total[1::2]).tolist())} |")


def errors(ends: Any, batch: Any, movable: torch.Tensor, view: int) -> list[float]:
    """Sum and weight of each error of the table."""
    from worldmodel import metrics

    now, future = batch.observation, batch.future
    shown = future.valid[:, :, None] & (movable & now.has_points)[:, None]
    seen = future.valid & now.has_camera[:, None, view]
    path = metrics.translation_error(ends.camera_to_base[:, :, view], future.camera_to_base[:, :, view])
    found = [
        (1000, metrics.trajectory_error(ends.points, future.points, shown)),
        (1000, metrics.trajectory_error(ends.points, future.points, metrics.last_valid(shown))),
        (1000, metrics.masked_sums(path, seen)),
        (1, metrics.wrench_error(ends.wrench, future.wrench, future.valid[:, :, None] & now.has_wrench[:, None])),
    ]
    return [x for scale, sums in found for x in (scale * sums.total.sum().item(), sums.weight.sum().item())]


if __name__ == "__main__":
    main()
