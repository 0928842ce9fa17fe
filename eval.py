"""Evaluate a checkpoint: `python eval.py checkpoint=runs/kairos_tiny`; `python eval.py --help` lists the settings."""

import sys
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="configs/eval", config_name="eval", version_base="1.3")
def main(config: DictConfig) -> None:
    """Evaluate, and answer what a user got wrong with one line."""
    from worldmodel.errors import ConfigError, WorldModelError

    settings = cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))
    aims = {name: settings.pop(name) for name in ("rerun", "compare")}
    asked = {override.split("=")[0] for override in HydraConfig.get().overrides.task} - set(aims)
    try:
        if aims["compare"] is not None:
            from worldmodel.side_by_side import write_comparison

            print(*write_comparison(aims["compare"], config.out if "out" in asked else None), sep="\n")
        elif aims["rerun"] is not None:
            from worldmodel.rerun import rerun

            if changed := rerun(aims["rerun"], {name: settings.get(name) for name in asked}):
                shown = "\n  ".join(changed[:10])
                sys.exit(f"eval.py: {len(changed)} numbers are not those of {aims['rerun']}:\n  {shown}")
            print(f"The same numbers as in {aims['rerun']}.")
        elif OmegaConf.is_missing(config, "checkpoint"):
            raise ConfigError("which checkpoint? For example: python eval.py checkpoint=runs/kairos_tiny")
        else:
            from worldmodel.protocol import evaluate

            evaluate(settings)
    except WorldModelError as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
