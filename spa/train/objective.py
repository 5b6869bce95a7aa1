"""What is minimised: cross-entropy, distance to the teacher's outputs, and distance to its inner activations.

The inner part is that of Aflalo et al., "Knapsack Pruning with Inner Distillation", 2020: activations of blocks against
the teacher's, through a linear map over the channels where their number differs. Here each block's squared error is
divided by the variance of the teacher's activations, so that one weight fits all networks, and a map starts as the
least-squares solution, so that training begins with what the pruned model really lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter, ParameterList

from spa.errors import UsageError
from spa.interpreter import CrossEntropy, Interpreter
from spa.train.matching import Pair
from spa.train.samples import Batch
from spa.train.settings import Settings

Values = Mapping[str, Tensor]
_CLASSES_LAST = 3
"""Up to this rank classes are the last axis, from the next one on the second."""
_RIDGE = 1e-3
"""Of the least squares that maps start from, relative to the mean squared activation."""
_ROWS = 1 << 14
"""Positions that maps are fit on at most."""


def scores(y: Tensor) -> Tensor:
    """Scores before a softmax, in float32: a model that ends in one gives probabilities, whose logarithms they are."""
    y = y.float()
    with torch.no_grad():
        axis = _axis(y)
        sums = y.sum(axis)
        probabilities = bool((y >= 0).all()) and bool((sums - 1).abs().max() < 1e-3)
    return (y + 1e-12).log() if probabilities else y


def _axis(y: Tensor) -> int:
    return -1 if y.dim() <= _CLASSES_LAST else 1


def classes(name: str, y: Tensor, outputs: int, kind: str) -> bool:
    """Whether an output holds scores of classes."""
    if kind != "auto" or y.dim() < 2:
        return kind == "logits" and y.dim() >= 2
    single = outputs == 1 and y.dim() <= _CLASSES_LAST and y.shape[-1] > 1 and "embed" not in name.lower()
    return "logit" in name.lower() or single


def per_sample(x: Tensor) -> Tensor:
    """Means over everything but the first axis, [n]."""
    return x.flatten(1).mean(1) if x.dim() > 1 else x


@dataclass(frozen=True)
class Inner:
    """One compared activation."""

    mine: str
    theirs: str
    axis: int | None
    """The axis whose size differs."""
    widths: tuple[int, int] = (0, 0)
    """Its size in the pruned model and in the teacher."""


class Maps(Module):
    """The linear maps between activations of different width, [teacher, pruned] each; not part of the result."""

    def __init__(self, inner: Sequence[Inner]) -> None:
        super().__init__()
        self._index = {i.mine: k for k, i in enumerate([i for i in inner if i.axis is not None])}
        self.matrices = ParameterList(
            [Parameter(torch.zeros(*reversed(i.widths))) for i in inner if i.axis is not None]
        )

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        """The activation at the teacher's width."""
        if inner.axis is None:
            return x
        matrix: Tensor = self.matrices[self._index[inner.mine]]
        mapped: Tensor = x.movedim(inner.axis, -1) @ matrix.T
        return mapped.movedim(-1, inner.axis)

    @torch.no_grad()
    def fit(self, inner: Inner, x: Tensor, goal: Tensor) -> None:
        """Set a map to the least-squares solution on some activations."""
        if inner.axis is None:
            return
        s, t = (v.movedim(inner.axis, -1).flatten(0, -2) for v in (x, goal))
        step = -(-len(s) // _ROWS)
        s, t = s[::step].double(), t[::step].double()
        gram = s.T @ s
        gram += _RIDGE * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), device=gram.device)
        self.matrices[self._index[inner.mine]].copy_(torch.linalg.solve(gram, s.T @ t).T)


