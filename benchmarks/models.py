"""The models the benchmarks run on: random seeded weights, no downloads.

    python benchmarks/models.py [NAME ...] [--cache FOLDER]

Networks are written here (torchvision is not needed) and exported by `torch.onnx.export`; decoders of LLaMA's shape
are written as ONNX directly, so that 27 GB of weights never exist: their data file is sparse, it has a size but no
blocks. Files are kept in $SPA_BENCH_CACHE, by default `spa-benchmarks` in the temporary folder.

This module needs torch for the exported networks only, and `transformers` for `bert-base-hf` and `llama-narrow` as
modules; it never imports `spa`, so that the tools it is compared with can import it in an environment of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SEED = 0


def cache() -> Path:
    """Where models are kept."""
    folder = Path(os.environ.get("SPA_BENCH_CACHE") or Path(tempfile.gettempdir()) / "spa-benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- networks as torch modules ----------------------------------------------------------------------------------------


def _torch() -> Any:
    import torch

    return torch


def _conv(cin: int, cout: int, k: int = 1, stride: int = 1, groups: int = 1, act: str = "relu") -> Any:
    """Convolution, batch norm, activation."""
    nn = _torch().nn
    acts = {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "": None}
    layers = [nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(cout)]
    if (kind := acts[act]) is not None:
        layers.append(kind())
    return nn.Sequential(*layers)


def _residual(body: Any, shortcut: Any = None, after: Any = None) -> Any:
    nn = _torch().nn

    class Residual(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.shortcut, self.after = body, shortcut or nn.Identity(), after or nn.Identity()

        def forward(self, x: Any) -> Any:
            return self.after(self.body(x) + self.shortcut(x))

    return Residual()


def resnet50() -> Any:
    nn = _torch().nn
    layers: list[Any] = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    cin = 64
    for stage, (width, depth) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for block in range(depth):
            stride = 2 if stage and not block else 1
            body = nn.Sequential(_conv(cin, width), _conv(width, width, 3, stride), _conv(width, 4 * width, act=""))
            shortcut = _conv(cin, 4 * width, 1, stride, act="") if not block else None
            layers.append(_residual(body, shortcut, nn.ReLU()))
            cin = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 1000))


def vgg16_bn() -> Any:
    nn = _torch().nn
    layers, cin = [], 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers.append(_conv(cin, width, 3))
            cin = width
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def mobilenet_v2() -> Any:
    nn = _torch().nn
    layers, cin = [_conv(3, 32, 3, 2, act="relu6")], 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, cout, depth, first in table:
        for block in range(depth):
            stride, hidden = first if not block else 1, cin * expand
            parts = [_conv(cin, hidden, act="relu6")] if expand > 1 else []
            parts += [_conv(hidden, hidden, 3, stride, hidden, act="relu6"), _conv(hidden, cout, act="")]
            body = nn.Sequential(*parts)
            layers.append(_residual(body) if stride == 1 and cin == cout else body)
            cin = cout
    return nn.Sequential(
        *layers, _conv(cin, 1280, act="relu6"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)
    )


def densenet121() -> Any:
    torch = _torch()
    nn = torch.nn

    class Dense(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, cin: int, growth: int = 32) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, 4 * growth, 1, bias=False),
                nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
            )  # fmt: skip

        def forward(self, x: list[Any]) -> list[Any]:
            return [*x, self.body(torch.cat(x, 1))]

    class Block(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, cin: int, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Dense(cin + 32 * k) for k in range(depth))

        def forward(self, x: Any) -> Any:
            parts = [x]
            for layer in self.layers:
                parts = layer(parts)
            return torch.cat(parts, 1)

    layers, cin = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate((6, 12, 24, 16)):
        layers.append(Block(cin, depth))
        cin += 32 * depth
        if stage < 3:
            layers += [nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, cin // 2, 1, bias=False), nn.AvgPool2d(2)]
            cin //= 2
    return nn.Sequential(
        *layers, nn.BatchNorm2d(cin), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 1000)
    )


def efficientnet_b0() -> Any:
    nn = _torch().nn

    class Excite(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, width: int, squeeze: int) -> None:
            super().__init__()
            self.gate = nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(width, squeeze, 1),
                nn.SiLU(),
                nn.Conv2d(squeeze, width, 1),
                nn.Sigmoid(),
            )

        def forward(self, x: Any) -> Any:
            return x * self.gate(x)

    layers, cin = [_conv(3, 32, 3, 2, act="silu")], 32
    table = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    )  # fmt: skip
    for expand, cout, depth, first, k in table:
        for block in range(depth):
            stride, hidden = first if not block else 1, cin * expand
            parts = [_conv(cin, hidden, act="silu")] if expand > 1 else []
            parts += [
                _conv(hidden, hidden, k, stride, hidden, act="silu"),
                Excite(hidden, max(1, cin // 4)),
                _conv(hidden, cout, act=""),
            ]
            body = nn.Sequential(*parts)
            layers.append(_residual(body) if stride == 1 and cin == cout else body)
            cin = cout
    return nn.Sequential(
        *layers, _conv(cin, 1280, act="silu"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)
    )


def convnext_tiny() -> Any:
    torch = _torch()
    nn = torch.nn

    class Norm(nn.LayerNorm):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Block(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.scale = nn.Parameter(0.1 * torch.ones(width))

        def forward(self, x: Any) -> Any:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            y = self.scale * self.down(nn.functional.gelu(self.up(y)))
            return x + y.permute(0, 3, 1, 2)

    layers: list[Any] = [nn.Conv2d(3, 96, 4, 4), Norm(96, eps=1e-6)]
    cin = 96
    for width, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width != cin:
            layers += [Norm(cin, eps=1e-6), nn.Conv2d(cin, width, 2, 2)]
            cin = width
        layers += [Block(width) for _ in range(depth)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(cin), nn.Linear(cin, 1000))


def _encoder_layer(width: int, heads: int, hidden: int, fused: bool, before: bool) -> Any:
    """A transformer layer: fused or separate query, key and value; normalised before or after each part."""
    torch = _torch()
    nn = torch.nn

    class Layer(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            if fused:
                self.qkv = nn.Linear(width, 3 * width)
            else:
                self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
            self.out = nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

        def attend(self, x: Any, mask: Any) -> Any:
            b, n, _ = x.shape
            if fused:
                q, k, v = self.qkv(x).reshape(b, n, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
            else:
                q, k, v = (f(x).view(b, n, heads, width // heads).transpose(1, 2) for f in (self.q, self.k, self.v))
            scores = q @ k.transpose(-2, -1) / (width // heads) ** 0.5
            if mask is not None:
                scores = scores + mask
            y = scores.softmax(-1) @ v
            return self.out(y.transpose(1, 2).reshape(b, n, width))

        def forward(self, x: Any, mask: Any = None) -> Any:
            gelu = nn.functional.gelu
            if before:
                x = x + self.attend(self.norm1(x), mask)
                return x + self.down(gelu(self.up(self.norm2(x))))
            x = self.norm1(x + self.attend(x, mask))
            return self.norm2(x + self.down(gelu(self.up(x))))

    return Layer()


def vit_b16(depth: int = 12) -> Any:
    torch = _torch()
    nn = torch.nn

    class ViT(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 768, 16, 16)
            self.token = nn.Parameter(0.02 * torch.randn(1, 1, 768))
            self.position = nn.Parameter(0.02 * torch.randn(1, 197, 768))
            self.layers = nn.ModuleList(_encoder_layer(768, 12, 3072, True, True) for _ in range(depth))
            self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

        def forward(self, x: Any) -> Any:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x)[:, 0])

    return ViT()


def bert_base(depth: int = 12) -> Any:
    torch = _torch()
    nn = torch.nn

    class Bert(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kinds, self.positions = (nn.Embedding(n, 768) for n in (30522, 2, 512))
            self.norm = nn.LayerNorm(768)
            self.layers = nn.ModuleList(_encoder_layer(768, 12, 3072, False, False) for _ in range(depth))
            self.pooler = nn.Linear(768, 768)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            x = self.words(input_ids) + self.kinds(torch.zeros_like(input_ids))
            x = self.norm(x + self.positions(torch.arange(input_ids.shape[1])))
            mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e9
            for layer in self.layers:
                x = layer(x, mask)
            return x, self.pooler(x[:, 0]).tanh()

    return Bert()


def bert_base_hf(depth: int = 12) -> Any:
    from transformers import BertConfig, BertModel

    return _by_keyword(BertModel(BertConfig(num_hidden_layers=depth)), "input_ids", "attention_mask")


def llama_narrow_hf(depth: int = 32) -> Any:
    """Width 1/8 of LLaMA-7B, for tools that must hold and run the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=depth, num_attention_heads=32,
        num_key_value_heads=32, use_cache=False,
    )  # fmt: skip
    return _by_keyword(LlamaForCausalLM(config), "input_ids")


