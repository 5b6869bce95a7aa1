"""Relevance of every unit by layer-wise relevance propagation, for any model that the interpreter runs.

A network whose derivatives follow the rules of `propagation`: the derivative of what is explained with respect to a
gate of 1 is the relevance of the unit behind it. Source: "Pruning by Explaining" (Yeom et al., arXiv 1912.08881; Hatefi
et al., arXiv 2408.12568).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from spa.errors import UsageError
from spa.graph import Graph
from spa.interpreter.activity import KEEPERS, Activity
from spa.interpreter.module import Interpreter
from spa.interpreter.objective import chosen
from spa.interpreter.plan import Plan, Read, Timed
from spa.interpreter.program import Step
from spa.interpreter.propagation import Kernel, Rules, carried, linear, shared, surrogate
from spa.interpreter.statistics import Task, gates_by_sample


def gate_relevance(task: Task, rules: Rules | None = None) -> dict[str, NDArray[np.float32]]:
    """Relevance of every unit for every sample, [samples, units] per group, summed over positions.

    It starts at the score (before a softmax or sigmoid at the end) of the label, or of the class that the model
    predicts if there are no labels; with more axes, at that of every position. Of outputs that are no classes it is
    their magnitude. The loss of the task plays no part. Half precision is computed in float32.

    Raises:
        UsageError: the model has no floating-point output.
    """
    network = Propagation(task.analysis.coupling.model, rules)
    network = network.to(device=task.device, dtype=torch.float32).eval()
    network.requires_grad_(False)
    names = network.explained()

    def explain(feeds: Mapping[str, Any], labels: NDArray[np.int64] | None, gates: Any) -> Tensor:
        return start(network(feeds, names, gates), labels)

    return gates_by_sample(task, lambda: explain)


def start(outputs: Mapping[str, Tensor], labels: NDArray[np.int64] | None) -> Tensor:
    """The number of each sample that is explained, [n]. Raises: UsageError without a floating-point output."""
    floats = {n: y for n, y in outputs.items() if y.is_floating_point()}
    if not floats:
        raise UsageError("the model has no floating-point output to explain")
    how = chosen("auto", floats, labels)
    if how == "gaussian":
        return torch.stack([y.abs().flatten(1).sum(1) for y in floats.values()]).sum(0)
    scores = next(y for n, y in floats.items() if y.dim() in (2, 3) and y.shape[-1] > 1)
    if how == "ce" and labels is not None:
        return scores.gather(1, torch.as_tensor(labels).to(scores.device)[:, None]).squeeze(1)
    return scores.amax(-1).flatten(1).sum(1) if scores.dim() == 3 else scores.amax(1)


class Propagation(Interpreter):
    """A model whose activations times derivatives are relevances.

    Args:
        model: as for `Interpreter`.
        rules: for layers with weights; `Rules()` if None.
    """

    def __init__(self, model: ir.Model | Graph, rules: Rules | None = None) -> None:
        super().__init__(model)
        self.rules = Rules() if rules is None else rules
        self.activity = Activity(self.model.graph, self._compiler.facts.dtype)
        self._ruled: set[Plan] = set()

    def explained(self) -> tuple[str, ...]:
        """Names of what is explained: the outputs, before a softmax or sigmoid that stands at the end."""
        return tuple(_scores(value).name or "" for value in self.model.graph.outputs)

    def _plan(self, names: tuple[str, ...], reads: tuple[Read, ...]) -> Plan:
        plan = super()._plan(names, reads)
        if plan not in self._ruled:
            plan.steps = self._propagating(plan.steps, set(plan.outputs))
            self._ruled.add(plan)
        return plan

    def _propagating(self, steps: Sequence[Timed], kept: set[int]) -> list[Timed]:
        merged = _merged(steps, kept, self.activity)
        out: list[Timed] = []
        held: dict[int, tuple[Step, tuple[int, ...]]] = {}
        for k, (step, frees) in enumerate(steps):
            if k in merged.values():
                held[k] = (step, frees)
            elif k in merged:
                before, more = held[merged[k]]
                kernel = _with_norm(before.kernel, step.kernel, step.node, self.rules)
                reads = (*before.reads[:2], (*before.reads, 0)[2], *step.reads[1:5])
                out.append((Step(kernel, reads, step.writes, step.node), (*frees, *more)))
            else:
                out.append((self._ruled_step(step), frees))
        return out

    def _ruled_step(self, step: Step) -> Step:
        kernel = None if step.node is None else _rule(step.node, step.kernel, self.activity, self.rules)
        return step if kernel is None else Step(kernel, step.reads, step.writes, step.node, step.what)


def _scores(value: ir.Value) -> ir.Value:
    """What a softmax or sigmoid at the end is applied to; the value itself where there is none."""
    at: ir.Value | None = value
    while at is not None and (node := at.producer()) is not None:
        if node.op_type in ("Softmax", "LogSoftmax", "Sigmoid"):
            source = node.inputs[0]
            return value if source is None or not source.name else source
        if node.op_type not in ("Identity", "Cast", "Reshape", "Flatten", "Squeeze"):
            break
        at = node.inputs[0]
    return value


# -- which rule a node has -------------------------------------------------------------------------------------------


def _rule(node: ir.Node, kernel: Kernel, activity: Activity, rules: Rules) -> Kernel | None:
    """The kernel with the derivatives of a rule; None where the true ones are right."""
    slots = activity.active(node)
    if not slots:
        return None
    name = node.op_type
    if name in ("Conv", "ConvTranspose") and slots == [0]:
        return _weighted(kernel, 0, 1, rules.convolution)
    if name in ("MatMul", "Gemm", "FusedMatMul", "TransposeMatMul"):
        if slots[:2] == [0, 1]:
            return _evenly(kernel, {0: 0.5, 1: 0.5})
        return None if slots[0] > 1 else _weighted(kernel, slots[0], 1 - slots[0], rules.dense)
    if name == "Einsum" and len(slots) > 1:
        return _evenly(kernel, dict.fromkeys(slots, 1 / len(slots)))
    if name == "Mul":
        return _product(node, kernel, activity, slots)
    if name == "Div" and 1 in slots:
        return lambda a, b: kernel(a, b.detach())
    if name in KEEPERS:
        return _activation(kernel, added=name in ("BiasGelu", "FastGelu"), limits=name == "Clip")
    if name == "Pow" and slots == [0]:
        return _power(kernel)
    if name in _NORMS:
        return _norm(kernel, _NORMS[name](node), simple="Skip" not in name)
    return _attention(node, kernel)


def _weighted(kernel: Kernel, x: int, w: int, rule: Any) -> Kernel:
    def run(*inputs: Tensor | None) -> Tensor:
        value: Tensor = kernel(*inputs)
        data, weight = inputs[x], inputs[w]
        if data is None or weight is None or not value.requires_grad:
            return value
        turned = (lambda a, b: kernel(a, b)) if x == 0 else (lambda a, b: kernel(b, a))
        return linear(turned, data, weight.detach(), value, rule)

    return run


def _with_norm(conv: Kernel, norm: Kernel, node: ir.Node | None, rules: Rules) -> Kernel:
    """A convolution and the batch normalisation behind it as one convolution."""
    epsilon = 1e-5 if node is None or "epsilon" not in node.attributes else node.attributes["epsilon"].as_float()

    def run(
        x: Tensor, w: Tensor, b: Tensor | None, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor
    ) -> Tensor:
        value: Tensor = norm(conv(x, w, b), scale, shift, mean, variance)
        if not value.requires_grad:
            return value
        factor = (scale * torch.rsqrt(variance + epsilon)).detach().to(w.dtype)
        return linear(conv, x, w.detach() * factor.reshape(-1, *[1] * (w.dim() - 1)), value, rules.convolution)

    return run


def _merged(steps: Sequence[Timed], kept: set[int], activity: Activity) -> dict[int, int]:
    """Batch normalisations that are the only reader of a convolution: position of the one -> of the other."""
    written = {step.writes[0]: k for k, (step, _) in enumerate(steps) if _is(step, "Conv", activity)}
    readers: dict[int, int] = {}
    for step, _ in steps:
        for slot in step.reads:
            readers[slot] = readers.get(slot, 0) + 1
    found = {}
    for k, (step, _) in enumerate(steps):
        source = written.get(step.reads[0]) if _is(step, "BatchNormalization", activity) else None
        if source is not None and readers[step.reads[0]] == 1 and step.reads[0] not in kept:
            found[k] = source
    return found


def _is(step: Step, operator: str, activity: Activity) -> bool:
    """Whether a step is a node of this operator of whose inputs only the first carries relevance."""
    node = step.node
    return node is not None and node.op_type == operator and len(step.writes) == 1 and activity.active(node) == [0]


def _evenly(kernel: Kernel, shares: Mapping[int, float]) -> Kernel:
    """Factors of a product have equal shares (the uniform rule of AttnLRP)."""

    def run(*inputs: Tensor | None) -> Any:
        return kernel(*(x if x is None or k not in shares else shared(x, shares[k]) for k, x in enumerate(inputs)))

    return run


def _product(node: ir.Node, kernel: Kernel, activity: Activity, slots: list[int]) -> Kernel | None:
    if len(slots) < 2:
        return None
    signal = activity.gated(node)
    scales = [k for k in slots if activity.denominator(node.inputs[k])]
    if signal is None and len(scales) == 1:
        signal = 1 - scales[0]
    if signal is None:
        return _evenly(kernel, {0: 0.5, 1: 0.5})
    return _evenly(kernel, {1 - signal: 0.0})


def _activation(kernel: Kernel, added: bool, limits: bool) -> Kernel:
    """Its relevance passes unchanged (the identity rule), that of a bias inside excepted."""

    def run(x: Tensor, *rest: Tensor | None) -> Tensor:
        value: Tensor = kernel(x, *rest)
        if not value.requires_grad or (limits and bool(kernel(x.new_zeros(1), *rest).any())):
            return value
        bias = rest[0] if added and rest else None
        return carried(x if bias is None else x + bias, value.detach())

    return run


def _power(kernel: Kernel) -> Kernel:
    def run(x: Tensor, exponent: Tensor) -> Tensor:
        value: Tensor = kernel(x, exponent)
        return carried(x, value.detach()) if value.requires_grad and bool((exponent > 0).all()) else value

    return run


# -- norms -----------------------------------------------------------------------------------------------------------

Centred = Callable[[Tensor], Tensor]
"""What a norm scales: its input, or that without the mean."""


def _last(node: ir.Node) -> Centred:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    return lambda x: x - x.mean(list(range(axis % x.dim(), x.dim())), keepdim=True)


def _grouped(node: ir.Node) -> Centred:
    groups = node.attributes["num_groups"].as_int()

    def run(x: Tensor) -> Tensor:
        parts = x.reshape(x.shape[0], groups, -1)
        return (parts - parts.mean(-1, keepdim=True)).reshape(x.shape)

    return run


def _spatial(node: ir.Node) -> Centred:
    return lambda x: x - x.mean(list(range(2, x.dim())), keepdim=True)


def _given_axes(node: ir.Node) -> Centred:
    axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else [0, 2, 3]
    return lambda x: x - x.mean(axes, keepdim=True)


def _plain(node: ir.Node) -> Centred:
    return lambda x: x


_NORMS: dict[str, Callable[[ir.Node], Centred]] = {
    "LayerNormalization": _last,
    "SkipLayerNormalization": _last,
    "InstanceNormalization": _spatial,
    "GroupNormalization": _grouped,
    "MeanVarianceNormalization": _given_axes,
    **dict.fromkeys(
        ("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "LpNormalization",
         "LRN"),
        _plain,
    ),
}  # fmt: skip


def _norm(kernel: Kernel, centred: Centred, simple: bool) -> Kernel:
    """Standard deviations and the like only scale (the rule of AttnLRP); a bias keeps its share."""
    first = 1 if simple else 2
    """Where scale and shift are."""

    def run(*inputs: Tensor | None) -> Any:
        results = kernel(*inputs)
        value: Tensor = results[0] if isinstance(results, tuple) else results
        if not value.requires_grad:
            return results
        given = [x for x in (inputs[0], *(() if simple else (inputs[1], *inputs[4:5]))) if x is not None]
        total = given[0]
        for more in given[1:]:
            total = total + more
        bare = list(inputs)
        shift = bare[first + 1] if len(bare) > first + 1 else None
        if shift is not None:
            bare[first + 1] = torch.zeros_like(shift)
        without = kernel(*bare)
        without = (without[0] if isinstance(without, tuple) else without).detach()
        out = surrogate(value, carried(centred(total), without))
        return (out, *results[1:]) if isinstance(results, tuple) else out

    return run


# -- attention in one operator ---------------------------------------------------------------------------------------


def _attention(node: ir.Node, kernel: Kernel) -> Kernel | None:
    """Scores times values: each half; of the half of the scores, queries and keys half each."""
    name, domain = node.op_type, node.domain
    packed = [v is not None for v in node.inputs[:3]] != [True] * 3
    if name in ("MultiHeadAttention", "GroupQueryAttention", "Attention") and not (packed or _own(name, domain)):
        return _evenly(kernel, {0: 0.25, 1: 0.25, 2: 0.5})
    if name == "Attention" and domain == "com.microsoft":
        return _projected(node, kernel)
    if name == "GroupQueryAttention":
        heads, groups = (node.attributes[key].as_int() for key in ("num_heads", "kv_num_heads"))
        return _columns(kernel, lambda wide: wide // (heads + 2 * groups) * (heads + groups))
    return None


def _own(name: str, domain: str) -> bool:
    """com.microsoft's Attention has weights where others have keys."""
    return name == "Attention" and domain == "com.microsoft"


def _columns(kernel: Kernel, values: Callable[[int], int]) -> Kernel:
    """Queries, keys and, from column `values(width)` on, values in one tensor."""

    def run(x: Tensor, *rest: Tensor | None) -> Any:
        return kernel(shared(x, _shares(x, values(x.shape[-1]))), *rest)

    return run


def _shares(x: Tensor, values: int) -> Tensor:
    shares = torch.full((x.shape[-1],), 0.25, dtype=x.dtype, device=x.device)
    shares[values:] = 0.5
    return shares


def _projected(node: ir.Node, kernel: Kernel) -> Kernel:
    """With the projection inside: it is taken out, and the operator gets an identity for it."""
    sizes = list(node.attributes["qkv_hidden_sizes"].as_ints()) if "qkv_hidden_sizes" in node.attributes else None

    def run(x: Tensor, w: Tensor, b: Tensor | None = None, *rest: Tensor | None) -> Any:
        qkv = x @ w if b is None else x @ w + b
        values = sum(sizes[:2]) if sizes else qkv.shape[-1] // 3 * 2
        one = torch.eye(qkv.shape[-1], dtype=qkv.dtype, device=qkv.device)
        return kernel(shared(qkv, _shares(qkv, values)), one, None, *rest)

    return run
