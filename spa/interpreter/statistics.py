"""Derivatives of a loss over calibration samples: of gates, of weights, and products of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spa.calibration import Calibration
from spa.errors import UsageError
from spa.groups import Analysis, Group
from spa.interpreter.gates import Gates
from spa.interpreter.losses import Loss
from spa.interpreter.module import Interpreter
from spa.interpreter.objective import Run, objective

Array = NDArray[np.float64]
Tell = Callable[[int, int], None]
"""(samples done, samples in all)."""


@dataclass(frozen=True)
class Task:
    """What is differentiated: a model with its groups, on samples."""

    analysis: Analysis
    groups: Sequence[Group]
    data: Calibration
    loss: str | Loss = "auto"
    """See `objective`."""
    seed: int = 0
    batch: int = 32
    device: str = "cpu"
    tell: Tell = lambda done, total: None

    def network(self, dtype: torch.dtype | None = None) -> Interpreter:
        """The model, in eval mode."""
        network = Interpreter(self.analysis.coupling.model).to(self.device)
        return (network if dtype is None else network.to(dtype)).eval()

    def batches(self, size: int) -> Iterator[tuple[dict[str, Any], NDArray[np.int64] | None]]:
        """Feeds and labels."""
        done = 0
        for feeds in self.data.batches(size):
            count = len(next(iter(feeds.values())))
            labels = None if self.data.labels is None else self.data.labels[done : done + count]
            done += count
            yield feeds, labels
            self.tell(done, self.data.samples)


def gate_gradients(task: Task) -> dict[str, NDArray[np.float32]]:
    """dL_s / dz_u of every sample s and unit u, [samples, units] per group; z_u = 1 is the unit's gate.

    Samples of a batch get gates of their own where the model allows it; else they are run one by one.

    Raises:
        UsageError: the loss does not fit the model's outputs, or there are no labels for it.
    """
    network = task.network()
    network.requires_grad_(False)
    return gates_by_sample(task, lambda: objective(task.loss, network, task.seed))


def gates_by_sample(task: Task, make: Callable[[], Run]) -> dict[str, NDArray[np.float32]]:
    """Derivatives of what `make()` gives for each sample, with respect to the gates, [samples, units] per group."""
    try:
        return _gates_by_sample(task, make(), task.batch)
    except UsageError:
        if task.batch == 1:
            raise
        return _gates_by_sample(task, make(), 1)


def _gates_by_sample(task: Task, loss: Run, size: int) -> dict[str, NDArray[np.float32]]:
    found: dict[str, list[NDArray[np.float32]]] = {}
    for feeds, labels in task.batches(size):
        count = len(next(iter(feeds.values())))
        single = size == 1 or task.data.fixed == 1
        gates = Gates(task.analysis, task.groups, samples=0 if single else count, device=task.device)
        if single and count > 1:
            raise UsageError("the model's batch is fixed and its gates cannot be told apart by sample.")
        vectors = list(gates.vectors.values())
        if not vectors:
            return {}
        losses = loss(feeds, labels, gates)
        grads = _filled(torch.autograd.grad(losses.sum(), vectors, allow_unused=True), vectors)
        for name, grad in zip(gates.vectors, grads, strict=True):
            found.setdefault(name, []).append(grad.float().cpu().numpy().reshape(-1, grad.shape[-1]))
    return {name: np.concatenate(rows) for name, rows in found.items()}


@dataclass(frozen=True)
class Estimate:
    """A Hutchinson estimate."""

    value: Array
    error: Array
    """Standard error of it."""
    draws: int


STABLE = 0.9
"""Rank correlation of the estimates of two halves of the draws above which no more are taken."""
FEWEST, MOST = 8, 64
"""Draws."""


def gate_curvature(task: Task) -> dict[str, Estimate]:
    """Diagonal of the Hessian of the mean loss with respect to the gates, [units] per group.

    Hutchinson: E[v * (H v)] over random signs v. Labels that would be drawn are taken on average. Each batch is
    differentiated once and asked for several products if there are few; drawing stops when the ranking of the units is
    stable.
    """
    network = task.network()
    network.requires_grad_(False)
    loss = objective(task.loss, network, task.seed, expected=True)
    generator = torch.Generator().manual_seed(task.seed)
    gates = Gates(task.analysis, task.groups, device=task.device)
    vectors = list(gates.vectors.values())
    sizes = [len(v) for v in vectors]
    batches = -(-task.data.samples // task.batch)

    def draws() -> Iterator[Array]:
        for feeds, labels in task.batches(task.batch):
            total = loss(feeds, labels, gates).mean()
            first = _filled(torch.autograd.grad(total, vectors, create_graph=True, allow_unused=True), vectors)
            for _ in range(max(1, FEWEST // batches)):
                signs = [_signs(v, generator) for v in vectors]
                products = _product(first, signs, vectors)
                yield torch.cat([s * p for s, p in zip(signs, products, strict=True)]).cpu().double().numpy()

    return _split(_until_stable(draws, sum(sizes)), list(gates.vectors), sizes)


def _until_stable(draws: Callable[[], Iterator[Array]], size: int) -> Estimate:
    sums, squares = np.zeros((2, size)), np.zeros(size)
    count = 0
    while True:
        before = count
        for draw in draws():
            sums[count % 2] += draw
            squares += draw**2
            count += 1
        if count == before:
            raise UsageError("calibration: there are no samples to take derivatives on")
        halves = sums[0] / -(-count // 2), sums[1] / max(count // 2, 1)
        if count >= MOST or (count >= FEWEST and rank_correlation(*halves) >= STABLE):
            mean = sums.sum(axis=0) / count
            variance = np.maximum(squares / count - mean**2, 0) * count / max(count - 1, 1)
            return Estimate(mean, np.sqrt(variance / count), count)


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's, ties by order."""
    ranks = [np.argsort(np.argsort(x, kind="stable"), kind="stable").astype(np.float64) for x in (a, b)]
    if len(a) < 2:
        return 1.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def weight_gradients(task: Task, temperature: float = 1.0) -> dict[str, Array]:
    """Gradient of the mean loss, by the name of the weight. `temperature` divides the outputs (GraSP)."""
    network = task.network()
    loss = objective(task.loss, network, task.seed, temperature)
    names, weights = _learned(network)
    total = [torch.zeros_like(w) for w in weights]
    for feeds, labels in task.batches(task.batch):
        part = loss(feeds, labels, None).sum() / task.data.samples
        for sum_, grad in zip(total, torch.autograd.grad(part, weights, allow_unused=True), strict=True):
            if grad is not None:
                sum_ += grad
    return _arrays(names, total)