def _by_keyword(net: Any, *names: str) -> Any:
    """A module that takes positional inputs, as exporters and tracers want, and returns the first output."""

    class Wrapper(_torch().nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *inputs: Any) -> Any:
            return self.net(**dict(zip(names, inputs, strict=True)), return_dict=False)[0]

    return Wrapper()


def module(build: Callable[[], Any]) -> Any:
    """The seeded module in evaluation mode; norms are given statistics of their own, as trained ones have."""
    torch = _torch()
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = build()
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.1)
            elif isinstance(part, torch.nn.LayerNorm):
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.1)
    return net.eval()


def example(name: str) -> tuple[Any, ...]:
    """Inputs of a module."""
    torch = _torch()
    generator = torch.Generator().manual_seed(SEED)
    if name.startswith("bert"):
        return torch.randint(0, 30522, (1, 128), generator=generator), torch.ones(1, 128, dtype=torch.int64)
    if name.startswith("llama"):
        return (torch.randint(0, 32000, (1, 128), generator=generator),)
    return (torch.randn(1, 3, 224, 224, generator=generator),)


MODULES: dict[str, Callable[[], Any]] = {
    "resnet50": resnet50,
    "vgg16-bn": vgg16_bn,
    "mobilenet-v2": mobilenet_v2,
    "densenet121": densenet121,
    "efficientnet-b0": efficientnet_b0,
    "vit-b16": vit_b16,
    "convnext-t": convnext_tiny,
    "bert-base": bert_base,
    "bert-base-hf": bert_base_hf,
}
"""Networks by name."""
PEER_MODULES: dict[str, Callable[[], Any]] = {**MODULES, "llama-narrow": llama_narrow_hf}


