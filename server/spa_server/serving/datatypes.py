"""The protocol's element types, next to ONNX Runtime's and numpy's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["BY_NAME", "BY_RUNTIME", "Datatype"]


@dataclass(frozen=True)
class Datatype:
    """One element type."""

    name: str
    """In the protocol, such as FP32."""
    runtime: str
    """In ONNX Runtime, such as tensor(float)."""
    dtype: np.dtype[Any]
    """In numpy; object (of str) for BYTES."""
    field: str | None
    """The list of InferTensorContents that holds its elements; None if they travel raw only."""
    config: str
    """In a ModelConfig, such as TYPE_FP32."""


def _row(name: str, runtime: str, dtype: Any, field: str | None, config: str | None = None) -> Datatype:
    return Datatype(name, f"tensor({runtime})", np.dtype(dtype), field, f"TYPE_{config or name}")


_TABLE = (
    _row("BOOL", "bool", np.bool_, "bool_contents"),
    _row("UINT8", "uint8", np.uint8, "uint_contents"),
    _row("UINT16", "uint16", np.uint16, "uint_contents"),
    _row("UINT32", "uint32", np.uint32, "uint_contents"),
    _row("UINT64", "uint64", np.uint64, "uint64_contents"),
    _row("INT8", "int8", np.int8, "int_contents"),
    _row("INT16", "int16", np.int16, "int_contents"),
    _row("INT32", "int32", np.int32, "int_contents"),
    _row("INT64", "int64", np.int64, "int64_contents"),
    _row("FP16", "float16", np.float16, None),
    _row("FP32", "float", np.float32, "fp32_contents"),
    _row("FP64", "double", np.float64, "fp64_contents"),
    _row("BYTES", "string", np.object_, "bytes_contents", "STRING"),
    _row("BF16", "bfloat16", ml_dtypes.bfloat16, None),
)
BY_NAME: Mapping[str, Datatype] = MappingProxyType({row.name: row for row in _TABLE})
BY_RUNTIME: Mapping[str, Datatype] = MappingProxyType({row.runtime: row for row in _TABLE})
