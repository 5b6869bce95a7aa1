"""Sites: linear operators with constant weights, y = W x + b, whatever operator writes them.

A convolution is linear in the patches it reads; `Site` gives every such operator the same form: per group of a grouped
operator a matrix [m, k c], whose columns are ordered by kernel tap, then by channel. Criteria and compensation know
matrices only. One line per operator in `_LAYOUTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.coupling import tensor_of

Layout = Literal["conv", "transposed", "tokens"]
"""tokens: x [..., c]; conv: x [batch, g c, space ...]; transposed: the same for a transposed convolution."""


@dataclass(frozen=True, eq=False)
class Site:
    """One linear operator."""

    node: ir.Node
    layout: Layout
    data: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    """Constant [g m] that is added to the output by the node itself or by the next one; None if there is none."""
    groups: int
    rows: int
    """Outputs per group, m."""
    channels: int
    """Input channels per group, c."""
    kernel: tuple[int, ...]
    transposed: bool
    """The weight is stored [inputs, outputs]."""
    scale: float = 1.0
    """y = scale x W x + bias_scale x b."""
    bias_scale: float = 1.0
    fused: bool = False
    """The node also applies an activation: its output is not y."""
    bias_slot: int | None = None
    """Input slot for a bias, if the operator has one; without `bias` it is empty, or holds what others read, too."""

    @property
    def name(self) -> str:
        """The name of its output, unique in the graph."""
        return self.node.outputs[0].name or ""

    @property
    def output(self) -> ir.Value:
        """y, before a bias that the next node adds."""
        return self.node.outputs[0]

    @cached_property
    def reading(self) -> tuple[object, ...]:
        """What it reads, and how; sites with the same have the same inputs x."""
        geometry = (_attr(self.node, name, None) for name in _GEOMETRY) if self.kernel else ()
        how = (tuple(v) if isinstance(v, Sequence) else v for v in geometry)
        return self.data.name, self.layout, self.groups, self.channels, self.kernel, *how

    @property
    def taps(self) -> int:
        """Positions of the kernel, k."""
        return math.prod(self.kernel)

    @property
    def columns(self) -> int:
        """d = k c."""
        return self.taps * self.channels

    @property
    def output_axis(self) -> int:
        """Axis of the stored weight along which the outputs lie (within their group)."""
        if self.layout == "conv":
            return 0
        return 1 if self.transposed else 0

    @property
    def weights(self) -> NDArray[np.float64]:
        """The weight as it is now, [g, m, k c]."""
        tensor = constant_of(self.weight)
        assert tensor is not None
        return self.matrix(tensor.numpy())

    def matrix(self, array: NDArray[Any]) -> NDArray[np.float64]:
        """The stored weight as [g, m, k c], float64."""
        g, m, c, k = self.groups, self.rows, self.channels, self.taps
        w = array.astype(np.float64) * self.scale
        if self.layout == "tokens":
            return (w.T if self.transposed else w).reshape(1, m, c)
        if self.layout == "conv":
            return w.reshape(g, m, c, k).transpose(0, 1, 3, 2).reshape(g, m, k * c)
        return w.reshape(g, c, m, k).transpose(0, 2, 3, 1).reshape(g, m, k * c)

    def stored(self, matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        """Inverse of `matrix`, in the shape of the stored weight."""
        g, m, c, k = self.groups, self.rows, self.channels, self.taps
        w = matrix / self.scale
        if self.layout == "tokens":
            return np.asarray(w[0].T if self.transposed else w[0])
        w = w.reshape(g, m, k, c)
        if self.layout == "conv":
            return np.asarray(w.transpose(0, 1, 3, 2).reshape(g * m, c, *self.kernel))
        return np.asarray(w.transpose(0, 3, 1, 2).reshape(g * c, m, *self.kernel))


_GEOMETRY = ("strides", "pads", "dilations", "auto_pad", "output_padding", "output_shape")
_Read = Callable[[ir.Node, tuple[int, ...]], dict[str, Any] | None]


def _attr(node: ir.Node, name: str, default: Any) -> Any:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _conv(node: ir.Node, shape: tuple[int, ...]) -> dict[str, Any] | None:
    g = _attr(node, "group", 1)
    return {"groups": g, "rows": shape[0] // g, "channels": shape[1], "kernel": shape[2:], "transposed": False}


def _conv_transpose(node: ir.Node, shape: tuple[int, ...]) -> dict[str, Any] | None:
    g = _attr(node, "group", 1)
    return {"groups": g, "rows": shape[1], "channels": shape[0] // g, "kernel": shape[2:], "transposed": True}


def _tokens(shape: tuple[int, ...], turned: bool, **more: Any) -> dict[str, Any] | None:
    if len(shape) != 2:
        return None
    c, m = shape if not turned else shape[::-1]
    return {"groups": 1, "rows": m, "channels": c, "kernel": (), "transposed": not turned, **more}


def _matmul(node: ir.Node, shape: tuple[int, ...]) -> dict[str, Any] | None:
    return _tokens(shape, False)


def _fused_matmul(node: ir.Node, shape: tuple[int, ...]) -> dict[str, Any] | None:
    if any(_attr(node, name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return None
    return _tokens(shape, bool(_attr(node, "transB", 0)), scale=_attr(node, "alpha", 1.0))


def _gemm(node: ir.Node, shape: tuple[int, ...]) -> dict[str, Any] | None:
    if _attr(node, "transA", 0):
        return None
    scales = {"scale": _attr(node, "alpha", 1.0), "bias_scale": _attr(node, "beta", 1.0)}
    return _tokens(shape, bool(_attr(node, "transB", 0)), **scales)


_LAYOUTS: dict[tuple[str, str], tuple[Layout, int | None, bool, _Read]] = {
    ("", "Conv"): ("conv", 2, False, _conv),
    ("", "ConvTranspose"): ("transposed", 2, False, _conv_transpose),
    ("", "MatMul"): ("tokens", None, False, _matmul),
    ("", "Gemm"): ("tokens", 2, False, _gemm),
    ("com.microsoft", "FusedConv"): ("conv", 2, True, _conv),
    ("com.microsoft", "FusedMatMul"): ("tokens", None, False, _fused_matmul),
    ("com.microsoft", "FusedGemm"): ("tokens", 2, True, _gemm),
    ("com.microsoft", "GemmFastGelu"): ("tokens", 2, True, _gemm),
}
"""Operator -> layout, slot of the bias, whether an activation follows inside, and how its weight is read."""

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def find_sites(model: ir.Model) -> list[Site]:
    """The sites of the main graph, in execution order; weights that other nodes read too are left out."""
    return [site for node in model.graph if (site := site_of(node)) is not None]


def site_of(node: ir.Node) -> Site | None:
    """`node` as a site; None if it is none, or if its weight is shared, quantised or computed."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    known = _LAYOUTS.get((domain, node.op_type))
    if known is None or len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return None
    layout, slot, fused, read = known
    data, weight = node.inputs[0], node.inputs[1]
    turned = layout == "tokens" and (source := _turned(weight)) is not None
    if turned and source is not None:
        weight = source
    tensor = constant_of(weight)
    if tensor is None or tensor.dtype not in _FLOATS or constant_of(data) is not None or len(weight.uses()) != 1:
        return None
    shape = tuple(tensor.shape.numpy())
    found = read(node, shape[::-1] if turned else shape)
    if found is None or not all(found[key] for key in ("groups", "rows", "channels")):
        return None
    found["transposed"] ^= turned
    outputs = found["groups"] * found["rows"]
    bias = node.inputs[slot] if slot is not None and slot < len(node.inputs) else None
    if bias is None and not fused and layout == "tokens":
        bias = _next_bias(node, outputs)
    if bias is not None and not _own(bias, outputs):
        if slot is not None and slot < len(node.inputs) and bias is node.inputs[slot] and not _copied(bias, outputs):
            if fused:
                return None
            slot = None  # taken by something that is no constant vector
        bias = None
    return Site(node, layout, data, weight, bias, fused=fused, bias_slot=slot, **found)


