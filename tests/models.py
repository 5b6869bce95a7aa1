"""Small models of the usual architectures, built without any framework: enough to test a fresh clone."""

from __future__ import annotations

import numpy as np
import onnx

from tests.models_odd import ODD
from tests.net import Built, Net

Model = onnx.ModelProto

# -- images ----------------------------------------------------------------------------------------------------------


def residual_cnn() -> Model:
    """Residual blocks with BatchNormalization, a depthwise block, squeeze-excite, a concatenation, a Gemm head."""
    net = Net(opset=13)
    x = net.conv(net.input("image", "n", 3, 12, 12), "stem", 3, 32, norm=True, bias=False)
    y = net.conv(x, "block.conv1", 32, 32, norm=True, bias=False)
    y = net.conv(y, "block.conv2", 32, 32, norm=True, bias=False, act=None)
    x = net("Relu", net("Add", x, y))
    y = net.conv(x, "inverted.expand", 32, 64, 1, norm=True, bias=False)
    y = net.conv(y, "inverted.depthwise", 64, 64, group=64, stride=2, norm=True, bias=False)
    gate = net("GlobalAveragePool", y)
    gate = net.conv(gate, "inverted.reduce", 64, 16, 1)
    gate = net.conv(gate, "inverted.widen", 16, 64, 1, act="Sigmoid")
    y = net.conv(net("Mul", y, gate), "inverted.project", 64, 48, 1, norm=True, bias=False, act=None)
    z = net.conv(x, "branch", 32, 16, stride=2)
    x = net.conv(net("Concat", y, z, axis=1), "mix", 64, 40)
    x = net("Flatten", net("GlobalAveragePool", x), axis=1)
    net.named(net.gemm(x, "head", 40, 10), "logits")
    return net.model(logits=("n", 10))


