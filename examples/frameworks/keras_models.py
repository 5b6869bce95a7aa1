"""The two networks in Keras. `python keras_models.py FOLDER EPOCHS` trains them and writes both of its formats."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
from keras import layers


def conv_bn(x: keras.KerasTensor, channels: int, relu: bool = True) -> keras.KerasTensor:
    """Convolution, BatchNormalization and, unless told otherwise, ReLU."""
    x = layers.BatchNormalization()(layers.Conv2D(channels, 3, padding="same", use_bias=False)(x))
    return layers.ReLU()(x) if relu else x


def cnn() -> keras.Model:
    """Stem, residual block, pooling, convolution, dense layer."""
    image = keras.Input((8, 8, 1), name="image")
    x = conv_bn(image, 12)
    x = layers.ReLU()(layers.Add()([x, conv_bn(conv_bn(x, 12), 12, relu=False)]))
    x = conv_bn(layers.MaxPooling2D(2)(x), 16)
    return keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


class Positions(layers.Layer):
    """Adds a learned vector to every token."""

    def build(self, shape: tuple[int, ...]) -> None:
        """One vector per token."""
        self.table = self.add_weight(shape=(1, *shape[1:]), initializer=keras.initializers.RandomNormal(0.1))

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """The sum."""
        return x + self.table


def block(x: keras.KerasTensor, dim: int, heads: int, mlp: int) -> keras.KerasTensor:
    """A pre-norm transformer block."""
    y = layers.LayerNormalization(epsilon=1e-5)(x)
    x = layers.Add()([x, layers.MultiHeadAttention(heads, dim // heads)(y, y)])
    y = layers.Dense(mlp, activation="gelu")(layers.LayerNormalization(epsilon=1e-5)(x))
    return layers.Add()([x, layers.Dense(dim)(y)])


def transformer() -> keras.Model:
    """Patches of 2 x 2, two blocks, mean over the tokens, dense layer."""
    image = keras.Input((8, 8, 1), name="image")
    x = Positions()(layers.Reshape((16, 16))(layers.Conv2D(16, 2, 2)(image)))
    for _ in range(2):
        x = block(x, 16, 4, 48)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(epsilon=1e-5)(x))
    return keras.Model(image, layers.Dense(10)(x))


def trained() -> keras.Model:
    """The trained transformer, whose layer of our own a file alone does not tell: `keras:keras_models:trained`."""
    folder = Path(os.environ.get("FRAMEWORKS_FOLDER", "."))
    return keras.saving.load_model(folder / "transformer.keras", custom_objects={"Positions": Positions}, compile=False)


def main(folder: Path, epochs: int) -> None:
    """Train both and write them in both formats."""
    digits = np.load(folder / "digits.npz")
    images, labels = digits["images"][..., None], digits["labels"]
    for name, build in {"cnn": cnn, "transformer": transformer}.items():
        keras.utils.set_random_seed(0)
        network = build()
        schedule = keras.optimizers.schedules.CosineDecay(5e-3, epochs * -(-len(images) // 64))
        network.compile(keras.optimizers.Adam(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        network.fit(images, labels, batch_size=64, epochs=epochs, verbose=0)
        network.save(folder / f"{name}.keras")
        network.export(folder / f"{name}-saved", verbose=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
