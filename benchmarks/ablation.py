"""What layers, streams and co-training buy at equal optimiser steps: trains variants of kairos_tiny on several seeds.

  python benchmarks/ablation.py DATA OUT [--base RUN] [--synthesis-steps 80] [--policy-steps 80] [--seeds 0 1 2]

DATA are Meta-World shards (`python -m worldmodel.data generate metaworld DATA`). All variants start from one base: the
tokeniser, understanding and behaviour phases of kairos_tiny, trained here once, or those of a finished run (--base).
Then each trains the synthesis and the policy phase for the same steps, with nothing else changed, and is evaluated on
held-out episodes. The budget is yours: a few minutes a run order the variants roughly, no more. Every run is kept in
OUT and only what is missing is run again. Prints Markdown tables: figures per variant, and differences to `ours` paired
by seed, with their 95 % t-intervals over seeds.

  ours             hybrid layers [swa, swa, dswa, gated], all streams, conditions, video co-training
  full attention   every layer attends to all frames
  no gated delta   [swa, swa, dswa, dswa]: windows alone
  no camera        without the stream of camera poses; likewise: no points, no force
  no conditions    nothing of the future can be given (but actions, as tokens)
  no co-training   the policy phase trains on actions alone
  blind to camera  is shown no camera poses, neither in these phases nor when evaluated; likewise: to points, to touch.
                   What it starts from was trained with them, and predicts without them where they are absent
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

STREAMS = ("video", "camera", "points", "force")
SENSES = ("camera", "points", "touch")
PATTERN = "synthesis.denoiser.pattern="
POLICY = "[{mode: policy, weight: 0.2, drop: [rgb]}, {mode: policy, weight: 0.27, rows: 32, draws: 2}, "
POLICY += "{mode: policy, weight: 0.53, drop: [camera, points, touch], rows: 32, draws: 2}]"


def without(stream: str) -> list[str]:
    """Overrides that take a stream out of stage 2."""
    rest = f"[{', '.join(name for name in STREAMS if name != stream)}]"
    return [f"+synthesis.denoiser.streams={rest}", f"synthesis.denoiser.anchored={rest}"]


VARIANTS: dict[str, list[str]] = {
    "ours": [],
    "full attention": [f"{PATTERN}[swa, swa, swa, swa]", "synthesis.denoiser.window=99"],
    "no gated delta": [f"{PATTERN}[swa, swa, dswa, dswa]"],
    **{f"no {name}": without(name) for name in STREAMS[1:]},
    "no conditions": ["synthesis.denoiser.conditions=null"],
    "no co-training": [f"phases.policy.mixture={POLICY}"],
    **{
        f"blind to {sense}": [f"phases.{phase}.dropout.{sense}=1.0" for phase in ("synthesis", "policy")]
        for sense in SENSES
    },
}
FIGURES = {
    "video_psnr": "video PSNR, dB",
    "video_ssim": "SSIM",
    "trajectory_ade": "objects ADE, mm",
    "camera_path_translation/wrist": "wrist camera, mm",
    "force_future": "force, N",
    "action": "action MAE",
    "camera_given_actions/wrist": "wrist camera given actions, mm",
    "video_given_camera": "video given camera, dB",
}
IN_MILLIMETRES = ("trajectory_ade", "camera_path_translation/wrist", "camera_given_actions/wrist")
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""97.5 % quantile of Student's t by degrees of freedom."""


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, help="finished run of kairos_tiny on the same data to start from")
    parser.add_argument("--synthesis-steps", type=int, default=80)
    parser.add_argument("--policy-steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--clips", type=int, default=60, help="held-out clips of the evaluation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every run")
    return parser