def hessian_gradients(task: Task, temperature: float = 1.0) -> dict[str, Array]:
    """H g of the mean loss for its gradient g, by the name of the weight: two passes over the samples."""
    network = task.network()
    names, weights = _learned(network)
    gradient = [
        torch.from_numpy(array).to(w)
        for array, w in zip(weight_gradients(task, temperature).values(), weights, strict=True)
    ]
    loss = objective(task.loss, network, task.seed, temperature)
    total = [torch.zeros_like(w) for w in weights]
    for feeds, labels in task.batches(task.batch):
        part = loss(feeds, labels, None).sum() / task.data.samples
        first = _filled(torch.autograd.grad(part, weights, create_graph=True, allow_unused=True), weights)
        for sum_, product in zip(total, _product(first, gradient, weights), strict=True):
            sum_ += product
    return _arrays(names, total)


def weight_curvature(task: Task, axes: Mapping[str, int]) -> dict[str, Estimate]:
    """Traces of the Hessian of the mean loss over slices of weights (Hutchinson), labels as in `gate_curvature`.

    Args:
        task: model and samples.
        axes: the axis of each weight, by its name, whose slices have a trace each.

    Returns:
        Per weight one trace per position of its axis.
    """
    network = task.network()
    weights = [network.weights[name] for name in axes]
    loss = objective(task.loss, network, task.seed, expected=True)
    generator = torch.Generator().manual_seed(task.seed)
    batches = -(-task.data.samples // task.batch)

    def traces(signs: Sequence[Tensor], products: Sequence[Tensor]) -> Array:
        parts = [
            (s * p).movedim(axis, 0).flatten(1).sum(1) if s.dim() > 1 else s * p
            for s, p, axis in zip(signs, products, axes.values(), strict=True)
        ]
        return np.asarray(torch.cat(parts).cpu().double().numpy())

    def draws() -> Iterator[Array]:
        for feeds, labels in task.batches(task.batch):
            total = loss(feeds, labels, None).mean()
            first = _filled(torch.autograd.grad(total, weights, create_graph=True, allow_unused=True), weights)
            for _ in range(max(1, FEWEST // batches)):
                signs = [_signs(w, generator) for w in weights]
                yield traces(signs, _product(first, signs, weights))

    sizes = [w.shape[axis] for w, axis in zip(weights, axes.values(), strict=True)]
    return _split(_until_stable(draws, sum(sizes)), list(axes), sizes)


def _split(found: Estimate, names: Sequence[str], sizes: Sequence[int]) -> dict[str, Estimate]:
    at = np.cumsum(sizes)[:-1]
    parts = zip(names, np.split(found.value, at), np.split(found.error, at), strict=True)
    return {name: Estimate(value, error, found.draws) for name, value, error in parts}


def synaptic_flow(task: Task) -> dict[str, Array]:
    """|w| dR/d|w| with all weights positive, inputs of ones and R the sum of the outputs, by the weight's name.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow" (2020),
    equation 2 ff.; the samples of the task give the shapes of the inputs only.
    """
    network = task.network(torch.float64)
    names, weights = _learned(network)
    with torch.no_grad():
        for w in network.parameters():
            w.abs_()
    feeds = next(task.data.batches(1))
    ones = {n: np.ones_like(a) for n, a in feeds.items()}
    outputs = [y for y in network(ones).values() if y.is_floating_point()]
    flow = torch.stack([y.sum() for y in outputs]).sum()
    grads = _filled(torch.autograd.grad(flow, weights, allow_unused=True), weights)
    return _arrays(names, [w.detach() * g for w, g in zip(weights, grads, strict=True)])


def _learned(network: Interpreter) -> tuple[list[str], list[Tensor]]:
    found = {name: w for name, w in network.weights.items() if w.requires_grad}
    return list(found), list(found.values())


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)


def _filled(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, like, strict=True)]


def _product(first: Sequence[Tensor], vector: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """H v from the graph of the first derivatives."""
    inner = torch.stack([(g * v).sum() for g, v in zip(first, vector, strict=True)]).sum()
    if not inner.requires_grad:
        return [torch.zeros_like(w) for w in wanted]
    return _filled(torch.autograd.grad(inner, list(wanted), retain_graph=True, allow_unused=True), wanted)


def _arrays(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Array]:
    return {n: t.detach().cpu().double().numpy() for n, t in zip(names, tensors, strict=True)}
