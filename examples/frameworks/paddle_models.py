"""The two networks in PaddlePaddle. `python paddle_models.py FOLDER EPOCHS` trains them and writes them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F  # noqa: N812 (the name everybody uses)


class ConvBN(nn.Sequential):
    """Convolution, BatchNormalization and, unless told otherwise, ReLU."""

    def __init__(self, c_in: int, c_out: int, relu: bool = True):
        conv = nn.Conv2D(c_in, c_out, 3, padding=1, bias_attr=False)
        super().__init__(conv, nn.BatchNorm2D(c_out), nn.ReLU() if relu else nn.Identity())


class CNN(nn.Layer):
    """Stem, residual block, pooling, convolution, dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBN(1, 12)
        self.first, self.second = ConvBN(12, 12), ConvBN(12, 12, relu=False)
        self.last = ConvBN(12, 16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, image: paddle.Tensor) -> paddle.Tensor:
        """Logits of images [batch, 1, 8, 8]."""
        x = self.stem(image)
        x = F.relu(x + self.second(self.first(x)))
        return self.classifier(self.last(F.max_pool2d(x, 2)).mean([2, 3]))


class Block(nn.Layer):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiHeadAttention(dim, heads)
        self.up, self.down = nn.Linear(dim, mlp), nn.Linear(mlp, dim)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Attention and MLP, both residual."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Layer):
    """Patches of 2 x 2, two blocks, mean over the tokens, dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2D(1, 16, 2, 2)
        self.position = self.create_parameter([1, 16, 16], default_initializer=nn.initializer.Normal(std=0.1))
        self.blocks = nn.Sequential(Block(16, 4, 48), Block(16, 4, 48))
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 10)

    def forward(self, image: paddle.Tensor) -> paddle.Tensor:
        """Logits of images [batch, 1, 8, 8]."""
        x = self.patch(image).flatten(2).transpose([0, 2, 1]) + self.position
        return self.classifier(self.norm(self.blocks(x)).mean(1))


def main(folder: Path, epochs: int) -> None:
    """Train both and write them for inference."""
    digits = np.load(folder / "digits.npz")
    images, labels = digits["images"][:, None], digits["labels"]
    for name, build in {"cnn": CNN, "transformer": Transformer}.items():
        paddle.seed(0)
        network, rng = build(), np.random.default_rng(0)
        schedule = paddle.optimizer.lr.CosineAnnealingDecay(5e-3, epochs * -(-len(images) // 64))
        optimizer = paddle.optimizer.Adam(schedule, parameters=network.parameters())
        for _ in range(epochs):
            order = rng.permutation(len(images))
            for k in range(0, len(images), 64):
                index = order[k : k + 64]
                loss = F.cross_entropy(network(paddle.to_tensor(images[index])), paddle.to_tensor(labels[index]))
                loss.backward()
                optimizer.step()
                optimizer.clear_grad()
                schedule.step()
        network.eval()
        spec = paddle.static.InputSpec([None, 1, 8, 8], "float32", "image")
        paddle.jit.save(network, str(folder / f"{name}-inference" / "model"), input_spec=[spec])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
