"""Knowledge about operators: one line of data each, by family. Importing this package registers all of them."""

from __future__ import annotations

from spa.rules import attention, choice, control, elementwise, linear, movement, norm, quant, recurrent, reduce, reshape
from spa.rules.base import (
    Choice,
    Cost,
    Edit,
    Flow,
    Leaving,
    Op,
    Operand,
    Pin,
    Relations,
    Remap,
    Rule,
    Zero,
    lookup,
    register,
    table,
)
from spa.rules.without import REASONS

__all__ = [
    "REASONS",
    "Choice",
    "Cost",
    "Edit",
    "Flow",
    "Leaving",
    "Op",
    "Operand",
    "Pin",
    "Relations",
    "Remap",
    "Rule",
    "Zero",
    "attention",
    "choice",
    "control",
    "elementwise",
    "linear",
    "lookup",
    "movement",
    "norm",
    "quant",
    "recurrent",
    "reduce",
    "register",
    "reshape",
    "table",
]
