"""Structured sparsity while training: the coupled slices of a unit are shrunk together, until pruning it costs nothing.

After each step of the optimiser every penalised unit goes through the proximal operator of the group lasso (Yuan & Lin
2006; Parikh & Boyd, "Proximal Algorithms", 2014, section 6.5.1):

    w_u <- w_u * max(0, 1 - t / ||w_u||_2)

where w_u is everything of the unit in the analysis' own groups: the rows that make it, its bias and norm, the columns
that read it. `group-lasso` shrinks all units (Wen et al., "Learning Structured Sparsity", 2016), small ones more, so
that a group parts into large and small units: t is multiplied by 4^(1 - 2 r), where r is the unit's place between the
smallest and the largest norm of its group, 0 to 1 (DepGraph, arXiv 2301.12900, has 2^(4 - 4 r)). `mask` shrinks only
what a plan removes (MaskSparsity, arXiv 2201.06776), `growing` too, with a threshold that grows from nothing (Wang et
al., arXiv 2012.09243).

Thresholds are shares of norms instead of a factor of the loss, so that one strength fits all networks, optimisers and
lengths of a run. With strength 1 they add up to a unit's own norm at the start (`mask`, `growing`: where no gradient
holds it, it is gone at the end), or to the mean norm of its group (`group-lasso`, before that factor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from spa.consumers import units_along
from spa.errors import PlanError, UsageError
from spa.graph import Graph
from spa.groups import Analysis, Group, Member, analyze_model
from spa.interpreter import Interpreter
from spa.plan import Plan
from spa.removal import kept_by
from spa.train.settings import Settings

_GONE = 1e-6
"""Below this share of its norm at the start a unit counts as gone."""


@dataclass(frozen=True)
class Penalised:
    """Units of a group that are shrunk."""

    group: Group
    units: NDArray[np.bool_]
    """[units]."""


def penalised(graph: Graph, plan: Plan | None, label: str, sparsity: str) -> tuple[Analysis, list[Penalised]]:
    """Which units are shrunk: all, or those that a plan removes.

    Args:
        graph: the model, before vectors are taken apart (the plan knows nothing of that).
        plan: what will be pruned; not used for `group-lasso`.
        label: how messages call the plan.
        sparsity: which kind.

    Raises:
        PlanError: the plan is of another model.
        UsageError: there is nothing to shrink.
    """
    analysis = analyze_model(graph.model)
    if sparsity == "group-lasso":
        found = [Penalised(g, np.ones(g.units, dtype=bool)) for g in analysis.groups]
    else:
        assert plan is not None  # settings have been checked
        if plan.sha256 != graph.sha256:
            raise PlanError(
                f"{label} belongs to another model (sha256 {plan.sha256[:12]}..., this one's is "
                f"{graph.sha256[:12]}...); --sparsity {sparsity} needs the plan that will prune the model it trains."
            )
        kept = kept_by(analysis, plan, label)
        found = [Penalised(g, np.asarray(~kept[g.positions].all(axis=1))) for g in analysis.groups]
    found = [p for p in found if p.units.any()]
    if not found:
        raise UsageError(f"--sparsity {sparsity} finds nothing to shrink: no unit of this model can be pruned.")
    return analysis, found


@dataclass(frozen=True)
class _Slices:
    """One weight of a group."""

    weight: Parameter
    axis: int
    unit: Tensor
    """Per position of the axis its unit; for positions that belong to none, one more than the last unit."""


class Shrinkage:
    """Shrinks penalised units after each step; made before the first one, whose norms thresholds are shares of."""

    def __init__(
        self, network: Interpreter, analysis: Analysis, chosen: Sequence[Penalised], settings: Settings
    ) -> None:
        self._growing = settings.sparsity == "growing"
        self._all = settings.sparsity == "group-lasso"
        self._groups: list[tuple[list[_Slices], Tensor, Tensor]] = []
        for item in chosen:
            slices = _slices(network, analysis, item.group)
            if not slices:
                continue
            mine = torch.from_numpy(item.units).to(network.device)
            norms = _norms(slices, item.group.units)
            whole = norms.mean().expand_as(norms) if self._all else norms
            self._groups.append((slices, whole * settings.strength * mine, norms * mine))
        if not self._groups:
            raise UsageError("--freeze leaves no weight of a unit that --sparsity could shrink.")

    def threshold(self, step: int, total: int, factor: float, factors: float) -> float:
        """Share of the whole threshold that a step takes off; the shares of all steps add up to 1.

        Args:
            step: its number, from 0 on.
            total: steps in all.
            factor: of the learning rate in this step.
            factors: sum of those of all steps.
        """
        return 2 * (step + 1) / (total * (total + 1)) if self._growing else factor / factors

    @torch.no_grad()
    def __call__(self, share: float) -> None:
        """Shrink once, by this share of the thresholds."""
        for slices, whole, _ in self._groups:
            norms = _norms(slices, len(whole))
            limit = share * whole * (_apart(norms) if self._all else 1)
            left = (1 - limit / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_min(0)
            left = torch.cat([left, left.new_ones(1)])
            for part in slices:
                shape = [1] * part.weight.dim()
                shape[part.axis] = -1
                part.weight.mul_(left[part.unit].reshape(shape).to(part.weight.dtype))

    @torch.no_grad()
    def left(self) -> float:
        """Norm of the penalised units by what it was at the start, mean."""
        now, before = self._now_and_before()
        return float((now / before.clamp_min(1e-30)).mean())

    @torch.no_grad()
    def gone(self) -> tuple[int, int]:
        """Penalised units that are gone, and how many there are."""
        now, before = self._now_and_before()
        return int((now <= _GONE * before).sum()), len(now)

    def _now_and_before(self) -> tuple[Tensor, Tensor]:
        now = torch.cat([_norms(slices, len(norms))[norms > 0] for slices, _, norms in self._groups])
        return now, torch.cat([norms[norms > 0] for _, _, norms in self._groups])


def _apart(norms: Tensor) -> Tensor:
    """4 for the smallest norm, 1/4 for the largest, [units]."""
    low, high = norms.min(), norms.max()
    return 4.0 ** (1 - 2 * (norms - low) / (high - low).clamp_min(torch.finfo(norms.dtype).tiny))


def _slices(network: Interpreter, analysis: Analysis, group: Group) -> list[_Slices]:
    """The weights of a group that are trained."""
    out = []
    weights = network.weights
    for member in group.members:
        weight = weights.get(_value(member).name or "")
        if weight is None or not weight.requires_grad:
            continue
        unit = units_along(analysis, group, group.leaves, member.dim)
        index = np.where(unit < 0, group.units, unit)
        out.append(_Slices(weight, member.axis, torch.from_numpy(index).to(weight.device)))
    return out


def _value(member: Member) -> ir.Value:
    """The weight that a member means now: a use may have got a vector of its own since the analysis."""
    if member.use is None:
        return member.value
    node, slot = member.use
    return node.inputs[slot] or member.value


def _norms(slices: Sequence[_Slices], units: int) -> Tensor:
    """||w_u||_2 over all coupled slices, [units]."""
    total = torch.zeros(units + 1, dtype=torch.float32, device=slices[0].weight.device)
    for part in slices:
        squares = part.weight.detach().float().square()
        others = [d for d in range(squares.dim()) if d != part.axis]
        total.index_add_(0, part.unit, squares.sum(others) if others else squares)
    return total[:units].sqrt()
