"""Tensors on the wire: what is sent is what arrives, and nothing else is accepted."""

from __future__ import annotations

import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa_server.serving.codec import from_raw, from_typed, to_raw, to_typed
from spa_server.serving.datatypes import BY_NAME, BY_RUNTIME
from spa_server.serving.errors import InvalidRequest
from tests.serving.nets import KINDS

PACKED = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""Python's own idea of the types."""
TYPED = sorted(set(BY_NAME) - {"FP16", "BF16"})


def values_of(datatype: str, rng: np.random.Generator, count: int) -> list[Any]:
    dtype = BY_NAME[datatype].dtype
    if datatype == "BYTES":
        return ["", "a", "\0", "naïve ☃", "x" * 300][:count] * 3
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return [limits.min, limits.max, *rng.integers(0, 100, count).tolist()]
    return rng.integers(0, 2, count).astype(bool).tolist() if datatype == "BOOL" else rng.normal(size=count).tolist()


def test_all_types_of_the_protocol_are_there() -> None:
    assert set(BY_NAME) == set(KINDS)
    assert len(BY_RUNTIME) == len(BY_NAME)


@pytest.mark.parametrize("datatype", PACKED)
def test_raw_numbers_are_packed_as_python_packs_them(datatype: str) -> None:
    values = values_of(datatype, np.random.default_rng(0), 6)
    kind = BY_NAME[datatype]
    data = struct.pack(f"<{len(values)}{PACKED[datatype]}", *values)
    array = from_raw("x", kind, [2, len(values) // 2], data)
    assert array.shape == (2, len(values) // 2)
    assert array.dtype == kind.dtype
    assert bytes(to_raw(array, kind)) == data
    assert bytes(to_raw(array.T.copy().T, kind)) == data  # not contiguous


def test_raw_bfloat16_is_the_upper_half_of_float32() -> None:
    data = struct.pack("<f", 1.5)[2:] + struct.pack("<f", -3.0)[2:]
    array = from_raw("x", BY_NAME["BF16"], [2], data)
    assert array.dtype == ml_dtypes.bfloat16
    assert array.astype(np.float32).tolist() == [1.5, -3.0]
    assert bytes(to_raw(array, BY_NAME["BF16"])) == data


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_texts_come_back(texts: list[str]) -> None:
    kind = BY_NAME["BYTES"]
    data = b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in texts)
    array = from_raw("x", kind, [len(texts)], data)
    assert array.tolist() == texts
    assert to_raw(array, kind) == data
    assert to_typed(array, kind) == [text.encode() for text in texts]
    assert from_typed("x", kind, [len(texts), 1], to_typed(array, kind)).tolist() == [[text] for text in texts]


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_values_come_back(datatype: str) -> None:
    values = values_of(datatype, np.random.default_rng(1), 4)
    kind = BY_NAME[datatype]
    given_values = [text.encode() for text in values] if datatype == "BYTES" else values
    array = from_typed("x", kind, [1, len(values)], given_values)
    assert array.shape == (1, len(values))
    assert array.tolist() == [np.array(values, kind.dtype).tolist()]
    np.testing.assert_array_equal(from_typed("x", kind, [1, len(values)], to_typed(array, kind)), array)


@pytest.mark.parametrize("datatype", sorted(BY_NAME))
@pytest.mark.parametrize("shape", [[0], [3, 0], [0, 2**31]])
def test_empty(datatype: str, shape: list[int]) -> None:
    array = from_raw("x", BY_NAME[datatype], shape, b"")
    assert array.shape == tuple(shape)
    assert bytes(to_raw(array, BY_NAME[datatype])) == b""


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP32", [2, 2], b"\0" * 12, "takes 16 bytes, but 12"),
        ("FP32", [-1, 4], b"", "must be 0 or more"),
        ("FP32", [2**40, 2**40], b"\0" * 8, "takes"),
        ("FP32", [0] * 70, b"", "70 axes"),
        ("FP32", [0, 2**62, 2**62], b"", "3 axes"),
        ("INT64", [], b"", "takes 8 bytes"),
        ("BOOL", [2], b"\1\2", "neither 0 nor 1"),
        ("BYTES", [1], b"\2\0\0\0a", "not divided so"),
        ("BYTES", [2], b"\1\0\0\0a", "must hold 2 elements"),
        ("BYTES", [1], b"\1\0\0\0ab", "not divided so"),
        ("BYTES", [2**60], b"\1\0\0\0a", "not divided so"),
        ("BYTES", [1], b"\xff\xff\xff\xffa", "not divided so"),
        ("BYTES", [1], b"\1\0\0\0\xff", "not UTF-8"),
        ("BYTES", [0], b"\0", "must hold 0 elements"),
    ],
)
def test_raw_data_that_do_not_fit(datatype: str, shape: list[int], data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        from_raw("pixels", BY_NAME[datatype], shape, data)
    assert "input 'pixels'" in str(caught.value)


@pytest.mark.parametrize(
    ("datatype", "shape", "values", "says"),
    [
        ("INT8", [1], [128], "does not fit into INT8"),
        ("UINT8", [1], [256], "does not fit into UINT8"),
        ("INT16", [1], [-(2**15) - 1], "does not fit into INT16"),
        ("FP32", [2], [1.0], "has 2 elements, but fp32_contents holds 1"),
        ("BYTES", [1], [b"\xff"], "not UTF-8"),
        ("BOOL", [-1], [True], "must be 0 or more"),
    ],
)
def test_typed_values_that_do_not_fit(datatype: str, shape: list[int], values: list[Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        from_typed("pixels", BY_NAME[datatype], shape, values)
    assert "input 'pixels'" in str(caught.value)
