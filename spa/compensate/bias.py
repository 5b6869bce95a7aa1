"""The bias of a site, and what goes into it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.sites import Site, constant_of, exchange
from spa.twin import Twin


@dataclass(frozen=True)
class Bias:
    """Where the bias of a site goes."""

    value: ir.Value
    inside: bool
    """Added by the node itself: the site's output contains it."""
    scale: float
    """What the node multiplies it with."""

    def read(self) -> NDArray[np.float64]:
        """As it is added, [g m]."""
        tensor = constant_of(self.value)
        assert tensor is not None
        return np.asarray(tensor.numpy().astype(np.float64).reshape(-1) * self.scale)

    def write(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """Let `numbers` [g m] be added; returns the stored array."""
        tensor = constant_of(self.value)
        assert tensor is not None
        array = (numbers / self.scale).reshape(tensor.shape.numpy())
        exchange(self.value, array)
        return array


def bias_of(twin: Twin, site: Site) -> Bias:
    """The site's bias; a zero one is inserted if it has none, and a copy of its own if others read it, too."""
    inside = site.bias_slot is not None
    slot = site.bias_slot or 0
    at = site.node.inputs[slot] if inside and slot < len(site.node.inputs) else None
    if site.bias is not None and site.bias is not at:
        return Bias(site.bias, False, 1.0)
    if site.bias is not None and site.bias_scale:
        return Bias(site.bias, True, site.bias_scale)
    weight = constant_of(site.weight)
    assert weight is not None
    count = site.groups * site.rows
    rank = 1 if inside or site.layout == "tokens" else 1 + len(site.kernel)
    start = np.zeros((count, *(1,) * (rank - 1)))
    present = constant_of(at) if at is not None and site.bias_scale else None
    if present is not None:
        start = present.numpy().reshape(count)
    first = ir.Tensor(start.astype(weight.dtype.numpy()), dtype=weight.dtype)
    constant = twin.constant(first, f"{site.name}_bias")
    if inside:
        if slot >= len(site.node.inputs):
            site.node.resize_inputs(slot + 1)
        site.node.replace_input_with(slot, constant)
        scale = site.bias_scale
        if scale == 0:
            site.node.attributes["beta"] = ir.AttrFloat32("beta", 1.0)
            scale = 1.0
        return Bias(constant, True, scale)
    output = site.output
    readers = list(output.uses())
    added = twin.after(output, "Add", [output, constant])
    added.type = output.type
    for node, slot in readers:
        node.replace_input_with(slot, added)
    twin.publish(output, added)
    return Bias(constant, False, 1.0)
