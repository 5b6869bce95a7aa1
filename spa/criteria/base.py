"""What a criterion is, and what is done to its scores: aggregation over members, normalisation over groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.evidence import Evidence, Vector
from spa.groups import Group

Index = NDArray[np.int64]
Aggregation = Literal["sum", "mean", "max"]
Normalisation = Literal["none", "sum", "mean", "max", "gaussian", "isomorphic"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)


@dataclass(frozen=True)
class Criterion:
    """A way to score the units of a group."""

    name: str
    text: str
    """One line: the formula and its source."""
    members: Callable[[Group, Evidence], Sequence[Vector]]
    """Per member that counts, one score per unit, [units] each."""
    needs: Literal["weights", "data", "gradients"] = "weights"
    """What it looks at; `data` asks for calibration samples, `gradients` for torch as well."""

    exchange: Callable[[Group, Evidence, Index], Index] | None = None
    """Better units to remove, as many as are given, by a loss that single scores only approximate."""

    def score(self, group: Group, evidence: Evidence, aggregation: Aggregation = "mean") -> Vector:
        """Importance of each unit, [units]; larger is kept longer."""
        rows = np.stack(self.members(group, evidence))
        if aggregation == "max":
            return np.asarray(rows.max(axis=0))
        return np.asarray(rows.sum(axis=0) if aggregation == "sum" else rows.mean(axis=0))


def normalise(scores: Mapping[str, Vector], groups: Sequence[Group], how: Normalisation) -> dict[str, Vector]:
    """Make the scores of different groups comparable.

    none: as they are. sum, mean, max: divided by that statistic of the group (Torch-Pruning's options; SPA's
    within-group step is `sum`). gaussian: (s - mean) / std of the group. isomorphic: rank within the bucket of groups
    with the same topology, in (0, 1] (Isomorphic Pruning, arXiv 2407.04616: never compare different structures).
    """
    if how == "isomorphic":
        return _isomorphic(scores, groups)
    out = {}
    for group in groups:
        s = scores[group.name]
        if how == "gaussian":
            out[group.name] = (s - s.mean()) / (s.std() + 1e-8)
        elif how == "none":
            out[group.name] = s
        else:
            unit = {"sum": s.sum(), "mean": s.mean(), "max": s.max()}[how]
            out[group.name] = s / (unit + 1e-30)
    return out


def _isomorphic(scores: Mapping[str, Vector], groups: Sequence[Group]) -> dict[str, Vector]:
    buckets: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        buckets.setdefault((group.kind, *_topology(group)), []).append(group)
    out = {}
    for bucket in buckets.values():
        joined = np.concatenate([scores[g.name] for g in bucket])
        ranks = (np.argsort(np.argsort(joined, kind="stable"), kind="stable") + 1) / len(joined)
        for group, part in zip(bucket, np.split(ranks, np.cumsum([g.units for g in bucket])[:-1]), strict=True):
            out[group.name] = part
    return out


def _topology(group: Group) -> list[tuple[str, int, str]]:
    """The operators that consume the members, with the axis, in graph order."""

    def operator(value: ir.Value) -> str:
        use = next(iter(value.uses()), None)
        return use[0].op_type if use is not None else ""

    return [(operator(m.value), m.axis, m.role) for m in group.members]
