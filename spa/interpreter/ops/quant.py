"""Quantised operators, computed in floats on whole numbers.

Rounding has no gradient; where a quantised tensor is only dequantised again, the gradient passes straight through the
pair (within the range of the type), so that quantised models can be scored and tuned.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor

from spa.interpreter.base import Kernel, Node, Unsupported, axis_of, operator
from spa.interpreter.ops.linear import convolution
from spa.interpreter.types import HELD, RANGES, rounded

MS = "com.microsoft"
_T = ir.DataType


def around(x: Tensor) -> Tensor:
    """`x` rounded half to even; the gradient passes unchanged."""
    return x + (torch.round(x) - x).detach() if x.requires_grad else torch.round(x)


def along(part: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points so that they broadcast against `x`: one for all, per index of an axis, or per block."""
    if part.numel() == 1 and not block:
        return part.reshape(())
    d = axis_of(axis, x.dim())
    if block:
        wide = part.repeat_interleave(block, d)
        return wide.narrow(d, 0, x.shape[d]) if wide.shape[d] != x.shape[d] else wide
    shape = [1] * x.dim()
    shape[d] = -1
    return part.reshape(shape)


def quantised(x: Tensor, scale: Tensor, zero: Tensor | None, kind: ir.DataType) -> Tensor:
    """Whole numbers (as floats) of `x`: round(x / scale) + zero, within the range of an integer type."""
    low, high = RANGES[kind]
    y = around(x / scale)
    return (y if zero is None else y + zero.to(y.dtype)).clamp(low, high)


