"""Building small ONNX models by hand: values are names, every weight is random but the same on every machine."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
DIMS = {"n": 2, "t": 6}
"""Sizes of the symbolic axes when a model runs."""
VOCABULARY = 24


class Net:
    """A graph under construction."""

    def __init__(self, opset: int = 17, ir_version: int = 8, dtype: Any = np.float32, prefix: str = "") -> None:
        self.opset, self.ir_version, self.dtype, self.prefix = opset, ir_version, np.dtype(dtype), prefix
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, Array] = {}
        self.domains: dict[str, int] = {}
        self.functions: list[onnx.FunctionProto] = []
        self.count = 0

    def input(self, name: str, *shape: int | str | None, dtype: Any = None) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def value(self, name: str, array: Any, dtype: Any = None) -> str:
        """An initializer with these numbers (int64 if they are integers)."""
        array = np.asarray(array)
        self.weights[name] = array.astype(dtype or (np.int64 if array.dtype.kind == "i" else self.dtype))
        return name

    def weight(self, name: str, *shape: int, dtype: Any = None) -> str:
        """Random numbers: matrices keep the magnitude of what flows, vectors are small."""
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        fan = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
        scale = 0.3 if len(shape) == 1 else 1 / np.sqrt(fan)
        return self.value(name, rng.normal(0, scale, shape), dtype)

    def positive(self, name: str, *shape: int) -> str:
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return self.value(name, rng.uniform(0.5, 1.5, shape))

    def __call__(
        self, op: str, *inputs: str, name: str = "", outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Append a node; returns the name of its output, or a tuple of names."""
        self.count += 1
        name = self.prefix + (name or f"{op.lower()}{self.count}")
        out = [f"{name}_out{k or ''}" for k in range(outputs)]
        attributes = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(op, inputs, out, name=name, domain=domain, **attributes))
        if domain:
            self.domains.setdefault(domain, 1)
        return out[0] if outputs == 1 else tuple(out)

    def graph(self, outputs: Sequence[onnx.ValueInfoProto], name: str = "net") -> onnx.GraphProto:
        tensors = [numpy_helper.from_array(array, key) for key, array in self.weights.items()]
        return helper.make_graph(self.nodes, name, self.inputs, list(outputs), tensors)

    def model(self, **outputs: Sequence[int | str | None]) -> onnx.ModelProto:
        """The model; its outputs are values of that name, of the net's own type."""
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        infos = [helper.make_tensor_value_info(key, kind, shape) for key, shape in outputs.items()]
        imports = [helper.make_opsetid(domain, version) for domain, version in {"": self.opset, **self.domains}.items()]
        model = helper.make_model(
            self.graph(infos), opset_imports=imports, ir_version=self.ir_version, functions=self.functions,
            producer_name="spa tests", producer_version="7", domain="org.example", model_version=3, doc_string="tiny",
        )  # fmt: skip
        helper.set_model_props(model, {"author": "nobody", "classes": '["a", "b"]'})
        return model

    # -- layers ------------------------------------------------------------------------------------------------------

    def named(self, value: str, name: str) -> str:
        """Rename the output of the last node (for graph outputs)."""
        assert self.nodes[-1].output[0] == value
        self.nodes[-1].output[0] = name
        return name

    def conv(self, x: str, name: str, c_in: int, c_out: int, kernel: int = 3, *, group: int = 1, stride: int = 1,
             bias: bool = True, norm: bool = False, act: str | None = "Relu") -> str:  # fmt: skip
        inputs = [x, self.weight(f"{name}.weight", c_out, c_in // group, kernel, kernel)]
        inputs += [self.weight(f"{name}.bias", c_out)] if bias else []
        x = self("Conv", *inputs, name=name, group=group, kernel_shape=[kernel] * 2, strides=[stride] * 2,
                 pads=[kernel // 2] * 4)  # fmt: skip
        if norm:
            x = self.batch_norm(x, f"{name}.bn", c_out)
        return self(act, x) if act else x

    def batch_norm(self, x: str, name: str, c: int) -> str:
        stats = [self.positive(f"{name}.scale", c), self.weight(f"{name}.bias", c), self.weight(f"{name}.mean", c)]
        return str(self("BatchNormalization", x, *stats, self.positive(f"{name}.var", c), name=name))

    def linear(self, x: str, name: str, c_in: int, c_out: int, bias: bool = True) -> str:
        """MatMul and Add, as exporters write it for more than two dimensions."""
        x = self("MatMul", x, self.weight(f"{name}.weight", c_in, c_out), name=name)
        return self("Add", x, self.weight(f"{name}.bias", c_out)) if bias else x

    def gemm(self, x: str, name: str, c_in: int, c_out: int) -> str:
        weight, bias = self.weight(f"{name}.weight", c_out, c_in), self.weight(f"{name}.bias", c_out)
        return str(self("Gemm", x, weight, bias, name=name, transB=1))

    def layer_norm(self, x: str, name: str, c: int) -> str:
        scale, bias = self.positive(f"{name}.scale", c), self.weight(f"{name}.bias", c)
        return str(self("LayerNormalization", x, scale, bias, name=name, axis=-1))

    def reshape(self, x: str, *shape: int) -> str:
        """To a constant shape; equal shapes share one initializer."""
        key = "shape_" + "_".join(str(k) for k in shape)
        return str(self("Reshape", x, self.value(key, list(shape))))

    def gelu(self, x: str) -> str:
        """As exporters spell it out, through Erf."""
        root, one, half = self.value("root2", 2**0.5), self.value("one", 1.0), self.value("half", 0.5)
        return str(self("Mul", self("Mul", x, self("Add", self("Erf", self("Div", x, root)), one)), half))


@dataclass(frozen=True)
class Built:
    """One model of this folder and what may be expected of it."""

    build: Callable[[], onnx.ModelProto]
    exact: bool = True
    """Whether anything can be pruned exactly."""
    runtime: bool = True
    """Whether ONNX Runtime runs it as it is (else only together with `functions`)."""
    tolerance: float = 1e-4
    written_down: bool = False
    """Whether weights are computed from weights: the pruned file has the results, and fewer numbers than predicted."""
    functions: Sequence[onnx.FunctionProto] = field(default_factory=tuple)
    """Bodies of custom operators that the file leaves out."""


def sizes(model: onnx.ModelProto, wanted: Mapping[str, int]) -> dict[str, int]:
    """The part of `wanted` that names symbolic axes of this model's inputs."""
    dims = (dim for info in model.graph.input for dim in info.type.tensor_type.shape.dim)
    return {dim.dim_param: wanted[dim.dim_param] for dim in dims if dim.dim_param in wanted}


def feeds(model: onnx.ModelProto, seed: int = 0, dims: Mapping[str, int] = DIMS) -> dict[str, Array]:
    """Random inputs, made without any help from `spa`."""
    rng = np.random.default_rng(seed)
    weights = {tensor.name for tensor in model.graph.initializer}
    out: dict[str, Array] = {}
    for info in model.graph.input:
        if info.name in weights:
            continue
        kind = info.type.tensor_type
        shape = [dim.dim_value if dim.HasField("dim_value") else dims[dim.dim_param] for dim in kind.shape.dim]
        if kind.elem_type in (TensorProto.INT64, TensorProto.INT32):
            out[info.name] = rng.integers(0, VOCABULARY, shape)
        elif kind.elem_type == TensorProto.BOOL:
            out[info.name] = rng.random(shape) < 0.5
        else:
            out[info.name] = rng.normal(size=shape)
        out[info.name] = np.asarray(out[info.name]).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return out
