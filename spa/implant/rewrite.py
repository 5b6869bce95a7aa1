"""The rewrite: channels are put into another order, and convolutions are split in two.

The channels of a coupled group are reordered in every tensor that has them, so that the implants stand last; a
convolution then is two, k x k and 1 x 1, laid end to end. Nothing is gathered at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.axes import CAT, LEAF, Axis, Solution
from spa.groups import Analysis
from spa.implant.candidates import Candidate, Holder, Index, places_in
from spa.removal import variants
from spa.sites import constant_of
from spa.twin import Twin

Array = NDArray[Any]


@dataclass(frozen=True)
class Kernel:
    """What an implant computes with."""

    weight: NDArray[np.float64]
    """[implants, inputs]"""
    bias: NDArray[np.float64]
    """[implants]"""


Choice = Sequence[tuple[Candidate, Index]]
"""Groups with the units that become implants."""


def split(analysis: Analysis, chosen: Choice, kernels: Mapping[str, Kernel]) -> ir.Model:
    """A new model with implants; the analysed one is not touched.

    Args:
        analysis: of the model.
        chosen: groups and units; not all units of a group.
        kernels: by the output of each convolution the implants' weights, inputs and outputs in the old order.
    """
    twin = Twin(analysis.coupling.model)
    orders = new_orders(analysis, chosen)
    _reorder(analysis, twin, orders)
    for candidate, units in chosen:
        for holder in candidate.holders:
            kernel, moved = kernels[holder.name], inputs_of(analysis, holder, orders)
            _split(twin, holder, len(units), Kernel(kernel.weight[:, moved], kernel.bias))
    return twin.model


def new_orders(analysis: Analysis, chosen: Choice) -> dict[int, Index]:
    """Per leaf that is reordered the old position of what is at each position."""
    orders: dict[int, Index] = {}
    for candidate, units in chosen:
        orders.update(_orders(analysis, candidate, units))
    return orders


def inputs_of(analysis: Analysis, holder: Holder, orders: Mapping[int, Index]) -> Index:
    """Per input channel of a convolution, in the new order, which one it was."""
    dims = analysis.coupling.dims(holder.site.weight)
    assert dims is not None
    moved = order_along(analysis.coupling.solution, dims[1], orders)
    return np.arange(holder.site.channels, dtype=np.int64) if moved is None else moved


def _orders(analysis: Analysis, candidate: Candidate, units: Index) -> dict[int, Index]:
    """Per leaf of a group the old position of what is at each position: the implants last, else as before."""
    group = candidate.group
    unit_at = np.argsort(candidate.channels)
    out = np.isin(unit_at, units)
    moved = np.empty(group.units, dtype=np.int64)
    moved[unit_at] = np.concatenate([unit_at[~out], unit_at[out]])  # where unit u was, moved[u] goes
    found = {}
    for leaf in group.leaves:
        places = places_in(analysis, group, leaf)
        assert places is not None
        order = np.empty_like(places)
        order[places] = places[moved]
        found[leaf] = order
    return found


def _reorder(analysis: Analysis, twin: Twin, orders: Mapping[int, Index]) -> None:
    """Put the positions of all weights into their new order."""
    solution = analysis.coupling.solution
    for value, tensor in analysis.coupling.weights.items():
        moves = [(uses, [order_along(solution, d, orders) for d in dims]) for uses, dims in variants(analysis, value)]
        made: dict[tuple[bytes, ...], ir.Value] = {}
        taken = any(not _key(picks) for _, picks in moves)
        """Whether some uses read what was there before; else the first new tensor takes its place."""
        for uses, picks in moves:
            key = _key(picks)
            if not key:
                continue
            if key not in made:
                array = tensor.numpy()
                for axis, pick in enumerate(picks):
                    array = array if pick is None else np.take(array, pick, axis=axis)
                fresh = ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=tensor.name)
                if made or taken:
                    made[key] = twin.constant(fresh, f"{value.name}_spa")
                else:
                    made[key] = twin.value(value)
                    put(made[key], fresh)
            for node, slot in uses:
                twin.node(node).replace_input_with(slot, made[key])


def _key(picks: Sequence[Index | None]) -> tuple[bytes, ...]:
    """Equal for equal orders; empty if nothing moves."""
    key = tuple(b"" if pick is None else pick.tobytes() for pick in picks)
    return key if any(key) else ()


def order_along(solution: Solution, axis: Axis, orders: Mapping[int, Index]) -> Index | None:
    """Per position of an axis the old position of what is there, None if nothing moves."""
    if not set(solution.leaves(axis)) & orders.keys():
        return None
    return _order(solution, axis, orders)


def _order(solution: Solution, axis: Axis, orders: Mapping[int, Index]) -> Index:
    kind, parts = solution.terms[axis]
    if kind == LEAF:
        leaf = parts[0]
        size = int(solution.base[leaf + 1] - solution.base[leaf])
        return orders.get(leaf, np.arange(size, dtype=np.int64))
    pieces = [_order(solution, p, orders) for p in parts]
    out = pieces[0]
    for piece in pieces[1:]:
        if kind == CAT:
            out = np.concatenate([out, piece + len(out)])
        else:
            out = (out[:, None] * len(piece) + piece[None, :]).reshape(-1)
    return out


def put(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let an initializer or a `Constant` node hold another tensor."""
    producer = value.producer()
    if producer is None:
        value.const_value = tensor
    else:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
    value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)


def _split(twin: Twin, holder: Holder, count: int, kernel: Kernel) -> None:
    """Let the last `count` outputs of a convolution be computed by another one."""
    node = twin.node(holder.site.node)
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None
    assert weight is not None
    name, before = holder.name, constant_of(weight)
    assert before is not None
    stays = before.shape.numpy()[0] - count
    put(weight, ir.Tensor(before.numpy()[:stays], dtype=before.dtype, name=before.name))
    small = kernel.weight.reshape(count, -1, *[1] * len(holder.site.kernel)).astype(before.dtype.numpy())
    inputs = [x, twin.constant(ir.Tensor(small, dtype=before.dtype), f"{weight.name}_implant")]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    present = None if bias is None else constant_of(bias)
    if bias is not None and present is not None:
        fresh = ir.Tensor(present.numpy()[:stays], dtype=present.dtype, name=present.name)
        if len(bias.uses()) == 1:
            put(bias, fresh)
        else:
            node.replace_input_with(2, twin.constant(fresh, f"{bias.name}_kept"))
    if present is not None or kernel.bias.any():
        numbers = ir.Tensor(kernel.bias.astype(before.dtype.numpy()), dtype=before.dtype)
        inputs.append(twin.constant(numbers, f"{name}_implant_bias"))
    output = node.outputs[0]
    readers = list(output.uses())
    settings = [
        ir.AttrInt64s("kernel_shape", [1] * len(holder.site.kernel)),
        ir.AttrInt64s("strides", list(holder.strides)),
        ir.AttrInt64s("pads", list(holder.pads)),
    ]
    implants = twin.after(output, "Conv", inputs, settings)
    whole = twin.after(implants, "Concat", [output, implants], [ir.AttrInt64("axis", 1)])
    for reader, slot in readers:
        reader.replace_input_with(slot, whole)
    output.name, whole.name = twin.fresh(f"{name}_kept"), name
    for value in (implants, whole):
        value.type = output.type
    output.shape = None
