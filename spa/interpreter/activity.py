"""Which values of a graph carry relevance: what depends on what the model is given, not on weights and sizes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import onnx_ir as ir

Kind = Literal["constant", "table", "active"]
"""`table`: numbers looked up by an index that is given (embeddings, rotary tables), and moved or scaled at most."""

_LOOKUPS = ("Gather", "GatherND", "GatherElements", "GatherBlockQuantized")
_SIZES = ("Shape", "Size")
_MOVES = (
    "Identity", "Cast", "CastLike", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Slice",
    "Split", "Concat", "Tile", "Sin", "Cos", "Neg",
)  # fmt: skip
KEEPERS = (
    "Relu", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Tanh", "Erf", "Gelu", "FastGelu", "QuickGelu", "BiasGelu",
    "Swish", "Mish", "HardSwish", "Softsign", "ThresholdedRelu", "Shrink", "Clip", "Asinh", "Atan", "Sinh",
)  # fmt: skip
"""Activations that are 0 at 0: all relevance passes to what they are applied to."""
_SCALING = ("Identity", "Cast", "Dropout", "Neg", "Mul", "Div")
"""With one operand that carries relevance they are linear and without a constant part."""
_POINTWISE = (
    *KEEPERS, *_SCALING, "Sigmoid", "HardSigmoid", "Softplus", "Exp", "Log", "Sqrt", "Abs", "Reciprocal", "Pow", "Add",
    "Sub", "Sum", "Min", "Max", "Where",
)  # fmt: skip


class Activity:
    """What is known of the values of a model's main graph.

    Args:
        graph: the main graph.
        dtype: element type of a value as far as it is known.
    """

    def __init__(self, graph: ir.Graph, dtype: Callable[[ir.Value], ir.DataType | None]) -> None:
        self._kinds: dict[ir.Value, Kind] = {}
        self._cores: dict[ir.Value, ir.Value] = {}
        self._pure: set[ir.Value] = set()
        """Values all of whose relevance comes to their core."""
        indices: set[ir.Value] = set()
        """Integers and masks that depend on what is given."""

        def whole(value: ir.Value) -> bool:
            kind = dtype(value)
            return kind is not None and not kind.is_floating_point()

        for value in graph.inputs:
            if value not in graph.initializers.values():
                if whole(value):
                    indices.add(value)
                else:
                    self._kinds[value] = "active"
        for node in graph:
            given = any(v in indices for v in node.inputs)
            kind = _kind(node, [self.kind(v) for v in node.inputs], given)
            for value in node.outputs:
                if not whole(value):
                    self._kinds[value] = kind
                elif node.op_type not in _SIZES and (given or kind != "constant"):
                    indices.add(value)
            if node.op_type in _POINTWISE and kind != "constant":
                self._settle(node)

    def _settle(self, node: ir.Node) -> None:
        """Core and purity of what an operator gives that works position by position."""
        slots = self.active(node)
        cores = {self.core(v) for k in slots if (v := node.inputs[k]) is not None}
        if len(cores) != 1:
            return
        output = node.outputs[0]
        self._cores[output] = cores.pop()
        if node.op_type == "Mul" and len(slots) == 2:
            straight = self.gated(node) is not None
        else:
            source = node.inputs[slots[0]]
            first = slots == [0] or node.op_type == "Mul"
            came = source in self._pure or (source is not None and self.core(source) is source)
            straight = node.op_type in (*KEEPERS, *_SCALING) and len(slots) == 1 and first and came
        if straight:
            self._pure.add(output)

    def kind(self, value: ir.Value | None) -> Kind:
        """The kind of a value; those of subgraphs are constant."""
        return "constant" if value is None else self._kinds.get(value, "constant")

    def active(self, node: ir.Node) -> list[int]:
        """Input slots that carry relevance. A table does beside constants and tables only; else it is a coefficient."""
        kinds = [self.kind(v) for v in node.inputs]
        return [k for k, kind in enumerate(kinds) if kind == ("active" if "active" in kinds else "table")]

    def core(self, value: ir.Value) -> ir.Value:
        """The value furthest back of which this one is a function, position by position."""
        return self._cores.get(value, value)

    def gated(self, node: ir.Node) -> int | None:
        """Of a product x g(x) of functions of one value the slot that gets all relevance; None for other products."""
        slots = self.active(node)
        sides = [v for k in slots if (v := node.inputs[k]) is not None]
        if len(sides) != 2 or self.core(sides[0]) is not self.core(sides[1]):
            return None
        core = self.core(sides[0])
        return next((k for k, v in zip(slots, sides, strict=True) if v is core or v in self._pure), None)

    def denominator(self, value: ir.Value | None) -> bool:
        """Whether a factor is one over something: it only scales."""
        while value is not None and (node := value.producer()) is not None:
            if node.op_type == "Reciprocal":
                return True
            if node.op_type == "Div":
                return self.kind(node.inputs[0]) == "constant" and self.kind(node.inputs[1]) != "constant"
            if node.op_type == "Pow":
                return _negative(node.inputs[1])
            slots = self.active(node)
            if node.op_type not in (*_MOVES, "Mul") or len(slots) != 1:
                return False
            value = node.inputs[slots[0]]
        return False


def _kind(node: ir.Node, kinds: list[Kind], given: bool) -> Kind:
    if node.op_type in _SIZES:
        return "constant"
    if node.op_type in _LOOKUPS and kinds[:1] == ["constant"] and given:
        return "table"
    if node.op_type.endswith("EmbedLayerNormalization"):
        return "active"
    found = [kind for kind in kinds if kind != "constant"]
    if not found:
        return "constant"
    return "table" if node.op_type in (*_MOVES, "Mul", "Div") and found == ["table"] else "active"


def _negative(exponent: ir.Value | None) -> bool:
    tensor = None if exponent is None else exponent.const_value
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(-1)[0]) < 0