def dequantised(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """(x - zero) * scale in the scale's type."""
    wide = torch.float64 if x.dtype in (torch.int32, torch.uint32) else scale.dtype
    y = x.to(wide)
    return (y if zero is None else y - zero.to(wide)).to(scale.dtype) * scale


def kind_of(node: Node, slot: int, default: ir.DataType = _T.UINT8) -> ir.DataType:
    """The integer type of a zero point, by its slot. Raises: Unsupported for other types."""
    kind = (node.dtype(slot) if node.has(slot) else None) or default
    if kind not in RANGES:
        raise Unsupported(f"quantised to {kind.name}")
    return kind


# -- to and from -----------------------------------------------------------------------------------------------------


def _quantize(node: Node) -> Kernel:
    axis, block = int(node.attr("axis", 1)), int(node.attr("block_size", 0))
    asked = node.attr("output_dtype", 0)
    kind = ir.DataType(asked) if asked else (node.dtype(2) if node.has(2) else None) or _T.UINT8
    precision = node.attr("precision", 0)
    exact = ir.DataType(precision) if precision else None
    output = node.ir.outputs[0]
    uses = list(output.uses())
    again = bool(uses) and not output.is_graph_output() and all(n.op_type == "DequantizeLinear" for n, _ in uses)
    if kind not in RANGES:
        if kind not in HELD or not kind.is_floating_point():
            raise Unsupported(f"quantised to {kind.name}")
        saturate = bool(node.attr("saturate", 1))

        def float8(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
            y = x / along(scale, x, axis, block)
            y = y if zero is None else y + along(zero, x, axis, block).to(y.dtype)
            return rounded(y, kind, saturate)

        return float8

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        steps = along(scale, x, axis, block)
        point = None if zero is None else along(zero, x, axis, block)
        if exact is not None:
            x, steps = x.to(HELD[exact]), steps.to(HELD[exact])
        else:
            x = x.to(steps.dtype) if x.is_floating_point() else x.to(torch.float32)
        y = quantised(x, steps, point, kind)
        return y if again else y.to(HELD[kind])

    return run


def _dequantize(node: Node) -> Kernel:
    axis, block = int(node.attr("axis", 1)), int(node.attr("block_size", 0))
    asked = node.attr("output_dtype", 0)
    held = node.held(asked) if asked else None

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        steps = along(scale, x, axis, block)
        y = dequantised(x, steps, None if zero is None else along(zero, x, axis, block))
        return y if held is None else y.to(held())

    return run


for _domain in ("", MS):
    operator("QuantizeLinear", domain=_domain)(_quantize)
    operator("DequantizeLinear", domain=_domain)(_dequantize)


def dynamic(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """UINT8 numbers of `x` (as floats) with the scale and zero point that fit its extremes."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round((-low / scale).clamp(0, 255))
    return (around(x / scale) + zero).clamp(0, 255), scale, zero


@operator("DynamicQuantizeLinear")
def _dynamic(_: Node) -> Kernel:
    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, scale, zero = dynamic(x)
        return y.to(torch.uint8), scale, zero.to(torch.uint8)

    return run


# -- products --------------------------------------------------------------------------------------------------------


def _centred(x: Tensor, zero: Tensor | None, rows: bool = False) -> Tensor:
    """x - zero in float64, exact for all products of 8 bits; `rows`: one zero point per row."""
    y = x.to(torch.float64)
    if zero is None:
        return y
    zero = zero.to(torch.float64)
    return y - (zero.unsqueeze(-1) if rows and zero.dim() == 1 and zero.numel() > 1 else zero)


@operator("MatMulInteger")
def _matmul_integer(_: Node) -> Kernel:
    def run(a: Tensor, b: Tensor, za: Tensor | None = None, zb: Tensor | None = None) -> Tensor:
        return (_centred(a, za, rows=True) @ _centred(b, zb)).to(torch.int32)

    return run


@operator("ConvInteger")
def _conv_integer(node: Node) -> Kernel:
    conv = convolution(node)

    def run(x: Tensor, w: Tensor, zx: Tensor | None = None, zw: Tensor | None = None) -> Tensor:
        weights = _centred(w, None if zw is None else along(zw, w, 0, 0))
        return conv(_centred(x, zx), weights).to(torch.int32)  # type: ignore[no-any-return]  # `conv` is a kernel of any result

    return run


def _rows(scale: Tensor) -> Tensor:
    return scale.unsqueeze(-1) if scale.dim() == 1 and scale.numel() > 1 else scale


@operator("QLinearMatMul")
def _qlinear_matmul(node: Node) -> Kernel:
    kind = kind_of(node, 7)

    def run(a: Tensor, sa: Tensor, za: Tensor, b: Tensor, sb: Tensor, zb: Tensor, sy: Tensor, zy: Tensor) -> Tensor:
        product = _centred(a, za, rows=True) @ _centred(b, zb)
        y = product * _rows(sa).double() * sb.double() / sy.double()
        return (torch.round(y) + zy).clamp(*RANGES[kind]).to(HELD[kind])

    return run


@operator("QLinearConv")
def _qlinear_conv(node: Node) -> Kernel:
    kind, conv = kind_of(node, 7), None
    conv = convolution(_Shifted(node))

    def run(
        x: Tensor,
        sx: Tensor,
        zx: Tensor,
        w: Tensor,
        sw: Tensor,
        zw: Tensor,
        sy: Tensor,
        zy: Tensor,
        b: Tensor | None = None,
    ) -> Tensor:
        weights = _centred(w, along(zw, w, 0, 0))
        product = conv(_centred(x, zx), weights, None if b is None else b.double())
        factor = sx.double() * along(sw, product, 1, 0).double() / sy.double()
        return (torch.round(product * factor) + zy).clamp(*RANGES[kind]).to(HELD[kind])

    return run


class _Shifted(Node):
    """A node whose weight is in slot 3."""

    def __init__(self, node: Node) -> None:
        self.__dict__.update(node.__dict__)

    def rank(self, slot: int = 0) -> int | None:
        """Dimensions of x or the weight."""
        return super().rank(3 if slot else 0)


# -- the same of com.microsoft ---------------------------------------------------------------------------------------

Float = Callable[..., Tensor]


def _pair(node: Node, function: Float) -> Kernel:
    """QLinearAdd and the like: (a, scale, zero, b, scale, zero, scale, zero)."""
    kind = kind_of(node, 7, node.dtype(0) or _T.UINT8)

    def run(
        a: Tensor, sa: Tensor, za: Tensor, b: Tensor, sb: Tensor, zb: Tensor, sy: Tensor, zy: Tensor | None = None
    ) -> Tensor:
        y = function(dequantised(a, sa, za), dequantised(b, sb, zb))
        return quantised(y, sy, zy, kind).to(HELD[kind])

    return run


operator("QLinearAdd", domain=MS)(lambda node: _pair(node, torch.add))
operator("QLinearMul", domain=MS)(lambda node: _pair(node, torch.mul))


def single(node: Node, function: Float) -> Kernel:
    """QLinearSigmoid and the like: (x, scale, zero, scale, zero)."""
    kind = kind_of(node, 4, node.dtype(0) or _T.UINT8)

    def run(x: Tensor, sx: Tensor, zx: Tensor | None, sy: Tensor, zy: Tensor | None = None) -> Tensor:
        return quantised(function(dequantised(x, sx, zx)), sy, zy, kind).to(HELD[kind])

    return run


operator("QLinearSigmoid", domain=MS)(lambda node: single(node, torch.sigmoid))


@operator("QLinearLeakyRelu", domain=MS)
def _leaky(node: Node) -> Kernel:
    alpha = float(node.attr("alpha", 0.01))
    return single(node, lambda x: torch.nn.functional.leaky_relu(x, alpha))


@operator("QLinearSoftmax", domain=MS)
def _qlinear_softmax(node: Node) -> Kernel:
    axis, flat = int(node.attr("axis", -1)), int(node.attr("opset", 13)) < 13

    def over(x: Tensor) -> Tensor:
        d = axis_of(axis, x.dim())
        return torch.softmax(x.flatten(d), -1).reshape(x.shape) if flat else torch.softmax(x, d)

    return single(node, over)


def _images(node: Node, function: Float) -> Kernel:
    """Pooling, also with the channels last."""
    if not node.attr("channels_last", 0):
        return single(node, function)
    return single(node, lambda x: function(x.movedim(-1, 1)).movedim(1, -1))


@operator("QLinearGlobalAveragePool", domain=MS)
def _global(node: Node) -> Kernel:
    return _images(node, lambda x: x.mean(list(range(2, x.dim())), keepdim=True))


@operator("QLinearAveragePool", domain=MS)
def _average(node: Node) -> Kernel:
    from spa.interpreter.ops.pool import average_pool

    return _images(node, average_pool(node))


@operator("QLinearWhere", domain=MS)
def _where(node: Node) -> Kernel:
    kind = kind_of(node, 8, node.dtype(1) or _T.UINT8)

    def run(
        c: Tensor, a: Tensor, sa: Tensor, za: Tensor, b: Tensor, sb: Tensor, zb: Tensor, sy: Tensor, zy: Tensor
    ) -> Tensor:
        y = torch.where(c, dequantised(a, sa, za), dequantised(b, sb, zb))
        return quantised(y, sy, zy, kind).to(HELD[kind])

    return run


@operator("QLinearConcat", domain=MS)
def _concat(node: Node) -> Kernel:
    kind, axis = kind_of(node, 1), int(node.attr("axis", 1))

    def run(sy: Tensor, zy: Tensor, *rest: Tensor) -> Tensor:
        parts = [dequantised(*rest[k : k + 3]) for k in range(0, len(rest), 3)]
        return quantised(torch.cat(parts, axis), sy, zy, kind).to(HELD[kind])

    return run


@operator("QGemm", domain=MS)
def _qgemm(node: Node) -> Kernel:
    alpha = float(node.attr("alpha", 1.0))
    trans_a, trans_b = bool(node.attr("transA", 0)), bool(node.attr("transB", 0))
    kind = kind_of(node, 8) if node.has(7) else None

    def run(
        a: Tensor,
        sa: Tensor,
        za: Tensor,
        b: Tensor,
        sb: Tensor,
        zb: Tensor,
        c: Tensor | None = None,
        sy: Tensor | None = None,
        zy: Tensor | None = None,
    ) -> Tensor:
        left = _centred(a, za)
        right = _centred(b, along(zb, b, 0 if trans_b else 1, 0))
        product = (left.t() if trans_a else left) @ (right.t() if trans_b else right)
        product = product if c is None else product + c.double()
        y = product * alpha * sa.double() * sb.double()
        if sy is None or kind is None:
            return y.to(sa.dtype)
        return quantised(y, sy.double(), zy, kind).to(HELD[kind])

    return run
