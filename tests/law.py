"""The law that every rule must obey: op(restrict x) == restrict(op(x')).

A case is one operator with operands. The rules say which positions of which axes may leave together; random sets of
them do. The pruned model runs on restricted inputs. The original runs on x': the removed positions are zero where the
rule says that they are summed, gone where it says that a statistic runs over them, and alive everywhere else. After
restriction both must agree. The reference is made here with numpy, from nothing but the case; `spa.verify.masked`, the
reference that users rely on, is held against the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa import exactness
from spa.errors import RuntimeFailure
from spa.groups import Analysis, analyze_model
from spa.removal import changed_leaves
from spa.rewrite import rewritten
from spa.rules import Flow, Op, Rule
from spa.verify import masked
from tests.subject import (
    FLOAT16,
    FLOAT32,
    QUANTISED,
    Array,
    Case,
    Subject,
    Tolerance,
    case,
    difference,
    each,
    engine_for,
    execute,
)

__all__ = ["FLOAT16", "FLOAT32", "QUANTISED", "Case", "Law", "LawBroken", "Subject", "Tolerance", "case", "each"]

Mask = NDArray[np.bool_]


class LawBroken(AssertionError):
    """A rule says something that the operator does not do."""


# -- the law ---------------------------------------------------------------------------------------------------------


class Law:
    """One subject under the rules as they are now."""

    def __init__(self, subject: Subject, engine: str = "") -> None:
        self.subject = subject
        self.engine = engine or engine_for(subject)
        self.model = subject.model
        self.analysis: Analysis = analyze_model(self.model, free=("*",))
        self.coupling = self.analysis.coupling
        self.solution = self.coupling.solution
        self.values = {v.name: v for v in (*self.model.graph.inputs, *self.model.graph.initializers.values())}

    @property
    def op(self) -> Op:
        return self.coupling.ops[0]

    # -- what is free ------------------------------------------------------------------------------------------------

    def free(self) -> str:
        """Dimensions with free positions, in the notation of `Case.free`."""
        if self.subject.single:
            inputs = [() if o is None else o.dims for o in self.op.inputs]
            outputs = [() if o is None else o.dims for o in self.op.outputs]
        else:
            inputs = [self.coupling.dims(self.values[n]) or () for n in self.subject.arrays]
            outputs = [self.coupling.dims(v) or () for v in self.model.graph.outputs]
        sides = (" ".join(self._free(dims) for dims in side) for side in (inputs, outputs))
        return " > ".join(sides)

    def _free(self, dims: Sequence[int]) -> str:
        return "".join(str(d) for d, dim in enumerate(dims) if self._open(dim)) or "-"

    def _open(self, dim: int) -> bool:
        sizes = self.solution.leaf_size
        if any(not isinstance(sizes[leaf], int) for leaf in self.solution.leaves(dim)):
            return False
        fixed = self.solution.frozen | np.repeat(np.diff(self.solution.base) < 2, np.diff(self.solution.base))
        return not bool(self.solution.keep(dim, fixed).all())

    def buckets(self) -> list[list[NDArray[np.int64]]]:
        """Free atoms, those that touch the same leaves together."""
        base, label = self.solution.base, self.solution.label
        leaf = np.repeat(np.arange(len(base) - 1), np.diff(base))
        free = np.flatnonzero(~self.solution.frozen & (np.diff(base)[leaf] > 1))
        found: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
        for atom in np.unique(label[free]):
            positions = free[label[free] == atom]
            found.setdefault(tuple(leaf[positions].tolist()), []).append(positions)
        return list(found.values())

    def removals(self, seeds: int) -> Iterator[Mask]:
        """Each bucket alone: one unit, about half, all but one; then random mixtures."""
        rng = np.random.default_rng(0)
        buckets = self.buckets()
        chosen: list[list[NDArray[np.int64]]] = []
        for atoms in buckets:
            order = [atoms[k] for k in rng.permutation(len(atoms))]
            sizes = sorted({1, len(atoms) // 2, len(atoms) - 1} - {0}) or [1]
            chosen.extend(order[:size] for size in sizes)
        if len(buckets) > 1:
            for _ in range(seeds):
                shares = rng.random(len(buckets))
                chosen.append(
                    [a for atoms, share in zip(buckets, shares, strict=True) for a in atoms if rng.random() < share]
                )
        for atoms in chosen:
            kept = self._without(atoms)
            if not kept.all():
                yield kept

    def _without(self, atoms: Sequence[NDArray[np.int64]]) -> Mask:
        """Remove atoms one after the other, as long as every leaf keeps a position, or as many as are chosen."""
        kept = np.ones(self.solution.positions, dtype=bool)
        base = self.solution.base
        least = np.minimum(np.diff(base), 1)
        for choice in self.coupling.relations.choices:
            for leaf in self.solution.leaves(choice.flow.axis):
                least[leaf] = max(least[leaf], int(choice.count))
        for positions in atoms:
            trial = kept.copy()
            trial[positions] = False
            alive = np.concatenate([[0], np.cumsum(trial)])[base]
            if (np.diff(alive) >= least).all():
                kept = trial
        return kept

    # -- both sides --------------------------------------------------------------------------------------------------

    def check(self, seeds: int = 3) -> int:
        """Try removals; returns how many.

        Raises:
            LawBroken: pruned and reference differ, or the pruned model does not run.
        """
        count = 0
        for kept in self.removals(seeds):
            count += 1
            try:
                small = self.small(kept)
            except RuntimeFailure as error:
                raise LawBroken(f"{self._told(kept)}: the pruned model does not run: {error}") from error
            if self.subject.single:
                for which in range(self.carriers()):
                    self._compare(small, self.reference(kept, which), kept, "its operands restricted and zeroed")
                self.check_zeros(kept)
            if self.engine == "ort":
                self._compare(small, self.masked(kept), kept, "the masked reference")
        return count

    def _compare(self, small: Mapping[str, Array], wide: Mapping[str, Array], kept: Mask, what: str) -> None:
        for name, expected in wide.items():
            gap = difference(expected, small[name])
            if gap > self.subject.tolerance.relative:
                shapes = (
                    f"{expected.shape} and {small[name].shape}" if expected.shape != small[name].shape else f"{gap:.3g}"
                )
                raise LawBroken(f"{self._told(kept)}: {name} differs from {what} ({shapes})")

    def _told(self, kept: Mask) -> str:
        gone = []
        for name, value in self.values.items():
            for d, dim in enumerate(self.coupling.dims(value) or ()):
                if self.solution.touched(dim, changed_leaves(self.solution, kept)):
                    gone.append(f"{name}.{d} without {np.flatnonzero(~self.solution.keep(dim, kept)).tolist()}")
        return "; ".join(gone) or "removal inside"

    def small(self, kept: Mask) -> dict[str, Array]:
        """Outputs of the pruned model on restricted inputs."""
        model = rewritten(self.analysis, kept).model
        arrays = {name: self._cut(name, array, kept) for name, array in self.subject.arrays.items()}
        feeds = self.subject.feeds(arrays)
        for value in model.graph.inputs:
            if value.name in feeds:
                value.shape = ir.Shape(feeds[value.name].shape)
        return execute(self.engine, ir.to_proto(model), feeds)

    def _cut(self, name: str, array: Array, kept: Mask) -> Array:
        for d, dim in enumerate(self.coupling.dims(self.values[name]) or ()):
            if self.solution.touched(dim, changed_leaves(self.solution, kept)):
                array = np.compress(self.solution.keep(dim, kept), array, axis=d)
        return array

    def masked(self, kept: Mask) -> dict[str, Array]:
        """Outputs of `spa.verify.masked`, restricted.

        A node that runs on survivors only lays its outputs out again for other nodes, not for the graph's outputs.
        """
        wide = execute("ort", ir.to_proto(masked(self.analysis, kept)), self.subject.feeds(self.subject.arrays))
        changed = changed_leaves(self.solution, kept)
        flows = [f for f in self.coupling.relations.flows if f.leaving != "pass"]
        contracted = {leaf for flow in flows for leaf in self.solution.leaves(flow.axis)} & changed
        out = {}
        for value in self.model.graph.outputs:
            array = wide[value.name or ""]
            for gone in (set(), self._gone(changed), contracted):
                pairs = zip(array.shape, self.coupling.dims(value) or (), strict=True)
                there = self._only(kept, gone)
                if all(n == self.solution.keep(d, there).sum() for n, d in pairs if self.solution.touched(d, changed)):
                    break
            out[value.name or ""] = self._restricted(array, value, kept, gone)
        return out

    def carriers(self) -> int:
        """How many operands a sum could be zeroed in: each one alone must do."""
        return max([len(self._slots(f)) for f in self.coupling.relations.flows if f.leaving == "sum"] or [1])

    def _slots(self, flow: Flow) -> list[int]:
        slots = {slot for slot, _ in flow.inputs}
        return sorted(slots & set(self.subject.carriers) or slots)

    def reference(self, kept: Mask, which: int) -> dict[str, Array]:
        """Outputs of the original operator on x', restricted."""
        changed = changed_leaves(self.solution, kept)
        gone = self._gone(changed)
        arrays = {name: array.copy() for name, array in self.subject.arrays.items()}
        names = [v.name if v is not None else None for v in self.op.node.inputs]
        for flow in self.coupling.relations.flows:
            leaves = (set(self.solution.leaves(flow.axis)) & changed) - gone
            slots = self._slots(flow)
            if flow.leaving == "choice" and leaves:
                for slot, d in flow.inputs:
                    mask = self.solution.keep(self.op.inputs[slot].dims[d], self._only(kept, leaves))  # type: ignore[union-attr]  # a flow names inputs that are there
                    np.moveaxis(arrays[names[slot] or ""], d, 0)[~mask] = -1e9
            if flow.leaving != "sum" or not leaves or not slots:
                continue
            for slot, d in flow.inputs:
                if slot == slots[which % len(slots)]:
                    name, operand = names[slot] or "", self.op.inputs[slot]
                    assert operand is not None
                    mask = self.solution.keep(operand.dims[d], self._only(kept, leaves))
                    zero = self.subject.zeros.get(name, 0)
                    value = arrays[zero] if isinstance(zero, str) else zero
                    shape = [len(mask) if k == d else 1 for k in range(arrays[name].ndim)]
                    arrays[name] = np.where(mask.reshape(shape), arrays[name], value).astype(arrays[name].dtype)
        for slot, operand in enumerate(self.op.inputs):
            for d, dim in enumerate(operand.dims if operand is not None else ()):
                if self.solution.touched(dim, gone):
                    keep = self.solution.keep(dim, self._only(kept, gone))
                    arrays[names[slot] or ""] = np.compress(keep, arrays[names[slot] or ""], axis=d)
        wide = execute(self.engine, self.subject.with_arrays(arrays), self.subject.feeds(arrays))
        return {v.name or "": self._restricted(wide[v.name or ""], v, kept, gone) for v in self.model.graph.outputs}

    def _gone(self, changed: set[int]) -> set[int]:
        """Leaves over which a statistic or a mean runs."""
        flows = [f for f in self.coupling.relations.flows if f.leaving in ("stat", "mean")]
        return {leaf for flow in flows for leaf in self.solution.leaves(flow.axis)} & changed

    def _restricted(self, array: Array, value: ir.Value, kept: Mask, gone: set[int]) -> Array:
        """`array` at the surviving positions; it has already lost those in the leaves `gone`."""
        for d, dim in enumerate(self.coupling.dims(value) or ()):
            if self.solution.touched(dim, changed_leaves(self.solution, kept)):
                there = self.solution.keep(dim, self._only(kept, gone))
                if array.shape[d] != there.sum():
                    raise LawBroken(f"{value.name}.{d} has {array.shape[d]} positions, the rule says {there.sum()}")
                array = np.compress(self.solution.keep(dim, kept)[there], array, axis=d)
        return array

    def _only(self, kept: Mask, leaves: set[int]) -> Mask:
        out = np.ones_like(kept)
        for leaf in leaves:
            span = slice(self.solution.base[leaf], self.solution.base[leaf + 1])
            out[span] = kept[span]
        return out

    # -- zero in, zero out -------------------------------------------------------------------------------------------

    def check_zeros(self, kept: Mask) -> None:
        """Where `spa.exactness` follows a zero through the operator, the original really gives zero."""
        rule = self.coupling.rules.get(0)
        if rule is None or (zero := rule.zero_of(self.op)).never:
            return
        changed = changed_leaves(self.solution, kept)
        present = [k for k, operand in enumerate(self.op.inputs) if operand is not None]
        summands = present if zero.all_of == "all" else [k for k in zero.all_of if k in present]
        if any(a.dtype.kind not in "iub" and not np.isfinite(a).all() for a in self.subject.arrays.values()):
            return  # zero times infinity is nobody's promise
        factors: list[set[int]] = [{k} for k in zero.any_of if k in present] or [set()]
        for factor in factors:
            slots = {*summands, *factor}
            if slots & set(rule.divisors):
                continue
            arrays = {name: array.copy() for name, array in self.subject.arrays.items()}
            claimed: dict[ir.Value, set[int]] = {}
            for slot in slots:
                operand, value = self.op.inputs[slot], self.op.node.inputs[slot]
                assert operand is not None
                assert value is not None
                claimed[value] = set()
                for d, dim in enumerate(operand.dims):
                    leaves = set(self.solution.leaves(dim)) & changed
                    if leaves:
                        claimed[value] |= leaves
                        mask = self.solution.keep(dim, self._only(kept, leaves))
                        np.moveaxis(arrays[value.name or ""], d, 0)[~mask] = 0
            self._zero_out(rule, arrays, claimed, kept)

    def _zero_out(self, rule: Rule, arrays: dict[str, Array], claimed: dict[ir.Value, set[int]], kept: Mask) -> None:
        known = self.promised(rule, claimed)
        wide = execute(self.engine, self.subject.with_arrays(arrays), self.subject.feeds(arrays))
        for value in self.model.graph.outputs:
            if value in claimed:
                continue
            for d, dim in enumerate(self.coupling.dims(value) or ()):
                leaves = set(self.solution.leaves(dim)) & known.get(value, set()) & changed_leaves(self.solution, kept)
                if leaves:
                    mask = self.solution.keep(dim, self._only(kept, leaves))
                    if np.any(np.compress(~mask, wide[value.name or ""], axis=d)):
                        raise LawBroken(f"{value.name}.{d} is not zero where its operands are: {self._told(kept)}")

    def promised(self, rule: Rule, zeros: Mapping[ir.Value, set[int]]) -> dict[ir.Value, set[int]]:
        """What `spa.exactness` concludes from zeros in the operands: per value, the leaves on which it is zero."""
        known = {value: set(leaves) for value, leaves in zeros.items()}
        weights, self.coupling.weights = self.coupling.weights, {}
        try:
            remaps = [r for r in self.coupling.relations.remaps if r.node is self.op.node]
            exactness._forward(self.coupling, self.op, rule, known, set(), remaps)
        finally:
            self.coupling.weights = weights
        return {v: leaves for v, leaves in known.items() if v not in zeros}

    def movable(self, leaf: int) -> bool:
        """Whether positions of a leaf can leave."""
        span = slice(self.solution.base[leaf], self.solution.base[leaf + 1])
        return bool((~self.solution.frozen[span]).sum() > 1)