def compose(given: argparse.Namespace, run: Path, *overrides: str) -> dict[str, Any]:
    """The resolved configuration of one run."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    from worldmodel.config import register_resolvers

    register_resolvers()
    fixed = [
        "experiment=kairos_tiny", f"data.root={given.data}", f"run_dir={run}", "wandb.mode=disabled",
        f"trainer.threads={given.threads}",
    ]  # fmt: skip
    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "configs"), version_base="1.3"):
        config = OmegaConf.to_container(hydra_compose("train", [*fixed, *given.set, *overrides]), resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def make_base(given: argparse.Namespace) -> Path:
    """What every variant starts from: stage 1, tokeniser, compositor and state policy, nothing that is compared."""
    from safetensors.torch import load_file, save_file

    from worldmodel.curriculum import train

    path = given.out / "base.safetensors"
    if not path.is_file():
        run = given.base
        if run is None:
            run = train(compose(given, given.out / "base", "~phases.synthesis", "~phases.policy"))
        weights = load_file(run / "model.safetensors")
        kept = ("autoencoder.", "encoder.", "compositor.", "expert.state.", "expert.foresight.")
        save_file({n: w for n, w in weights.items() if n.startswith(kept)}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        if (run / "latents.safetensors").is_file():
            shutil.copy(run / "latents.safetensors", given.out / "latents.safetensors")
    return path


def measure(given: argparse.Namespace, variant: str, seed: int) -> dict[str, float]:
    """Trains and evaluates one variant with one seed, or reads what an earlier call found."""
    from worldmodel.checkpoint import load_model
    from worldmodel.curriculum import train
    from worldmodel.data.shards import ShardReader
    from worldmodel.evaluation import evaluate_offline
    from worldmodel.missing import Absent, Without

    run = given.out / f"{variant.replace(' ', '_')}-{seed}"
    found = run / "ablation.json"
    if not found.is_file():
        run.mkdir(parents=True, exist_ok=True)
        if (given.out / "latents.safetensors").is_file():
            shutil.copy(given.out / "latents.safetensors", run / "latents.safetensors")
        steps = []
        for phase in ("synthesis", "policy"):
            count = getattr(given, f"{phase}_steps")
            # Warm-up and average are as long a part of a short phase as of a long one.
            steps += [f"phases.{phase}.steps={count}", f"++phases.{phase}.warmup={count // 5}"]
            steps += [f"phases.{phase}.ema={max(1 - 5 / count, 0.0):.4f}"]
        kept = [f"~phases.{phase}" for phase in ("tokeniser", "understanding", "locate", "compositor", "behaviour")]
        start = [*kept, f"init={make_base(given)}"]
        train(compose(given, run, f"seed={seed}", *start, *steps, *VARIANTS[variant]))
        (run / "latents.safetensors").unlink(missing_ok=True)
        model = load_model(run)
        blind = tuple(sense for sense in SENSES if variant == f"blind to {sense}")
        shown = Without(model, Absent(senses=blind)) if blind else model
        result = evaluate_offline(shown, ShardReader(given.data), "heldout_episodes", max_clips=given.clips)
        values = {f["name"]: f["ours"]["value"] for f in result["figures"]}
        values["parameters"] = sum(p.numel() for p in model.parameters())
        found.write_text(json.dumps(values, indent=1))
    values = json.loads(found.read_text())
    return values | {name: 1e3 * values[name] for name in IN_MILLIMETRES if name in values}


def spread(values: list[float]) -> str:
    """Mean and half-width of the 95 % t-interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    quantile = STUDENT.get(len(values) - 1, 1.96)
    digits = 2 if abs(mean) >= 1 else 4
    return f"{mean:.{digits}f} ± {quantile * deviation / math.sqrt(len(values)):.{digits}f}"


def table(rows: dict[str, list[dict[str, float]]], paired: bool) -> str:
    """Figures per variant, or their differences to `ours` seed by seed."""
    lines = ["| variant | M parameters | " + " | ".join(FIGURES.values()) + " |"]
    lines.append("| --- |" + " ---: |" * (len(FIGURES) + 1))
    for variant, results in rows.items():
        if paired and variant == "ours":
            continue
        cells = [f"{results[0]['parameters'] / 1e6:.2f}"]
        for name in FIGURES:
            pairs = [(r[name], o[name]) for r, o in zip(results, rows["ours"], strict=True) if name in r and name in o]
            cells.append(spread([a - b if paired else a for a, b in pairs]) if pairs else "–")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is missing, seed by seed so that an early table compares all variants, and prints the tables."""
    import torch
    from tqdm import tqdm

    given = arguments().parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    variants = ["ours", *(v for v in given.variants if v != "ours")]
    rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    runs = [(seed, variant) for seed in given.seeds for variant in variants]
    for seed, variant in tqdm(runs, desc="ablation", unit="run"):
        rows[variant].append(measure(given, variant, seed))
    print(f"\nSteps: synthesis {given.synthesis_steps}, policy {given.policy_steps}; seeds {given.seeds}\n")
    print(table(rows, paired=False))
    if len(variants) > 1:
        print(f"\nDifference to ours, paired by seed:\n\n{table(rows, paired=True)}")


if __name__ == "__main__":
    main()
