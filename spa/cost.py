"""What a model costs, as functions of the kept sizes.

Every cost is a sum of terms, each a function of the sizes of some axes. Multiply-accumulates (MACs) come from the
rules, parameters and bytes from the shapes of the weights; these are monomials. Latency is a sum of operators that
were measured (`spa.latency`), and only there for a model that was profiled. Axes whose size is known only at run time
count with the sizes in `dims` (by symbol name), by default 1 for a leading axis of a graph input and 128 (224 in
images) for others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import LEAF, PROD, Axis, Solution
from spa.coupling import Coupling, weights_of
from spa.symbols import Size, Sym, bind, is_static

Metric = Literal["macs", "parameters", "bytes", "latency", "units"]
"""`latency` is milliseconds of one run; `units` is what selection counts, a cost model knows the others."""
METRICS: tuple[Metric, ...] = ("macs", "parameters", "bytes")
"""Those that every model has."""
Sizes = int | NDArray[np.float64]
"""A size, or several to be tried at once."""
Amount = float | NDArray[np.float64]
"""A cost, or one per size that is tried."""

_COUNTED = {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "FLOAT4E2M1"}
_COUNTED |= {"INT16", "UINT16", "INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2"}
_COUNTED |= {"FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0", "COMPLEX64", "COMPLEX128"}


def counts_as_parameter(tensor: ir.TensorProtocol) -> bool:
    """Floating-point and quantised tensors are parameters; integers, booleans and strings are structure."""
    return tensor.dtype.name in _COUNTED


def parameters_of(model: ir.Model) -> int:
    """Parameters of a model as it stands: un-shared weights count as often as they are stored."""
    return sum(t.size for _, t in weights_of(model.graph) if counts_as_parameter(t))


class CostTerm(Protocol):
    """A part of a cost: a function of the sizes of some axes, which does not fall with any of them."""

    @property
    def metric(self) -> Metric:
        """What it is a part of."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What it depends on."""

    def value(self, sizes: Sequence[Sizes]) -> Amount:
        """The cost at these sizes of `axes`; where several are given at once, one cost for each."""


@dataclass(frozen=True)
class Term:
    """coefficient x product of the sizes of `axes`."""

    metric: Metric
    coefficient: float
    axes: tuple[Axis, ...]

    def value(self, sizes: Sequence[Sizes]) -> Amount:
        """See `CostTerm`."""
        out: Amount = self.coefficient
        for size in sizes:
            out = out * size
        return out


