"""Writes a path as traced and frozen TorchScript, for controllers that link libtorch."""

import warnings
from collections.abc import Sequence
from pathlib import Path as FilePath

import numpy as np
import torch
from torch import Tensor, nn

from export.runtime.golden import Golden
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


class GoldenTensors(nn.Module):
    """Golden observations as a TorchScript module, so that a controller in C++ reads them with libtorch alone."""

    inputs: list[list[Tensor]]
    expected: list[list[Tensor]]
    starts: list[bool]
    cache: list[Tensor]

    def __init__(
        self, inputs: list[list[Tensor]], expected: list[list[Tensor]], starts: list[bool], cache: list[Tensor]
    ) -> None:
        super().__init__()
        self.inputs, self.expected, self.starts, self.cache = inputs, expected, starts, cache

    def forward(self) -> tuple[list[list[Tensor]], list[list[Tensor]], list[bool], list[Tensor]]:
        """By tick: the inputs without the cache, the expected answers without the next one, and whether an episode
        begins; and the empty cache."""
        return self.inputs, self.expected, self.starts, self.cache


def write_golden_tensors(file: FilePath, golden: Golden) -> None:
    """Writes golden observations for `export/cpp`."""
    inputs: list[list[Tensor]] = []
    expected: list[list[Tensor]] = []
    starts: list[bool] = []
    for example in range(golden.examples):
        for tick, feed in enumerate(golden.feeds(example)):
            answers = golden.expected(example, tick)
            inputs.append([torch.from_numpy(feed[row["name"]]) for row in golden.inputs if row["name"] in feed])
            expected.append([torch.from_numpy(np.asarray(answers[name])[None]) for name in golden.answers])
            starts.append(tick == 0)
    cache = [torch.from_numpy(value) for value in golden.empty_cache().values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(GoldenTensors(inputs, expected, starts, cache)), str(file))
