"""What a model with implants must equal: the original with kernels that are zero but for the middle; no split here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from spa.implant.rewrite import Kernel
from spa.sites import constant_of
from spa.twin import Twin


def embedded(
    model: ir.Model,
    channels: Mapping[str, Sequence[int]],
    kernels: Mapping[str, Kernel],
    inputs: Mapping[str, Sequence[int]],
) -> ir.Model:
    """A copy of `model` in which some channels use the middle of their kernel only.

    Args:
        model: in the original order.
        channels: by the output of each convolution its channels that are implants.
        kernels: their weights and biases.
        inputs: by the output of each convolution the input channels that `kernels` are about.
    """
    twin = Twin(model)
    by_name = {node.outputs[0].name or "": node for node in twin.model.graph if node.op_type == "Conv"}
    for name, rows in channels.items():
        node, kernel = by_name[name], kernels[name]
        weight = node.inputs[1]
        tensor = None if weight is None else constant_of(weight)
        assert tensor is not None
        array = np.array(tensor.numpy())
        middle = tuple(k // 2 for k in array.shape[2:])
        array[list(rows)] = 0
        array[(np.array(rows)[:, None], np.array(inputs[name])[None, :], *middle)] = kernel.weight
        node.replace_input_with(1, twin.constant(ir.Tensor(array, dtype=tensor.dtype), f"{name}_reference"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        present = None if bias is None else constant_of(bias)
        numbers = np.zeros(len(array), array.dtype) if present is None else np.array(present.numpy())
        numbers[list(rows)] = kernel.bias
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, twin.constant(ir.Tensor(numbers, dtype=tensor.dtype), f"{name}_bias"))
    return twin.model