def _export(name: str, path: Path, dynamo: bool) -> None:
    torch = _torch()
    net, inputs = module(MODULES[name]), example(name)
    names = ["input_ids", "attention_mask"][: len(inputs)] if name.startswith("bert") else ["x"]
    text = name.startswith("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            batch = torch.export.Dim("batch", min=1, max=64)
            length = torch.export.Dim("length", min=2, max=512)
            shapes = tuple({0: batch, 1: length} if text else {0: batch} for _ in inputs)
            inputs = tuple(torch.cat([x, x]) for x in inputs)
            program = torch.onnx.export(
                net,
                inputs,
                None,
                dynamo=True,
                opset_version=18,
                input_names=names,
                dynamic_shapes=shapes,
                verbose=False,
            )
            program.save(str(path), external_data=False)
        else:
            axes = {n: {0: "batch", 1: "length"} if text else {0: "batch"} for n in names}
            torch.onnx.export(
                net, inputs, str(path), dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes
            )


# -- decoders of LLaMA's shape, as ONNX -------------------------------------------------------------------------------


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
        self.file = open(data, "wb")  # noqa: SIM115  (closed by `close`)
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


# -- files ------------------------------------------------------------------------------------------------------------


def path_of(name: str) -> Path:
    """Where a model lies once `build` made it."""
    return cache() / f"{name}.onnx"


def build(name: str) -> Path:
    """Make a model unless it is there: a name of `MODULES` (with `-dynamo` for the other exporter) or of `DECODERS`."""
    path = path_of(name)
    if path.exists():
        return path
    draft = path.with_suffix(".draft.onnx")
    if name in DECODERS:  # the data file's name is part of the model
        path.with_suffix(".onnx.data").unlink(missing_ok=True)
        folder = Path(tempfile.mkdtemp(dir=cache()))
        write_decoder(folder / path.name, DECODERS[name])
        os.replace(folder / f"{path.name}.data", f"{path}.data")
        os.replace(folder / path.name, path)
        folder.rmdir()
        return path
    if name == "decoder-1gb-single":
        _inline(build("decoder-1gb"), draft)
    else:
        _export(name.removesuffix("-dynamo"), draft, name.endswith("-dynamo"))
    os.replace(draft, path)
    return path


def _inline(source: Path, target: Path) -> None:
    """The same model with its weights inside."""
    import onnx

    onnx.save(onnx.load(str(source)), str(target))


def needs(name: str) -> Sequence[str]:
    """Packages that building a model takes."""
    if name in DECODERS or name == "decoder-1gb-single":
        return ("onnx",)
    exporter = ("onnxscript",) if name.endswith("-dynamo") else ()
    return ("torch", "onnx", *exporter, *(("transformers",) if "-hf" in name else ()))


NAMES = (
    *MODULES,
    "resnet50-dynamo",
    "vit-b16-dynamo",
    "bert-base-dynamo",
    *DECODERS,
    "decoder-1gb-single",
)
"""Everything `build` can make."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    if options.cache:
        os.environ["SPA_BENCH_CACHE"] = str(options.cache)
    for name in options.names or NAMES:
        try:
            path = build(name)
        except ImportError as error:
            print(f"{name:20} skipped: {error}", flush=True)
            continue
        data = path.with_name(path.name + ".data")
        size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
        disk = (path.stat().st_blocks + (data.stat().st_blocks if data.exists() else 0)) * 512
        print(f"{name:20} {size / 1e6:10,.1f} MB ({disk / 1e6:,.1f} MB on disk)  {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
