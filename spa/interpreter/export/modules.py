"""Layers with weights as modules of `torch.nn`; None where the node is something that they are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from spa.interpreter.export.call import Call
from spa.interpreter.export.names import number
from spa.interpreter.ops.linear import pads_of, same_pads

Form = Callable[[Call], str | None]


def linear(call: Call, stored: bool = False) -> str | None:
    """MatMul and Gemm; a third operand is a bias, `stored` says that the weight of a MatMul is [outputs, inputs]."""
    weight = call.learned(1)
    if weight is None or weight.dim() != 2:
        return None
    if call.operator == "Gemm":
        node = call.node
        if node.attr("transA", 0) or float(node.attr("alpha", 1.0)) != 1 or float(node.attr("beta", 1.0)) != 1:
            return None
        stored = bool(node.attr("transB", 0))
    outputs, inputs = weight.shape if stored else weight.shape[::-1]
    biased = len(call.values) > 2 and call.values[2] is not None
    bias = call.learned(2) if biased else None
    if biased and (bias is None or tuple(bias.shape) != (outputs,)):
        return None
    made = f"nn.Linear({inputs}, {outputs}{'' if biased else ', bias=False'}{_type(weight)})"
    slots = {"weight": 1, **({"bias": 2} if biased else {})}
    return f"{call.module(made, slots, () if stored else ('weight',))}({call.arg(0)})"


def conv(call: Call) -> str | None:
    """Conv with equal padding on both sides; other padding is a call of its own."""
    weight = call.learned(1)
    if weight is None or not 3 <= weight.dim() <= 5 or (call.node.has(2) and call.learned(2) is None):
        return None
    rank = weight.dim() - 2
    x, node = call.arg(0), call.node
    strides, dilations = ([int(n) for n in node.attr(a) or [1] * rank] for a in ("strides", "dilations"))
    pads = pads_of(node, rank)
    if pads is None:
        sizes = (call.sizes() or [])[2:]
        if not sizes:
            return None
        upper = node.attr("auto_pad") == "SAME_UPPER"
        pads = same_pads(sizes, list(weight.shape[2:]), strides, dilations, upper)
    begins, ends = pads
    if begins != ends:
        around = [n for pair in zip(reversed(begins), reversed(ends), strict=True) for n in pair]
        x, begins = f"F.pad({x}, {around})", [0] * rank
    group = int(node.attr("group", 1))
    options = {
        "stride": (strides, 1), "padding": (list(begins), 0), "dilation": (dilations, 1), "groups": (group, 1),
        "bias": (node.has(2), True),
    }  # fmt: skip
    made = f"nn.Conv{rank}d({weight.shape[1] * group}, {weight.shape[0]}, {_same(list(weight.shape[2:]))}"
    made += f"{_options(options)}{_type(weight)})"
    return f"{call.module(made, {'weight': 1, **({'bias': 2} if node.has(2) else {})})}({x})"


def conv_transpose(call: Call) -> str | None:
    """ConvTranspose where torch's arguments say the same."""
    weight, node = call.learned(1), call.node
    if weight is None or not 3 <= weight.dim() <= 5 or (node.has(2) and call.learned(2) is None):
        return None
    rank = weight.dim() - 2
    strides, dilations = ([int(n) for n in node.attr(a) or [1] * rank] for a in ("strides", "dilations"))
    extra = [int(n) for n in node.attr("output_padding") or [0] * rank]
    pads = pads_of(node, rank)
    fits = all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    if node.attr("output_shape") is not None or pads is None or pads[0] != pads[1] or not fits:
        return None
    group = int(node.attr("group", 1))
    options = {
        "stride": (strides, 1), "padding": (pads[0], 0), "output_padding": (extra, 0), "groups": (group, 1),
        "bias": (node.has(2), True), "dilation": (dilations, 1),
    }  # fmt: skip
    made = f"nn.ConvTranspose{rank}d({weight.shape[0]}, {weight.shape[1] * group}, {_same(list(weight.shape[2:]))}"
    made += f"{_options(options)}{_type(weight)})"
    return f"{call.module(made, {'weight': 1, **({'bias': 2} if node.has(2) else {})})}({call.arg(0)})"


def batch_norm(call: Call) -> str | None:
    """BatchNormalization: torch's momentum is one minus ONNX's."""
    node, found = call.node, [call.learned(k) for k in range(1, 5)]
    rank = call.rank()
    same = len({x.dtype for x in found if x is not None}) == 1
    if node.attr("training_mode", 0) or node.outputs > 1 or rank is None or not 2 <= rank <= 5 or not same:
        return None
    if any(x is None for x in found):
        return None
    first = found[0]
    assert first is not None
    options = {
        "eps": (number(float(node.attr("epsilon", 1e-5))), "1e-05"),
        "momentum": (number(round(1 - float(node.attr("momentum", 0.9)), 6)), "0.1"),
    }
    made = f"nn.BatchNorm{max(rank - 2, 1)}d({len(first)}{_options(options)}{_type(first)})"
    slots = {"weight": 1, "bias": 2, "running_mean": 3, "running_var": 4}
    return f"{call.module(made, slots)}({call.arg(0)})"


