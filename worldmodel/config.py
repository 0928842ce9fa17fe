"""What Hydra needs to know before it composes a configuration of this project."""

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """Adds `${count:LIST}`, the length of a list, so that sizes follow from names and are written once."""
    OmegaConf.register_new_resolver("count", len, replace=True)
