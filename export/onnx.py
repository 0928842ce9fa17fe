"""Writes a path as ONNX and runs it with onnxruntime."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from export.runtime.session import open_session
from export.wrappers import Path
from worldmodel.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir


SCOPES = "pkg.torch.onnx.name_scopes"
"""Note of the exporter at each node: the modules that it belongs to."""


def write_onnx(module: Path, path: FilePath, *, opset: int, dynamic: bool) -> None:
    """Exports to one self-contained file with the names of the path's inputs and outputs.

    Args:
        module: the path, in eval mode.
        path: of the .onnx file.
        opset: ONNX operator set.
        dynamic: leaves the batch dimension open instead of fixing it to 1.

    Raises:
        ExportError: the exporter refuses the model, the checker refuses the graph, or an input is unused.
    """
    import onnx

    # The exporter takes a batch of one for a constant.
    example = module.example(2 if dynamic else 1)
    names = [row.name for row in module.inputs]
    # The exporter narrates its steps through warnings and the log; failures come as exceptions.
    for name in ("onnxscript", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                input_names=names,
                output_names=[row.name for row in module.outputs],
                opset_version=opset,
                dynamic_shapes=batch_shapes(example) if dynamic else None,
                verbose=False,
                optimize=False,
            )
            assert program is not None
            simplify(program.model)
            name_outputs(program.model, [row.name for row in module.outputs])
            program.save(str(path), external_data=False)
        graph = onnx.load(str(path))
        onnx.checker.check_model(graph, full_check=True)
    except Exception as error:  # the exporter, the converter and the checker each raise families of their own
        raise ExportError(f"{path.name}: ONNX export failed: {reason(error)}") from error
    if (found := [entry.name for entry in graph.graph.output]) != (outputs := [row.name for row in module.outputs]):
        raise ExportError(f"{path.name}: the graph has outputs {found}, expected {outputs}")
    found = [entry.name for entry in graph.graph.input]
    if found != names:
        unused = sorted(set(names) - set(found))
        raise ExportError(f"{path.name}: the graph has inputs {found}, expected {names}; unused: {unused}")


def batch_shapes(example: Sequence[Tensor]) -> tuple[tuple[dict[int, object], ...]]:
    """Dynamic shapes of `Path.forward(*inputs)`: an open batch, the same for all."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    return (tuple({0: batch} for _ in example),)


def simplify(model: "ir.Model") -> None:
    """Folds constants and removes what is there twice, in place.

    The exporter's own optimiser does this too, and then spends twenty times as long on rewriting patterns, which this
    graph has few of: the result is no faster in onnxruntime. One of its rewrites is needed: a convolution without bias
    is exported with a bias of zeros that onnxruntime cannot read. And a root mean square norm is exported as a product
    with the reciprocal of a root, where onnxruntime looks for a quotient to make one operator of the six.
    """
    import onnx_ir.passes.common as common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter import pattern
    from onnxscript.rewriter.rules.common import remove_optional_bias_from_conv_rule

    quotient = pattern.RewriteRule(
        lambda op, x, y: op.Mul(x, op.Reciprocal(op.Sqrt(y))), lambda op, x, y: op.Div(x, op.Sqrt(y))
    )

    optimizer.fold_constants(model)
    rewriter.rewrite(model, [remove_optional_bias_from_conv_rule, quotient])
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        tidy(model)
    # Stack traces and the like are a quarter of the file; scopes say later which nodes belong to which part.
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key != SCOPES]:
            del node.metadata_props[key]


def name_outputs(model: "ir.Model", names: Sequence[str]) -> None:
    """Gives each output its own value and name, in place.

    Two outputs that are always equal, the masks of two caches for one, become the same value when what is there twice
    is removed; the graph would then have one name twice and lack the other. An input that is answered keeps its name.
    """
    import onnx_ir as ir

    outputs = model.graph.outputs
    for place, (value, name) in enumerate(zip(list(outputs), names, strict=True)):
        if value.producer() is None or any(value is earlier for earlier in outputs[:place]):
            copied = ir.Value(name=name, type=value.type, shape=value.shape)
            model.graph.append(ir.Node("", "Identity", [value], outputs=[copied]))
            outputs[place] = copied
        else:
            value.name = name


def reason(error: BaseException) -> str:
    """The innermost cause; the exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


class OnnxRunner:
    """Runs an exported graph on torch tensors, on one CPU thread."""

    def __init__(self, path: FilePath, threads: int = 1) -> None:
        self._session = open_session(path, threads)
        self._inputs = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, inputs: Sequence[Tensor]) -> list[np.ndarray]:
        """The outputs, in order."""
        feed = {name: tensor.numpy() for name, tensor in zip(self._inputs, inputs, strict=True)}
        return [np.asarray(value) for value in self._session.run(None, feed)]
