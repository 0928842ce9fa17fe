"""Writes the action path as ONNX and runs it with onnxruntime."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from export.wrappers import INPUT_NAMES, ActionPath
from worldmodel.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir


def write_onnx(path_module: ActionPath, example: tuple[Tensor, ...], path: Path, *, opset: int, dynamic: bool) -> None:
    """Exports to one self-contained file with named inputs and the output `actions`.

    Args:
        path_module: the wrapped model, in eval mode.
        example: one valid input of each kind, see `wrappers.random_inputs`; batch 2 or more where `dynamic`, since
            the exporter takes a batch of one for a constant.
        path: of the .onnx file.
        opset: ONNX operator set.
        dynamic: leaves the batch dimension open instead of fixing it to the example's.

    Raises:
        ExportError: the exporter refuses the model, the checker refuses the graph, or an input is unused.
    """
    import onnx

    shapes = None
    if dynamic:
        batch = torch.export.Dim("batch", min=1, max=1024)
        shapes = tuple({0: batch} for _ in example)
    # The exporter narrates its steps through warnings and the log; failures come as exceptions.
    for name in ("onnxscript", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                path_module,
                example,
                dynamo=True,
                input_names=list(INPUT_NAMES),
                output_names=["actions"],
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
                optimize=False,
            )
            assert program is not None
            simplify(program.model)
            program.save(str(path), external_data=False)
        graph = onnx.load(str(path))
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # the exporter, the converter and the checker each raise families of their own
        raise ExportError(f"{path.name}: ONNX export failed: {_reason(error)}") from error
    names = [entry.name for entry in graph.graph.input]
    if names != list(INPUT_NAMES):
        unused = sorted(set(INPUT_NAMES) - set(names))
        raise ExportError(f"{path.name}: the graph has inputs {names}, expected {list(INPUT_NAMES)}; unused: {unused}")


def simplify(model: "ir.Model") -> None:
    """Folds constants and removes what is there twice, in place.

    The exporter's own optimiser does this too, and then spends twenty times as long on rewriting patterns, which this
    graph has few of: the result is no faster in onnxruntime. One of its rewrites is needed: a convolution without bias
    is exported with a bias of zeros that onnxruntime cannot read.
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import remove_optional_bias_from_conv_rule

    optimizer.fold_constants(model)
    rewriter.rewrite(model, [remove_optional_bias_from_conv_rule])
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        tidy(model)


def _reason(error: BaseException) -> str:
    """The innermost cause; the exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


class OnnxRunner:
    """Runs an exported graph on torch tensors, on one CPU thread."""

    def __init__(self, path: Path, threads: int = 1) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Sequence[Tensor]) -> np.ndarray:
        """Actions (B, A, D)."""
        feed = {name: tensor.numpy() for name, tensor in zip(INPUT_NAMES, inputs, strict=True)}
        (actions,) = self._session.run(["actions"], feed)
        return np.asarray(actions)
