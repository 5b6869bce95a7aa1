"""Criteria: how much each unit of a group matters. Each states what evidence it needs and never sees an operator."""

from __future__ import annotations

from spa.criteria.base import AGGREGATIONS, NORMALISATIONS, Aggregation, Criterion, Normalisation, normalise
from spa.criteria.weights import CRITERIA

__all__ = [
    "AGGREGATIONS",
    "CRITERIA",
    "NORMALISATIONS",
    "Aggregation",
    "Criterion",
    "Normalisation",
    "normalise",
]
