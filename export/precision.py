"""Other number formats of an ONNX graph, and whether they are close enough to it to be used.

fp16            arithmetic in half precision; the safety envelope and the calibration stay in single precision
bf16            weights stored in bfloat16, arithmetic in single precision: half the file
int8_dynamic    weights of matrix products in int8 per channel, activations quantised as they come
int8_static     weights and activations in int8, with ranges measured on held-out observations
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.evidence import action_error
from export.onnx import SCOPES, reason
from export.parity import Example, Runner, eager_answers, run_ticks
from export.wrappers import ActionPath, Path
from worldmodel.contracts import Batch
from worldmodel.errors import ExportError

PRECISIONS = ("fp16", "bf16", "int8_dynamic", "int8_static")
GUARDED = ("envelope", "trust")
"""Parts of a path that are never computed in another format."""
SMALL = 1024
"""Tensors of fewer numbers stay as they are in bf16."""


def write_precision(
    source: FilePath, target: FilePath, precision: str, path: Path, examples: Sequence[Example]
) -> None:
    """Rewrites an fp32 graph in one of `PRECISIONS`.

    Args:
        source: the fp32 graph.
        target: the file to write.
        precision: one of `PRECISIONS`.
        path: which path it is.
        examples: what ranges of activations are measured on.

    Raises:
        ExportError: the converter or quantiser fails on this graph.
    """
    import onnx

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = onnx.load(str(source))
            guarded = guarded_nodes(model)
            if precision == "fp16":
                halve(model, guarded)
                onnx.save(model, str(target))
            elif precision == "bf16":
                store_bfloat16(model)
                onnx.save(model, str(target))
            else:
                quantise(model, target, precision, guarded, path, examples)
    except Exception as error:  # converters and quantisers raise whatever their graph walks run into
        raise ExportError(f"{target.name}: {precision} failed: {reason(error)}") from error


def guarded_nodes(model: Any) -> list[str]:
    """Names of the nodes that belong to the parts named in `GUARDED`, by the scopes that the exporter noted."""
    found = []
    for node in model.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = notes.get(SCOPES, "")
        if any(f"'{part}'" in scopes for part in GUARDED):
            found.append(node.name)
    return found


def halve(model: Any, guarded: Sequence[str]) -> None:
    """Half precision in place; inputs and outputs stay as they are."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=list(guarded), disable_shape_infer=False)
    model.CopyFrom(half)


def store_bfloat16(model: Any) -> None:
    """Large float tensors in bfloat16, cast back where the graph begins."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < SMALL or values.ndim < 2:
            continue
        name, stored = tensor.name, f"{tensor.name}_bf16"
        rounded = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy()
        packed = helper.make_tensor(stored, TensorProto.BFLOAT16, values.shape, rounded.tobytes(), raw=True)
        tensor.CopyFrom(packed)
        casts.append(helper.make_node("Cast", [stored], [name], name=f"cast_{name}", to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def quantise(
    model: Any, target: FilePath, precision: str, guarded: Sequence[str], path: Path, examples: Sequence[Example]
) -> None:
    """int8 by onnxruntime's quantiser, matrix products alone: convolutions are slower in it on most CPUs."""
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    # The quantiser recommends through the log a preparation that this graph has had (see `onnx.simplify`).
    logging.getLogger().addFilter(lambda record: "pre-processing" not in record.getMessage())
    skipped = [*guarded, *odd_products(model)]
    settings: dict[str, Any] = {"op_types_to_quantize": ["MatMul"], "nodes_to_exclude": skipped}
    settings |= {"per_channel": True, "weight_type": QuantType.QInt8}
    with tempfile.TemporaryDirectory() as folder:
        source = str(FilePath(folder) / "source.onnx")
        onnx.save(model, source)
        if precision == "int8_dynamic":
            quantize_dynamic(source, str(target), extra_options={"MatMulConstBOnly": True}, **settings)
            return
        names = [row.name for row in path.inputs]
        rows = iter(feeds(path, names, examples))

        class Reader(CalibrationDataReader):
            """Hands observations to the quantiser."""

            def get_next(self) -> Any:
                """The next one."""
                return next(rows, None)

        options = {"MatMulConstBOnly": True}
        quantize_static(source, str(target), Reader(), quant_format=QuantFormat.QDQ, extra_options=options, **settings)


def odd_products(model: Any) -> list[str]:
    """Names of products with a constant that is no matrix: onnxruntime has no kernel for its channels in int8."""
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return [n.name for n in model.graph.node if n.op_type == "MatMul" and any(ranks.get(i, 2) != 2 for i in n.input)]


