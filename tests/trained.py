"""Two networks that have really learned something, made once per test run in a few seconds."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

EPOCHS = {"cnn": 2, "vit": 5}


@functools.cache
def _network(name: str) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from examples import digits

    return digits.train(digits.RECIPES[name], epochs=EPOCHS[name])


@functools.cache
def trained(name: str, *, folded: bool = False) -> onnx.ModelProto:
    """`cnn` or `vit` of examples/digits.py after a few epochs; skips where torch or scikit-learn are not installed.

    `folded`: without BatchNormalization nodes.
    """
    network = _network(name)
    from examples import digits

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        digits.export(network, path, keep_batch_norm=digits.RECIPES[name].keep_batch_norm and not folded)
        return onnx.load(path)


@functools.cache
def images(count: int = 160) -> np.ndarray:
    """Training images, [count, 1, 8, 8] float32."""
    pytest.importorskip("sklearn")
    from examples import digits

    return digits.data()[0][:count]
