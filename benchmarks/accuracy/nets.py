"""The benchmark's networks as torch modules, with the weights of their ONNX files, for tools that prune modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F  # noqa: N812  # its usual name

TOLERANCE = 1e-4


class MismatchError(Exception):
    """A module computes something else than its ONNX file."""


def _weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}


# -- residual networks for CIFAR-10 ------------------------------------------------------------------------------------


class Shortcut(nn.Conv2d):
    """Every second pixel, channels padded with zeros on both sides, as a convolution with fixed weights.

    Torch-Pruning 1.6.1 does not follow indices through a padding of channels; through a convolution it does.
    """

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__(cin, cout, 1, stride=2, bias=False)
        with torch.no_grad():
            self.weight.zero_()
            rows = torch.arange(cin)
            self.weight[rows + (cout - cin) // 2, rows] = 1


class Block(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        stride = 1 if cin == cout else 2
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Identity() if cin == cout else Shortcut(cin, cout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 32, 64]
        for k in (1, 2, 3):
            first = Block(widths[k - 1], widths[k])
            rest = [Block(widths[k], widths[k]) for _ in range(blocks - 1)]
            setattr(self, f"layer{k}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet(path: Path) -> ResNet:
    weights = _weights(onnx.load(path))
    net = ResNet(len({name.split(".")[1] for name in weights if name.startswith("layer1.")}))
    missing, _ = net.load_state_dict(weights, strict=False)
    wrong = [name for name in missing if "shortcut" not in name and "num_batches" not in name]
    if wrong:
        raise MismatchError(f"{path.name} has no {', '.join(wrong)}")
    return net.eval()


# -- plain convolutional graphs ----------------------------------------------------------------------------------------


class GraphNet(nn.Module):
    """Runs the nodes of a small convolutional ONNX graph one after the other."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        weights = _weights(model)
        self.layers = nn.ModuleDict()
        self.steps: list[tuple[str, list[str], str, dict[str, Any]]] = []
        for node in model.graph.node:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            key = node.output[0].replace(".", "_")
            if node.op_type == "Conv":
                self.layers[key] = _convolution(attributes, *(weights[name] for name in node.input[1:]))
                attributes = {"key": key, "pads": attributes["pads"]}
            elif node.op_type == "Clip":
                attributes = {"low": float(weights[node.input[1]]), "high": float(weights[node.input[2]])}
            inputs = [name for name in node.input if name not in weights]
            self.steps.append((node.op_type, inputs, node.output[0], attributes))
        self.input, self.output = model.graph.input[0].name, model.graph.output[0].name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {self.input: x}
        for op, inputs, output, a in self.steps:
            values[output] = self._step(op, [values[name] for name in inputs], a)
        return values[self.output]

    def _step(self, op: str, v: list[torch.Tensor], a: dict[str, Any]) -> torch.Tensor:
        x = v[0]
        match op:
            case "Conv":
                top, left, bottom, right = a["pads"]
                uneven = (top, left) != (bottom, right)
                return self.layers[a["key"]](F.pad(x, (left, right, top, bottom)) if uneven else x)
            case "Relu":
                return F.relu(x)
            case "Clip":
                return torch.clamp(x, a["low"], a["high"])
            case "Add":
                return x + v[1]
            case "Concat":
                return torch.cat(v, a["axis"])
            case "MaxPool":
                return F.max_pool2d(x, a["kernel_shape"], a["strides"], ceil_mode=bool(a.get("ceil_mode")))
            case "GlobalAveragePool":
                return F.adaptive_avg_pool2d(x, 1)
            case "Flatten":
                return x.flatten(1)
            case "Softmax":
                return x  # the loss wants logits, and the largest stays the largest
        raise MismatchError(f"operator {op} is not known here")


def _convolution(a: dict[str, Any], weight: torch.Tensor, bias: torch.Tensor) -> nn.Conv2d:
    top, left, bottom, right = a["pads"]
    groups = a.get("group", 1)
    layer = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], tuple(a["kernel_shape"]), tuple(a["strides"]),
        (top, left) if (top, left) == (bottom, right) else 0, groups=groups,
    )  # fmt: skip
    layer.weight.data = weight
    layer.bias = nn.Parameter(bias)
    return layer


def graph_net(path: Path) -> GraphNet:
    return GraphNet(onnx.load(path)).eval()


# -- vision transformer ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, t, self.num_heads * self.head_dim))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Encoder(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, 1e-6), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, 1e-6), Mlp(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 16, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.blocks = nn.Sequential(*(Encoder(width, heads, 4 * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, 1e-6), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def transformer(path: Path) -> VisionTransformer:
    """DeiT: biases keep their names in the file, the matrices of the linear layers do not and are found by them."""
    model = onnx.load(path)
    weights = _weights(model)
    product = {n.output[0]: n.input[1] for n in model.graph.node if n.op_type == "MatMul"}
    for node in model.graph.node:
        bias = next((name for name in node.input if name.endswith(".bias")), None)
        matrix = next((product[name] for name in node.input if name in product), None)
        if node.op_type == "Add" and bias and matrix in weights:
            weights[bias.removesuffix("bias") + "weight"] = weights[matrix].T.contiguous()
    net = VisionTransformer()
    missing, _ = net.load_state_dict(weights, strict=False)
    if missing:
        raise MismatchError(f"{path.name} has no {', '.join(missing)}")
    return net.eval()


def check(net: nn.Module, path: Path, x: np.ndarray[Any, Any]) -> float:
    """Largest difference of the outputs from ONNX Runtime's on a few inputs.

    Raises:
        MismatchError: it is above 1e-4 of the largest output.
    """
    from benchmarks.accuracy.evaluate import session

    run: Any = session(path)
    want = run({run.input_name: x})
    with torch.no_grad():
        got = net(torch.from_numpy(x))
        if np.allclose(want.sum(1), 1, atol=1e-3):  # the file ends in a softmax
            got = got.softmax(1)
    worst = float(np.abs(got.numpy() - want).max())
    if worst > TOLERANCE * max(1.0, float(np.abs(want).max())):
        raise MismatchError(f"the module of {path.name} differs from the file by {worst:.2e}")
    return worst
