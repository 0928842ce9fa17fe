"""A teacher and its few-step students side by side: quality, agreement, latency and closed-loop success per step count.

  python benchmarks/distillation.py TEACHER STUDENT [STUDENT ...] [--teacher-steps 1 2 4 8 16] [--steps 1 2 4]

Runs on clips that nobody trained on. Every model starts from the same noise, so that agreement, the difference from
the teacher's samples of its most steps, measures the distillation alone; the other figures compare with what happened,
where a teacher of more steps need not be better. Latency is of one clip on this machine; models take turns within each
tick, so read the ratios. With `--trials N` the policies also drive the simulated arm, N trials of every task.

Prints a Markdown table:

  PSNR, SSIM, ADE, camera, force   predicted streams against the truth; camera is that of the view that moves most
  action                           action chunk of mode policy against the demonstration, MAE in action units
  agreement                        video PSNR and action MAE against the teacher's samples of most steps
  video, chunk                     median ms of mode video_prediction, decoded, and of one chunk of actions
  success                          closed loop, with 95 % Wilson interval
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

AGREEMENT = "/agreement"
COLUMNS = {
    "video_psnr": ("PSNR dB", 1.0, 2),
    "video_ssim": ("SSIM", 1.0, 4),
    "trajectory_ade": ("ADE mm", 1e3, 1),
    "camera_path_translation": ("camera mm", 1e3, 1),
    "force_future": ("force N", 1.0, 1),
    "action": ("action", 1.0, 4),
    "video_psnr/agreement": ("agreement: PSNR dB", 1.0, 1),
    "action/agreement": ("action", 1.0, 4),
}


class Contender(NamedTuple):
    """A model with a number of sampling steps."""

    name: str
    folder: Path
    model: Any
    steps: int


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="run folder with model.safetensors and model.json")
    parser.add_argument("students", type=Path, nargs="+", help="run folders")
    parser.add_argument("--teacher-steps", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4], help="of the students")
    parser.add_argument("--data", help="shards; default: what the teacher was trained on")
    parser.add_argument("--split", default="heldout_episodes", choices=["heldout_episodes", "heldout_tasks"])
    parser.add_argument("--clips", type=int, default=100, help="at most, spread over tasks and episodes")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--ticks", type=int, default=30, help="measured calls for each latency")
    parser.add_argument("--trials", type=int, default=0, help="closed-loop trials per task; 0: none")
    parser.add_argument("--trial-steps", type=int, nargs="+", default=[1, 2], help="action steps that drive the arm")
    parser.add_argument("--tasks", nargs="+", help="of the closed loop; default: those trained on")
    parser.add_argument("--mask", nargs="+", default=[], help="senses hidden in the closed loop, e.g. points touch")
    parser.add_argument("--workers", type=int, default=1, help="processes of the closed loop")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the rows of the table")
    return parser


def main() -> None:
    """Measures and prints."""
    from worldmodel.errors import WorldModelError

    try:
        print(table(*run(arguments().parse_args())))
    except WorldModelError as error:
        sys.exit(f"distillation.py: {error}")


def run(given: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Rows of the table, and the line above it."""
    import torch

    from benchmarks.latency import machine
    from worldmodel.checkpoint import load_model
    from worldmodel.data.shards import ShardReader

    torch.set_num_threads(given.threads)
    folders = [given.teacher, *given.students]
    names = ["teacher", *("student" if len(given.students) == 1 else folder.name for folder in given.students)]
    contenders = [
        Contender(name, folder, model, steps)
        for name, folder in zip(names, folders, strict=True)
        for model in [load_model(folder)]
        for steps in sorted(given.teacher_steps if folder is given.teacher else given.steps)
    ]
    reader = ShardReader(given.data or contenders[0].model.metadata["training"]["data_root"])
    clips, figures = quality(contenders, reader, given)
    seconds = latency(contenders, given.ticks)
    rows = []
    for contender, found, (video, chunk) in zip(contenders, figures, seconds, strict=True):
        row = {"model": contender.name, "steps": contender.steps, "figures": found, "video_s": video, "chunk_s": chunk}
        rows.append(row)
        if given.trials and contender.steps in given.trial_steps:
            row["closed_loop"] = drive(contender, given)
        if given.out:
            given.out.write_text(json.dumps(rows, indent=1))
    return rows, f"{clips} clips of {given.split}, seed {given.seed}; {machine()}, {given.threads} thread"


