"""What data criteria share: statistics of a group's activations, unit by unit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from spa.consumers import Tap
from spa.evidence import Evidence, Vector
from spa.executors.collect import Profile
from spa.groups import Group

Statistic = Callable[[Tap, Profile], Vector]
"""(tap, its profile) -> one number per position of the tap's axis."""


def activations(group: Group, evidence: Evidence, statistic: Statistic, *, every_reader: bool = False) -> list[Vector]:
    """Per activation that carries the group: the statistic, summed over the positions of each unit, [units] each.

    `every_reader`: per operator that reads it, for statistics that depend on the reader's weights.
    """
    measured = evidence.measured
    rows, seen = [], set[tuple[tuple[str, int], ir.Node | None]]()
    for tap in measured.taps(group):
        key = tap.key, tap.site.node if tap.site is not None and every_reader else None
        if key not in seen:
            seen.add(key)
            rows.append(tap.per_unit(statistic(tap, measured.profile(tap)), group.units))
    return rows


def squared_columns(tap: Tap) -> Vector:
    """||w||^2 of the weights that read each position; 1 where no weight does. [positions]"""
    if tap.site is None:
        return np.ones(len(tap.units))
    site = tap.site
    squares = np.square(tap.site.weights).sum(axis=1)  # [g, k c]
    return np.asarray(squares.reshape(site.groups, site.taps, site.channels).sum(axis=1).reshape(-1))


def nothing(group: Group) -> list[Vector]:
    """Scores where no data says anything: all alike."""
    return [np.ones(group.units)]
