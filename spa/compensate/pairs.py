"""Sites of the original and of the pruned model side by side, and how they are visited."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.coupling import Coupling
from spa.executors.fused import SUFFIX
from spa.groups import Analysis
from spa.removal import Mask, changed_leaves
from spa.sites import Site, constant_of, find_sites, site_of
from spa.twin import Twin


@dataclass(frozen=True, eq=False)
class Behind:
    """What happens to a site's output y before anything else reads it: f(scale y + shift + other branch)."""

    scale: NDArray[np.float64]
    """[outputs of the pruned site]"""
    shift: NDArray[np.float64]
    skip: tuple[str, str] | None = None
    """The branch that a residual connection adds: its name in the original and in the pruned model."""
    low: float = -math.inf
    """f clips to low ... high: ReLU is 0 ... inf. What lies outside on both sides need not be matched."""
    high: float = math.inf

    @property
    def bends(self) -> bool:
        """Whether f clips at all."""
        return math.isfinite(self.low) or math.isfinite(self.high)


@dataclass(frozen=True, eq=False)
class Pair:
    """One site before and after pruning."""

    original: Site
    pruned: Site
    outputs: NDArray[np.int64]
    """Output channels of the original site that the pruned one still has."""
    behind: Behind

    @property
    def target(self) -> str:
        """What the outputs of the pruned site should be: a value of the original model."""
        return _linear(self.original)

    @property
    def matched(self) -> str:
        """The value of the pruned model that should be like `target`."""
        return _linear(self.pruned)


def _linear(site: Site) -> str:
    return site.name + SUFFIX if site.fused else site.name


def pair_up(analysis: Analysis, kept: Mask, twin: Twin) -> list[Pair]:
    """The sites of the pruned model whose inputs differ from the original's, in execution order."""
    coupling = analysis.coupling
    changed = affected(analysis, kept)
    out = []
    for site in find_sites(coupling.model):
        mirror = site_of(twin.node(site.node))
        outputs = kept_outputs(coupling, site, kept)
        if mirror is None or outputs is None or site.data not in changed:
            continue
        if len(outputs) == mirror.groups * mirror.rows:
            out.append(Pair(site, mirror, outputs, _behind(analysis, kept, twin, site, outputs)))
    return out


def kept_outputs(coupling: Coupling, site: Site, kept: Mask) -> NDArray[np.int64] | None:
    """Outputs of an original site that stay, of [g m]; None if its axes are not known."""
    dims = coupling.dims(site.output)
    if dims is None:
        return None
    return np.flatnonzero(coupling.solution.keep(dims[-1 if site.layout == "tokens" else 1], kept))


def affected(analysis: Analysis, kept: Mask) -> set[ir.Value]:
    """Values of the original model that depend on something that was cut."""
    coupling = analysis.coupling
    solution, said = coupling.solution, coupling.relations
    changed = changed_leaves(solution, kept)
    edited = {e.node for e in said.edits if any(solution.touched(a, changed) for a in (*e.axes, *e.watch))}
    edited |= {r.node for r in said.remaps if any(solution.touched(a, changed) for a in (r.source, r.target))}
    edited |= {p.node for p in said.pins if solution.touched(p.axis, changed)}
    out: set[ir.Value] = set()
    for op in coupling.ops:
        touched = op.node in edited or any(v is not None and v in out for v in op.node.inputs)
        for slot, value in enumerate(op.node.inputs):
            if not touched and value is not None and value in coupling.weights:
                dims = coupling.dims(value, (op.node, slot)) or ()
                touched = any(solution.touched(d, changed) for d in dims)
        if touched:
            out.update(op.node.outputs)
    return out


_Range = tuple[float, float]


