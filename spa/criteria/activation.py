"""Norms of activations: Minitron, 2SSP, adaptive activation-based pruning."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.consumers import Tap
from spa.criteria.base import Criterion
from spa.criteria.taps import activations, nothing
from spa.evidence import Evidence, Vector
from spa.executors.collect import Profile
from spa.groups import Group


def _minitron(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Mean |h| over positions, then L2 over samples; several positions of a unit (a head) by L2."""
    rows = activations(group, evidence, lambda tap, profile: np.square(profile.absolute).sum(axis=0))
    return [np.sqrt(row) for row in rows] or nothing(group)


def _two_stage(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Mean over samples of the L2 norm over positions."""

    def norm(tap: Tap, profile: Profile) -> Vector:
        return np.asarray(np.sqrt(profile.positions[:, None] * profile.power()).mean(axis=0))

    return activations(group, evidence, norm) or nothing(group)


def _attention_map(group: Group, evidence: Evidence) -> Sequence[Vector]:
    """Mean over samples of mean h^2 over positions: the activation's attention map with p = 2."""
    return activations(group, evidence, lambda tap, profile: profile.power().mean(axis=0)) or nothing(group)


ACTIVATION = (
    Criterion("activation", "L2 over samples of mean |h| (Minitron, arXiv 2407.14679)", _minitron, "data"),
    Criterion("activation-l2", "mean over samples of ||h||_2 (2SSP, arXiv 2501.17771)", _two_stage, "data"),
    Criterion("activation-map", "mean of h^2 (adaptive activation-based, arXiv 2201.10520)", _attention_map, "data"),
)
