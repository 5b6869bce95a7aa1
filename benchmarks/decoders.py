"""Decoders of LLaMA's shape, written as ONNX directly.

27 GB of weights never exist: the data file is sparse, it has a size but no blocks.
"""

from __future__ import annotations

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
    """Real random float32 weights; else the data file is sparse and reads as zeros."""


class _Writer:
    """Nodes, and weights that go straight to the data file."""

    def __init__(self, data: Path, random: bool) -> None:
        import onnx

        self.onnx, self.helper = onnx, onnx.helper
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.location, self.offset = data.name, 0
        self.file = open(data, "wb")  # noqa: SIM115  # closed by `close`
        self.random = np.random.default_rng(SEED) if random else None

    def weight(self, name: str, *shape: int) -> str:
        tensor = self.onnx.TensorProto(name=name, dims=shape, data_type=self.onnx.TensorProto.FLOAT)
        length = 4 * int(np.prod(shape))
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", self.offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        if self.random is not None:
            self.file.seek(self.offset)
            rows = max(1, (16 << 20) * shape[0] // length)
            scale = np.float32(1.0 if len(shape) == 1 else shape[0] ** -0.5)
            for start in range(0, shape[0], rows):
                part = (min(rows, shape[0] - start), *shape[1:])
                (self.random.standard_normal(part, np.float32) * scale).tofile(self.file)
        self.offset += length + -length % 4096
        return name

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
    g = _Writer(data, shape.random)
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
    g.constant("scale", np.float32(head**-0.5))
    g.constant("low", np.float32(-1e9))
    g.constant("frequency", (10000.0 ** (-np.arange(0, head, 2) / head)).astype(np.float32)[None, :])
    ids = g("Shape", "input_ids", name="shape")
    batch = g("Gather", ids, "i0", name="batch", axis=0)
    length = g("Gather", ids, "i1", name="length", axis=0)
    where = g("Cast", g("Range", "i0", length, "i1", name="range"), name="where", to=1)
    angle = g("Mul", g("Unsqueeze", where, "v1", name="column"), "frequency", name="angle")
    angles = g("Concat", angle, angle, name="angles", axis=-1)
    cos, sin = g("Cos", angles, name="cos"), g("Sin", angles, name="sin")
    square = g(
        "Concat",
        g("Unsqueeze", length, "v0", name="sq0"),
        g("Unsqueeze", length, "v0", name="sq1"),
        name="square",
        axis=0,
    )
    mask = g("Trilu", g("Expand", "low", square, name="full"), "i1", name="mask", upper=1)

    def norm(x: str, name: str) -> str:
        mean = g("ReduceMean", g("Pow", x, "two", name=f"{name}/pow"), name=f"{name}/mean", axes=[-1], keepdims=1)
        root = g("Sqrt", g("Add", mean, "eps", name=f"{name}/add"), name=f"{name}/sqrt")
        unit = g("Mul", x, g("Div", "one", root, name=f"{name}/div"), name=f"{name}/unit")
        return g("Mul", g.weight(f"{name}.weight", width), unit, name=f"{name}/mul")

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
        soft = g("Softmax", g("Add", scores, mask, name=f"{p}.attn/masked"), name=f"{p}.attn/softmax", axis=-1)
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
    info = g.helper.make_tensor_value_info
    inputs = [info("input_ids", g.onnx.TensorProto.INT64, ["batch", "length"])]
    outputs = [info("logits", g.onnx.TensorProto.FLOAT, ["batch", "length", shape.vocabulary])]
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
}
"""Decoders by name; `llama-7b*` have LLaMA-7B's sizes (27 GB that take no disk), `llama-narrow*` 1/8 of its width."""
