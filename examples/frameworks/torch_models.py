"""The two networks in PyTorch. `python torch_models.py FOLDER EPOCHS` trains them; `cnn`, `transformer` load them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name everybody uses)


class ConvBN(nn.Sequential):
    """Convolution, BatchNormalization and, unless told otherwise, ReLU."""

    def __init__(self, c_in: int, c_out: int, relu: bool = True):
        conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), nn.ReLU() if relu else nn.Identity())


class CNN(nn.Module):
    """Stem, residual block, pooling, convolution, dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 12)
        self.first, self.second = ConvBN(12, 12), ConvBN(12, 12, relu=False)
        self.last = ConvBN(12, 16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of images [batch, 1, 8, 8]."""
        x = self.stem(image)
        x = F.relu(x + self.second(self.first(x)))
        return self.classifier(self.last(F.max_pool2d(x, 2)).mean((2, 3)))


class Attention(nn.Module):
    """Multi-head attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Of all tokens to all tokens."""
        batch, tokens, dim = x.shape
        q, k, v = (
            layer(x).reshape(batch, tokens, self.heads, dim // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-2, -1) * (dim // self.heads) ** -0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.up, self.down = nn.Linear(dim, mlp), nn.Linear(mlp, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, both residual."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Patches of 2 x 2, two blocks, mean over the tokens, dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 16, 2, 2)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.1)
        self.blocks = nn.Sequential(Block(16, 4, 48), Block(16, 4, 48))
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of images [batch, 1, 8, 8]."""
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.norm(self.blocks(x)).mean(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"cnn": CNN, "transformer": Transformer}
FOLDER = Path(os.environ.get("FRAMEWORKS_FOLDER", "."))


def trained(name: str) -> tuple[nn.Module, Tensor]:
    """A trained network, and an example."""
    network = NETWORKS[name]()
    network.load_state_dict(torch.load(FOLDER / f"{name}.pt", weights_only=True))
    return network, torch.zeros(1, 1, 8, 8)


def cnn() -> tuple[nn.Module, Tensor]:
    """For `spa export torch:torch_models:cnn`."""
    return trained("cnn")


def transformer() -> tuple[nn.Module, Tensor]:
    """For `spa export torch:torch_models:transformer`."""
    return trained("transformer")


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Adam on cross entropy."""
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    steps = epochs * -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()


def main(folder: Path, epochs: int) -> None:
    """Train both and write their weights."""
    torch.set_num_threads(1)
    digits = np.load(folder / "digits.npz")
    images = torch.from_numpy(digits["images"][:, None])
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        network = build()
        train(network, images, torch.from_numpy(digits["labels"]), epochs)
        torch.save(network.state_dict(), folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
