"""Between slices of initializers (the plan) and solver positions (the analysis), in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import CAT, LEAF, Axis, Solution
from spa.coupling import Use
from spa.errors import PlanError
from spa.groups import Analysis, Group
from spa.plan import Consumer, Plan, Removal

Mask = NDArray[np.bool_]


def kept_without(analysis: Analysis, removed: Sequence[tuple[Group, Sequence[int]]]) -> Mask:
    """Position mask after the given units of the given groups have left."""
    kept = np.ones(analysis.coupling.solution.positions, dtype=bool)
    for group, units in removed:
        kept[group.positions[list(units)].reshape(-1)] = False
    return kept


def changed_leaves(solution: Solution, kept: Mask) -> set[int]:
    """Leaves that lose positions."""
    return set(np.unique(np.searchsorted(solution.base, np.flatnonzero(~kept), side="right") - 1).tolist())


def variants(analysis: Analysis, value: ir.Value) -> list[tuple[list[Use], tuple[Axis, ...]]]:
    """The uses of a weight that share axes, with those axes; one entry unless uses were separated."""
    coupling = analysis.coupling
    uses = coupling.shared.get(value, [])
    together = [u for u in uses if not coupling.separate(value, u)]
    out = [([use], coupling.dims(value, use) or ()) for use in uses if coupling.separate(value, use)]
    if together or not uses:
        out.insert(0, (together, coupling.dims(value) or ()))
    return out


def removals(analysis: Analysis, kept: Mask) -> tuple[Removal, ...]:
    """The slices of initializers that leave, in the order of the file.

    Weights whose zero would turn into NaN (denominators) are left out: they follow from the others.
    """
    solution = analysis.coupling.solution
    changed = changed_leaves(solution, kept)
    out: list[Removal] = []
    for value in analysis.coupling.weights:
        if value in analysis.poison:
            continue
        found: dict[tuple[int, tuple[int, ...]], list[Use]] = {}
        groups = variants(analysis, value)
        for uses, dims in groups:
            for d, dim in enumerate(dims):
                if solution.touched(dim, changed):
                    gone = tuple(np.flatnonzero(~solution.keep(dim, kept)).tolist())
                    if gone:
                        found.setdefault((d, gone), []).extend(uses)
        total = sum(len(uses) for uses, _ in groups)
        for (d, gone), uses in found.items():
            everywhere = len(groups) == 1 or len(uses) == total
            consumers = None if everywhere else tuple(Consumer(n.outputs[0].name or "", k) for n, k in uses)
            out.append(Removal(value.name or "", consumers, d, gone))
    return tuple(out)


def kept_by(analysis: Analysis, plan: Plan, label: str) -> Mask:
    """Position mask of a plan.

    Raises:
        PlanError: the plan names what the model does not have, or removes slices that cannot leave alone.
    """
    coupling, solution = analysis.coupling, analysis.coupling.solution
    kept = np.ones(solution.positions, dtype=bool)
    by_name = {value.name: value for value in coupling.weights}
    for removal in plan.removed:
        value = by_name.get(removal.initializer)
        if value is None:
            raise PlanError(f"{label} removes slices of {removal.initializer!r}, which {_MISSING}")
        meant = None if removal.consumers is None else {(c.output, c.input) for c in removal.consumers}
        for uses, dims in variants(analysis, value):
            if meant is not None and not any((n.outputs[0].name, k) in meant for n, k in uses):
                continue
            if not 0 <= removal.axis < len(dims):
                raise PlanError(f"{label} prunes axis {removal.axis} of {removal.initializer!r}, which {_MISSING}")
            _unkeep(solution, dims[removal.axis], _mask(solution, dims[removal.axis], removal, label), kept)
    gone = np.unique(solution.label[~kept])
    kept &= ~np.isin(solution.label, gone)
    if solution.frozen[~kept].any():
        raise PlanError(f"{label} removes slices that cannot be pruned in this model; make the plan anew")
    if any(not kept[solution.base[leaf] : solution.base[leaf + 1]].any() for leaf in changed_leaves(solution, kept)):
        raise PlanError(f"{label} removes all units of a layer; keep at least one")
    for group in analysis.groups:
        if int(kept[group.positions[:, 0]].sum()) < group.least:
            raise PlanError(f"{label} keeps fewer units of {group.name} than are chosen; keep at least {group.least}")
    if removals(analysis, kept) != plan.removed:
        raise PlanError(f"{label} removes slices that cannot leave alone in this model; make the plan anew")
    return kept


_MISSING = "this model does not have; the plan belongs to another model"


def _mask(solution: Solution, dim: Axis, removal: Removal, label: str) -> Mask:
    mask = np.ones(len(solution.keep(dim, np.ones(solution.positions, dtype=bool))), dtype=bool)
    wrong = next((i for i in removal.indices if not 0 <= i < len(mask)), None)
    if wrong is not None:
        raise PlanError(f"{label} removes index {wrong} of {removal.initializer!r}, which {_MISSING}")
    mask[list(removal.indices)] = False
    return mask


def _unkeep(solution: Solution, axis: Axis, mask: Mask, kept: Mask) -> None:
    """Inverse of `Solution.keep`: a factor position is gone if all its positions in `axis` are."""
    kind, parts = solution.terms[axis]
    if mask.all():
        return
    if kind == LEAF:
        kept[solution.base[parts[0]] : solution.base[parts[0] + 1]] &= mask
        return
    everything = np.ones(solution.positions, dtype=bool)
    sizes = [len(solution.keep(p, everything)) for p in parts]
    if kind == CAT:
        for part, piece in zip(parts, np.split(mask, np.cumsum(sizes)[:-1]), strict=True):
            _unkeep(solution, part, piece, kept)
        return
    grid = mask.reshape(sizes)
    for k, part in enumerate(parts):
        _unkeep(solution, part, np.asarray(grid.any(axis=tuple(j for j in range(len(parts)) if j != k))), kept)
