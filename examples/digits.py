"""Two small networks, really trained on scikit-learn's handwritten digits and exported to ONNX.

The CNN is residual, has a depthwise block and keeps its BatchNormalization nodes (they are what `bn-scale` reads).
The ViT has a fused qkv projection, a class token and a GELU MLP. Both recipes are ordinary; the CNN's strong weight
decay costs no accuracy and lets the channels that it does not need shrink, which pruning by magnitude hopes for.

    python examples/digits.py        # trains and exports both into examples/out/
"""

from __future__ import annotations

import functools
import multiprocessing
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name everybody uses)

OUT = Path(__file__).parent / "out"
OPSET = 17


class ConvBN(nn.Sequential):
    """Convolution, BatchNormalization and, unless told otherwise, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True):
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), nn.ReLU() if relu else nn.Identity())


class Basic(nn.Module):
    """ResNet's basic block, with a 1x1 shortcut where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(ConvBN(c_in, c_out, 3, stride), ConvBN(c_out, c_out, 3, relu=False))
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else ConvBN(c_in, c_out, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum, then ReLU."""
        return F.relu(self.body(x) + self.shortcut(x))


class Inverted(nn.Module):
    """MobileNetV2's block: expand, depthwise convolution, project, add."""

    def __init__(self, channels: int, expand: int):
        super().__init__()
        wide = channels * expand
        self.body = nn.Sequential(
            ConvBN(channels, wide, 1), ConvBN(wide, wide, 3, groups=wide), ConvBN(wide, channels, 1, relu=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum."""
        return x + self.body(x)


def cnn() -> nn.Module:
    """A residual CNN of about 0.2 million parameters."""
    return nn.Sequential(
        ConvBN(1, 32, 3), Basic(32, 32), Basic(32, 64, stride=2), Inverted(64, 3), Basic(64, 64),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Softmax attention over the tokens."""
        batch, tokens, dim = x.shape
        head_dim = dim // self.heads
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * head_dim**-0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp), nn.GELU(), nn.Linear(mlp, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, both residual."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer on 2x2 patches: 16 tokens and a class token."""

    def __init__(self, dim: int = 64, layers: int = 4, heads: int = 4, mlp: int = 256):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, dim) * 0.5)
        self.layers = nn.Sequential(*[Layer(dim, heads, mlp) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits from the class token."""
        patches = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


@dataclass(frozen=True)
class Recipe:
    """How one network is built, trained and exported."""

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float
    keep_batch_norm: bool
    """Export BatchNormalization as nodes instead of folding it into the convolutions."""


RECIPES = {
    "cnn": Recipe(cnn, epochs=20, learning_rate=4e-3, weight_decay=2.0, keep_batch_norm=True),
    "vit": Recipe(ViT, epochs=50, learning_rate=1.5e-3, weight_decay=0.05, keep_batch_norm=False),
}


@functools.cache
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images, training labels, test labels: 1347 and 450 of them, never mixed."""
    digits = load_digits()
    images = (digits.images[:, None] / 8 - 1).astype(np.float32)
    split = train_test_split(images, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    return tuple(split)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image by up to one pixel in each direction: the only augmentation."""
    dy, dx = torch.randint(0, 3, (2, len(images)), generator=generator)
    padded = F.pad(images[:, 0], (1, 1, 1, 1), value=-1)
    rows, cols = dy[:, None] + torch.arange(8), dx[:, None] + torch.arange(8)
    return padded[torch.arange(len(images))[:, None, None], rows[:, :, None], cols[:, None, :]][:, None]


def train(recipe: Recipe, *, epochs: int | None = None, seed: int = 0, batch: int = 64) -> nn.Module:
    """Train on the training split and return the network in evaluation mode."""
    torch.set_num_threads(1)  # the layers are too small for more, and results no longer depend on the number of cores
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, _, labels, _ = (torch.from_numpy(array) for array in data())
    model = recipe.build()
    steps = -(-len(images) // batch) * (epochs or recipe.epochs)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.15)
    for _ in range(epochs or recipe.epochs):
        for index in torch.randperm(len(images), generator=generator).split(batch):
            logits = model(shifted(images[index], generator))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def export(model: nn.Module, path: Path, *, keep_batch_norm: bool) -> None:
    """Write `model` as ONNX with a dynamic batch."""
    mode = torch.onnx.TrainingMode.PRESERVE if keep_batch_norm else torch.onnx.TrainingMode.EVAL
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter calls itself deprecated, but the new one needs another package
        torch.onnx.export(
            model.eval(), (torch.zeros(2, 1, 8, 8),), path, dynamo=False, opset_version=OPSET, training=mode,
            input_names=["image"], output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip


def make(name: str, path: Path, *, epochs: int | None = None, seed: int = 0) -> Path:
    """Train the network called `name` ("cnn" or "vit") and write it to `path`."""
    recipe = RECIPES[name]
    export(train(recipe, epochs=epochs, seed=seed), path, keep_batch_norm=recipe.keep_batch_norm)
    return path


def trained() -> dict[str, Path]:
    """Both trained networks in `examples/out/`; those missing or older than this file are made, in one process each."""
    paths = {name: OUT / f"{name}.onnx" for name in RECIPES}
    recipe_time = Path(__file__).stat().st_mtime
    stale = [name for name, path in paths.items() if not path.exists() or path.stat().st_mtime < recipe_time]
    if stale:
        with ProcessPoolExecutor(len(stale), mp_context=multiprocessing.get_context("spawn")) as pool:
            made = pool.map(make, stale, [paths[name].with_suffix(".tmp") for name in stale])
            for name, temporary in zip(stale, made, strict=True):
                temporary.replace(paths[name])
    return paths


def accuracy(model: Path | bytes) -> float:
    """Fraction of the test images that `model` classifies correctly in ONNX Runtime."""
    _, images, _, labels = data()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images})
    return float((logits.argmax(1) == labels).mean())


if __name__ == "__main__":
    start = time.perf_counter()
    for file in trained().values():
        print(f"{file}: {accuracy(file):.2%} of the test images")
    print(f"{time.perf_counter() - start:.0f} s")
