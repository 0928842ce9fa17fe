"""Writes a path as a `torch.export` program, and as a package of it that AOTInductor compiled."""

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path as FilePath

import numpy as np
import torch
from torch import Tensor

from export.onnx import batch_shapes, reason
from export.wrappers import Path
from worldmodel.errors import ConfigError, ExportError


def compiler() -> str | None:
    """The C++ compiler that AOTInductor would call, or None where there is none."""
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def write_program(module: Path, path: FilePath, *, dynamic: bool, compiled: bool) -> None:
    """Writes a program of ATen operators, or with `compiled` the machine code that this host's compiler makes of it.

    Raises:
        ConfigError: `compiled` on a machine without a C++ compiler.
        ExportError: the model cannot be exported or compiled.
    """
    if compiled and compiler() is None:
        raise ConfigError("formats: aotinductor needs a C++ compiler and this machine has none (CXX, g++ or clang++)")
    example = module.example(2 if dynamic else 1)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            shapes = batch_shapes(example) if dynamic else None
            program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
            if compiled:
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
            else:
                torch.export.save(program, str(path))
    except Exception as error:  # export, decompositions and the compiler each raise families of their own
        raise ExportError(f"{path.name}: torch.export failed: {reason(error)}") from error


class ProgramRunner:
    """Runs a saved program or package on torch tensors."""

    def __init__(self, path: FilePath, *, compiled: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if compiled:
                self._call = torch._inductor.aoti_load_package(str(path))
            else:
                self._call = torch.export.load(str(path)).module()

    def __call__(self, inputs: Sequence[Tensor]) -> list[np.ndarray]:
        """The outputs, in order."""
        with torch.no_grad():
            return [value.numpy() for value in self._call(*inputs)]
