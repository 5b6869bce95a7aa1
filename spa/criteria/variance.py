"""Variance-Based Pruning."""

from __future__ import annotations

from collections.abc import Sequence

from spa.criteria.base import Criterion
from spa.criteria.taps import activations, nothing
from spa.evidence import Evidence, Vector
from spa.groups import Group


def _variance(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Raw variance of the activation behind the non-linearity, pooled over samples and positions."""
    return activations(group, evidence, lambda tap, profile: profile.pooled()[1]) or nothing(group)


VARIANCE = Criterion(
    "variance", "Var(h) of the activation that is consumed (VBP, arXiv 2507.12988, eq. 4)", _variance, "data"
)
