"""The two networks in JAX (flax). `python jax_models.py FOLDER EPOCHS` trains them; `cnn`, `transformer` load them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class ConvBN(nnx.Module):
    """Convolution and BatchNormalization."""

    def __init__(self, c_in: int, c_out: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(c_in, c_out, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(c_out, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Without an activation."""
        return self.norm(self.conv(x))


class CNN(nnx.Module):
    """Stem, residual block, pooling, convolution, dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem = ConvBN(1, 12, rngs)
        self.first, self.second = ConvBN(12, 12, rngs), ConvBN(12, 12, rngs)
        self.last = ConvBN(12, 16, rngs)
        self.classifier = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Logits of images [batch, 8, 8, 1]."""
        x = nnx.relu(self.stem(image))
        x = nnx.relu(x + self.second(nnx.relu(self.first(x))))
        x = nnx.relu(self.last(nnx.max_pool(x, window_shape=(2, 2), strides=(2, 2))))
        return self.classifier(x.mean((1, 2)))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(dim, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(heads, dim, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(dim, mlp, rngs=rngs), nnx.Linear(mlp, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention and MLP, both residual."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class Transformer(nnx.Module):
    """Patches of 2 x 2, two blocks, mean over the tokens, dense layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.patch = nnx.Conv(1, 16, (2, 2), (2, 2), rngs=rngs)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (1, 16, 16)) * 0.1)
        self.blocks = nnx.List([Block(16, 4, 48, rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(16, epsilon=1e-5, rngs=rngs)
        self.classifier = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Logits of images [batch, 8, 8, 1]."""
        x = self.patch(image).reshape(-1, 16, 16) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(1))


NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {"cnn": CNN, "transformer": Transformer}
FOLDER = Path(os.environ.get("FRAMEWORKS_FOLDER", "."))


def trained(name: str) -> tuple[nnx.Module, tuple[jax.Array]]:
    """A trained network, and an example."""
    network = NETWORKS[name](nnx.Rngs(0))
    stored = np.load(FOLDER / f"{name}.npz")
    state = nnx.state(network)
    leaves, structure = jax.tree_util.tree_flatten(state)
    read = [
        leaf if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.asarray(stored[str(k)])
        for k, leaf in enumerate(leaves)
    ]
    nnx.update(network, jax.tree_util.tree_unflatten(structure, read))
    return network, (jnp.zeros((1, 8, 8, 1)),)


def cnn() -> tuple[nnx.Module, tuple[jax.Array]]:
    """For `spa export jax:jax_models:cnn`."""
    return trained("cnn")


def transformer() -> tuple[nnx.Module, tuple[jax.Array]]:
    """For `spa export jax:jax_models:transformer`."""
    return trained("transformer")


@nnx.jit
def step(network: Any, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    """One step of Adam on cross entropy."""

    def loss(network: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(network(images), labels).mean()

    optimizer.update(network, nnx.grad(loss)(network))


def main(folder: Path, epochs: int) -> None:
    """Train both and write their weights."""
    digits = np.load(folder / "digits.npz")
    images, labels = digits["images"][..., None], digits["labels"]
    for name, build in NETWORKS.items():
        network, rng = build(nnx.Rngs(0)), np.random.default_rng(0)
        network.train()
        steps = epochs * (len(images) // 64)
        optimizer = nnx.Optimizer(network, optax.adam(optax.cosine_decay_schedule(5e-3, steps)), wrt=nnx.Param)
        for _ in range(epochs):
            order = rng.permutation(len(images))
            for k in range(len(images) // 64):  # whole batches only: each other size would be compiled anew
                index = order[64 * k : 64 * (k + 1)]
                step(network, optimizer, images[index], labels[index])
        leaves = jax.tree_util.tree_leaves(nnx.state(network))
        arrays = {str(k): x for k, x in enumerate(leaves) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)}
        np.savez(folder / f"{name}.npz", **{k: np.asarray(x) for k, x in arrays.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