class CostModel:
    """The costs of a model under any kept sizes, updated incrementally."""

    def __init__(self, coupling: Coupling, dims: Mapping[str, int] | None = None, overhead: int = 0) -> None:
        self.solution = coupling.solution
        self.overhead = overhead
        sizes = {**_unnamed_dims(coupling), **default_dims(coupling.model, dims)}
        self.full = [_number(s, sizes) for s in self.solution.leaf_size]
        self.metrics = METRICS
        """What is known, in this order."""
        self.terms: list[CostTerm] = []
        self.by_leaf: dict[int, list[int]] = {}
        self._add(_terms(coupling))

    def _add(self, terms: Sequence[CostTerm]) -> None:
        for k, term in enumerate(terms, start=len(self.terms)):
            for leaf in {leaf for axis in term.axes for leaf in self.solution.leaves(axis)}:
                self.by_leaf.setdefault(leaf, []).append(k)
        self.terms += terms

    def extended(self, metric: Metric, terms: Sequence[CostTerm]) -> CostModel:
        """The same model with one more metric."""
        out = copy(self)
        out.metrics = (*self.metrics, metric)
        out.terms = list(self.terms)
        out.by_leaf = {leaf: list(known) for leaf, known in self.by_leaf.items()}
        out._add(terms)
        return out

    def totals(self, counts: Sequence[int]) -> dict[Metric, float]:
        """All metrics when leaf k keeps `counts[k]` positions."""
        out: dict[Metric, float] = dict.fromkeys(self.metrics, 0.0)
        out["bytes"] += self.overhead
        known: _Known = {}
        for term in self.terms:
            out[term.metric] += float(self._value(term, counts, known))
        return out

    def _value(self, term: CostTerm, counts: Sequence[Sizes], known: _Known) -> Amount:
        """One term under `counts`; `known` remembers the sizes found under the same counts."""
        return term.value([_size(self.solution, axis, counts, known) for axis in term.axes])

    def change(self, counts: list[int], new: Mapping[int, int]) -> dict[Metric, float]:
        """Difference of all metrics if the leaves in `new` went from `counts` to their new counts."""
        affected = {k for leaf in new for k in self.by_leaf.get(leaf, ())}
        out: dict[Metric, float] = dict.fromkeys(self.metrics, 0.0)
        known: _Known = {}
        before = {k: self._value(self.terms[k], counts, known) for k in affected}
        old = {leaf: counts[leaf] for leaf in new}
        for leaf, count in new.items():
            counts[leaf] = count
        known = {}
        for k in affected:
            out[self.terms[k].metric] += float(self._value(self.terms[k], counts, known) - before[k])
        for leaf, count in old.items():
            counts[leaf] = count
        return out

    def sweep(
        self, counts: Sequence[int], new: Mapping[int, NDArray[np.float64]], metrics: Sequence[Metric]
    ) -> dict[Metric, Amount]:
        """What all terms that depend on the leaves in `new` cost together, for several counts of these at once.

        Differences of the result are differences of the model's costs.
        """
        tried: list[Sizes] = list(counts)
        for leaf, sizes in new.items():
            tried[leaf] = sizes
        out: dict[Metric, Amount] = dict.fromkeys(metrics, 0.0)
        known: _Known = {}
        for k in sorted({k for leaf in new for k in self.by_leaf.get(leaf, ())}):
            term = self.terms[k]
            if term.metric in out:
                out[term.metric] = out[term.metric] + self._value(term, tried, known)
        return out


_Known = dict[tuple[int, tuple[int, ...]], Sizes]


def _size(solution: Solution, axis: Axis, counts: Sequence[Sizes], known: _Known) -> Sizes:
    term = solution.terms[axis]
    kind, parts = term
    if kind == LEAF:
        return counts[parts[0]]
    size = known.get(term)
    if size is None:
        size = 1 if kind == PROD else 0
        for part in parts:
            piece = _size(solution, part, counts, known)
            size = size * piece if kind == PROD else size + piece
        known[term] = size
    return size


def _terms(coupling: Coupling) -> list[CostTerm]:
    terms: list[CostTerm] = [Term("macs", float(c.coefficient), c.axes) for c in coupling.relations.costs]
    for value, tensor in coupling.weights.items():
        uses = coupling.shared.get(value)
        dims = coupling.dims(value, uses[0] if uses else None)
        if dims is None:
            continue
        terms.append(Term("bytes", tensor.dtype.bitwidth / 8, dims))
        if counts_as_parameter(tensor):
            terms.append(Term("parameters", 1.0, dims))
    return terms


def default_dims(model: ir.Model, given: Mapping[str, int] | None = None) -> dict[str, int]:
    """Sizes assumed for the symbolic axes of the graph inputs; `given` wins."""
    out: dict[str, int] = {}
    for value in model.graph.inputs:
        for k, dim in enumerate(value.shape or ()):
            name = None if isinstance(dim, int) else dim.value
            if name is not None:
                out.setdefault(name, _assumed(value, k))
    out.update(given or {})
    return out


def _unnamed_dims(coupling: Coupling) -> dict[str, int]:
    """The same for axes without a name, by the symbols that shape inference made up for them."""
    out: dict[str, int] = {}
    for value in coupling.model.graph.inputs:
        for k, axis in enumerate(coupling.dims(value) or ()):
            size = coupling.axes.size(axis)
            if isinstance(size, Sym) and len(size.names) == 1:
                out.setdefault(size.names[0], _assumed(value, k))
    return out


def _assumed(value: ir.Value, axis: int) -> int:
    image = len(value.shape or ()) >= 4 and value.dtype is not None and value.dtype.is_floating_point()
    return 1 if axis == 0 else 224 if image and axis >= 2 else 128


def _number(size: Size, dims: Mapping[str, int]) -> int:
    if is_static(size):
        return size
    value = bind(size, dims)
    return 128 if value is None else max(int(value), 1)