def flat_cnn() -> Model:
    """Channels flattened together with their pixels into a Gemm; grouped convolution; PRelu, Clip, pooling, Pad."""
    net = Net(opset=17)
    x = net.conv(net.input("image", "n", 1, 8, 8), "c1", 1, 16, act=None)
    x = net("PRelu", x, net.positive("slope", 16, 1, 1))
    x = net("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.conv(x, "grouped", 16, 32, group=4, act=None)
    x = net("Clip", x, net.value("low", 0.0), net.value("high", 6.0))
    x = net("Pad", x, net.value("pads", [0, 0, 1, 0, 0, 0, 0, 1]))
    x = net.gemm(net("Flatten", net.conv(x, "c3", 32, 8), axis=1), "fc1", 8 * 25, 24)
    net.named(net.gemm(net("LeakyRelu", x), "fc2", 24, 5), "logits")
    return net.model(logits=("n", 5))


def unet() -> Model:
    """Two levels down and up: transposed convolution and Resize, skip connections by concatenation."""
    net = Net(opset=17)
    a = net.conv(net.input("image", "n", 3, 16, 16), "down1", 3, 16)
    b = net.conv(net("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2]), "down2", 16, 32)
    c = net.conv(net("AveragePool", b, kernel_shape=[2, 2], strides=[2, 2]), "middle", 32, 48)
    weight, bias = net.weight("up2.weight", 48, 24, 2, 2), net.weight("up2.bias", 24)
    c = net("ConvTranspose", c, weight, bias, name="up2", kernel_shape=[2, 2], strides=[2, 2])
    d = net.conv(net("Concat", b, c, axis=1), "merge2", 56, 24)
    d = net("Resize", d, "", net.value("scales", [1.0, 1.0, 2.0, 2.0], np.float32), name="up1", mode="nearest")
    x = net.conv(net("Concat", d, a, axis=1), "merge1", 40, 16)
    net.named(net("Sigmoid", net.conv(x, "out", 16, 2, 1, act=None)), "mask")
    return net.model(mask=("n", 2, 16, 16))


def shuffle_net() -> Model:
    """Grouped convolutions with a channel shuffle between them, and a channel split."""
    net = Net(opset=13)
    x = net.conv(net.input("image", "n", 3, 8, 8), "stem", 3, 32)
    y = net.conv(x, "g1", 32, 32, 1, group=2)
    y = net("Transpose", net.reshape(y, -1, 2, 16, 8, 8), perm=[0, 2, 1, 3, 4])
    y = net.reshape(y, -1, 32, 8, 8)
    y = net.conv(y, "dw", 32, 32, group=32, act=None)
    x = net("Add", x, net.conv(y, "g2", 32, 32, 1, group=2))
    a, b = net("Split", x, net.value("halves", [16, 16]), outputs=2, axis=1)
    x = net("Concat", a, net.conv(b, "half", 16, 16), axis=1)
    x = net("Transpose", net.reshape(x, -1, 2, 16, 8, 8), perm=[0, 2, 1, 3, 4])
    x = net.conv(net.reshape(x, -1, 32, 8, 8), "last", 32, 24, 1)
    net.named(net.gemm(net("Flatten", net("GlobalAveragePool", x)), "head", 24, 4), "logits")
    return net.model(logits=("n", 4))


def group_norm() -> Model:
    """GroupNorm as exporters write it (InstanceNormalization between Reshapes), InstanceNorm, PixelShuffle."""
    net = Net(opset=17)
    x = net.conv(net.input("image", "n", 3, 8, 8), "stem", 3, 32, act=None)
    y = net.reshape(x, 0, 4, -1)
    y = net("InstanceNormalization", y, net.value("ones", np.ones(4)), net.value("zeros", np.zeros(4)), name="gn")
    y = net("Reshape", y, net("Shape", x))
    y = net("Add", net("Mul", y, net.positive("gn.scale", 32, 1, 1)), net.weight("gn.bias", 32, 1, 1))
    x = net.conv(net("Relu", y), "mid", 32, 16)
    x = net("InstanceNormalization", x, net.positive("in.scale", 16), net.weight("in.bias", 16), name="in")
    x = net("DepthToSpace", net.conv(x, "up", 16, 48), blocksize=2)
    net.named(net.conv(x, "out", 12, 2, act=None), "image2")
    return net.model(image2=("n", 2, 16, 16))


def picked() -> Model:
    """Channels permuted and repeated by Gather, a depthwise convolution with two outputs per channel, PixelShuffle."""
    net = Net(opset=17)
    x = net.conv(net.input("image", "n", 3, 6, 6), "c1", 3, 16)
    order = np.random.default_rng(0).permutation(16)[:12]
    x = net("Gather", x, net.value("order", order), axis=1)
    x = net("Gather", x, net.value("twice", np.array([0, 0, 1, 2, 3, 5, 5, 7])), axis=1)
    x = net("Conv", x, net.weight("dw.weight", 16, 1, 3, 3), name="dw", group=8, pads=[1] * 4)
    x = net.conv(net("Relu", x), "c2", 16, 32)
    x = net("Transpose", net.reshape(x, 0, 8, 2, 2, 6, 6), perm=[0, 1, 4, 2, 5, 3])
    net.named(net.conv(net.reshape(x, 0, 8, 12, 12), "out", 8, 3, act=None), "y")
    return net.model(y=("n", 3, 12, 12))


# -- transformers ----------------------------------------------------------------------------------------------------


def _attend(net: Net, q: str, k: str, v: str, scale: float) -> str:
    """q, v [n h t d] and k [n h d t] to [n h t d]."""
    scores = net("Mul", net("MatMul", q, k, name=f"scores{net.count}"), net.value(f"scale{net.count}", scale))
    return str(net("MatMul", net("Softmax", scores, axis=-1), v, name=f"mix{net.count}"))


def _mlp(net: Net, x: str, name: str, c: int, wide: int) -> str:
    return net.linear(net.gelu(net.linear(x, f"{name}.fc1", c, wide)), f"{name}.fc2", wide, c)


def vit_split() -> Model:
    """Patch convolution, class token, fused qkv cut with Split, GELU, head on the class token."""
    net, c, h = Net(opset=17), 32, 4
    x = net.input("image", "n", 3, 8, 8)
    x = net(
        "Conv", x, net.weight("patch.weight", c, 3, 4, 4), net.weight("patch.bias", c), name="patch", strides=[4, 4]
    )
    x = net("Transpose", net.reshape(x, 0, c, -1), perm=[0, 2, 1])
    batch = net("Slice", net("Shape", x), net.value("zero", [0]), net.value("first", [1]))
    shape = net("Concat", batch, net.value("tail", [-1, -1]), axis=0)
    shape = net("Where", net("Equal", shape, net.value("minus", [-1])), net.value("ones3", [1, 1, 1]), shape)
    x = net(
        "Add", net("Concat", net("Expand", net.weight("token", 1, 1, c), shape), x, axis=1), net.weight("pos", 1, 5, c)
    )
    y = net.layer_norm(x, "norm1", c)
    q, k, v = net("Split", net.linear(y, "qkv", c, 3 * c), net.value("thirds", [c, c, c]), outputs=3, axis=-1)
    q, k, v = (net.reshape(part, 0, 0, h, c // h) for part in (q, k, v))
    q, v = (net("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, v))
    y = _attend(net, q, net("Transpose", k, perm=[0, 2, 3, 1]), v, (c // h) ** -0.5)
    y = net.reshape(net("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, c)
    x = net("Add", x, net.linear(y, "proj", c, c))
    x = net("Add", x, _mlp(net, net.layer_norm(x, "norm2", c), "mlp", c, 64))
    x = net("Gather", net.layer_norm(x, "norm", c), net.value("index0", 0), axis=1)
    net.named(net.gemm(x, "head", c, 10), "logits")
    return net.model(logits=("n", 10))


def vit_reshape() -> Model:
    """Fused qkv cut by Reshape to (3, heads, size), Transpose and Gather."""
    net, c, h = Net(opset=14), 48, 3
    x = net.linear(net.input("tokens", "n", "t", 12), "embed", 12, c)
    y = net.reshape(net.linear(x, "qkv", c, 3 * c), 0, 0, 3, h, c // h)
    y = net("Transpose", y, perm=[2, 0, 3, 1, 4])
    q, k, v = (net("Gather", y, net.value(f"pick{i}", i), axis=0) for i in range(3))
    y = _attend(net, q, net("Transpose", k, perm=[0, 1, 3, 2]), v, 0.25)
    y = net.reshape(net("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, c)
    x = net("Add", x, net.linear(y, "proj", c, c))
    x = net("Add", x, _mlp(net, x, "mlp", c, 96))
    net.named(net.linear(x, "head", c, 7, bias=False), "scores")
    return net.model(scores=("n", "t", 7))


def _windows(net: Net, x: str, c: int, back: bool = False) -> str:
    """Images of 8 x 8 tokens to windows of 4 x 4, or back."""
    x = net.reshape(x, -1, 2, 2, 4, 4, c) if back else net.reshape(x, -1, 2, 4, 2, 4, c)
    x = net("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
    return net.reshape(x, -1, 8, 8, c) if back else net.reshape(x, -1, 16, c)


def swin() -> Model:
    """Shifted windows with a table of position biases per head, and patch merging by strided Slices."""
    net, c = Net(opset=17), 24
    x = net.linear(net.input("pixels", "n", 8, 8, 6), "embed", 6, c)
    at = {k: net.value(f"at_{k}", [k]) for k in (0, 1, 3, 8)}
    shifted = net("Concat", net("Slice", x, at[3], at[8], at[1]), net("Slice", x, at[0], at[3], at[1]), axis=1)
    qkv = net.reshape(net.linear(_windows(net, shifted, c), "qkv", c, 3 * c), -1, 16, 3, 3, 8)
    parts = net("Split", net("Transpose", qkv, perm=[2, 0, 3, 1, 4]), net.value("each", [1, 1, 1]), outputs=3, axis=0)
    q, k, v = (net("Squeeze", part, at[0]) for part in parts)
    table = net("Gather", net.weight("table", 49, 3), net.value("pairs", np.arange(256) % 49), axis=0)
    bias = net("Transpose", net.reshape(table, 16, 16, 3), perm=[2, 0, 1])
    scores = net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2]), name="scores")
    weights = net("Softmax", net("Add", scores, net("Unsqueeze", bias, at[0])), axis=-1)
    y = net.reshape(net("Transpose", net("MatMul", weights, v, name="mix"), perm=[0, 2, 1, 3]), -1, 16, c)
    x = net("Add", x, _windows(net, net.linear(y, "proj", c, c), c, back=True))
    ends, axes, steps = net.value("ends", [8, 8]), net.value("axes", [1, 2]), net.value("steps", [2, 2])
    corners = [net("Slice", x, net.value(f"from{i}{j}", [i, j]), ends, axes, steps) for i in (0, 1) for j in (0, 1)]
    x = net.linear(net.layer_norm(net("Concat", *corners, axis=-1), "norm", 4 * c), "merge", 4 * c, 2 * c, bias=False)
    net.named(net.linear(net("ReduceMean", x, axes=[1, 2], keepdims=0), "head", 2 * c, 5), "logits")
    return net.model(logits=("n", 5))


def experts() -> Model:
    """A soft mixture of four experts, as Einsum over stacked weights."""
    net = Net(opset=17)
    x = net.linear(net.input("x", "n", 8), "embed", 8, 16)
    gate = net("Softmax", net.linear(x, "gate", 16, 4), axis=-1)
    y = net("Relu", net("Einsum", x, net.weight("up", 4, 16, 24), name="up", equation="nd,edf->nef"))
    y = net("Einsum", y, net.weight("down", 4, 24, 16), name="down", equation="nef,efd->ned")
    y = net("Mul", y, net("Unsqueeze", gate, net.value("end", [-1])))
    y = net("ReduceSum", y, net.value("experts", [1]), keepdims=0)
    net.named(net.linear(y, "head", 16, 3), "y")
    return net.model(y=("n", 3))


def _rms_norm(net: Net, x: str, name: str, c: int) -> str:
    """As exporters spell it out."""
    mean = net("ReduceMean", net("Pow", x, net.value("two", 2.0)), axes=[-1], keepdims=1)
    y = net("Div", x, net("Sqrt", net("Add", mean, net.value("epsilon", 1e-5))))
    return str(net("Mul", net.positive(f"{name}.scale", c), y))


def _rotate_half(net: Net, x: str, d: int, axis: int = 3) -> str:
    """RoPE with cosine and sine tables that queries and keys share."""
    angles = np.outer(np.arange(6), 1.0 / 100 ** (np.arange(d // 2) / (d // 2)))
    tables = [
        net.value(f, g(np.concatenate([angles, angles], 1))[None, None]) for f, g in (("cos", np.cos), ("sin", np.sin))
    ]
    zero, half, end, axes = (net.value(f"at{k}", [k]) for k in (0, d // 2, 1 << 40, axis))
    low, high = net("Slice", x, zero, half, axes), net("Slice", x, half, end, axes)
    turned = net("Concat", net("Neg", high), low, axis=axis)
    return str(net("Add", net("Mul", x, tables[0]), net("Mul", turned, tables[1])))


def decoder() -> Model:
    """LLaMA block: grouped-query attention (6 heads on 2), rotate-half RoPE, SwiGLU, decomposed RMSNorm."""
    net, c, heads, kv, d, t = Net(opset=17), 48, 6, 2, 8, 6
    x = net("Gather", net.weight("embedding", 24, c), net.input("ids", "n", t, dtype=np.int64), name="embed")
    y = _rms_norm(net, x, "norm1", c)
    q, k, v = (net.linear(y, name, c, n * d, bias=False) for name, n in (("q", heads), ("k", kv), ("v", kv)))
    q = net("Transpose", net.reshape(q, 0, 0, heads, d), perm=[0, 2, 1, 3])
    k, v = (net("Transpose", net.reshape(z, 0, 0, kv, d), perm=[0, 2, 1, 3]) for z in (k, v))
    q, k = _rotate_half(net, q, d), _rotate_half(net, k, d)
    spread = net.value("spread", [1, kv, heads // kv, t, d])
    k, v = (
        net.reshape(net("Expand", net("Unsqueeze", z, net.value("at2", [2])), spread), 0, heads, t, d) for z in (k, v)
    )
    y = _attend(net, q, net("Transpose", k, perm=[0, 1, 3, 2]), v, d**-0.5)
    y = net.reshape(net("Transpose", y, perm=[0, 2, 1, 3]), 0, t, heads * d)
    x = net("Add", x, net.linear(y, "o", heads * d, c, bias=False))
    y = _rms_norm(net, x, "norm2", c)
    gate = net.linear(y, "gate", c, 64, bias=False)
    y = net("Mul", net("Mul", gate, net("Sigmoid", gate)), net.linear(y, "up", c, 64, bias=False))
    x = net("Add", x, net.linear(y, "down", 64, c, bias=False))
    net.named(net.linear(_rms_norm(net, x, "norm", c), "lm_head", c, 24, bias=False), "logits")
    return net.model(logits=("n", t, 24))


def modern() -> Model:
    """Opset 23: RMSNormalization, Gelu and Attention (grouped-query, on 3-D tensors) as operators."""
    net, c, heads, kv, d = Net(opset=23, ir_version=10), 32, 4, 2, 8
    x = net.input("tokens", "n", 6, c)
    y = net("RMSNormalization", x, net.positive("norm.scale", c), name="norm")
    q, k, v = (net.linear(y, name, c, n * d, bias=False) for name, n in (("q", heads), ("k", kv), ("v", kv)))
    y = net("Attention", q, k, v, name="attention", q_num_heads=heads, kv_num_heads=kv)
    x = net("Add", x, net.linear(y, "o", heads * d, c, bias=False))
    y = net("Gelu", net.linear(x, "fc1", c, 64), approximate="tanh")
    net.named(net.linear(y, "fc2", 64, 5), "scores")
    return net.model(scores=("n", 6, 5))


def fused_bert() -> Model:
    """ONNX Runtime's fused operators: Attention, SkipLayerNormalization, BiasGelu."""
    net, c, ms = Net(opset=17), 32, "com.microsoft"
    x = net("Gather", net.weight("words", 24, c), net.input("ids", "n", "t", dtype=np.int64), name="embed")
    x = net.layer_norm(x, "norm0", c)
    y = net("Attention", x, net.weight("qkv.weight", c, 3 * c), net.weight("qkv.bias", 3 * c), name="attention",
            domain=ms, num_heads=4)  # fmt: skip
    y = net.linear(y, "proj", c, c, bias=False)
    scale, bias, extra = net.positive("skip.scale", c), net.weight("skip.bias", c), net.weight("proj.bias", c)
    x = net("SkipLayerNormalization", x, y, scale, bias, extra, name="skip", domain=ms)
    y = net("BiasGelu", net.linear(x, "fc1", c, 64, bias=False), net.weight("fc1.bias", 64), name="gelu", domain=ms)
    x = net("Add", x, net.linear(y, "fc2", 64, c))
    net.named(net.linear(x, "head", c, 6), "scores")
    return net.model(scores=("n", "t", 6))


# -- sequences -------------------------------------------------------------------------------------------------------


def lstm_tagger() -> Model:
    """Embedding, bidirectional LSTM, GRU, tags."""
    net, c, h = Net(opset=14), 16, 12
    x = net("Gather", net.weight("words", 24, c), net.input("ids", "n", "t", dtype=np.int64), name="embed")
    x = net("Transpose", x, perm=[1, 0, 2])
    parts = net.weight("lstm.W", 2, 4 * h, c), net.weight("lstm.R", 2, 4 * h, h), net.weight("lstm.B", 2, 8 * h)
    y, _, _ = net("LSTM", x, *parts, name="lstm", outputs=3, hidden_size=h, direction="bidirectional")
    y = net.reshape(net("Transpose", y, perm=[0, 2, 1, 3]), 0, 0, -1)
    parts = net.weight("gru.W", 1, 3 * h, 2 * h), net.weight("gru.R", 1, 3 * h, h), net.weight("gru.B", 1, 6 * h)
    y, _ = net("GRU", y, *parts, name="gru", outputs=2, hidden_size=h, linear_before_reset=1)
    y = net("Transpose", net("Squeeze", y, net.value("one1", [1])), perm=[1, 0, 2])
    net.named(net("LogSoftmax", net.linear(y, "tags", h, 9), axis=-1), "labels")
    return net.model(labels=("n", "t", 9))


def tied() -> Model:
    """One matrix as the embedding and, transposed, as the output projection."""
    net, c = Net(opset=17), 32
    table = net.weight("table", 24, c)
    x = net("Gather", table, net.input("ids", "n", "t", dtype=np.int64), name="embed")
    x = net("Add", x, _mlp(net, net.layer_norm(x, "norm", c), "mlp", c, 64))
    net.named(net("MatMul", x, net("Transpose", table, perm=[1, 0]), name="lm_head"), "logits")
    return net.model(logits=("n", "t", 24))


def two_ways() -> Model:
    """Two inputs, two outputs, one of them a hidden state."""
    net = Net(opset=17)
    image, text = net.input("image", "n", 3, 8, 8), net.input("text", "n", 10)
    a = net("Flatten", net("GlobalAveragePool", net.conv(image, "see", 3, 32)))
    b = net("Tanh", net.gemm(text, "read", 10, 32))
    x = net("Add", net.gemm(a, "join", 32, 32), b)
    net.named(net("Relu", net.gemm(x, "hidden", 32, 24)), "state")
    net.named(net.gemm(net("Relu", net.gemm("state", "fc", 24, 40)), "head", 40, 5), "logits")
    return net.model(logits=("n", 5), state=("n", 24))


BUILT: dict[str, Built] = {
    f.__name__: Built(f)
    for f in (
        residual_cnn, flat_cnn, unet, shuffle_net, group_norm, picked, vit_split, vit_reshape, swin, experts, decoder,
        modern, fused_bert, lstm_tagger, tied, two_ways,
    )
} | ODD  # fmt: skip
"""All models of this folder by name."""
