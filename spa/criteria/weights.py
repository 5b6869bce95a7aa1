"""Criteria that look at the weights only: random, l1, l2, bn-scale."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from spa.cost import counts_as_parameter
from spa.criteria.base import Criterion
from spa.evidence import Evidence, Vector
from spa.groups import Group, Member

_NORMS = ("BatchNormalization", "LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization")


def _random(group: Group, evidence: Evidence) -> Sequence[Vector]:
    return [np.random.default_rng([evidence.seed, zlib.crc32(group.name.encode())]).random(group.units)]


def _norm(group: Group, evidence: Evidence, power: Literal[1, 2]) -> Sequence[Vector]:
    """Per weight matrix (biases and scales only where a group has nothing else), the norm of each unit's slice."""
    tensors = evidence.analysis.coupling.weights
    weights = [m for m in group.members if m.rank >= 2 and counts_as_parameter(tensors[m.value])]
    chosen: Sequence[Member] = weights or group.members
    rows = [evidence.per_unit(group, m, evidence.power_sums(m, power)) for m in chosen]
    return rows if power == 1 else [np.sqrt(row) for row in rows]


def _l1(group: Group, evidence: Evidence) -> Sequence[Vector]:
    return _norm(group, evidence, 1)


def _l2(group: Group, evidence: Evidence) -> Sequence[Vector]:
    return _norm(group, evidence, 2)


def _bn_scale(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """|scale| of the normalisations the units pass through; units that pass none are scored by l2."""
    scales = [m for m in group.members if _is_norm_scale(m)]
    if not scales:
        return _l2(group, evidence)
    return [evidence.per_unit(group, m, evidence.power_sums(m, 1)) for m in scales]


def _is_norm_scale(member: Member) -> bool:
    uses = [member.use] if member.use is not None else list(member.value.uses())
    return any(node.op_type in _NORMS and slot == 1 for node, slot in uses)


WEIGHTS = (
    Criterion("random", "uniform random scores: the floor every criterion must beat", _random),
    Criterion("l1", "sum |w| of a unit's slices (Li et al., arXiv 1608.08710)", _l1),
    Criterion("l2", "||w||_2 of a unit's slices (DepGraph's group norm, arXiv 2301.12900)", _l2),
    Criterion("bn-scale", "|gamma| of the normalisation behind a unit (Network Slimming, arXiv 1708.06519)", _bn_scale),
)


def l2(group: Group, evidence: Evidence) -> Vector:
    """||w||_2 of each unit, mean over its matrices, [units]."""
    return np.asarray(np.mean(_l2(group, evidence), axis=0))
