"""ONNX element types as torch tensors, and tensors to and from numpy.

torch has no arithmetic for the narrow types: 4- and 2-bit integers are held in 8 bits, floats below 16 bits in float32
(rounded to what their type can hold). `to_numpy` gives the real type back.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

_T = ir.DataType
HELD: dict[ir.DataType, torch.dtype] = {
    _T.FLOAT: torch.float32,
    _T.DOUBLE: torch.float64,
    _T.FLOAT16: torch.float16,
    _T.BFLOAT16: torch.bfloat16,
    _T.BOOL: torch.bool,
    _T.INT8: torch.int8,
    _T.INT16: torch.int16,
    _T.INT32: torch.int32,
    _T.INT64: torch.int64,
    _T.UINT8: torch.uint8,
    _T.UINT16: torch.uint16,
    _T.UINT32: torch.uint32,
    _T.UINT64: torch.uint64,
    _T.COMPLEX64: torch.complex64,
    _T.COMPLEX128: torch.complex128,
    **dict.fromkeys((_T.INT4, _T.INT2), torch.int8),
    **dict.fromkeys((_T.UINT4, _T.UINT2), torch.uint8),
    **dict.fromkeys(
        (
            _T.FLOAT8E4M3FN,
            _T.FLOAT8E4M3FNUZ,
            _T.FLOAT8E5M2,
            _T.FLOAT8E5M2FNUZ,
            _T.FLOAT8E8M0,
            _T.FLOAT4E2M1,
        ),
        torch.float32,
    ),
}
"""How values of an ONNX type are held; strings and types that are missing here are not."""
FLOATS = (_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.BFLOAT16)
"""Types that can be trained, and that `Interpreter.to` changes."""
WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""torch has hardly any arithmetic for these."""
RANGES: dict[ir.DataType, tuple[int, int]] = {
    **{t: (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for t, b in ((_T.INT2, 2), (_T.INT4, 4), (_T.INT8, 8), (_T.INT16, 16))},
    **{t: (0, 2**b - 1) for t, b in ((_T.UINT2, 2), (_T.UINT4, 4), (_T.UINT8, 8), (_T.UINT16, 16))},
    _T.INT32: (-(2**31), 2**31 - 1),
}
"""Smallest and largest value of the integers that models are quantised to."""


def narrow(dtype: ir.DataType) -> bool:
    """Whether values of this type are held in a wider one."""
    return dtype in HELD and (dtype.bitwidth < 8 or (dtype.is_floating_point() and dtype.bitwidth == 8))


def to_tensor(array: Any) -> Tensor:
    """A numpy array (or something like it) as a CPU tensor of its own memory.

    Raises:
        TypeError: strings or other objects.
    """
    array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.kind in "OUSM":
        raise TypeError("strings are no tensors")
    if array.dtype.kind == "V" or array.dtype.name.startswith(
        ("float8", "float4", "float6", "int4", "int2", "uint4", "uint2")
    ):
        kind = HELD[ir.DataType.from_numpy(array.dtype)]
        return torch.from_numpy(array.astype(np.float32 if kind == torch.float32 else str(kind).removeprefix("torch.")))
    return torch.from_numpy(array.copy() if not array.flags.writeable or array.base is not None else array)


def from_onnx(tensor: ir.TensorProtocol) -> Tensor:
    """The numbers of an initializer as a CPU tensor of its own memory. Raises: TypeError for strings."""
    return to_tensor(np.array(tensor.numpy()))


def to_numpy(tensor: Tensor, dtype: ir.DataType | None = None) -> NDArray[Any]:
    """A tensor as a numpy array, of the ONNX type if one is given."""
    tensor = tensor.detach().cpu().resolve_conj()
    if tensor.dtype == torch.bfloat16:
        bits: NDArray[Any] = tensor.contiguous().view(torch.int16).numpy()
        array: NDArray[Any] = bits.view(ml_dtypes.bfloat16)
    else:
        array = tensor.numpy()
    wanted = None if dtype is None else dtype.numpy()
    return array if wanted is None or wanted == array.dtype else array.astype(wanted)


def rounded(x: Tensor, dtype: ir.DataType, saturate: bool = True) -> Tensor:
    """`x` with the values that the narrow float type `dtype` can hold, in float32; the gradient passes unchanged."""
    values = x.detach().cpu().to(torch.float32).numpy()
    kind = np.dtype(dtype.numpy())
    with np.errstate(all="ignore"):
        if saturate:
            high = float(ml_dtypes.finfo(kind).max)  # type: ignore[no-untyped-call]  # no types are shipped
            values = np.clip(values, -high, high)  # NaN stays
        result = values.astype(kind).astype(np.float32)
    out = torch.from_numpy(np.ascontiguousarray(result)).to(x.device)
    return x + (out - x).detach() if x.requires_grad and x.is_floating_point() else out
