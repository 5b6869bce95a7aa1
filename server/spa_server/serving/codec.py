"""Tensors as bytes or lists on the wire, and back: little endian, row by row; texts behind a length of four bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from spa_server.serving.datatypes import BY_NAME, Datatype
from spa_server.serving.errors import InvalidRequest, RunFailed

__all__ = ["Array", "datatype_of", "from_raw", "from_typed", "to_raw", "to_typed"]

Array = npt.NDArray[Any]

_LENGTH = struct.Struct("<I")


def datatype_of(name: str, tensor: str) -> Datatype:
    """The element type that a request names for `tensor`. Raises: InvalidRequest if there is none of that name."""
    found = BY_NAME.get(name)
    if found is None:
        raise InvalidRequest(f"input {tensor!r} has datatype {name!r}, which is none of {', '.join(BY_NAME)}.")
    return found


def from_raw(tensor: str, datatype: Datatype, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """The array of `shape` whose elements are `data`; numbers are not copied and cannot be written to.

    Raises: InvalidRequest if a size is negative, or `data` is no such array.
    """
    count = _count(tensor, shape)
    if datatype.name == "BYTES":
        return _shaped(tensor, _texts(tensor, _split(tensor, count, data)), shape)
    expected = count * datatype.dtype.itemsize
    if len(data) != expected:
        raise InvalidRequest(
            f"input {tensor!r} of shape {list(shape)} and datatype {datatype.name} takes {expected} bytes, "
            f"but {len(data)} were sent."
        )
    if datatype.name == "BOOL":
        _check_bits(tensor, data)
    return _shaped(tensor, np.frombuffer(data, datatype.dtype), shape)


def from_typed(tensor: str, datatype: Datatype, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """The array of `shape` whose elements are listed in the field of `datatype`.

    Raises: InvalidRequest if their number does not fit the shape, or one of them does not fit the type.
    """
    count = _count(tensor, shape)
    if len(values) != count:
        raise InvalidRequest(
            f"input {tensor!r} of shape {list(shape)} has {count} elements, but {datatype.field} holds {len(values)}."
        )
    if datatype.name == "BYTES":
        return _shaped(tensor, _texts(tensor, values), shape)
    try:
        array = np.array(values, dtype=datatype.dtype)
    except OverflowError:
        raise InvalidRequest(f"input {tensor!r} has an element that does not fit into {datatype.name}.") from None
    return _shaped(tensor, array, shape)


def to_raw(array: Array, datatype: Datatype) -> bytes | memoryview:
    """The elements of `array`, as `from_raw` takes them; of numbers a view."""
    if datatype.name != "BYTES":
        view: memoryview = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        return view
    parts = []
    for text in _encoded(array):
        parts += [_LENGTH.pack(len(text)), text]
    return b"".join(parts)


def to_typed(array: Array, datatype: Datatype) -> list[Any]:
    """The elements of `array`, as `from_typed` takes them; `datatype` must have a field for them."""
    if datatype.name == "BYTES":
        return _encoded(array)
    listed: list[Any] = array.reshape(-1).tolist()
    return listed


def _count(tensor: str, shape: Sequence[int]) -> int:
    if any(size < 0 for size in shape):
        raise InvalidRequest(f"input {tensor!r} has shape {list(shape)}: sizes must be 0 or more.")
    return math.prod(shape)


def _shaped(tensor: str, flat: Array, shape: Sequence[int]) -> Array:
    try:
        return flat.reshape(tuple(shape))
    except ValueError:  # more axes than numpy has, or sizes around a 0 that overflow
        raise InvalidRequest(f"input {tensor!r} has a shape of {len(shape)} axes that no array can have.") from None


def _check_bits(tensor: str, data: bytes | memoryview) -> None:
    if data and np.frombuffer(data, np.uint8).max() > 1:
        raise InvalidRequest(f"input {tensor!r} has datatype BOOL, but a byte of it is neither 0 nor 1.")


def _split(tensor: str, count: int, data: bytes | memoryview) -> list[bytes | memoryview]:
    texts: list[bytes | memoryview] = []
    position = 0
    while len(texts) < count and position + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, position)
        position += _LENGTH.size
        if position + length > len(data):
            break
        texts.append(data[position : position + length])
        position += length
    if len(texts) != count or position != len(data):
        raise InvalidRequest(
            f"input {tensor!r} of datatype BYTES must hold {count} elements, each behind its length in 4 bytes; "
            f"its {len(data)} bytes are not divided so."
        )
    return texts


def _texts(tensor: str, values: Sequence[bytes | memoryview]) -> Array:
    array = np.empty(len(values), object)
    try:
        array[:] = [str(value, "utf-8") for value in values]
    except UnicodeDecodeError:
        raise InvalidRequest(
            f"input {tensor!r} has an element that is not UTF-8: the texts of an ONNX model are."
        ) from None
    return array


def _encoded(array: Array) -> list[bytes]:
    texts = array.reshape(-1).tolist()
    try:
        return [text.encode() for text in texts]
    except UnicodeEncodeError:
        raise RunFailed("the model answered with a text that cannot be written as UTF-8.") from None
