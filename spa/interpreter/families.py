"""The modules of operators: importing them registers their builders."""

from __future__ import annotations

import importlib

FAMILIES = (
    "arithmetic",
    "activation",
    "linear",
    "pool",
    "norm",
    "reduce",
    "movement",
    "indexing",
    "resize",
    "vision",
    "attention",
    "recurrent",
    "quant",
    "control",
    "contrib",
    "contrib_quant",
    "mixture",
    "losses",
)


def load() -> None:
    """Register all operators."""
    for name in FAMILIES:
        importlib.import_module(f"spa.interpreter.ops.{name}")