def feeds(path: Path, names: Sequence[str], examples: Sequence[Example]) -> Iterator[dict[str, np.ndarray]]:
    """Inputs of every tick of the examples by name, with the cache that the model itself would have."""
    for example in examples:
        seen: list[Sequence[Tensor]] = []

        def record(inputs: Sequence[Tensor], seen: list[Sequence[Tensor]] = seen) -> list[np.ndarray]:
            seen.append(inputs)
            with torch.no_grad():
                return [x.numpy() for x in path(*inputs)]

        run_ticks(path, record, example)
        for inputs in seen:
            yield {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}


def judge(
    path: Path, runner: Runner, examples: Sequence[Example], batches: Sequence[Batch], *, bound: float
) -> dict[str, Any]:
    """How far a graph is from the eager model, and whether that is within `bound`.

    Differences are in standard deviations of the actions, and for other outputs over their size where it is above 1. A
    graph passes if the mean difference of every output is at most `bound` and, for `policy`, its error against the
    demonstrators of `batches` is larger than the eager model's by at most the share `bound`.
    """
    sums: dict[str, list[float]] = {}
    units = action_units(path)
    for example in examples:
        for right, answer in zip(eager_answers(path, example), run_ticks(path, runner, example), strict=True):
            for row, a, b in zip(path.outputs, right, answer, strict=False):
                if a.dtype != bool:
                    off = np.abs(np.asarray(b, np.float64) - a)
                    size = units if row.name == "actions" and units is not None else max(1.0, np.abs(a).max(initial=0))
                    sums.setdefault(row.name, []).append(float((off / size).mean()))
    verdict: dict[str, Any] = {"bound": bound, "mean_difference": {n: float(np.mean(v)) for n, v in sums.items()}}
    verdict["largest_difference"] = {name: float(np.max(values)) for name, values in sums.items()}
    failures = [f"{name} differs by {v:.3g}" for name, v in verdict["mean_difference"].items() if not v <= bound]
    if path.name == "policy" and batches:
        assert isinstance(path, ActionPath)
        eager, own = against_demonstrators(path, runner, batches)
        verdict |= {"eager_action_error": eager, "action_error": own}
        if not own <= eager * (1 + bound):
            failures.append(f"the error of its actions is {own:.3g} against {eager:.3g}")
    verdict["reason"] = f"{' and '.join(failures)}; at most {bound:g} is allowed" if failures else None
    return verdict


def action_units(path: Path) -> np.ndarray | None:
    """Standard deviations of the first embodiment's actions, infinite where it has none; None for other paths."""
    if not isinstance(path, ActionPath):
        return None
    units = np.full(path.spec.action, np.inf)
    std = path.model.statistics[path.spec.embodiments[0]].get("action", {}).get("std", ())
    units[: len(std)] = std
    return units if len(std) else np.ones(path.spec.action)


def against_demonstrators(path: ActionPath, runner: Runner, batches: Sequence[Batch]) -> tuple[float, float]:
    """Mean action error of the eager path and of a graph on recorded clips, one by one, all senses present."""
    generator, spec = torch.Generator().manual_seed(2), path.spec
    before = (torch.zeros(1, 2, spec.action), torch.zeros(1, 2, dtype=torch.bool))
    free = (torch.zeros(1, spec.chunk, spec.action), torch.zeros(1, spec.chunk, dtype=torch.bool))
    errors: list[tuple[float, float]] = []
    eager: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda inputs: path(*inputs)  # noqa: E731
    for batch in batches:
        for i in range(len(batch.key)):
            row = batch._replace(
                observation=type(batch.observation)(*(x[i : i + 1] for x in batch.observation)),
                future=type(batch.future)(*(x[i : i + 1] for x in batch.future)),
            )
            noise = torch.randn((1, spec.chunk, spec.action), generator=generator)
            inputs = (*row.observation, noise, *before, *free)
            with torch.no_grad():
                answers = (eager(inputs)[0], torch.as_tensor(np.asarray(runner(inputs)[0])))
            first, second = (float(action_error(path.model, answer, row)) for answer in answers)
            errors.append((first, second))
    found = np.array(errors)
    found = found[np.isfinite(found[:, 0])]
    return float(found[:, 0].mean()), float(found[:, 1].mean())


def bounds_of(settings: Mapping[str, float], precisions: Sequence[str]) -> dict[str, float]:
    """The bound of each precision.

    Raises:
        ExportError: one has none.
    """
    lacking = [name for name in precisions if name not in settings]
    if lacking:
        raise ExportError(f"bounds: none for {lacking}; there are those of {sorted(settings)}")
    return {name: float(settings[name]) for name in precisions}
