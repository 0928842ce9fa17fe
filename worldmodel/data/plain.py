"""JSON and numpy files that others wrote, read without trust: whatever is wrong with them is a `ValueError`."""

import io
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from worldmodel.errors import DataError

LARGEST_ARCHIVE = 1 << 30
"""Bytes that the arrays of one archive may take: a few compressed kilobytes can stand for any number of them."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, or with half a character, which cannot be written again.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text))
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in `path`; `what` says in the message what the file is and how to get it.

    Raises:
        DataError: no such file, or no JSON object in it.
    """
    try:
        value = loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {what}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: not readable JSON ({error}); {what}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold a JSON object, got {type(value).__name__}; {what}")
    return value


def load_array(data: bytes) -> np.ndarray:
    """The array of a `.npy` file.

    Raises:
        ValueError: damaged, of Python objects, or not as long as its head says.
    """
    try:
        return _array(data)
    except Exception as error:  # what a damaged head makes numpy raise is not a closed list
        raise ValueError(str(error)) from error


def load_archive(file: BinaryIO) -> dict[str, np.ndarray]:
    """The arrays of a `.npz` file by name.

    Raises:
        ValueError: damaged, with other members than arrays, or larger than `LARGEST_ARCHIVE`.
    """
    found: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (size := sum(member.file_size for member in members)) > LARGEST_ARCHIVE:
                raise ValueError(f"{size} bytes of arrays, at most {LARGEST_ARCHIVE} are read")
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename or name in found:
                    raise ValueError(f"member {member.filename!r} is no array, or there twice")
                found[name] = _array(archive.read(member))
    except Exception as error:  # zipfile, its decompressors and numpy raise a dozen types
        raise ValueError(str(error)) from error
    return found


def picture_array(start: bytes, size: int) -> tuple[int, tuple[int, ...]]:
    """Where the values of a `.npy` file of pictures begin, and its shape (T, 3, h, w), from the file's first bytes.

    Raises:
        ValueError: damaged, not `size` bytes long, or no such array of uint8 in C order.
    """
    try:
        stream = io.BytesIO(start)
        shape, fortran, dtype = _head(stream, size)
        if len(shape) != 4 or shape[1] != 3 or dtype != np.uint8 or fortran or 0 in shape:
            raise ValueError(f"shape {shape} of {dtype}; pictures are (T, 3, h, w) of uint8 in C order")
        return stream.tell(), shape
    except Exception as error:  # as in `load_array`
        raise ValueError(str(error)) from error


def _head(stream: io.BytesIO, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is Fortran's, and type, where `size` bytes hold just the values they promise."""
    version = np.lib.format.read_magic(stream)
    heads = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in heads:
        raise ValueError(f"version {version} of the numpy format; 1.0 and 2.0 are read")
    shape, fortran, dtype = heads[version](stream)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded when allow_pickle=False")
    count = math.prod(shape)
    # Told before reading: numpy would first make room for whatever the head asks.
    if min(shape, default=0) < 0 or count * dtype.itemsize != size - stream.tell() or count > size:
        raise ValueError(f"{size - stream.tell()} bytes of values for shape {shape} of {dtype}")
    return shape, fortran, dtype


def _array(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    shape, fortran, dtype = _head(stream, len(data))
    array = np.ndarray(shape, dtype, data, stream.tell(), order="F" if fortran else "C").copy("K")
    if dtype.kind == "U":
        array.tolist()  # raises for numbers that are no characters
    return array
