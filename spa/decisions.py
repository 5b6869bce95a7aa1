"""Which output of a model holds scores of classes, and what they decide: the reading of `spa.train`, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spa.calibration.data import is_float

Array = NDArray[Any]
_CLASSES_LAST = 3
"""Up to this rank classes are the last axis, from the next one on the second."""


def class_output(outputs: Mapping[str, Array]) -> str | None:
    """The output that holds scores of classes: named so, or the only one where that may be.

    A matrix or three axes, more than one score, and not called an embedding.
    """
    scores = {n: y for n, y in outputs.items() if is_float(y.dtype) and y.ndim >= 2}
    named = [n for n in scores if "logit" in n.lower()]
    if len(named) == 1:
        return named[0]
    if len(outputs) != 1:
        return None
    single = [n for n, y in scores.items() if y.ndim <= _CLASSES_LAST and y.shape[-1] > 1 and "embed" not in n.lower()]
    return single[0] if single else None


def classes_last(y: Array) -> Array:
    """Scores with the classes as the last axis."""
    return y if y.ndim <= _CLASSES_LAST else np.moveaxis(y, 1, -1)


def decisions(y: Array) -> NDArray[np.int64]:
    """The class with the largest score."""
    return np.asarray(np.argmax(classes_last(y), axis=-1), dtype=np.int64)
