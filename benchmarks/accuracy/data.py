"""Images and texts of the accuracy benchmark, read from the folder `SPA_DATA`, or `shared` beside the checkout."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(os.environ.get("SPA_DATA") or Path(__file__).resolve().parents[3] / "shared")
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
CALIBRATION_IMAGES = 1000

Array = np.ndarray[Any, Any]


class DataError(Exception):
    """Something of the data folder is missing; the message is one sentence for the user."""


@dataclass(frozen=True)
class Images:
    """Inputs of a network, [n, c, h, w] float32, with labels."""

    x: Array
    y: Array

    def __len__(self) -> int:
        return len(self.y)

    def first(self, n: int | None) -> Images:
        return self if n is None else Images(self.x[:n], self.y[:n])

    def at(self, rows: Array) -> Images:
        return Images(np.ascontiguousarray(self.x[rows]), self.y[rows])


def model(name: str) -> Path:
    """The file of a trained network."""
    return _file("models", f"{name}.onnx")


@cache
def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _file(*parts: str) -> Path:
    path = ROOT.joinpath("data", *parts)
    if not path.is_file():
        raise DataError(f"{path} does not exist: set SPA_DATA to the folder with the trained networks and their data")
    return path


def _decode(path: Path) -> tuple[Array, Array]:
    """uint8 [n, h, w, 3] RGB and labels of a file of concatenated JPEG images."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("the images are JPEG files: pip install pillow") from error
    with np.load(path) as z:
        blob, offset, label = z["jpeg"].tobytes(), z["offset"], z["label"].astype(np.int64)
    pixels = [
        np.asarray(Image.open(io.BytesIO(blob[offset[k] : offset[k + 1]])).convert("RGB")) for k in range(len(label))
    ]
    return np.stack(pixels), label


def _standard(pixels: Array) -> Array:
    """Normalised NCHW, as torchvision does, of uint8 NHWC."""
    return np.ascontiguousarray(((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2), np.float32)


# -- CIFAR-10 ----------------------------------------------------------------------------------------------------------

CIFAR_SETS = ("jpeg", "lossless")


@cache
def cifar_test(kind: str) -> Images:
    """`lossless`: 761 images as published; `jpeg`: all 10,000, recompressed, which costs a network ten points."""
    return _cifar(kind, "test_10k", "test")


@cache
def cifar_train(kind: str) -> Images:
    return _cifar(kind, "train_10k", "calib")


def _cifar(kind: str, jpeg: str, lossless: str) -> Images:
    """One part of the data, by its name in either form."""
    if kind == "jpeg":
        x, y = _decode(_file("data", f"cifar10_{jpeg}.jpeg.npz"))
        return Images(_standard(x), y)
    with np.load(_file("data", "cifar10_lossless.npz")) as z:
        x, y = z[f"{lossless}_x"], z[f"{lossless}_y"]
        return Images(_standard(x.transpose(0, 2, 3, 1)), y.astype(np.int64))


def cifar_calibration(kind: str, seed: int) -> Images:
    """1,000 training images of the same kind as the test images; the seed chooses them."""
    train = cifar_train(kind)
    return train.at(np.sort(np.random.default_rng(seed).permutation(len(train))[:CALIBRATION_IMAGES]))


# -- ImageNet ----------------------------------------------------------------------------------------------------------


@cache
def _imagenet_pixels() -> tuple[Array, Array]:
    return _decode(_file("data", "imagenet_1k_sample_224.jpeg.npz"))


@cache
def imagenet(preparation: str) -> Images:
    """1,000 images, one per class, prepared as a network wants it."""
    pixels, y = _imagenet_pixels()
    if preparation == "mobilenetv2":
        x = (pixels.astype(np.float32) - 128) / 128
    elif preparation == "squeezenet":
        x = pixels[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)
    else:
        return Images(_standard(pixels), y)
    return Images(np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32), y)


def halves(n: int, seed: int) -> tuple[Array, Array]:
    """Rows to calibrate with and rows to test on: no row is in both, every row is in one.

    Seeds 2k and 2k + 1 are the two halves of one split, swapped; the first split is even and odd rows.
    """
    if seed // 2:
        order = np.random.default_rng(seed // 2).permutation(n)
    else:
        order = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)])
    parts = np.sort(order[: n // 2]), np.sort(order[n // 2 :])
    return parts[seed % 2], parts[1 - seed % 2]


def imagenet_halves(preparation: str, seed: int) -> tuple[Images, Images]:
    """500 images to calibrate with and the other 500 to test on."""
    images = imagenet(preparation)
    calibration, test = halves(len(images), seed)
    return images.at(calibration), images.at(test)


# -- texts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Two sentences each and how similar people find them."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    score: Array


def sts(split: str) -> Pairs:
    """STS-B pairs of `test` or `dev`."""
    lines = _file("data", f"stsb_en_{split}.tsv").read_text(encoding="utf-8").split("\n")[1:]
    rows = [line.split("\t") for line in lines if line]
    a, b, score = zip(*rows, strict=True)
    return Pairs(a, b, np.array(score, float))


@cache
def _tokenizer() -> Any:
    path = _file("data", "minilm_tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError("the sentence encoder needs its tokenizer: pip install tokenizers") from error
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding()
    return tokenizer


def tokens(texts: list[str]) -> dict[str, Array]:
    """The encoder's inputs, int64 [n, length], padded to the longest."""
    rows = _tokenizer().encode_batch(texts)
    return {
        "input_ids": np.array([row.ids for row in rows], np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
    }


def sentences(count: int, seed: int) -> dict[str, Array]:
    """Tokens of sentences drawn from the dev pairs."""
    pairs = sts("dev")
    texts = sorted({*pairs.first, *pairs.second})
    order = np.random.default_rng(seed).permutation(len(texts))[:count]
    return tokens([texts[k] for k in order])


def stories(split: str) -> Array:
    """Token ids of stories, int64 [n, 256]; `split` is `calib` or `eval`."""
    with np.load(_file("data", f"tinystories_{split}_256.npz")) as z:
        return z["tokens"]
