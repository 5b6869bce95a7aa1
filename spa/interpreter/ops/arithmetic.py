"""Arithmetic, comparison and conversion, position by position with numpy broadcasting."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from spa.interpreter.base import Kernel, Node, Unsupported, operator, plain, wide
from spa.interpreter.types import HELD, RANGES, narrow, rounded, to_numpy

_T = ir.DataType
_WIDE = (_T.UINT16, _T.UINT32, _T.UINT64)


def _each(names: str, kernel: Kernel) -> None:
    """Register a function that torch lacks for wide unsigned integers."""
    operator(names)(lambda node: wide(kernel) if node.dtype() in _WIDE else kernel)


def _fold(kernel: Kernel) -> Kernel:
    return lambda *inputs: functools.reduce(kernel, inputs)


# -- one line each ---------------------------------------------------------------------------------------------------

_each("Add", torch.add)
_each("Sub", torch.sub)
_each("Mul", torch.mul)
_each("Abs", torch.abs)
_each("Neg", torch.neg)
_each("Sign", torch.sign)
_each("Equal", torch.eq)
_each("Greater", torch.gt)
_each("GreaterOrEqual", torch.ge)
_each("Less", torch.lt)
_each("LessOrEqual", torch.le)
_each("Max", _fold(torch.maximum))
_each("Min", _fold(torch.minimum))
_each("Sum", _fold(torch.add))
_each("BitwiseAnd", torch.bitwise_and)
_each("BitwiseOr", torch.bitwise_or)
_each("BitwiseXor", torch.bitwise_xor)
_each("BitwiseNot", torch.bitwise_not)
plain("Mean", lambda *inputs: functools.reduce(torch.add, inputs) / len(inputs))
plain("And", torch.logical_and)
plain("Or", torch.logical_or)
plain("Xor", torch.logical_xor)
plain("Not", torch.logical_not)
plain("Acos", torch.acos)
plain("Acosh", torch.acosh)
plain("Asin", torch.asin)
plain("Asinh", torch.asinh)
plain("Atan", torch.atan)
plain("Atanh", torch.atanh)
plain("Ceil", torch.ceil)
plain("Cos", torch.cos)
plain("Cosh", torch.cosh)
plain("Det", torch.det)
plain("Erf", torch.erf)
plain("Exp", torch.exp)
plain("Floor", torch.floor)
plain("IsNaN", torch.isnan)
plain("Log", torch.log)
plain("Reciprocal", torch.reciprocal)
plain("Round", torch.round)
plain("Sin", torch.sin)
plain("Sinh", torch.sinh)
plain("Sqrt", torch.sqrt)
plain("Tan", torch.tan)
plain("Where", torch.where)
plain("Identity", lambda x: x)

# -- those with attributes or two meanings ---------------------------------------------------------------------------


@operator("Div")
def _div(node: Node) -> Kernel:
    def whole(a: Tensor, b: Tensor) -> Tensor:
        return torch.div(a, b, rounding_mode="trunc")

    dtype = node.dtype()
    if dtype is None:
        return lambda a, b: torch.div(a, b) if a.is_floating_point() else whole(a, b)
    if dtype in _WIDE:
        return wide(whole)
    return whole if not dtype.is_floating_point() else torch.div


@operator("Mod")
def _mod(node: Node) -> Kernel:
    kernel = torch.fmod if node.attr("fmod", 0) else torch.remainder
    return wide(kernel) if node.dtype() in _WIDE else kernel


@operator("Pow")
def _pow(node: Node) -> Kernel:
    exponent = node.const(1)
    if exponent is not None and exponent.numel() == 1 and exponent.dim() == 0:
        fixed = exponent.item()
        if isinstance(fixed, float) and fixed == int(fixed) and abs(fixed) < 64:
            fixed = int(fixed)

        def run(x: Tensor, _: Tensor) -> Tensor:
            return x.pow(fixed) if x.is_floating_point() else torch.pow(x.double(), fixed).to(x.dtype)

        return run

    def general(x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.pow(x, y).to(x.dtype)
        return torch.pow(x.double(), y.double()).to(x.dtype)

    return general


@operator("BitShift")
def _bit_shift(node: Node) -> Kernel:
    kernel = torch.bitwise_left_shift if node.attr("direction") == "LEFT" else torch.bitwise_right_shift
    return wide(kernel) if node.dtype() in _WIDE else kernel


@operator("IsInf")
def _is_inf(node: Node) -> Kernel:
    negative, positive = node.attr("detect_negative", 1), node.attr("detect_positive", 1)
    if negative and positive:
        return torch.isinf
    if negative:
        return torch.isneginf
    return torch.isposinf if positive else lambda x: torch.zeros_like(x, dtype=torch.bool)


@operator("Clip")
def _clip(node: Node) -> Kernel:
    limits: list[Any] = [None, None]
    fixed = True
    for k, name in enumerate(("min", "max")):
        if node.attr(name) is not None:
            limits[k] = node.attr(name)
        elif node.has(k + 1):
            known = node.const(k + 1)
            limits[k] = known.item() if known is not None and known.numel() == 1 else None
            fixed = fixed and known is not None
    low, high = limits
    low = None if low is not None and math.isinf(low) and low < 0 else low
    high = None if high is not None and math.isinf(high) and high > 0 else high
    if low is None and high is None and fixed:
        return lambda x, *_: x
    if fixed:
        one: Kernel = lambda x, *_: torch.clamp(x, low, high)  # noqa: E731  (a kernel)
    else:
        one = lambda x, a=None, b=None: torch.clamp(x, a if low is None else low, b if high is None else high)  # noqa: E731
    return (lambda x, *rest: one(x.to(torch.int64), *rest).to(x.dtype)) if node.dtype() in _WIDE else one


# -- conversion ------------------------------------------------------------------------------------------------------


def caster(node: Node, target: ir.DataType) -> Kernel:
    """A kernel that converts to an ONNX type. Raises: Unsupported."""
    held = node.held(target)
    source = node.dtype()
    if source == _T.STRING:
        raise Unsupported("STRING tensors")
    if narrow(target) and target.is_floating_point():
        return _to_narrow(target, bool(node.attr("saturate", 1)), str(node.attr("round_mode", "up")))
    if narrow(target):
        low, high = RANGES[target]
        return lambda x: ((x.to(torch.int64) - low) & (high - low)).add(low).to(HELD[target])
    if target in RANGES or target in (_T.UINT32, _T.UINT64):
        # through int64: what does not fit wraps around as it does in the reference
        return lambda x: (x.to(torch.int64) if x.is_floating_point() else x).to(HELD[target])

    def run(x: Tensor) -> Tensor:
        dtype = held()
        return x if x.dtype == dtype else x.to(dtype)

    return run


def _to_narrow(target: ir.DataType, saturate: bool, mode: str) -> Kernel:
    if target == _T.FLOAT8E8M0:
        return lambda x: _powers_of_two(x, saturate, mode)
    return lambda x: rounded(x, target, saturate)


def _powers_of_two(x: Tensor, saturate: bool, mode: str) -> Tensor:
    """FLOAT8E8M0: the power of two above, below or nearest."""
    from onnx.numpy_helper import to_float8e8m0

    values = to_float8e8m0(to_numpy(x.float()), saturate=saturate, round_mode=mode)
    return torch.from_numpy(np.asarray(values).astype(np.float32)).to(x.device)


@operator("Cast")
def _cast(node: Node) -> Kernel:
    return caster(node, ir.DataType(node.attr("to")))


@operator("CastLike")
def _cast_like(node: Node) -> Kernel:
    target = node.dtype(1)
    if target is None:
        return lambda x, like: x.to(like.dtype)
    kernel = caster(node, target)
    return lambda x, _: kernel(x)


@operator("BitCast")
def _bit_cast(node: Node) -> Kernel:
    target = ir.DataType(node.attr("to"))
    held = node.held(target)
    source = node.dtype()
    if narrow(target) or (source is not None and (narrow(source) or source.bitwidth != target.bitwidth)):
        raise Unsupported(f"bits of {source.name if source else 'unknown'} as {target.name}")
    return lambda x: x.contiguous().view(held())
