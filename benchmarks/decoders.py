"""Decoders of LLaMA's shape, written as ONNX directly.

27 GB of weights never exist: the data file is sparse, it has a size but no blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 11008
    vocabulary: int = 32000
    random: bool = False
    """Real random weights; else the data file is sparse and reads as zeros."""
    half: bool = False
    """Weights and activations in float16, norms and positions in float32 inside, as a language model is exported."""
    files: int = 1
    """How many data files the weights are spread over; 0 writes none, the weights are absent."""

    @property
    def parameters(self) -> int:
        """Weights of all layers."""
        head = self.width // self.heads
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * head
        layer = attention + 3 * self.width * self.hidden + 2 * self.width
        return self.layers * layer + 2 * self.vocabulary * self.width + self.width


class _Writer:
    """Nodes, and weights that go straight to the data files."""

    def __init__(self, data: Path, shape: Decoder) -> None:
        import onnx

        self.onnx, self.helper = onnx, onnx.helper
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.random = np.random.default_rng(SEED) if shape.random else None
        self.type = np.dtype(np.float16 if shape.half else np.float32)
        self.limit = self.type.itemsize * shape.parameters // shape.files if shape.files > 1 else None
        self.data, self.offset, self.count = data, 0, 0
        self.file = open(data, "wb")  # noqa: SIM115  # closed by `close`

    def weight(self, name: str, *shape: int) -> str:
        kind = self.helper.np_dtype_to_tensor_dtype(self.type)
        tensor = self.onnx.TensorProto(name=name, dims=shape, data_type=kind)
        length = self.type.itemsize * math.prod(shape)
        if self.limit is not None and self.offset and self.offset + length // 2 > self.limit:
            self._next()
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        for key, value in (("location", Path(self.file.name).name), ("offset", self.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        if self.random is not None:
            self.file.seek(self.offset)
            rows = max(1, (16 << 20) * shape[0] // length)
            scale = np.float32(1.0 if len(shape) == 1 else shape[0] ** -0.5)
            for start in range(0, shape[0], rows):
                part = (min(rows, shape[0] - start), *shape[1:])
                (self.random.standard_normal(part, np.float32) * scale).astype(self.type).tofile(self.file)
        self.offset += length + -length % 4096
        return name

    def _next(self) -> None:
        """Go on in another file."""
        self.close()
        self.count, self.offset = self.count + 1, 0
        self.file = open(self.data.with_name(f"{self.data.name}_{self.count}"), "wb")  # noqa: SIM115  # as above

    def constant(self, name: str, array: Any) -> str:
        self.weights.append(self.onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def __call__(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        self.nodes.append(self.helper.make_node(kind, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def close(self) -> None:
        self.file.truncate(self.offset)
        self.file.close()


def write_decoder(path: Path, shape: Decoder) -> None:
    """A decoder of LLaMA's form: RMS norms, rotary positions, (grouped) attention and SwiGLU, all in basic operators.

    Shapes are computed as the TorchScript exporter does: Shape, Gather, Unsqueeze, Concat before each Reshape.
    """
    data = path.with_suffix(".onnx.data")
    g = _Writer(data, shape)
    width, head = shape.width, shape.width // shape.heads
    for k in (0, 1, 2, 3):
        g.constant(f"i{k}", np.int64(k))
        g.constant(f"v{k}", np.array([k], np.int64))
    g.constant("end", np.array([2**62], np.int64))
    g.constant("half", np.array([head // 2], np.int64))
    g.constant("head", np.array([head], np.int64))
    g.constant("eps", np.float32(1e-5))
    g.constant("two", np.float32(2))
    g.constant("one", np.float32(1))
    g.constant("scale", g.type.type(head**-0.5))
    g.constant("low", np.float32(-1e9))
    g.constant("frequency", (10000.0 ** (-np.arange(0, head, 2) / head)).astype(np.float32)[None, :])
    ids = g("Shape", "input_ids", name="shape")
    batch = g("Gather", ids, "i0", name="batch", axis=0)
    length = g("Gather", ids, "i1", name="length", axis=0)
    where = g("Cast", g("Range", "i0", length, "i1", name="range"), name="where", to=1)
    angle = g("Mul", g("Unsqueeze", where, "v1", name="column"), "frequency", name="angle")
    angles = g("Concat", angle, angle, name="angles", axis=-1)

    def single(x: str, name: str) -> str:
        """In float32, where a float16 model computes so."""
        return g("Cast", x, name=f"{name}/single", to=1) if shape.half else x

    def half(x: str, name: str) -> str:
        return g("Cast", x, name=f"{name}/half", to=10) if shape.half else x

    cos, sin = half(g("Cos", angles, name="cos"), "cos"), half(g("Sin", angles, name="sin"), "sin")
    square = g(
        "Concat",
        g("Unsqueeze", length, "v0", name="sq0"),
        g("Unsqueeze", length, "v0", name="sq1"),
        name="square",
        axis=0,
    )
    mask = g("Trilu", g("Expand", "low", square, name="full"), "i1", name="mask", upper=1)

    def norm(x: str, name: str) -> str:
        x = single(x, name)
        mean = g("ReduceMean", g("Pow", x, "two", name=f"{name}/pow"), name=f"{name}/mean", axes=[-1], keepdims=1)
        root = g("Sqrt", g("Add", mean, "eps", name=f"{name}/add"), name=f"{name}/sqrt")
        unit = g("Mul", x, g("Div", "one", root, name=f"{name}/div"), name=f"{name}/unit")
        return g("Mul", g.weight(f"{name}.weight", width), half(unit, name), name=f"{name}/mul")

    def linear(x: str, name: str, cin: int, cout: int) -> str:
        return g("MatMul", x, g.weight(f"{name}.weight", cin, cout), name=f"{name}/MatMul")

    def reshape(x: str, name: str, *tail: str) -> str:
        like = g("Shape", x, name=f"{name}/Shape")
        dims = [
            g(
                "Unsqueeze",
                g("Gather", like, f"i{k}", name=f"{name}/Gather{k}", axis=0),
                "v0",
                name=f"{name}/Unsqueeze{k}",
            )
            for k in (0, 1)
        ]
        return g("Reshape", x, g("Concat", *dims, *tail, name=f"{name}/Concat", axis=0), name=f"{name}/Reshape")

    def split(x: str, name: str) -> str:
        return g("Transpose", reshape(x, name, "minus", "head"), name=f"{name}/Transpose", perm=[0, 2, 1, 3])

    def rotate(x: str, name: str) -> str:
        low = g("Slice", x, "v0", "half", "v3", "v1", name=f"{name}/low")
        high = g("Slice", x, "half", "end", "v3", "v1", name=f"{name}/high")
        turned = g("Concat", g("Neg", high, name=f"{name}/neg"), low, name=f"{name}/turned", axis=-1)
        return g(
            "Add", g("Mul", x, cos, name=f"{name}/cos"), g("Mul", turned, sin, name=f"{name}/sin"), name=f"{name}/rope"
        )

    def repeat(x: str, name: str) -> str:
        times = shape.heads // shape.kv_heads
        if times == 1:
            return x
        like = g("Shape", x, name=f"{name}/kvShape")
        b, k, n, d = (
            g("Slice", like, f"v{j}", f"v{j + 1}" if j < 3 else "end", "v0", name=f"{name}/dim{j}") for j in range(4)
        )
        wide = g(
            "Expand",
            g("Unsqueeze", x, "v2", name=f"{name}/kvUnsqueeze"),
            g("Concat", b, k, "times", n, d, name=f"{name}/kvDims", axis=0),
            name=f"{name}/kvExpand",
        )
        flat = g("Concat", b, g("Mul", k, "times", name=f"{name}/kvHeads"), n, d, name=f"{name}/kvFlat", axis=0)
        return g("Reshape", wide, flat, name=f"{name}/kvReshape")

    g.constant("minus", np.array([-1], np.int64))
    g.constant("times", np.array([shape.heads // shape.kv_heads], np.int64))
    x = g("Gather", g.weight("embedding.weight", shape.vocabulary, width), "input_ids", name="embedding", axis=0)
    kv = shape.kv_heads * head
    for k in range(shape.layers):
        p = f"layers.{k}"
        y = norm(x, f"{p}.input_norm")
        q = rotate(split(linear(y, f"{p}.attn.q", width, width), f"{p}.attn.q"), f"{p}.attn.q")
        key = rotate(split(linear(y, f"{p}.attn.k", width, kv), f"{p}.attn.k"), f"{p}.attn.k")
        value = split(linear(y, f"{p}.attn.v", width, kv), f"{p}.attn.v")
        key, value = repeat(key, f"{p}.attn.k"), repeat(value, f"{p}.attn.v")
        turned = g("Transpose", key, name=f"{p}.attn/kT", perm=[0, 1, 3, 2])
        scores = g("Mul", g("MatMul", q, turned, name=f"{p}.attn/scores"), "scale", name=f"{p}.attn/scaled")
        scores = single(scores, f"{p}.attn/scores")
        soft = g("Softmax", g("Add", scores, mask, name=f"{p}.attn/masked"), name=f"{p}.attn/softmax", axis=-1)
        soft = half(soft, f"{p}.attn/softmax")
        mixed = g("Transpose", g("MatMul", soft, value, name=f"{p}.attn/mix"), name=f"{p}.attn/back", perm=[0, 2, 1, 3])
        y = linear(reshape(mixed, f"{p}.attn.o", "minus"), f"{p}.attn.o", width, width)
        x = g("Add", x, y, name=f"{p}/residual1")
        y = norm(x, f"{p}.post_norm")
        gate = linear(y, f"{p}.mlp.gate", width, shape.hidden)
        silu = g("Mul", gate, g("Sigmoid", gate, name=f"{p}.mlp/sigmoid"), name=f"{p}.mlp/silu")
        up = g("Mul", silu, linear(y, f"{p}.mlp.up", width, shape.hidden), name=f"{p}.mlp/mul")
        x = g("Add", x, linear(up, f"{p}.mlp.down", shape.hidden, width), name=f"{p}/residual2")
    logits = linear(norm(x, "norm"), "lm_head", width, shape.vocabulary)
    g.nodes.append(g.helper.make_node("Identity", [logits], ["logits"], name="logits"))
    g.close()
    if not shape.files:
        data.unlink()
    info = g.helper.make_tensor_value_info
    inputs = [info("input_ids", g.onnx.TensorProto.INT64, ["batch", "length"])]
    outputs = [info("logits", g.helper.np_dtype_to_tensor_dtype(g.type), ["batch", "length", shape.vocabulary])]
    graph = g.helper.make_graph(g.nodes, "decoder", inputs, outputs, g.weights)
    model = g.helper.make_model(graph, opset_imports=[g.helper.make_opsetid("", 17)], producer_name="benchmarks")
    model.ir_version = 8
    del batch
    path.write_bytes(model.SerializeToString())


DECODERS: dict[str, Decoder] = {
    "llama-7b": Decoder(),
    "llama-7b-gqa": Decoder(kv_heads=8),
    "llama-narrow": Decoder(width=512, hidden=1376, random=True),
    **{f"llama-narrow-{n}": Decoder(layers=n, width=512, hidden=1376, random=True) for n in (2, 4, 8, 16)},
    **{f"llama-7b-{n}": Decoder(layers=n) for n in (2, 4, 8, 16)},
    "decoder-1gb": Decoder(layers=16, width=1024, heads=16, kv_heads=16, hidden=4096, vocabulary=1000, random=True),
    "decoder-3gb": Decoder(layers=16, width=2048, heads=16, kv_heads=16, hidden=5632, vocabulary=4000, random=True),
    **{
        f"tinyllama{suffix}": Decoder(22, 2048, 32, 4, 5632, 32000, random=True, half=True, files=files)
        for suffix, files in (("", 1), ("-sharded", 4))
    },
    **{f"tinyllama-{n}-layers": Decoder(n, 2048, 32, 4, 5632, 32000, random=True, half=True) for n in (2, 4)},
    "tinyllama-100m": Decoder(12, 768, 12, 4, 2048, 16000, random=True, half=True),
    "tinyllama-10m": Decoder(6, 320, 10, 2, 896, 6000, random=True, half=True),
    "llama-70b": Decoder(80, 8192, 64, 8, 28672, 128256, half=True, files=0),
}
"""Decoders by name; `llama-7b*` have LLaMA-7B's sizes (27 GB that take no disk), `llama-narrow*` 1/8 of its width."""
