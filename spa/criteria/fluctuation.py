"""FLAP's fluctuation metric."""

from __future__ import annotations

from collections.abc import Sequence

from spa.criteria.base import Criterion
from spa.criteria.taps import activations, nothing, squared_columns
from spa.evidence import Evidence, Vector
from spa.groups import Group


def _fluctuation(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Var(h_j) ||w_j||^2: what replacing h_j by its mean costs each consumer."""
    rows = activations(
        group, evidence, lambda tap, profile: profile.pooled()[1] * squared_columns(tap), every_reader=True
    )
    return rows or nothing(group)


FLUCTUATION = Criterion("fluctuation", "Var(h) ||w||^2 (FLAP, arXiv 2312.11983, eq. 5)", _fluctuation, "data")
