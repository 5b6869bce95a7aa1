"""Small models with the oddities of real files: shared and computed weights, shapes, control flow, formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from tests.net import Built, Net

Model = onnx.ModelProto

# -- weights ---------------------------------------------------------------------------------------------------------


def one_zero_bias() -> Model:
    """An exporter merged equal initializers: one zero bias in unrelated layers, one scale in two norms."""
    net, c = Net(opset=17), 24
    bias, ones = net.value("zeros24", np.zeros(c)), net.value("ones24", np.ones(c))
    x = net(
        "Conv", net.input("image", "n", 3, 6, 6), net.weight("c1.weight", c, 3, 3, 3), bias, name="c1", pads=[1] * 4
    )
    x = net("Conv", net("Relu", x), net.weight("c2.weight", c, c, 3, 3), bias, name="c2", pads=[1] * 4)
    x = net("Flatten", net("GlobalAveragePool", net("Relu", x)))
    x = net("Gemm", x, net.weight("fc1.weight", c, c), bias, name="fc1")
    x = net("LayerNormalization", x, ones, bias, name="norm1")
    x = net("LayerNormalization", net("Tanh", x), ones, bias, name="norm2")
    net.named(net("Gemm", x, net.weight("fc2.weight", c, 5), name="fc2"), "logits")
    return net.model(logits=("n", 5))


def behind() -> Model:
    """Weights behind Transpose, Cast, Identity, Reshape and a product of two (weight norm), in `Constant` nodes too."""
    net, c = Net(opset=17), 32
    x = net.input("x", "n", 8)
    x = net("Relu", net("MatMul", x, net("Transpose", net.weight("w1", c, 8), perm=[1, 0]), name="fc1"))
    half = net("Cast", net.weight("w2", c, c, dtype=np.float16), to=TensorProto.FLOAT)
    x = net("Relu", net("MatMul", x, net("Identity", half), name="fc2"))
    weight = net("Mul", net.weight("w3.v", c, c), net.positive("w3.g", 1, c))
    x = net(
        "Add", net("MatMul", x, weight, name="fc3"), net("Reshape", net.weight("b3", 1, c), net.value("flat", [-1]))
    )
    rng = np.random.default_rng(5)
    value = numpy_helper.from_array(rng.normal(0, 0.2, (c, 16)).astype(np.float32), "w4")
    x = net("MatMul", net("Relu", x), net("Constant", name="w4", value=value), name="fc4")
    x = net("Mul", x, net("Constant", name="slopes", value_floats=[(k + 1) / 16 for k in range(16)]))
    low = net("MatMul", net.weight("lora.a", 16, 4), net.weight("lora.b", 4, 6))
    net.named(net("MatMul", net("Relu", x), net("Add", net.weight("w5", 16, 6), low), name="fc5"), "y")
    return net.model(y=("n", 6))


def external(folder: Path) -> Path:
    """A small network whose weights lie in two files beside it."""
    model = two_layers(times=4)
    for k, tensor in enumerate(model.graph.initializer):
        external_data_helper.set_external_data(tensor, f"part{k % 2}.bin")
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def two_layers(opset: int = 17, ir_version: int = 8, times: int = 1) -> Model:
    """Two hidden layers, in any opset."""
    net, a, b = Net(opset, ir_version), 64 * times, 32 * times
    x = net("Relu", net.gemm(net.input("x", "n", 12), "fc1", 12, a))
    net.named(net.gemm(net("Relu", net.gemm(x, "fc2", a, b)), "fc3", b, 4), "y")
    return net.model(y=("n", 4))


# -- sizes -----------------------------------------------------------------------------------------------------------


def _dim(net: Net, x: str, axis: int) -> str:
    return str(net("Gather", net("Shape", x), net.value(f"axis{axis}", axis), axis=0))


def _joined(net: Net, *parts: str | int) -> str:
    """A shape out of numbers and scalars."""
    zero = net.value("front", [0])
    pieces = [net.value(f"size{p}", [p]) if isinstance(p, int) else net("Unsqueeze", p, zero) for p in parts]
    return str(net("Concat", *pieces, axis=0))


def computed_scale() -> Model:
    """Attention whose 1/sqrt(size) and whose shapes are computed from Shape: cuts must not change it."""
    net, c, h = Net(opset=14), 32, 4
    x = net.input("x", "n", "t", 12)
    q, k, v = (net.linear(x, name, 12, c) for name in "qkv")
    n, t, width = (_dim(net, q, axis) for axis in range(3))
    size = net("Div", width, net.value("heads", h))
    q, k, v = (net("Reshape", part, _joined(net, n, t, h, size)) for part in (q, k, v))
    q, v = (net("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
    k = net("Transpose", k, perm=[0, 2, 3, 1])
    last = net("Gather", net("Shape", q), net.value("last", -1), axis=0)
    scale = net("Div", net.value("unit", 1.0), net("Sqrt", net("Cast", last, to=TensorProto.FLOAT)))
    scores = net("MatMul", net("Mul", q, net("Sqrt", scale)), net("Mul", k, net("Sqrt", scale)), name="scores")
    y = net("MatMul", net("Softmax", scores, axis=-1), v, name="mix")
    y = net("Reshape", net("Transpose", y, perm=[0, 2, 1, 3]), _joined(net, n, t, width))
    net.named(net.linear(y, "out", c, 6), "y")
    return net.model(y=("n", "t", 6))


def computed_shapes() -> Model:
    """Reshape to whole Shape vectors, to slices of them, and to products of their entries; Size; ConstantOfShape."""
    net, c = Net(opset=13), 24
    x = net.conv(net.input("image", "n", 3, 6, 6), "c1", 3, c)
    flat = net(
        "Reshape", x, _joined(net, _dim(net, x, 0), _dim(net, x, 1), net("Mul", _dim(net, x, 2), _dim(net, x, 3)))
    )
    x = net("Reshape", net("Relu", flat), net("Shape", x))
    y = net("Add", x, net("ConstantOfShape", net("Shape", x), value=helper.make_tensor("v", 1, [1], [0.5])))
    y = net.conv(y, "c2", c, c)
    y = net("Reshape", net("Reshape", y, net.value("rows", [0, 0, -1])), net("Shape", x))
    count = net("Cast", net("Size", y), to=TensorProto.FLOAT)
    y = net("Div", y, net("Sqrt", count))
    spatial = net("Slice", net("Shape", y), net.value("from2", [2]), net.value("to4", [4]))
    small = net.conv(net("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2]), "c3", c, 16)
    shape = net(
        "Concat", net("Slice", net("Shape", small), net.value("from0", [0]), net.value("to2", [2])), spatial, axis=0
    )
    big = net("Resize", small, "", "", shape, mode="nearest")
    big = net("Flatten", net("GlobalAveragePool", big))
    net.named(net.gemm(big, "head", 16, 4), "y")
    return net.model(y=("n", 4))


# -- structure -------------------------------------------------------------------------------------------------------


def _info(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def branches() -> Model:
    """If: both branches read outer weights and have weights of their own."""
    net = Net(opset=17)
    x = net("Relu", net.gemm(net.input("x", "n", 8), "fc1", 8, 32))
    flag = net("Greater", net("ReduceSum", "x", keepdims=0), net.value("nothing", 0.0))
    net.weight("outer.weight", 32, 24)
    then, other = Net(17, prefix="then."), Net(17, prefix="else.")
    then.named(then("Relu", then("MatMul", x, "outer.weight", name="fc")), "then_y")
    own = other("MatMul", x, other.weight("else.weight", 32, 24), name="fc")
    other.named(other("Add", own, other.weight("else.bias", 24)), "else_y")
    y = net("If", flag, name="if", then_branch=then.graph([_info("then_y", "n", 24)], "then"),
            else_branch=other.graph([_info("else_y", "n", 24)], "else"))  # fmt: skip
    net.named(net.gemm(y, "head", 24, 4), "y")
    return net.model(y=("n", 4))


def loop() -> Model:
    """Loop: a carried state that meets a captured weight three times."""
    net = Net(opset=17)
    x = net("Tanh", net.gemm(net.input("x", "n", 8), "fc1", 8, 32))
    net.weight("wide.weight", 32, 48)
    net.weight("back.weight", 48, 32)
    body = Net(17, prefix="body.")
    body.inputs = [
        _info("step", kind=TensorProto.INT64),
        _info("go_in", kind=TensorProto.BOOL),
        _info("state", "n", 32),
    ]
    y = body("MatMul", body("Relu", body("MatMul", "state", "wide.weight", name="wide")), "back.weight", name="back")
    body.named(body("Tanh", body("Add", "state", y)), "state_out")
    body("Identity", "go_in", name="go")
    outputs = [_info("go_out", kind=TensorProto.BOOL), _info("state_out", "n", 32)]
    for node in body.nodes:
        if node.name == "body.go":
            node.output[0] = "go_out"
    y = net("Loop", net.value("three", 3), net.value("true", np.array(True), np.bool_), x, name="loop",
            body=body.graph(outputs, "body"))  # fmt: skip
    net.named(net.gemm(y, "head", 32, 4), "y")
    return net.model(y=("n", 4))


def homonyms() -> Model:
    """If: weights of the two branches have the same names, so that no plan can tell them apart."""
    net = Net(opset=17)
    x = net("Relu", net.gemm(net("Relu", net.gemm(net.input("x", "n", 8), "fc0", 8, 40)), "fc1", 40, 32))
    flag = net("Greater", net("ReduceSum", "x", keepdims=0), net.value("nothing", 0.0))
    graphs = {}
    for k, key in enumerate(("then_branch", "else_branch")):
        side = Net(17, prefix=f"{key}.")
        rng = np.random.default_rng(k)
        y = side("Relu", side("MatMul", x, side.value("w1", rng.normal(0, 0.2, (32, 24))), name="a"))
        side.named(side("MatMul", y, side.value("w2", rng.normal(0, 0.2, (24, 24))), name="b"), f"{key}_y")
        graphs[key] = side.graph([_info(f"{key}_y", "n", 24)], key)
    net.named(net.gemm(net("If", flag, name="if", **graphs), "head", 24, 4), "y")
    return net.model(y=("n", 4))


def scan() -> Model:
    """Scan: a recurrent network written out, with a captured weight."""
    net = Net(opset=17)
    x = net("Transpose", net.linear(net.input("x", "n", "t", 8), "fc1", 8, 24), perm=[1, 0, 2])
    net.weight("state.weight", 24, 24)
    start = net("Mul", net("ReduceSum", x, net.value("time", [0]), keepdims=0), net.value("nothing", 0.0))
    body = Net(17, prefix="body.")
    body.inputs = [_info("state", "n", 24), _info("step", "n", 24)]
    y = body("Tanh", body("Add", body("MatMul", "state", "state.weight", name="recur"), "step"))
    body.named(body("Identity", y), "state_out")
    body.named(body("Identity", y), "step_out")
    graph = body.graph([_info("state_out", "n", 24), _info("step_out", "n", 24)], "body")
    _, y = net("Scan", start, x, outputs=2, name="scan", body=graph, num_scan_inputs=1)
    net.named(net.linear(net("Transpose", y, perm=[1, 0, 2]), "head", 24, 3), "y")
    return net.model(y=("n", "t", 3))


def functions() -> Model:
    """A local function used twice, with an attribute."""
    net = Net(opset=17)
    domain = "org.example.layers"
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["g"], name="gemm", transB=1),
        helper.make_node("LeakyRelu", ["g"], ["y"], name="act"),
    ]
    nodes[1].attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    imports = [helper.make_opsetid("", 17)]
    net.functions.append(helper.make_function(domain, "Dense", ["x", "w", "b"], ["y"], nodes, imports, ["slope"]))
    x = net.input("x", "n", 8)
    for name, c_in, c_out in (("d1", 8, 32), ("d2", 32, 48)):
        weight, bias = net.weight(f"{name}.weight", c_out, c_in), net.weight(f"{name}.bias", c_out)
        x = net("Dense", x, weight, bias, name=name, domain=domain, slope=0.2)
    net.named(net.gemm(x, "head", 48, 4), "y")
    return net.model(y=("n", 4))


CUSTOM = helper.make_function(
    "org.example.custom", "Mystery", ["x"], ["y"],
    [helper.make_node("Softplus", ["x"], ["s"]), helper.make_node("Sin", ["s"], ["y"])], [helper.make_opsetid("", 17)],
)  # fmt: skip


def custom() -> Model:
    """An operator nobody knows in the middle."""
    net = Net(opset=17)
    x = net.conv(net.input("image", "n", 3, 6, 6), "c1", 3, 24)
    x = net("Mystery", net.conv(x, "c2", 24, 16), name="mystery", domain="org.example.custom")
    # what leaves an unknown operator has an unknown shape, unless it is made known again
    x = net.conv(net.reshape(x, -1, 16, 6, 6), "c3", 16, 24)
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", x)), "head", 24, 4), "y")
    return net.model(y=("n", 4))


# -- number formats --------------------------------------------------------------------------------------------------


def half() -> Model:
    """float16 throughout."""
    net = Net(opset=17, dtype=np.float16)
    x = net.conv(net.input("image", "n", 3, 8, 8), "c1", 3, 24, norm=True)
    x = net("Add", net.conv(x, "c2", 24, 24), x)
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", x)), "head", 24, 4), "y")
    return net.model(y=("n", 4))


def _quantised(net: Net, name: str, c_out: int, c_in: int, kernel: int) -> tuple[str, str]:
    """int8 weights with a scale per output channel, int32 bias."""
    rng = np.random.default_rng(c_out)
    weight = net.value(f"{name}.weight_q", rng.integers(-127, 128, (c_out, c_in, kernel, kernel)), np.int8)
    scale = net.value(f"{name}.scale", rng.uniform(0.5, 1.5, c_out) / 127 / np.sqrt(c_in * kernel), np.float32)
    zero = net.value(f"{name}.zero", np.zeros(c_out), np.int8)
    bias = net.value(f"{name}.bias_q", rng.integers(-30, 30, c_out), np.int32)
    bias_scale, bias_zero = (
        net.value(f"{name}.bias_scale", np.full(c_out, 0.01)),
        net.value(f"{name}.bias_zero", np.zeros(c_out), np.int32),
    )
    return (
        net("DequantizeLinear", weight, scale, zero, axis=0),
        net("DequantizeLinear", bias, bias_scale, bias_zero, axis=0),
    )


def _rounded(net: Net, x: str, scale: float, zero: int) -> str:
    parts = net.value(f"a{net.count}.scale", scale, np.float32), net.value(f"a{net.count}.zero", zero, np.uint8)
    return str(net("DequantizeLinear", net("QuantizeLinear", x, *parts), *parts))


def qdq() -> Model:
    """Convolutions between QuantizeLinear and DequantizeLinear, weights per channel."""
    net = Net(opset=13)
    x = _rounded(net, net.input("image", "n", 3, 8, 8), 0.02, 128)
    x = net("Conv", x, *_quantised(net, "c1", 32, 3, 3), name="c1", pads=[1] * 4)
    x = _rounded(net, net("Relu", x), 0.01, 0)
    x = net("Conv", x, *_quantised(net, "c2", 32, 32, 3), name="c2", pads=[1] * 4)
    x = _rounded(net, net("Relu", x), 0.02, 0)
    x = net("Flatten", net("GlobalAveragePool", x))
    net.named(net.gemm(x, "head", 32, 4), "y")
    return net.model(y=("n", 4))


def four_bits() -> Model:
    """MatMulNBits: 4-bit blocks of 16 along the contracted axis, with scales; some with packed zero points."""
    net, block = Net(opset=17), 16
    net.domains["com.microsoft"] = 1

    def layer(x: str, name: str, k: int, n: int, zeros: bool = False) -> str:
        rng = np.random.default_rng(k + n)
        blocks = k // block
        packed = net.value(f"{name}.packed", rng.integers(0, 256, (n, blocks, block // 2)), np.uint8)
        scales = net.value(f"{name}.scales", rng.uniform(0.02, 0.05, n * blocks), np.float32)
        points = [net.value(f"{name}.zeros", rng.integers(0, 256, n * ((blocks + 1) // 2)), np.uint8)] if zeros else []
        return str(net("MatMulNBits", x, packed, scales, *points, name=name, domain="com.microsoft", K=k, N=n, bits=4,
                       block_size=block))  # fmt: skip

    x = net("Relu", layer(net.input("x", "n", "t", 32), "fc1", 32, 96, zeros=True))
    x = net("Relu", layer(x, "fc2", 96, 64))
    x = net("Relu", layer(x, "fc3", 64, 64, zeros=True))
    net.named(net.linear(x, "head", 64, 5), "y")
    return net.model(y=("n", "t", 5))


def standardised() -> Model:
    """Convolutions whose weights are computed: standardised by hand and by BatchNormalization, and weight norm."""
    net = Net(opset=17)

    def conv(x: str, name: str, weight: str, width: int) -> str:
        bias = net.weight(f"{name}.bias", width)
        return str(net("Relu", net("Conv", x, weight, bias, name=name, kernel_shape=[3, 3], pads=[1] * 4)))

    x = net.conv(net.input("image", "n", 3, 8, 8), "stem", 3, 32)
    v = net.weight("byhand.v", 24, 32, 3, 3)
    centred = net("Sub", v, net("ReduceMean", v, axes=[1, 2, 3], keepdims=1))
    spread = net("Sqrt", net("ReduceMean", net("Mul", centred, centred), axes=[1, 2, 3], keepdims=1))
    x = conv(x, "byhand", net("Mul", net("Div", centred, spread), net.positive("byhand.gain", 24, 1, 1, 1)), 24)
    rows = net("Reshape", net.weight("bybatch.v", 40, 24, 3, 3), net.value("rows", [1, 40, -1]))
    stored = net.value("bybatch.mean", np.zeros(40)), net.value("bybatch.var", np.ones(40))
    scale, shift = net.positive("bybatch.gain", 40), net.value("bybatch.shift", np.zeros(40))
    scaled, _, _ = net("BatchNormalization", rows, scale, shift, *stored, training_mode=1, epsilon=1e-6, outputs=3)
    x = conv(x, "bybatch", net("Reshape", scaled, net.value("kernels", [40, 24, 3, 3])), 40)
    v = net.weight("bynorm.v", 16, 40, 3, 3)
    unit = net("Div", v, net("ReduceL2", v, axes=[1, 2, 3], keepdims=1))
    x = conv(x, "bynorm", net("Mul", unit, net.positive("bynorm.g", 16, 1, 1, 1)), 16)
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", x)), "head", 16, 4), "y")
    return net.model(y=("n", 4))


def neighbours() -> Model:
    """Rotary positions with neighbours as pairs: x[::2] and x[1::2] are rotated and interleaved again."""
    net, heads, size = Net(opset=17), 4, 16

    def split(x: str, name: str) -> str:
        x = net.reshape(net.linear(x, name, 32, heads * size), 0, 0, heads, size)
        return str(net("Transpose", x, perm=[0, 2, 1, 3]))

    def every(x: str, start: int) -> str:
        ends, axis, step = net.value("far", [10**9]), net.value("last", [-1]), net.value("two", [2])
        return str(net("Slice", x, net.value(f"start{start}", [start]), ends, axis, step))

    def rotated(x: str) -> str:
        last, halves = net.value("last", [-1]), (every(x, 0), every(x, 1))
        turned = [net("Unsqueeze", part, last) for part in (net("Neg", halves[1]), halves[0])]
        turned = net.reshape(net("Concat", *turned, axis=-1), 0, 0, 0, size)
        cos, sin = net.weight("cos", 6, size), net.weight("sin", 6, size)
        return str(net("Add", net("Mul", x, cos), net("Mul", turned, sin)))

    x = net.input("x", "n", 6, 32)
    q, k, v = rotated(split(x, "q")), rotated(split(x, "k")), split(x, "v")
    scores = net("Softmax", net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    merged = net.reshape(net("Transpose", net("MatMul", scores, v), perm=[0, 2, 1, 3]), 0, 0, heads * size)
    net.named(net.linear(merged, "out", heads * size, 32), "y")
    return net.model(y=("n", 6, 32))


def merged() -> Model:
    """Equal scales that the exporter merged: one initializer, and an Identity in front of each other use."""
    net = Net(opset=17)
    scale = net.value("scale", np.ones((24, 1, 1)))
    x = net.input("image", "n", 3, 8, 8)
    for k, (c_in, name) in enumerate([(3, "c1"), (24, "c2"), (24, "c3")]):
        own = net("Identity", scale, name=f"scale{k}") if k else scale
        x = net("Relu", net("Mul", net.conv(x, name, c_in, 24, act=None), own))
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", x)), "head", 24, 4), "y")
    return net.model(y=("n", 4))


def old_inputs() -> Model:
    """IR version 3: every initializer is listed as a graph input."""
    model = two_layers(opset=8, ir_version=3)
    for tensor in model.graph.initializer:
        model.graph.input.append(_info(tensor.name, *tensor.dims))
    return model


def opset7() -> Model:
    """The oldest opset: attributes where there are inputs today."""
    net = Net(opset=7, ir_version=3)
    x = net.conv(net.input("image", "n", 3, 8, 8), "c1", 3, 24, norm=True)
    x = net("Pad", x, pads=[0, 0, 0, 0, 0, 0, 1, 1], mode="constant", value=0.0)
    a, b = net("Split", net.conv(x, "c2", 24, 32), axis=1, split=[16, 16], outputs=2)
    x = net("Mul", a, net("Sigmoid", b))
    x = net("Slice", x, axes=[2], starts=[1], ends=[9])
    x = net("Squeeze", net("ReduceMean", x, axes=[2, 3], keepdims=1), axes=[2, 3])
    x = net("Dropout", net("Clip", x, min=-3.0, max=3.0), ratio=0.5)
    net.named(net.gemm(x, "head", 16, 4), "y")
    model = net.model(y=("n", 4))
    for tensor in model.graph.initializer:
        kind = tensor.data_type
        model.graph.input.append(_info(tensor.name, *tensor.dims, kind=kind))
    return model


ODD: dict[str, Built] = {
    f.__name__: Built(f)
    for f in (
        one_zero_bias, behind, two_layers, computed_scale, computed_shapes, branches, homonyms, loop, scan, functions,
        qdq, four_bits, standardised, neighbours, merged, old_inputs, opset7,
    )
}  # fmt: skip
ODD["custom"] = Built(custom, runtime=False, functions=[CUSTOM])
ODD["standardised"] = Built(standardised, written_down=True)
# 11 bits: the sums of a layer of 24 x 9 products differ in the last two
ODD["half"] = Built(half, tolerance=5e-3)
