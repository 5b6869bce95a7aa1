"""Networks as torch modules with seeded random weights, and their export (torchvision is not needed).

torch is imported when a network is built, `transformers` for `bert-base-hf` and `llama-narrow`: the names are known
without them. `spa` is never imported, so that the tools it is compared with can use this in an environment of their
own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 0


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

    class Residual(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
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

    class Dense(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
        def __init__(self, cin: int, growth: int = 32) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, 4 * growth, 1, bias=False),
                nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
            )  # fmt: skip

        def forward(self, x: list[Any]) -> list[Any]:
            return [*x, self.body(torch.cat(x, 1))]

    class Block(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
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

    class Excite(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
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

    class Norm(nn.LayerNorm):  # type: ignore[misc,name-defined]  # torch is looked up at run time
        def forward(self, x: Any) -> Any:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Block(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
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

    class Layer(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
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

    class ViT(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
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

    class Bert(nn.Module):  # type: ignore[misc,name-defined]  # torch is looked up at run time
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

    class Wrapper(_torch().nn.Module):  # type: ignore[misc]  # torch is looked up at run time
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


def export(name: str, path: Path, dynamo: bool) -> None:
    """Write a network of `MODULES` as ONNX, by one of the two exporters of torch."""
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
