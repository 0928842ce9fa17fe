"""Evaluate a checkpoint: `python eval.py checkpoint=runs/kairos_tiny`; `python eval.py --help` lists the settings."""

import sys
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="configs/eval", config_name="eval", version_base="1.3")
def main(config: DictConfig) -> None:
    """Evaluate, and answer what a user got wrong with one line."""
    from worldmodel.errors import ConfigError, WorldModelError

    try:
        if OmegaConf.is_missing(config, "checkpoint"):
            raise ConfigError("which checkpoint? For example: python eval.py checkpoint=runs/kairos_tiny")
        from worldmodel.protocol import evaluate

        evaluate(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))
    except WorldModelError as error:
        sys.exit(f"eval.py: {error}")


if __name__ == "__main__":
    main()