def _behind(analysis: Analysis, kept: Mask, twin: Twin, site: Site, outputs: NDArray[np.int64]) -> Behind:
    """Follow the output of a site through norms and sums to a clipping activation, as long as nobody else reads it."""
    scale, shift = np.ones(site.groups * site.rows), np.zeros(site.groups * site.rows)
    skip: tuple[str, str] | None = None
    value = site.output
    if site.fused:
        branch = site.node.inputs[3] if len(site.node.inputs) > 3 else None
        if branch is not None and not _aligned(analysis, kept, site, branch):
            return Behind(scale[outputs], shift[outputs])
        if branch is not None:
            skip = branch.name or "", twin.value(branch).name or ""
        low, high = _inside(site.node)
        return Behind(scale[outputs], shift[outputs], skip, low, high)
    while True:
        plain = Behind(scale[outputs], shift[outputs], skip)
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return plain
        node, slot = uses[0]
        if node.domain not in ("", "ai.onnx"):
            return plain
        bounds = _clip(node)
        if bounds is not None:
            return replace(plain, low=bounds[0], high=bounds[1])
        if node.op_type == "BatchNormalization" and slot == 0 and site.layout != "tokens" and skip is None:
            norm = _norm(node)
            if norm is None or (np.abs(norm[0]) < 1e-3 * np.abs(norm[0]).max()).any():
                return plain  # a channel that its norm switches off cannot correct anything
            scale, shift = scale * norm[0], shift * norm[0] + norm[1]
        elif node.op_type == "Add":
            other = node.inputs[1 - slot]
            tensor = constant_of(other) if other is not None else None
            if tensor is not None:
                if tensor.size != 1 and not _per_output(tensor, site):
                    return plain
                shift = shift + tensor.numpy().astype(np.float64).reshape(-1)
            elif other is None or skip is not None or not _aligned(analysis, kept, site, other):
                return plain
            else:
                skip = other.name or "", twin.value(other).name or ""
        elif node.op_type != "Identity":
            return plain
        value = node.outputs[0]


def _per_output(tensor: ir.TensorProtocol, site: Site) -> bool:
    """Whether a constant that is added to a site's output is one number per output."""
    from_end = 1 if site.layout == "tokens" else 1 + len(site.kernel)
    outputs = site.groups * site.rows
    shape = tuple(tensor.shape.numpy())
    return tensor.size == outputs and len(shape) >= from_end and shape[-from_end] == outputs


def _inside(node: ir.Node) -> _Range:
    """What an activation inside an operator clips to; everything if it is another one."""
    kind = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    given = [node.attributes[n].as_floats() for n in ("activation_params",) if n in node.attributes]
    if kind == "Clip" and given and len(given[0]) == 2:
        return given[0][0], given[0][1]
    return (0.0, math.inf) if kind == "Relu" else (-math.inf, math.inf)


def _clip(node: ir.Node) -> _Range | None:
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    bounds = [-math.inf, math.inf]
    for k, name in enumerate(("min", "max")):
        value = node.inputs[k + 1] if k + 1 < len(node.inputs) else None
        tensor = constant_of(value) if value is not None else None
        if value is not None and (tensor is None or tensor.size != 1):
            return None
        if tensor is not None:
            bounds[k] = float(tensor.numpy().reshape(()))
        elif name in node.attributes:
            bounds[k] = node.attributes[name].as_float()
    return bounds[0], bounds[1]


def _norm(node: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Scale and shift of a batch normalisation."""
    tensors = [constant_of(v) if v is not None else None for v in node.inputs[1:5]]
    if any(t is None for t in tensors):
        return None
    gamma, beta, mean, variance = (t.numpy().astype(np.float64) for t in tensors if t is not None)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    scale = gamma / np.sqrt(variance + epsilon)
    return scale, beta - mean * scale


def _aligned(analysis: Analysis, kept: Mask, site: Site, other: ir.Value) -> bool:
    """Whether another branch has the same shape and loses the same channels."""
    coupling = analysis.coupling
    mine, theirs = coupling.dims(site.output), coupling.dims(other)
    if mine is None or theirs is None or len(mine) != len(theirs) or other in coupling.constants:
        return False
    at = 1 if site.layout != "tokens" else len(mine) - 1
    return np.array_equal(coupling.solution.keep(mine[at], kept), coupling.solution.keep(theirs[at], kept))


def steps(pairs: Sequence[Pair], ancestors: dict[str, frozenset[str]]) -> Iterable[list[Pair]]:
    """Consecutive pairs whose inputs do not depend on each other's outputs."""
    step: list[Pair] = []
    for pair in pairs:
        mine = ancestors.get(pair.pruned.data.name or "", frozenset())
        if step and any(other.pruned.name in mine for other in step):
            yield step
            step = []
        step.append(pair)
    if step:
        yield step


def site_ancestors(model: ir.Model, names: set[str]) -> dict[str, frozenset[str]]:
    """Value -> the sites (of `names`) that it depends on."""
    out: dict[str, frozenset[str]] = {}
    empty: frozenset[str] = frozenset()
    for node in model.graph:
        reads = [v.name for v in node.inputs if v is not None and v.name in out]
        joined = empty.union(*(out[n] for n in reads if n)) if reads else empty
        for value in node.outputs:
            mine = joined | {value.name} if value.name in names else joined
            if mine and value.name:
                out[value.name] = frozenset(m for m in mine if m)
    return out