def layer_norm(call: Call) -> str | None:
    """LayerNormalization and its kin with scale and bias of the normalised axes."""
    node, scale = call.node, call.learned(1)
    rms = call.operator != "LayerNormalization"
    biased = node.has(2) and not rms
    bias, shape = call.learned(2) if biased else None, call.shape()
    if scale is None or node.outputs > 1 or shape is None or (biased and (bias is None or bias.shape != scale.shape)):
        return None
    axis = int(node.attr("axis", -1))
    wide = list(shape[axis:])
    same = node.dtype(0) == node.dtype(1)
    if wide != list(scale.shape) or not same or (rms and len(wide) > 1):
        return None
    eps = number(float(node.attr("epsilon", 1e-5)))
    options = {"eps": (eps, "" if rms else "1e-05"), "bias": (biased or rms, True)}
    axes = str(wide[0]) if len(wide) == 1 else f"({', '.join(map(str, wide))})"
    made = f"nn.{'RMSNorm' if rms else 'LayerNorm'}({axes}{_options(options)}{_type(scale)})"
    return f"{call.module(made, {'weight': 1, **({'bias': 2} if biased else {})})}({call.arg(0)})"


def instance_norm(call: Call) -> str | None:
    """InstanceNormalization."""
    scale, bias, rank = call.learned(1), call.learned(2), call.rank()
    if scale is None or bias is None or rank is None or not 3 <= rank <= 5 or scale.dtype != bias.dtype:
        return None
    options = {"eps": (number(float(call.node.attr("epsilon", 1e-5))), "1e-05"), "affine": (True, False)}
    made = f"nn.InstanceNorm{rank - 2}d({len(scale)}{_options(options)}{_type(scale)})"
    return f"{call.module(made, {'weight': 1, 'bias': 2})}({call.arg(0)})"


def group_norm(call: Call) -> str | None:
    """GroupNormalization with scale and bias per channel."""
    scale, bias = call.learned(1), call.learned(2)
    if call.node.version < 21 or scale is None or bias is None:
        return None
    options = {"eps": (number(float(call.node.attr("epsilon", 1e-5))), "1e-05")}
    made = f"nn.GroupNorm({int(call.node.attr('num_groups'))}, {len(scale)}{_options(options)}{_type(scale)})"
    return f"{call.module(made, {'weight': 1, 'bias': 2})}({call.arg(0)})"


def embedding(call: Call) -> str | None:
    """Gather of rows of a matrix that is learned."""
    table, index = call.learned(0), call.shape(1)
    if table is None or table.dim() != 2 or int(call.node.attr("axis", 0)) not in (0, -2) or index is None or not index:
        return None
    fixed = call.node.const(1)
    if fixed is not None:
        return None
    made = f"nn.Embedding({table.shape[0]}, {table.shape[1]}{_type(table)})"
    return f"{call.module(made, {'weight': 0})}({call.arg(1)})"


def dropout(call: Call) -> str | None:
    """Dropout that is on while the module trains."""
    node = call.node
    ratio = node.number(1, "ratio", 0.5)
    asked = node.const(2)
    if node.wants(1) or (node.has(1) and node.const(1) is None) or (node.has(2) and (asked is None or bool(asked))):
        return None
    share = float(ratio(node.const(1)))
    return f"{call.plain_module(f'nn.Dropout({number(share)})')}({call.arg(0)})" if share else call.arg(0)


MODULES: dict[str, Form] = {
    "MatMul": linear,
    "Gemm": linear,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "RMSNormalization": layer_norm,
    "SimplifiedLayerNormalization": layer_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "Gather": embedding,
    "Dropout": dropout,
}


def _same(numbers: Sequence[object]) -> str:
    """`3` for (3, 3)."""
    if len(numbers) == 1 or len(set(numbers)) == 1:
        return str(numbers[0])
    return f"({', '.join(map(str, numbers))})"


def _options(options: Mapping[str, tuple[object, object]]) -> str:
    """Arguments that differ from torch's defaults."""
    out = []
    for name, (value, default) in options.items():
        text = _same(value) if isinstance(value, list) else str(value)
        if text != str(default):
            out.append(f", {name}={text}")
    return "".join(out)


def _type(x: Tensor) -> str:
    return "" if x.dtype == torch.float32 else f", dtype={x.dtype}"
