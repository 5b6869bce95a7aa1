"""Which numbers of a model are learned, which are statistics, and which are constants."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from spa.coupling import weights_of
from spa.errors import UsageError
from spa.interpreter.base import lookup
from spa.interpreter.types import FLOATS, from_onnx

MASK = 1e30
"""Weights are never that large; numbers that stand for minus infinity are."""
_ALONE = frozenset(
    [
        "Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu", "BatchNormalization", "InstanceNormalization",
        "LayerNormalization", "GroupNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LSTM", "GRU",
        "RNN", "FusedConv", "FusedGemm", "FusedMatMul",
    ]
)  # fmt: skip
"""Operators whose operands are learned even if they are a single number."""
_GIVEN = {
    "Dropout": 1, "Clip": 1, "Pad": 2, "Resize": 1, "Upsample": 1, "OneHot": 2, "QuantizeLinear": 1,
    "DequantizeLinear": 1, "QLinearConv": 1, "QLinearMatMul": 1, "ConstantOfShape": 0, "Range": 0, "RoiAlign": 1,
    "MaxRoiPool": 1, "NonMaxSuppression": 0, "STFT": 1, "DFT": 1, "MelWeightMatrix": 0,
}  # fmt: skip
"""Operators that read settings from this slot on: scales, limits, fill values."""


@dataclass(frozen=True)
class Leaves:
    """The numbers of a model."""

    tensors: Mapping[ir.Value, ir.TensorProtocol]
    """All initializers (tensors in Constant nodes only if they are learned)."""
    parameters: Mapping[ir.Value, Tensor]
    """What is learned."""
    statistics: Mapping[ir.Value, Tensor]
    """Means and variances of BatchNormalization."""
    dtypes: Mapping[ir.Value, ir.DataType]
    """Types of parameters and statistics in the model."""


def find(model: ir.Model, names: Collection[str] | None) -> Leaves:
    """Sort the float tensors of a model; `names` says what is learned instead of the rule.

    Raises: UsageError for a name that is no float tensor of the model.
    """
    found = dict(weights_of(model.graph))
    floats = {v: t for v, t in found.items() if t.dtype in FLOATS}
    counts: dict[str, int] = {}
    for value in found:
        counts[value.name or ""] = counts.get(value.name or "", 0) + 1
    statistics = {v: t for v, t in floats.items() if _is_statistic(v) and t.size}
    if names is None:
        learned = {
            v: t for v, t in floats.items() if v not in statistics and counts[v.name or ""] == 1 and _learned(v, t)
        }
    else:
        known = {v.name for v in floats}
        for name in names:
            if counts.get(name, 0) > 1:
                raise UsageError(f"several subgraphs have an initializer '{name}'; rename them to learn them.")
            if name not in known:
                raise UsageError(f"the model has no float initializer '{name}' that could be learned.")
        learned = {v: t for v, t in floats.items() if v.name in set(names) and v not in statistics}
    parameters = {v: from_onnx(t) for v, t in learned.items()}
    if names is None:
        parameters = {v: x for v, x in parameters.items() if not _is_mask(x)}
    return Leaves(
        {v: t for v, t in found.items() if v.is_initializer()},
        parameters,
        {v: from_onnx(t) for v, t in statistics.items()},
        {v: t.dtype for v, t in floats.items()},
    )


def _is_statistic(value: ir.Value) -> bool:
    uses = list(reached(value))
    return bool(uses) and all(node.op_type == "BatchNormalization" and slot in (3, 4) for node, slot in uses)


def _is_mask(x: Tensor) -> bool:
    return bool((x.abs() >= MASK).any()) or not bool(torch.isfinite(x).all())


def _learned(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Whether a float tensor is something that training would change."""
    if not tensor.size:
        return False
    uses = list(reached(value, ("Identity", "Cast")))
    if not uses and not value.is_graph_output():
        return False
    if any(slot >= _GIVEN.get(node.op_type, 1 << 30) or _as_numbers(node, slot) for node, slot in uses):
        return False
    return tensor.size > 1 or any(node.op_type in _ALONE for node, _ in uses)


def reached(value: ir.Value, through: Collection[str] = ("Identity",)) -> Iterator[tuple[ir.Node, int]]:
    """Uses of a value, also of copies of it."""
    for node, slot in value.uses():
        if node.op_type in through:
            yield from reached(node.outputs[0], through)
        else:
            yield node, slot


def origin(value: ir.Value) -> ir.Value:
    """What a value is a copy of."""
    while (node := value.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _as_numbers(node: ir.Node, slot: int) -> bool:
    found = lookup(node.domain, node.op_type, 1 << 20)
    return found is not None and slot in found.host
