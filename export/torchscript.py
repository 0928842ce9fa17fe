"""Writes the action path as traced and frozen TorchScript, for controllers that link libtorch."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.wrappers import ActionPath
from worldmodel.errors import ExportError


def write_torchscript(path_module: ActionPath, example: tuple[Tensor, ...], path: Path) -> None:
    """Traces and freezes the action path. Checks that raise are not in a trace; the runtime makes them.

    Args:
        path_module: the wrapped model, in eval mode.
        example: one valid input of each kind, see `wrappers.random_inputs`.
        path: of the .pt file.

    Raises:
        ExportError: the model cannot be traced.
    """
    try:
        # torch.jit is deprecated in favour of torch.export, which robot controllers in C++ do not load yet; and
        # the tracer warns about each Python number it fixes, which is what is wanted of sizes.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(path_module, example, check_trace=False)
            torch.jit.save(torch.jit.freeze(traced), str(path))  # type: ignore[arg-type]
    except Exception as error:  # the tracer raises whatever the traced code raises
        raise ExportError(f"{path.name}: TorchScript export failed: {type(error).__name__}: {error}") from error


class TorchScriptRunner:
    """Runs a saved trace on torch tensors."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._module = torch.jit.load(str(path), map_location="cpu")

    def __call__(self, inputs: Sequence[Tensor]) -> np.ndarray:
        """Actions (B, A, D)."""
        with torch.no_grad():
            return self._module(*inputs).numpy()
