"""What the outputs of a model are: scores of classes or other values; and which of its inputs are token ids.

One place for these decisions: losses, criteria and fine-tuning take the same outputs for the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["auto", "logits", "values"]
_CLASSES_LAST = 3
"""Up to this rank classes are the last axis ([n, classes], [n, tokens, classes]), from the next one on the second."""


def class_axis(y: Tensor) -> int:
    """The axis of the classes of an output that holds scores."""
    return -1 if y.dim() <= _CLASSES_LAST else 1


def is_scores(name: str, y: Tensor, outputs: int, kind: str = "auto") -> bool:
    """Whether an output holds scores of classes.

    Args:
        name: of the output.
        y: its value.
        outputs: how many (floating-point) outputs the model has.
        kind: `logits` and `values` say so; `auto`: if its name says logits, or if it is the only output, a matrix or of
            three axes, and not called an embedding.
    """
    if y.dim() < 2 or kind == "values":
        return False
    if kind == "logits":
        return True
    if y.shape[class_axis(y)] < 2:
        return False
    single = outputs == 1 and y.dim() <= _CLASSES_LAST and "embed" not in name.lower()
    return "logit" in name.lower() or single


def scores(y: Tensor) -> Tensor:
    """Scores before a softmax, in float32 at least: a model that ends in one gives probabilities, whose logarithms they
    are."""
    y = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    with torch.no_grad():
        sums = y.sum(class_axis(y))
        probabilities = bool((y >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)
    return (y + 1e-12).log() if probabilities else y


def per_sample(x: Tensor) -> Tensor:
    """Means over everything but the first axis, [n]."""
    return x.flatten(1).mean(1) if x.dim() > 1 else x


def token_inputs(feeds: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that may hold token ids: integers [n, tokens], those called so if there are any."""
    found = [n for n, a in feeds.items() if np.issubdtype(np.asarray(a).dtype, np.integer) and np.ndim(a) == 2]
    return [n for n in found if "id" in n.lower() or "token" in n.lower()] or found
