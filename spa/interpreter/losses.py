"""Losses of a model's outputs: one number per sample, so that means, sums and per-sample derivatives are the caller's.

A loss is called with the outputs by name and a mapping of targets (labels, or the outputs of the dense model), and
gives a tensor [samples]. Any Python callable of that form is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from spa.errors import UsageError
from spa.interpreter.outputs import Kind, class_axis, is_scores, per_sample, scores

Values = Mapping[str, Tensor]


class Loss(Protocol):
    """What gradients are taken of."""

    def __call__(self, outputs: Values, targets: Values) -> Tensor:
        """Losses per sample, [samples]."""


def only(values: Values, name: str | None, what: str) -> Tensor:
    """The value called `name`; without a name the only one (of the floats, for outputs).

    Raises: UsageError if there is no such value, or several to choose from.
    """
    if name is not None:
        if name not in values:
            raise UsageError(f"there is no {what} '{name}'; there are {', '.join(values) or 'none'}.")
        return values[name]
    found = [k for k, v in values.items() if what != "output" or v.is_floating_point()]
    if len(found) != 1:
        raise UsageError(
            f"the loss needs one {what} but there are {', '.join(found) or 'none'}: name the one that is meant."
        )
    return values[found[0]]


@dataclass(frozen=True)
class CrossEntropy:
    """Of logits [n, classes, ...] with integer labels [n, ...]; positions with label `ignore` do not count."""

    output: str | None = None
    """The output with the logits; the only one if None."""
    labels: str | None = None
    """The target with the labels; the only one if None."""
    ignore: int = -100
    smoothing: float = 0.0
    last: bool = False
    """Whether the classes are the last axis (token classification) instead of the second."""

    def __call__(self, outputs: Values, targets: Values) -> Tensor:
        """[n]. Raises: UsageError for labels of another shape, or beyond the classes."""
        logits = only(outputs, self.output, "output")
        labels = only(targets, self.labels, "target").to(torch.int64).to(logits.device)
        logits = logits.movedim(-1, 1) if self.last else logits
        want = (logits.shape[0], *logits.shape[2:])
        if logits.dim() < 2 or tuple(labels.shape) != want:
            raise UsageError(
                f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}; "
                f"pass integers of shape {list(want)}."
            )
        valid = labels != self.ignore
        if bool((labels[valid] >= logits.shape[1]).any()) or bool((labels[valid] < 0).any()):
            raise UsageError(f"labels must be between 0 and {logits.shape[1] - 1}, the classes of the model.")
        each = F.cross_entropy(
            logits, labels, ignore_index=self.ignore, reduction="none", label_smoothing=self.smoothing
        )
        if each.dim() == 1:
            return each
        return each.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


@dataclass(frozen=True)
class SquaredError:
    """Mean squared error of an output and a target of its shape."""

    output: str | None = None
    target: str | None = None

    def __call__(self, outputs: Values, targets: Values) -> Tensor:
        """[n]. Raises: UsageError for targets of another shape."""
        y = only(outputs, self.output, "output")
        goal = only(targets, self.target, "target").to(y)
        if goal.shape != y.shape:
            raise UsageError(f"targets of shape {list(goal.shape)} do not fit outputs of shape {list(y.shape)}.")
        return per_sample((y - goal).square())


@dataclass(frozen=True)
class CausalLM:
    """Next-token cross-entropy of logits [n, tokens, vocabulary] with the token ids [n, tokens] that were fed."""

    output: str | None = None
    tokens: str | None = None
    ignore: int = -100

    def __call__(self, outputs: Values, targets: Values) -> Tensor:
        """[n], the mean over the tokens that are predicted."""
        logits, ids = only(outputs, self.output, "output"), only(targets, self.tokens, "target")
        loss = CrossEntropy(ignore=self.ignore, last=True)
        return loss({"logits": logits[:, :-1]}, {"labels": ids[:, 1:]})


@dataclass
class SampledLabels:
    """Cross-entropy with labels drawn from the model's own output distribution: needs no labels.

    Squared derivatives of it estimate the true Fisher information. The draws depend on `seed` and the call's number.
    """

    output: str | None = None
    last: bool = False
    seed: int = 0
    expected: bool = False
    """Take the expectation over the labels in place of a draw. The mean Hessian is the same, the Fisher information,
    without the noise of draws; the gradient is 0."""
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, outputs: Values, targets: Values | None = None) -> Tensor:
        """[n]. Of several float outputs without a name each gets labels, and the losses are added."""
        if self.output is not None:
            found = [only(outputs, self.output, "output")]
        else:
            found = [v for v in outputs.values() if v.is_floating_point() and v.dim() >= 2]
        if not found:
            raise UsageError("labels can only be drawn from logits [n, classes, ...]; use a distance instead.")
        return torch.stack([self._one(logits) for logits in found]).sum(0)

    def _one(self, logits: Tensor) -> Tensor:
        flat = (logits if self.last else logits.movedim(1, -1)).flatten(0, -2)
        with torch.no_grad():
            labels = torch.softmax(flat.float(), -1)
            if not self.expected:
                labels = torch.multinomial(labels.cpu(), 1, generator=self._generator).squeeze(1)
            labels = labels.to(flat) if self.expected else labels.to(logits.device)
        each = F.cross_entropy(flat, labels, reduction="none")
        return each.reshape(logits.shape[0], -1).sum(1)  # positions are independent draws: their losses add


@dataclass(frozen=True)
class GraphLoss:
    """An ONNX graph that computes the loss from outputs and targets of its inputs' names.

    Its first output is the loss: [samples], or one number for all.
    """

    graph: Callable[[Values], Values]
    """An `Interpreter` of the loss, or anything like it that knows its `inputs`."""

    def __call__(self, outputs: Values, targets: Values) -> Tensor:
        """[n], or [1]. Raises: UsageError if an input of the loss is neither output nor target."""
        known = {**targets, **outputs}
        names: tuple[str, ...] = getattr(self.graph, "inputs", tuple(known))
        for name in names:
            if name not in known:
                raise UsageError(f"the loss needs '{name}', which is neither an output of the model nor a target.")
        found = self.graph({name: known[name] for name in names})
        return next(iter(found.values())).reshape(-1)


def spread(x: Tensor) -> Tensor:
    """The variance of all numbers, at least a little."""
    return x.var(unbiased=False).clamp_min(1e-8)


@dataclass(frozen=True)
class Distance:
    """How far outputs are from those of the dense model.

    Scores of classes: T^2 KL(dense || model) of softmax(scores / T) (Hinton et al., arXiv 1503.02531). Other outputs:
    the mean squared error.
    """

    kind: Kind = "auto"
    """Which of them; `auto`: see `spa.interpreter.outputs.is_scores`."""
    temperature: float = 1.0
    relative: bool = False
    """Whether squared errors are divided by the variance of the dense model's output."""
    last: bool | None = None
    """Whether the classes are the last axis; None: if the output is a matrix or has three axes."""

    def __call__(self, outputs: Values, targets: Values) -> Tensor:
        """[n], added over the float outputs that have a target. Raises: UsageError if there is none."""
        known = {
            n: y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
            for n, y in outputs.items()
            if n in targets and y.is_floating_point() and y.dim()
        }
        if not known:
            raise UsageError("no output of the model has a dense output to compare with; pass them by output name.")
        return torch.stack([self._one(n, y, targets[n].detach().to(y), len(known)) for n, y in known.items()]).sum(0)

    def _one(self, name: str, y: Tensor, goal: Tensor, outputs: int) -> Tensor:
        if is_scores(name, y, outputs, self.kind):
            return self._divergence(y, goal)
        error = per_sample((y - goal).square())
        return error / spread(goal) if self.relative else error

    def _divergence(self, y: Tensor, goal: Tensor) -> Tensor:
        axis = class_axis(y) if self.last is None else -1 if self.last else 1
        have, want = (torch.log_softmax(scores(v) / self.temperature, axis) for v in (y, goal))
        return self.temperature**2 * per_sample((want.exp() * (want - have)).sum(axis))