def quality(contenders: list[Contender], reader: Any, given: argparse.Namespace) -> tuple[int, list[dict[str, Any]]]:
    """How many clips there were, and each contender's figures by name: value, low, high."""
    import torch
    from tqdm import tqdm

    from worldmodel.data.clip import collate
    from worldmodel.data.dataset import ClipDataset
    from worldmodel.figures import summarise
    from worldmodel.holdout import check_unseen, choose_clips
    from worldmodel.metrics import Rows

    for contender in contenders:
        check_unseen(contender.model.metadata, reader, given.split)
    teachers = [i for i, contender in enumerate(contenders) if contender.folder == given.teacher]
    dataset = ClipDataset(reader, contenders[0].model.spec, split=given.split)
    clips = choose_clips(dataset, 2, given.clips, given.seed)
    rows: list[dict[str, Rows]] = [{} for _ in contenders]
    groups = np.array_split(np.arange(len(clips)), -(-len(clips) // given.batch))
    with tqdm(total=len(groups) * len(contenders), desc="quality", unit="batch") as bar, torch.inference_mode():
        for number, group in enumerate(groups):
            chosen = [clips[i] for i in group]
            batch = collate([dataset[clip.item] for clip in chosen])
            answers = []
            for contender in contenders:
                answers.append(sample(contender, batch.observation, given.seed + number))
                bar.update()
            reference = answers[teachers[-1]]
            for answer, own in zip(answers, rows, strict=True):
                for name, sums in score(batch, chosen, contenders[0].model.spec, answer, reference).items():
                    if answer is not reference or not name.endswith(AGREEMENT):
                        own.setdefault(name, Rows()).add(sums)
    found = [summarise(own, clips, given.seed)["figures"] for own in rows]
    return len(clips), [{figure["name"]: figure["ours"] for figure in figures} for figures in found]


def sample(contender: Contender, observation: Any, seed: int) -> tuple[Any, Any]:
    """Predicted streams, and actions (B, A, D) of mode policy."""
    import torch

    return tuple(
        contender.model.predict(
            observation, None, mode, generator=torch.Generator().manual_seed(seed), steps=contender.steps
        )
        for mode in ("video_prediction", "policy")
    )  # pyright: ignore[reportReturnType]


def score(
    batch: Any, clips: list[Any], spec: Any, answer: tuple[Any, Any], reference: tuple[Any, Any]
) -> dict[str, Any]:
    """Errors of each clip by the name of the figure."""
    import torch

    from worldmodel import metrics

    observation, future = batch.observation, batch.future
    (streams, policy), (teacher, teacher_policy) = answer, reference
    seen = future.valid.repeat_interleave(spec.stride, 1)[:, :, None] & observation.has_rgb[:, None]
    movable = torch.stack([clip.movable for clip in clips]) & observation.has_points
    target = future.rgb.float() / 255
    moved = metrics.translation_error(future.camera_to_base[:, -1], observation.camera_to_base[:, -1])
    view = int(moved.mean(0).argmax())
    camera = metrics.translation_error(streams.camera_to_base[:, :, view], future.camera_to_base[:, :, view])
    touched = future.valid[:, :, None] & observation.has_wrench[:, None]
    act = partial(metrics.action_error, valid=future.action_valid, dims=future.action_dims)
    return {
        "video_psnr": metrics.squared_error(streams.rgb, target, seen),
        "video_ssim": metrics.ssim(streams.rgb, target, seen),
        "trajectory_ade": metrics.trajectory_error(
            streams.points, future.points, future.valid[:, :, None] & movable[:, None]
        ),
        "camera_path_translation": metrics.masked_sums(camera, future.valid & observation.has_camera[:, None, view]),
        "force_future": metrics.wrench_error(streams.wrench, future.wrench, touched),
        "action": act(policy.actions, future.actions),
        "video_psnr/agreement": metrics.squared_error(streams.rgb, teacher.rgb, seen),
        "action/agreement": act(policy.actions, teacher_policy.actions),
    }


def latency(contenders: list[Contender], ticks: int) -> list[tuple[float, float]]:
    """Median seconds of a predicted clip and of a chunk of actions, of each contender, which take turns."""
    import torch

    from benchmarks.latency import measure
    from export.tensors import observation_specs, random_tensors
    from worldmodel.contracts import Observation

    spec = contenders[0].model.spec
    observation = Observation(*random_tensors(observation_specs(spec), spec, 1))
    noise = torch.randn(1, spec.chunk, spec.action, generator=torch.Generator().manual_seed(0))

    def video(contender: Contender) -> None:
        contender.model.predict(
            observation, None, "video_prediction", generator=torch.Generator().manual_seed(0), steps=contender.steps
        )

    def chunk(contender: Contender) -> None:
        contender.model.action_steps = contender.steps
        contender.model.act(observation, noise)

    calls: dict[str, Callable[[], object]] = {}
    for number, contender in enumerate(contenders):
        calls |= {f"{number} video": partial(video, contender), f"{number} chunk": partial(chunk, contender)}
    with torch.inference_mode():
        seconds = {name: float(np.median(values)) for name, values in measure(calls, ticks, warm_up=3).items()}
    return [(seconds[f"{i} video"], seconds[f"{i} chunk"]) for i in range(len(contenders))]


def drive(contender: Contender, given: argparse.Namespace) -> dict[str, Any]:
    """Closed-loop success of the policy with the contender's number of steps."""
    from worldmodel.closed_loop import SourceScenes, run_closed_loop
    from worldmodel.controllers import CheckpointFactory

    spec = contender.model.spec
    print(f"closed loop: {contender.name}, {contender.steps} steps", file=sys.stderr)
    return run_closed_loop(
        CheckpointFactory(contender.folder, tuple(given.mask), given.seed, action_steps=contender.steps),
        given.tasks or contender.model.metadata["training"]["tasks"],
        trials=given.trials,
        seed=given.seed,
        image_every=spec.stride,
        workers=given.workers,
        make_scene=SourceScenes(spec.height, spec.cameras),
    ).to_json()


def table(rows: list[dict[str, Any]], head: str) -> str:
    """A Markdown table of what was measured."""
    titles = [title for title, _, _ in COLUMNS.values()]
    lines = [
        head,
        "",
        f"| model | steps | {' | '.join(titles)} | video ms | chunk ms | success |",
        "| --- |" + " ---: |" * (len(titles) + 3) + " --- |",
    ]
    for row in rows:
        cells = [
            f"{row['figures'][name]['value'] * scale:.{digits}f}" if name in row["figures"] else ""
            for name, (_, scale, digits) in COLUMNS.items()
        ]
        closed = row.get("closed_loop")
        success = ""
        if closed is not None:
            low, high = closed["interval"]
            trials = sum(task["trials"] for task in closed["tasks"])
            success = f"{closed['mean_success']:.1%} ({low:.0%}-{high:.0%}) of {trials}"
        cells += [f"{1e3 * row['video_s']:.1f}", f"{1e3 * row['chunk_s']:.1f}", success]
        lines.append(f"| {row['model']} | {row['steps']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