def _turned(weight: ir.Value) -> ir.Value | None:
    """The matrix whose transpose a node reads, where an exporter left that to the runtime; nobody else may read it."""
    node = weight.producer()
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx") or len(weight.uses()) != 1:
        return None
    source = node.inputs[0]
    return source if source is not None and list(_attr(node, "perm", (1, 0))) == [1, 0] else None


def _own(bias: ir.Value, outputs: int) -> bool:
    return _copied(bias, outputs) and len(bias.uses()) == 1


def _copied(bias: ir.Value, outputs: int) -> bool:
    """Whether a constant is one number per output, so that a layer can have its own copy of it."""
    tensor = constant_of(bias)
    return (
        tensor is not None
        and tuple(tensor.shape.numpy())[-1:] == (outputs,) == (tensor.size,)
        and tensor.dtype in _FLOATS
    )


def _next_bias(node: ir.Node, outputs: int) -> ir.Value | None:
    """The constant that the only reader of a product adds to its last axis."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output():
        return None
    reader, slot = uses[0]
    if reader.op_type != "Add" or reader.domain not in ("", "ai.onnx"):
        return None
    other = reader.inputs[1 - slot]
    tensor = constant_of(other) if other is not None else None
    if other is None or tensor is None or tensor.size != outputs or tensor.shape.numpy()[-1:] != (outputs,):
        return None
    return other


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a `Constant` node; None for anything else."""
    producer = value.producer()
    if producer is None:
        return value.const_value
    return tensor_of(producer)


def exchange(
    value: ir.Value, array: NDArray[Any], keep: Callable[[NDArray[Any]], NDArray[Any]] = lambda array: array
) -> ir.Tensor[Any]:
    """Write new numbers of the same shape and type into an initializer or `Constant` node; they go through `keep`."""
    old = constant_of(value)
    assert old is not None
    numbers = keep(np.asarray(array, old.dtype.numpy(), order="C").reshape(old.shape.numpy()))
    tensor = ir.Tensor(numbers, dtype=old.dtype, name=old.name)
    producer = value.producer()
    if producer is None:
        value.const_value = tensor
    else:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
    return tensor
