"""How important a unit is: one short file per criterion, independent of how many units leave and of what follows."""

from __future__ import annotations

from spa.criteria.activation import ACTIVATION
from spa.criteria.amp import AMP
from spa.criteria.base import AGGREGATIONS, NORMALISATIONS, Aggregation, Criterion, Normalisation, normalise
from spa.criteria.cfsp import CFSP
from spa.criteria.feature_moment import FEATURE_MOMENT
from spa.criteria.fluctuation import FLUCTUATION
from spa.criteria.gates import GATES
from spa.criteria.lrp import LRP
from spa.criteria.obspa import OBSPA
from spa.criteria.variance import VARIANCE
from spa.criteria.weight_gradients import WEIGHT_GRADIENTS
from spa.criteria.weights import WEIGHTS

CRITERIA: dict[str, Criterion] = {
    c.name: c
    for c in (
        *WEIGHTS,
        *OBSPA,
        VARIANCE,
        FLUCTUATION,
        *ACTIVATION,
        AMP,
        CFSP,
        FEATURE_MOMENT,
        *GATES,
        LRP,
        *WEIGHT_GRADIENTS,
    )
}

__all__ = [
    "AGGREGATIONS",
    "CRITERIA",
    "NORMALISATIONS",
    "Aggregation",
    "Criterion",
    "Normalisation",
    "normalise",
]
