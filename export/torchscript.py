"""Writes a path as traced and frozen TorchScript, for controllers that link libtorch."""

import warnings
from collections.abc import Sequence
from pathlib import Path as FilePath

import numpy as np
import torch
from torch import Tensor

from export.wrappers import Path
from worldmodel.errors import ExportError


def write_torchscript(module: Path, path: FilePath) -> None:
    """Traces and freezes a path. Checks that raise are not in a trace; the runtime makes them.

    Args:
        module: the path, in eval mode.
        path: of the .pt file.

    Raises:
        ExportError: the model cannot be traced.
    """
    try:
        # torch.jit is deprecated in favour of torch.export, which robot controllers in C++ do not load yet; and
        # the tracer warns about each Python number it fixes, which is what is wanted of sizes.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module, module.example(1), check_trace=False)
            torch.jit.save(torch.jit.freeze(traced), str(path))  # type: ignore[arg-type]
    except Exception as error:  # the tracer raises whatever the traced code raises
        raise ExportError(f"{path.name}: TorchScript export failed: {type(error).__name__}: {error}") from error


class TorchScriptRunner:
    """Runs a saved trace on torch tensors."""

    def __init__(self, path: FilePath) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._module = torch.jit.load(str(path), map_location="cpu")

    def __call__(self, inputs: Sequence[Tensor]) -> list[np.ndarray]:
        """The outputs, in order."""
        with torch.no_grad():
            return [value.numpy() for value in self._module(*inputs)]
