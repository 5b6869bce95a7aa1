"""Which loss derivatives are taken of, for a model whose outputs say what they are, or do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spa.errors import UsageError
from spa.interpreter.losses import CausalLM, CrossEntropy, Loss, SampledLabels
from spa.interpreter.module import Interpreter, Multipliers
from spa.interpreter.outputs import is_scores, scores, token_inputs

Run = Callable[[Mapping[str, Any], "NDArray[np.int64] | None", Multipliers | None], Tensor]
"""(feeds, labels, gates) -> losses of the samples, [n]."""
LOSSES = ("auto", "ce", "sampled", "gaussian", "lm")
_CLASSES = 3
"""From this rank on classes are the last axis of three, and the second of more."""


def objective(
    kind: str | Loss, network: Interpreter, seed: int = 0, temperature: float = 1.0, expected: bool = False
) -> Run:
    """A loss of a network.

    Args:
        kind: `ce`: cross-entropy with the samples' labels. `sampled`: with labels drawn from the model's own output
            distribution, whose squared derivatives are the true Fisher information; needs no labels. `gaussian`:
            squared distance to outputs plus noise of their own spread, the same for outputs that are no classes. `lm`:
            next-token cross-entropy of the token ids that are fed. `auto`: `ce` if there are labels that fit; else
            `sampled` if the only float output may be class scores (a matrix or more, not called an embedding), else
            `gaussian`. A callable gets the outputs and {input or "labels": tensor} and gives one loss per sample.
        network: the model.
        seed: of what is drawn.
        temperature: divides the outputs.
        expected: of what would be drawn (`sampled`, `gaussian`), take the expectation: for second derivatives, which
            are the same on average, without the noise; first derivatives are 0.

    Raises:
        UsageError: an unknown kind, or one that does not fit the outputs or the samples.
    """
    if isinstance(kind, str) and kind not in LOSSES:
        raise UsageError(f"--loss: unknown loss {kind!r}; choose one of {', '.join(LOSSES)}")
    noise = torch.Generator().manual_seed(seed)
    drawn = {last: SampledLabels(last=last, seed=seed, expected=expected) for last in (False, True)}

    def run(feeds: Mapping[str, Any], labels: NDArray[np.int64] | None, gates: Multipliers | None) -> Tensor:
        outputs = {n: y / temperature for n, y in network(feeds, gates=gates).items() if y.is_floating_point()}
        if not outputs:
            raise UsageError("the model has no floating-point output to take derivatives of")
        device = next(iter(outputs.values())).device
        targets = {n: torch.as_tensor(np.asarray(a)).to(device) for n, a in feeds.items()}
        if labels is not None:
            targets["labels"] = torch.as_tensor(labels).to(device)
        if not isinstance(kind, str):
            return kind(outputs, targets)
        name = chosen(kind, outputs, labels)
        if name == "ce":
            if labels is None:
                raise UsageError("--loss ce needs labels with the samples: an array `labels` in the .npz file")
            return CrossEntropy()(_scores(outputs), {"labels": targets["labels"]})
        if name == "lm":
            return CausalLM()(_scores(outputs), {"tokens": _tokens(feeds, targets)})
        if name == "sampled":
            classes = {n: y for n, y in outputs.items() if y.dim() >= 2}
            return torch.stack([drawn[y.dim() == _CLASSES]({n: scores(y)}) for n, y in classes.items()]).sum(0)
        return torch.stack([_gaussian(y, None if expected else noise) for y in outputs.values()]).sum(0)

    return run


def chosen(kind: str, outputs: Mapping[str, Tensor], labels: NDArray[np.int64] | None) -> str:
    """What `auto` stands for (see `objective`); other kinds stand for themselves."""
    if kind != "auto":
        return kind
    classes = [y for n, y in outputs.items() if y.dim() in (2, _CLASSES) and is_scores(n, y, len(outputs))]
    if len(outputs) > 1 or not classes:
        return "gaussian"
    fits = labels is not None and classes[0].dim() == 2 and labels.ndim == 1 and labels.max() < classes[0].shape[1]
    return "ce" if fits else "sampled"


def _scores(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: scores(y) for n, y in outputs.items()}


def _tokens(feeds: Mapping[str, Any], targets: Mapping[str, Tensor]) -> Tensor:
    named = token_inputs(feeds)
    if len(named) != 1:
        raise UsageError(f"--loss lm: which input holds the token ids is not clear among {', '.join(named) or 'none'}")
    return targets[named[0]]


def _gaussian(y: Tensor, generator: torch.Generator | None) -> Tensor:
    """Half the squared distance to a draw from a normal distribution around the outputs, or to these, per sample."""
    with torch.no_grad():
        spread = y.std(0, keepdim=True).clamp_min(1e-6) if y.shape[0] > 1 else torch.ones_like(y)
        goal = y.clone()
        if generator is not None:
            goal += spread * torch.randn(y.shape, generator=generator).to(y)
    return 0.5 * ((y - goal) / spread).square().flatten(1).sum(1)