@dataclass
class Objective:
    """The loss of a batch and its parts."""

    student: Interpreter
    teacher: Interpreter | None
    settings: Settings
    labelled: bool
    """Whether there are labels, and one output that they are of."""
    inner: Sequence[Inner] = ()
    maps: Maps = field(default_factory=lambda: Maps(()))
    shared: tuple[str, ...] = ()
    """Float outputs that both models have."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Means over the batch: `loss`, and those of `ce`, `kd`, `inner` that it is made of."""
        settings = self.settings
        feeds = tensors(batch, self.student.device)
        theirs: Values = {}
        if self.teacher is not None and settings.loss != "ce":
            with torch.no_grad():
                theirs = self._run(self.teacher, feeds, [i.theirs for i in self.inner])
        mine = self._run(self.student, feeds, [i.mine for i in self.inner])
        outputs = {n: mine[n] for n in self._outputs(self.student)}
        parts: dict[str, Tensor] = {}
        if batch.labels is not None and (settings.loss == "ce" or (self.labelled and settings.alpha < 1)):
            parts["ce"] = cross_entropy(outputs, batch.labels).mean()
        if settings.loss != "ce":
            parts["kd"] = self.distance(outputs, theirs).mean()
        weights = self._weights(parts)
        if self.inner:
            parts["inner"] = torch.stack(
                [normalised(self.maps(i, mine[i.mine].float()), theirs[i.theirs].float()) for i in self.inner]
            ).mean()
            weights["inner"] = settings.gamma
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": total, **parts}

    def _weights(self, parts: Values) -> dict[str, float]:
        alpha = self.settings.alpha
        return {"ce": 1 - alpha if "kd" in parts else 1.0, "kd": alpha if "ce" in parts else 1.0}

    def _run(self, network: Interpreter, feeds: Values, inner: Sequence[str]) -> Values:
        names = list(dict.fromkeys([*self._outputs(network), *inner]))
        with torch.autocast(network.device.type, torch.bfloat16, enabled=self.settings.amp):
            found: Values = network(feeds, outputs=names)
        return found

    def _outputs(self, network: Interpreter) -> tuple[str, ...]:
        return self.shared or outputs_of(network)

    def distance(self, outputs: Values, theirs: Values) -> Tensor:
        """From the teacher's outputs, added over the outputs, [n].

        The divergence T^2 KL(teacher || student) of softmax(scores / T) for scores of classes (Hinton et al., 2015),
        the squared error divided by the teacher's variance for other outputs.
        """
        heat = self.settings.temperature
        found = []
        for name in self.shared:
            y, goal = outputs[name], theirs[name].detach()
            if classes(name, y, len(self.shared), self.settings.distance):
                axis = _axis(y)
                have, want = (torch.log_softmax(scores(v) / heat, axis) for v in (y, goal))
                found.append(heat**2 * per_sample((want.exp() * (want - have)).sum(axis)))
            else:
                y, goal = y.float(), goal.float()
                found.append(per_sample((y - goal).square()) / spread(goal))
        return torch.stack(found).sum(0)


def tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The inputs of a batch where the network computes."""
    return {n: torch.as_tensor(np.ascontiguousarray(a)).to(device) for n, a in batch.feeds.items()}


def outputs_of(network: Interpreter) -> tuple[str, ...]:
    """Names of the model's floating-point outputs."""
    return tuple(v.name or "" for v in network.model.graph.outputs if v.dtype is None or v.dtype.is_floating_point())


def spread(x: Tensor) -> Tensor:
    """The variance of all numbers, at least a little."""
    return x.var(unbiased=False).clamp_min(1e-8)


def normalised(x: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error over the goal's variance, one number."""
    return (x - goal).square().mean() / spread(goal)


def cross_entropy(outputs: Values, labels: np.ndarray) -> Tensor:
    """With labels, [n]. Raises: UsageError for several outputs, or labels beyond the classes."""
    known = {n: scores(y) for n, y in outputs.items()}
    return CrossEntropy()(known, {"labels": torch.as_tensor(labels)})


def hits(outputs: Values, labels: np.ndarray) -> int:
    """How many samples get the highest score at their label."""
    y = next(iter(outputs.values()))
    return int((y.argmax(1).cpu() == torch.as_tensor(labels)).sum())


# -- setting up ------------------------------------------------------------------------------------------------------


def shared_outputs(mine: Values, theirs: Values) -> tuple[str, ...]:
    """Float outputs of both models, on the same samples. Raises: UsageError if they do not answer the same question."""
    names = [n for n, y in mine.items() if y.is_floating_point()]
    for name in names:
        if name not in theirs:
            raise UsageError(
                f"the teacher has no output '{name}' but {', '.join(theirs) or 'none'}: "
                "give the model that was pruned as --teacher."
            )
        if mine[name].shape != theirs[name].shape:
            raise UsageError(
                f"the teacher's output '{name}' has shape {list(theirs[name].shape)} where the model's has "
                f"{list(mine[name].shape)}: give the model that was pruned as --teacher."
            )
    return tuple(names)


def comparable(pairs: Sequence[Pair], mine: Values, theirs: Values) -> list[Inner]:
    """The pairs whose values on the same samples are of equal shape, or differ along one axis behind the first."""
    out = []
    for name, other in pairs:
        x, goal = mine[name], theirs[other]
        if x.dim() != goal.dim() or x.dim() < 2 or not (x.is_floating_point() and goal.is_floating_point()):
            continue
        differ = [d for d, (a, b) in enumerate(zip(x.shape, goal.shape, strict=True)) if a != b]
        if not differ:
            out.append(Inner(name, other, None))
        elif len(differ) == 1 and differ[0] > 0:
            axis = differ[0]
            out.append(Inner(name, other, axis, (x.shape[axis], goal.shape[axis])))
    return out
