"""TFRecord files and `tf.train.Example` messages without TensorFlow.

A record is length (8 bytes), masked CRC32C of the length (4), data, masked CRC32C of the data (4), little-endian; see
https://www.tensorflow.org/tutorials/load_data/tfrecord. An Example is a map from names to lists of bytes, floats or
integers.
"""

import functools
import os
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.errors import ConfigError, DataError

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
_INSTALL = 'reading TFRecords needs the extra "formats": pip install "worldmodel[formats]"'


def record_offsets(path: Path) -> Iterator[int]:
    """Byte offset of every record of `path`; data are skipped, so only lengths are checked.

    Raises:
        DataError: a length is damaged or the file ends within a record; names file and offset.
    """
    try:
        with open(path, "rb") as file:
            size, offset = os.fstat(file.fileno()).st_size, 0
            while offset < size:
                length = _length(file.read(_HEADER.size), path, offset, size)
                yield offset
                offset += _HEADER.size + length + _FOOTER.size
                file.seek(offset)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_record(path: Path, offset: int) -> bytes:
    """The data of the record that starts at byte `offset` of `path`.

    Raises:
        DataError: the record is truncated or its checksum is wrong; names file and offset.
    """
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            length = _length(file.read(_HEADER.size), path, offset, os.fstat(file.fileno()).st_size)
            data, footer = file.read(length), file.read(_FOOTER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if masked_crc(data) != _FOOTER.unpack(footer)[0]:
        raise DataError(f"{path}: offset {offset}: the record's data do not match their CRC32C; restore the file")
    return data


def masked_crc(data: bytes) -> int:
    """CRC32C of `data`, rotated and shifted as TFRecord stores it.

    Raises:
        ConfigError: `google-crc32c` is not installed.
    """
    crc = _crc32c()(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data: bytes, where: str, names: Collection[str]) -> dict[str, np.ndarray | list[bytes]]:
    """The features `names` of one serialised `tf.train.Example`: a list of bytes, or a flat float32 or int64 array.

    Names that the record lacks, or holds without a value, are left out.

    Args:
        data: the message.
        where: file and offset, for messages.
        names: which features to convert.

    Raises:
        DataError: the bytes are no Example.
        ConfigError: `protobuf` is not installed.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _example_class().FromString(data).features.feature
    except DecodeError as error:
        raise DataError(f"{where}: the record is no tf.train.Example ({error})") from error
    found: dict[str, np.ndarray | list[bytes]] = {}
    for name in names:
        # Looking up a missing name in a protobuf map would add it.
        kind = features[name].WhichOneof("kind") if name in features else None
        if kind == "bytes_list":
            found[name] = list(features[name].bytes_list.value)
        elif kind:
            values = getattr(features[name], kind).value
            found[name] = np.fromiter(values, np.float32 if kind == "float_list" else np.int64, count=len(values))
    return found


def _length(header: bytes, path: Path, offset: int, size: int) -> int:
    """Length of the data of the record whose first bytes are `header`, checked against its CRC and the file's size."""
    if len(header) < _HEADER.size:
        raise DataError(f"{path}: offset {offset}: truncated, {len(header)} of {_HEADER.size} bytes of a record's head")
    length, crc = _HEADER.unpack(header)
    if masked_crc(header[:8]) != crc:
        packed = header[:2] == b"\x1f\x8b" and not offset
        fix = "the file is gzip-compressed: gunzip it" if packed else "restore the file"
        raise DataError(f"{path}: offset {offset}: the record's length does not match its CRC32C; {fix}")
    if offset + _HEADER.size + length + _FOOTER.size > size:
        raise DataError(
            f"{path}: offset {offset}: truncated, the record has {length} bytes but the file ends at {size}; "
            "restore the file"
        )
    return length


@functools.cache
def _crc32c() -> Callable[[bytes], int]:
    try:
        import google_crc32c
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    return google_crc32c.value


@functools.cache
def _example_class() -> Any:
    """Message class of `tf.train.Example`, declared here because its generated module comes with TensorFlow."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    except ImportError as error:
        raise ConfigError(_INSTALL) from error

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="worldmodel/example.proto", package="tensorflow", syntax="proto3")

    def add(message: Any, name: str, number: int, kind: int | str, *, repeated: bool = False) -> Any:
        label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
        if isinstance(kind, int):
            return message.field.add(name=name, number=number, type=kind, label=label)
        named = f".tensorflow.{kind}"
        return message.field.add(name=name, number=number, type=field.TYPE_MESSAGE, type_name=named, label=label)

    for name, kind in (("Bytes", field.TYPE_BYTES), ("Float", field.TYPE_FLOAT), ("Int64", field.TYPE_INT64)):
        add(file.message_type.add(name=f"{name}List"), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("Bytes", "Float", "Int64"), 1):
        add(feature, f"{name.lower()}_list", number, f"{name}List").oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, field.TYPE_STRING)
    add(entry, "value", 2, "Feature")
    add(features, "feature", 1, "Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
