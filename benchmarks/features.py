"""A training step of stage 1 whose images a frozen vision transformer reads, and the same step on its stored features.

  python benchmarks/features.py DATA [--steps 20] [--batch 8] [--layers 12] [--hidden 384] [--pixels 224]

Three steps take turns on the same batches, so that whatever else the machine does hits all of them alike; read the
ratios: with the convolutional stem, with the network run, and with its features read from files. Weights are random,
which changes no time. Prints a Markdown table.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="dataset folder, from `python -m worldmodel.data generate metaworld`")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each (default: 20)")
    parser.add_argument("--batch", type=int, default=8, help="clips a step (default: 8)")
    parser.add_argument("--layers", type=int, default=12, help="of the network (default: 12, a ViT-S)")
    parser.add_argument("--hidden", type=int, default=384, help="its width (default: 384, a ViT-S)")
    parser.add_argument("--pixels", type=int, default=224, help="rows and columns it is given (default: 224)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table(*measure(arguments, Path(folder)), arguments))


def models(arguments: argparse.Namespace) -> dict[str, Any]:
    """`kairos_tiny` with each way to read images."""
    import torch
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from worldmodel.checkpoint import build_model, make_spec
    from worldmodel.config import register_resolvers
    from worldmodel.data.statistics import load_statistics

    register_resolvers()
    sizes = {
        "hidden_size": arguments.hidden,
        "intermediate_size": 4 * arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "image_size": arguments.pixels,
    }
    seeing = ["encoders/image=vision", *(f"encoders.image.config.{name}={value}" for name, value in sizes.items())]
    built = {}
    for name, options in {"stem": [], "network": seeing, "features": seeing}.items():
        with initialize_config_dir(str(Path(__file__).parent.parent / "configs"), version_base="1.3"):
            config: Any = OmegaConf.to_container(compose("train", ["experiment=kairos_tiny", *options]), resolve=True)
        torch.manual_seed(0)
        built[name] = build_model(config["model"], make_spec(config["data"]["spec"]), load_statistics(arguments.data))
        for part in built[name].modules():
            if getattr(part, "frozen", False):
                part.requires_grad_(False)
    return built


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Seconds of every step by kind, and what the features take: bytes a picture, seconds of the network a picture."""
    import torch

    from worldmodel.data.clip import collate
    from worldmodel.data.dataset import ClipDataset
    from worldmodel.data.shards import ShardReader
    from worldmodel.encoders.feature_store import FeatureStore, describe, part_path, write_part
    from worldmodel.losses import understanding_loss

    torch.set_num_threads(1)
    built = models(arguments)
    dataset = ClipDataset(ShardReader(arguments.data), built["stem"].spec, split="train", future=False)
    chosen = np.random.default_rng(0).permutation(len(dataset))[: arguments.batch * arguments.steps]
    batches = [collate([dataset[int(i)] for i in part]) for part in np.split(chosen, arguments.steps)]
    backbone, found = built["features"].encoder.image.backbone, {}
    started = time.perf_counter()
    for o in (batch.observation for batch in batches):
        rgb = o.rgb[:, -1].float() / 127.5 - 1.0
        with torch.no_grad():
            found |= backbone.examples(o.text, o.has_text, rgb, o.has_rgb, known=found, silent=False)
    spent = time.perf_counter() - started
    describe(folder, part="image", backbone={}, dataset="", name=str(arguments.data), shards=["shard-000000.tar"])
    write_part(folder, "shard-000000.tar", found)
    size = part_path(folder, "shard-000000.tar").stat().st_size
    backbone.store = FeatureStore([folder])
    steps = {name: step_of(model, understanding_loss) for name, model in built.items()}
    for step in steps.values():
        step(batches[0], 0)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number, batch in enumerate(batches):
        for name, step in steps.items():
            started = time.perf_counter()
            step(batch, number)
            seconds[name].append(time.perf_counter() - started)
    costs = {"bytes": size / len(found), "seconds": spent / len(found)}
    return {name: np.array(values) for name, values in seconds.items()}, costs


def step_of(model: Any, loss: Callable[..., Any]) -> Callable[[Any, int], None]:
    """One optimisation step of stage 1."""
    import torch

    from worldmodel.draws import Draws

    model.train()
    optimiser = torch.optim.AdamW([p for p in model.encoder.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: Any, number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss(model, batch, {"points": 0.5, "touch": 0.5}, Draws(number, range(len(batch.key))))["loss"].backward()
        optimiser.step()

    return step


def table(seconds: dict[str, np.ndarray], costs: dict[str, float], arguments: argparse.Namespace) -> str:
    """A Markdown table with ratios to the step that runs the network."""
    import torch

    reference = float(np.median(seconds["network"]))
    lines = [
        f"{arguments.steps} steps of {arguments.batch} clips with two views; {arguments.layers} layers of width "
        f"{arguments.hidden} at {arguments.pixels} pixels; one thread of {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}",
        "",
        "| images are read by | median ms a step | network / this |",
        "| --- | ---: | ---: |",
    ]
    for name, values in seconds.items():
        median = float(np.median(values))
        lines.append(f"| {name} | {1e3 * median:.0f} | {reference / median:.2f} |")
    kept = f"{costs['bytes'] / 1e3:.1f} kB and {1e3 * costs['seconds']:.0f} ms once a picture"
    return "\n".join([*lines, "", f"Features take {kept}."])


if __name__ == "__main__":
    main()
