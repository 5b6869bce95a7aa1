"""Relevance of units for the class of each sample, by layer-wise relevance propagation.

Source: Yeom et al., "Pruning by Explaining" (arXiv 1912.08881); Hatefi et al., "Pruning by Explaining Revisited"
(arXiv 2408.12568): relevance summed over positions, its magnitude averaged over the reference samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spa.criteria.base import Criterion
from spa.evidence import Evidence, Vector
from spa.groups import Group


def _members(group: Group, evidence: Evidence) -> Sequence[Vector]:
    found = evidence.gradients.relevance.get(group.name)
    return [np.zeros(group.units) if found is None else np.abs(found.astype(np.float64)).mean(axis=0)]


LRP = Criterion(
    "lrp", "E |relevance| for the class of each sample (Pruning by Explaining, arXiv 2408.12568)", _members, "gradients"
)
