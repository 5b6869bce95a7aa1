"""What is minimised: cross-entropy (of labels or next tokens), distance to the teacher's outputs and inner activations.

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
from spa.interpreter import CausalLM, CrossEntropy, Distance, Interpreter
from spa.interpreter.losses import spread
from spa.interpreter.outputs import scores, token_inputs
from spa.train.matching import Pair
from spa.train.samples import Batch
from spa.train.settings import Settings

Values = Mapping[str, Tensor]
_IGNORED = -100
"""The label of a position that does not count."""
_RIDGE = 1e-3
"""Of the least squares that maps start from, relative to the mean squared activation."""
_ROWS = 1 << 14
"""Positions that maps are fit on at most."""


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
    language: Language | None = None
    """Where there are no labels: how next tokens are."""

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
        if settings.loss == "ce" or settings.alpha < 1:
            if batch.labels is not None and (settings.loss == "ce" or self.labelled):
                parts["ce"] = cross_entropy(outputs, batch.labels).mean()
            elif batch.labels is None and self.language is not None:
                parts["ce"] = self.language.loss(outputs, feeds).mean()
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
        """From the teacher's outputs, added over the outputs, [n]."""
        kind = Distance(self.settings.distance, self.settings.temperature, relative=True)
        return kind({n: outputs[n] for n in self.shared}, theirs)


def tensors(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The inputs of a batch where the network computes."""
    return {n: torch.as_tensor(np.ascontiguousarray(a)).to(device) for n, a in batch.feeds.items()}


def outputs_of(network: Interpreter) -> tuple[str, ...]:
    """Names of the model's floating-point outputs."""
    return tuple(v.name or "" for v in network.model.graph.outputs if v.dtype is None or v.dtype.is_floating_point())


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


@dataclass(frozen=True)
class Language:
    """A causal language model: what it is fed says what it should have said."""

    tokens: str
    """The input with the token ids, [n, tokens]."""
    mask: str | None = None
    """The input that is 0 where a token is padding."""

    def loss(self, outputs: Values, feeds: Values) -> Tensor:
        """Cross-entropy of the next tokens, mean over those of each sample, [n]. Raises: UsageError (ids too large)."""
        ids = feeds[self.tokens].to(torch.int64)
        if self.mask is not None:
            ids = ids.masked_fill(feeds[self.mask] == 0, _IGNORED)
        known = {n: scores(y) for n, y in outputs.items()}
        return CausalLM(ignore=_IGNORED)(known, {"tokens": ids})


@torch.no_grad()
def language(network: Interpreter, feeds: Values, outputs: Values) -> Language | None:
    """How a causal language model is fed; None for any other model.

    That is one with a single output [n, tokens, classes] and one input of token ids, where no output depends on a
    later token: the last one is changed, and only its own output may change.
    """
    named = token_inputs({n: x.cpu().numpy() for n, x in feeds.items()})
    if len(outputs) != 1 or not named:
        return None
    (y,) = outputs.values()
    for name in named:
        ids = feeds[name]
        if y.dim() != 3 or y.shape[:2] != ids.shape or ids.shape[1] < 2 or int(ids.max()) >= y.shape[2]:
            continue
        if len(set(ids.flatten().tolist())) < 3:
            continue  # a mask, or the kinds of segments
        other = ids.clone()
        other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids.flatten()[ids.flatten() != ids[0, 0]][0], ids[:, 0])
        (z,) = network({**feeds, name: other}, outputs=list(outputs)).values()
        if torch.allclose(z[:, :-1], y[:, :-1], rtol=1e-3, atol=1e-4) and not torch.equal(z[:, -1], y[:, -1]):
            masks = [n for n, x in feeds.items() if n != name and x.shape == ids.shape and "mask" in n.lower()]
            return Language(name, masks[0] if masks else None)
    return None


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
