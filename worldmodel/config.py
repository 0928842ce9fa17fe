"""What Hydra needs to know before it composes a configuration of this project."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf


def register_resolvers() -> None:
    """Adds `${count:LIST}`, the length of a list, and `${cells:SIZE,CELL}`, how many cells fit into a size, so that
    sizes follow from what they belong to and are written once."""
    OmegaConf.register_new_resolver("count", len, replace=True)
    OmegaConf.register_new_resolver("cells", lambda size, cell: size // cell, replace=True)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as frozen dataclasses take them: lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
