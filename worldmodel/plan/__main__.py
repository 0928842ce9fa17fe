"""Command line of plans: `python -m worldmodel.plan experiment=... gpu=...`; see `HELP`."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HELP = """\
Says what a run will take before it is started: parameters, FLOPs and memory of each phase, step time, days and data.
The model's own training step runs on tensors without memory, so nothing is allocated and no GPU is needed.

usage: python -m worldmodel.plan experiment=NAME [nodes=N gpus=N gpu=NAME] [KEY=VALUE ...]

It takes the settings of train.py and its own:

  nodes=N gpus=N           machines, and GPUs in each (default: 1 and 1)
  gpu=NAME                 a100, h100 (default), h200, b200, l40s, rtx4090, rtx5090
  shard=N                  GPUs that share one copy of what trains: 1 is data parallel, all of them (the default) FSDP,
                           a number between HSDP
  batch=N                  clips on each GPU instead of each phase's batch_size; accumulate=N batches make a step
  phase=NAME               that phase alone, or phase=[NAME,NAME]
  tokens=N                 stretches all phases alike until their clips hold N tokens
  mfu=X                    share of the peak at which all FLOPs run (default: 0.2, as layers of kairos_base did on an
                           H100; kairos_small reached 0.10 to 0.14 there)
  efficiency=X network=X   share of nominal links that is reached (0.7); GB/s between nodes for each GPU
  spare=X                  share of memory left free (0.1)
  bits=X epochs=X shard_gb=X   bits of a stored pixel (1.5), times each recording is seen (1), size of a shard (1)
  out=FILE                 the plan as JSON or as Markdown, by the ending of the name: .json or .md
"""
CONFIGS = Path(__file__).parent.parent.parent / "configs"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 if a phase does not fit, or 2 for what a user got wrong."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    import json
    import warnings

    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from worldmodel.config import register_resolvers
    from worldmodel.errors import ConfigError, WorldModelError

    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    register_resolvers()
    try:
        from worldmodel.plan.gpus import find_gpu
        from worldmodel.plan.plan import DEFAULTS, make_plan
        from worldmodel.plan.report import markdown

        pairs = [word.partition("=") for word in words]
        mine = {name: value for name, _, value in pairs if name in (*DEFAULTS, "out")}
        settings = {name: yaml.safe_load(value) for name, value in mine.items() if name in DEFAULTS}
        if "tokens" in settings:
            settings["tokens"] = float(settings["tokens"])  # YAML takes 1e12 for a word
        find_gpu(settings.get("gpu", DEFAULTS["gpu"]))
        out = Path(mine["out"]) if "out" in mine else None
        if out is not None and out.suffix not in (".json", ".md"):
            raise ConfigError(f"out: {out} ends neither with .json nor with .md")
        rest = [word for word in words if word.partition("=")[0] not in (*DEFAULTS, "out")]
        root = [] if any(word.startswith("data.root=") for word in rest) else ["data.root=none"]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config: Any = OmegaConf.to_container(compose("train", [*rest, *root]), resolve=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels that cannot be fused where there are none
            plan = make_plan(config, settings)
    except (WorldModelError, HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"python -m worldmodel.plan: {error}", file=sys.stderr)
        return 2
    text = markdown(plan)
    print(text)
    if out is not None:
        kept = json.dumps({"arguments": words, **plan}, indent=1) if out.suffix == ".json" else text + "\n"
        out.write_text(kept, encoding="utf-8")
    return 0 if all(row.get("fits", True) for row in plan["phases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
