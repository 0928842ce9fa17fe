"""The features that a TFDS folder declares in features.json, by the names its records use, and their decoding.

A record is one flat `tf.train.Example`: nested names are joined by `/`, the values of all steps of an episode lie one
after another under `steps/<name>`, and sequences inside steps are `<name>/ragged_flat_values` with
`<name>/ragged_row_lengths_0`. The JSON form is that of tensorflow_datasets/core/proto/feature.proto.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from worldmodel.data.formats.pictures import decode_pictures
from worldmodel.errors import DataError

_NUMBERS = frozenset(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)) | {"bool"}
_FLOATS = frozenset(("float16", "bfloat16", "float32", "float64"))
FLAT, ROWS = "/ragged_flat_values", "/ragged_row_lengths_0"


@dataclass(frozen=True)
class Feature:
    """One leaf. `kind` is `image`, `text`, `number`, or says what makes it unreadable."""

    kind: str
    shape: tuple[int | None, ...] = ()  # of one step
    dtype: str = ""
    encoding: str = "none"  # of a tensor: none, bytes or zlib
    sequences: int = 0  # around it: 1 is the steps, 2 a sequence inside a step, whose length `shape` starts with

    @property
    def ragged(self) -> bool:
        """Whether it is a sequence inside a step, which TFDS stores as flat values and row lengths."""
        return self.sequences > 1

    @property
    def readable(self) -> bool:
        """Whether this module decodes it."""
        return self.kind in ("image", "text", "number")


def leaves(
    declaration: Any, where: str, prefix: str = "", around: tuple[int | None, ...] = ()
) -> Iterator[tuple[str, Feature]]:
    """Name and feature of every leaf of a parsed features.json; `around` are the lengths of the sequences it lies in.

    Raises:
        DataError: the declaration has not the form of TFDS.
    """
    if not isinstance(declaration, dict):
        raise DataError(f"{where}: {prefix or 'top level'}: must be an object, got {type(declaration).__name__}")
    if (inner := declaration.get("featuresDict")) is not None:
        children = inner.get("features") if isinstance(inner, dict) else None
        if not isinstance(children, dict):
            raise DataError(f"{where}: {prefix or 'top level'}: featuresDict has no features")
        for name, child in children.items():
            yield from leaves(child, where, f"{prefix}/{name}" if prefix else name, around)
    elif (sequence := declaration.get("sequence")) is not None:
        if not isinstance(sequence, dict):
            raise DataError(f"{where}: {prefix or 'top level'}: sequence must be an object with a feature")
        length = str(sequence.get("length"))
        static = int(length) if length.isascii() and length.isdigit() and len(length) < 10 else None
        yield from leaves(sequence.get("feature"), where, prefix, (*around, static))
    else:
        try:
            yield prefix, _leaf(declaration, around)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise DataError(f"{where}: {prefix or 'top level'}: not a feature of TFDS ({error!r})") from error


def _leaf(declaration: dict[str, Any], around: tuple[int | None, ...]) -> Feature:
    depth, inner = len(around), around[1:]
    if (image := declaration.get("image")) is not None:
        plain = image.get("dtype", "uint8") == "uint8" and not inner
        return Feature("image" if plain else f"{image.get('dtype')} picture", _shape(image), sequences=depth)
    if "text" in declaration:
        return Feature("sequence of texts" if inner else "text", dtype="string", sequences=depth)
    if "classLabel" in declaration:
        return Feature("number" if depth < 3 else "sequence of sequences", inner, "int64", sequences=depth)
    for name in ("tensor", "boundingBox"):
        if (tensor := declaration.get(name)) is not None:
            shape, dtype, encoding = _shape(tensor), tensor["dtype"], tensor.get("encoding") or "none"
            if dtype == "string":
                return Feature("array of texts" if inner or shape else "text", shape, dtype, sequences=depth)
            known = dtype in _NUMBERS | _FLOATS and encoding in ("none", *(("bytes", "zlib") if not inner else ()))
            kind = "number" if known and depth < 3 else f"{dtype} tensor, encoding {encoding}, in {depth} sequences"
            return Feature(kind, (*inner, *shape), dtype, encoding, depth)
    return Feature(str(declaration.get("pythonClassName", "unknown feature")).rpartition(".")[2], sequences=depth)


def _shape(value: dict[str, Any]) -> tuple[int | None, ...]:
    sizes = [int(size) for size in value.get("shape", {}).get("dimensions", ())]
    return tuple(size if size >= 0 else None for size in sizes)


def decode(values: dict[str, Any], name: str, feature: Feature, length: int, where: str) -> np.ndarray | list[str]:
    """The steps of one feature of an episode: (T, ...) float32, pictures (T, h, w, 3) uint8, or T sentences.

    Args:
        values: what `parse_example` found.
        name: as the record has it, with `steps/`.
        feature: its declaration.
        length: T.
        where: file and offset, for messages.

    Raises:
        DataError: the values are missing, of another type, number or size than declared; names the feature.
    """
    place = f"{where}: {name}"
    value = values.get(name + FLAT if feature.ragged else name)
    if value is None:
        raise DataError(f"{place}: declared in features.json but not in the record; it is damaged or incomplete")
    if feature.kind == "number" and feature.encoding == "none":
        return _numbers(values, name, value, feature, length, place)
    if not isinstance(value, list):
        raise DataError(f"{place}: numbers where features.json declares a {feature.kind}")
    if not feature.ragged and len(value) != length:
        raise DataError(f"{place}: {len(value)} values, the episode has {length} steps; both must agree")
    if feature.kind == "image":
        return decode_pictures(value, place)
    if feature.kind == "text":
        return [item.decode("utf-8", "replace") for item in value]
    if feature.kind == "number":
        return np.stack([_tensor(item, feature, place) for item in value])
    raise DataError(f"{place}: {feature.kind} is not supported; leave it out of the map")


def _numbers(values: dict[str, Any], name: str, value: Any, feature: Feature, length: int, place: str) -> np.ndarray:
    if isinstance(value, list):
        raise DataError(f"{place}: bytes where features.json declares {feature.dtype}")
    shape = feature.shape
    if feature.ragged:
        # The outermost sequence is the steps; what is left must be as long in every step.
        rows = values.get(name + ROWS)
        if rows is None or isinstance(rows, list) or len(rows) != length or len(set(rows.tolist())) != 1:
            raise DataError(f"{place}: not as many values in each of the {length} steps; leave it out of the map")
        shape = (int(rows[0]), *shape[1:])
    sizes = [size for size in shape if size is not None]
    if len(sizes) != len(shape) or len(value) != length * math.prod(sizes):
        raise DataError(
            f"{place}: {len(value)} values, {length} steps of shape {shape} need "
            f"{length * math.prod(sizes)}; all features of an episode must have its number of steps"
        )
    return value.reshape(length, *sizes).astype(np.float32)


def _tensor(data: bytes, feature: Feature, place: str) -> np.ndarray:
    """One step of a tensor that TFDS stored as bytes, perhaps compressed."""
    sizes = [size for size in feature.shape if size is not None]
    if len(sizes) != len(feature.shape) or feature.dtype == "bfloat16":
        raise DataError(f"{place}: an encoded {feature.dtype} tensor of shape {feature.shape} is not supported")
    dtype = np.dtype(feature.dtype).newbyteorder("<")
    expected = math.prod(sizes) * dtype.itemsize
    if feature.encoding == "zlib":
        try:
            # Never inflate more than is declared.
            data = zlib.decompressobj().decompress(data, expected + 1)
        except zlib.error as error:
            raise DataError(f"{place}: not a zlib-compressed tensor ({error})") from error
    if len(data) != expected:
        raise DataError(f"{place}: {len(data)} bytes, a step of shape {feature.shape} {feature.dtype} has {expected}")
    with np.errstate(over="ignore"):  # what becomes infinite is named when the episode is checked
        return np.frombuffer(data, dtype).reshape(sizes).astype(np.float32)
