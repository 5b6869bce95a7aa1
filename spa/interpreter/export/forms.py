"""Operators as one line of torch: templates for those that models are made of.

A form returns None where it does not say what the node says; then the interpreter's own function is copied
(`spa.interpreter.export.copied`), which always does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from spa.interpreter.base import axis_of
from spa.interpreter.export.call import Call
from spa.interpreter.export.modules import Form
from spa.interpreter.export.names import number
from spa.interpreter.export.spatial import depth_to_space, overall, pool, resize
from spa.interpreter.types import FLOATS

_OPEN = 2**31 - 1
"""Ends of slices from here on mean "to the end"."""


# -- arithmetic ------------------------------------------------------------------------------------------------------


def _infix(sign: str) -> Form:
    def form(call: Call) -> str | None:
        if call.node.dtype() is None or call.node.dtype() == ir.DataType.BOOL:
            return None
        a = call.scalar(0, beside=1) or call.arg(0)
        return f"{a} {sign} {call.scalar(1, beside=0) or call.arg(1)}"

    return form


def _div(call: Call) -> str | None:
    if not call.floats():
        return None
    return _infix("/")(call)


def _pow(call: Call) -> str | None:
    exponent = call.scalar(1, beside=0)
    if not call.floats() or exponent is None:
        return None
    short = exponent.removesuffix(".0")
    return f"{call.arg(0)} ** {short}"


def _fold(name: str) -> Form:
    def form(call: Call) -> str | None:
        first, *rest = call.args()
        for other in rest:
            first = f"{name}({first}, {other})"
        return first

    return form


def _clip(call: Call) -> str | None:
    limits: list[str] = []
    for slot, name in ((1, "min"), (2, "max")):
        value = call.node.attr(name)
        if value is None and call.node.has(slot):
            found = call.node.const(slot)
            if found is None or found.numel() != 1:
                return None
            value = found.item()
        free = value is None or (isinstance(value, float) and math.isinf(value))
        limits.append("" if free else number(value))
    low, high = limits
    if call.node.dtype() not in (*FLOATS, ir.DataType.INT64, ir.DataType.INT32):
        return None
    if (low, high) == ("0.0", "6.0"):
        return f"F.relu6({call.arg(0)})"
    parts = [f"{side}={limit.strip('()')}" for side, limit in (("min", low), ("max", high)) if limit]
    return f"torch.clamp({', '.join([call.arg(0), *parts])})" if parts else call.arg(0)


def _cast(call: Call) -> str | None:
    target = ir.DataType(call.node.attr("to"))
    kind = call.dtype(target)
    if kind is None or call.dtype(call.node.dtype()) is None:
        return None
    return call.arg(0) if call.node.dtype() == target else f"{call.arg(0)}.to({kind})"


def _cast_like(call: Call) -> str | None:
    kind = call.dtype(call.node.dtype(1))
    return None if kind is None else f"{call.arg(0)}.to({kind})"


# -- activations -----------------------------------------------------------------------------------------------------


def _with(function: str, *attributes: tuple[str, float]) -> Form:
    def form(call: Call) -> str | None:
        values = [number(float(call.node.attr(name, default))) for name, default in attributes]
        return f"{function}({', '.join([call.arg(0), *values])})"

    return form


def _gelu(call: Call) -> str | None:
    how = str(call.node.attr("approximate", "none"))
    return f"F.gelu({call.arg(0)}{'' if how == 'none' else f', approximate={how!r}'})"


def _hard_sigmoid(call: Call) -> str | None:
    alpha, beta = float(call.node.attr("alpha", 0.2)), float(call.node.attr("beta", 0.5))
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return f"F.hardsigmoid({call.arg(0)})"
    return f"torch.clamp({number(alpha)} * {call.arg(0)} + {number(beta)}, 0, 1)"


def _over(function: str) -> Form:
    def form(call: Call) -> str | None:
        modern, rank = call.node.version >= 13, call.rank()
        axis = int(call.node.attr("axis", -1 if modern else 1))
        if not modern and (rank is None or axis_of(axis, rank) != rank - 1):
            return None
        return f"{function}({call.arg(0)}, dim={axis})"

    return form


# -- shapes ----------------------------------------------------------------------------------------------------------


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items)


def _reshape(call: Call) -> str | None:
    wanted, shape = call.ints(1, "shape"), call.shape()
    if wanted is None:
        return None
    if call.node.attr("allowzero", 0) and "0" in wanted:
        return None
    x, sizes = call.arg(0), call.layout.sizes
    for axis, item in enumerate(wanted):
        if item == "0":
            known = None if shape is None or axis >= len(shape) else sizes.text(shape[axis])
            wanted[axis] = known if known is not None and known.isdecimal() else f"{x}.shape[{axis}]"
    return f"{x}.reshape({_listed(wanted) or '()'})"


def _transpose(call: Call) -> str | None:
    order, rank = call.node.attr("perm"), call.rank()
    if order is None:
        if rank is None:
            return None
        order = list(range(rank - 1, -1, -1))
    order = list(order)
    moved = [d for d, k in enumerate(order) if d != k]
    if not moved:
        return call.arg(0)
    if len(moved) == 2:
        return f"{call.arg(0)}.transpose({moved[0]}, {moved[1]})"
    return f"{call.arg(0)}.permute({', '.join(map(str, order))})"


def _flatten(call: Call) -> str | None:
    axis, rank = int(call.node.attr("axis", 1)), call.rank()
    if rank is None or rank < 2 or not (axis := axis_of(axis, rank)) or axis == rank:
        return None
    return call.arg(0) + (f".flatten(0, {axis - 1})" if axis > 1 else "") + (".flatten(1)" if rank - axis > 1 else "")


def _squeeze(call: Call) -> str | None:
    if not call.node.has(1) and call.node.attr("axes") is None:
        return f"{call.arg(0)}.squeeze()"
    axes = call.numbers(1, "axes")
    if axes is None:
        return None
    return f"{call.arg(0)}.squeeze({axes[0] if len(axes) == 1 else tuple(axes)})"


def _unsqueeze(call: Call) -> str | None:
    axes, rank = call.numbers(1, "axes"), call.rank()
    if axes is None or (len(axes) > 1 and rank is None):
        return None
    if len(axes) > 1 and rank is not None:
        axes = sorted(axis_of(k, rank + len(axes)) for k in axes)
    return call.arg(0) + "".join(f".unsqueeze({k})" for k in axes)


def _expand(call: Call) -> str | None:
    wanted, shape = call.ints(1), call.shape()
    if wanted is None or shape is None:
        return None
    target = call.node.facts.const(call.node.ir.inputs[1]) if call.node.ir.inputs[1] is not None else None
    more = len(wanted) - len(shape)
    sizes = [None] * len(wanted) if target is None else list(target.reshape(-1))
    for k, size in enumerate(shape):
        at = k + more
        if at < 0:
            continue
        if wanted[at] == "1" or sizes[at] == size:
            wanted[at] = "-1"  # as it is
        elif size != 1:
            return None
    if more <= 0 and all(item == "-1" for item in wanted):
        return call.arg(0)
    return f"{call.arg(0)}.expand({_listed(['-1'] * max(0, -more) + wanted)})"


def _tile(call: Call) -> str | None:
    counts = call.ints(1)
    return None if not counts or call.node.version < 6 else f"{call.arg(0)}.repeat({_listed(counts)})"


def _concat(call: Call) -> str | None:
    return f"torch.cat([{_listed(call.args())}], dim={int(call.node.attr('axis', 1))})"


def _split(call: Call) -> str | None:
    axis, sizes = int(call.node.attr("axis", 0)), call.ints(1, "split")
    shape = call.shape()
    if sizes is None and not call.node.has(1):
        count = int(call.node.attr("num_outputs", len(call.node.ir.outputs)))
        whole = shape[axis] if shape is not None else None
        if not isinstance(whole, int):
            return None
        each = -(-whole // count)
        sizes = [str(max(0, min(each, whole - k * each))) for k in range(count)]
    if sizes is None:
        return None
    if len(set(sizes)) == 1 and len(sizes) > 1:
        return f"{call.arg(0)}.chunk({len(sizes)}, dim={axis})" if sizes[0] != "0" else None
    return f"torch.split({call.arg(0)}, [{_listed(sizes)}], dim={axis})"


def _slice(call: Call) -> str | None:
    starts, ends, rank = call.ints(1, "starts"), call.ints(2, "ends"), call.rank()
    axes = call.numbers(3, "axes") if call.node.has(3) or call.node.attr("axes") is not None else None
    steps = call.numbers(4) if call.node.has(4) else None
    if starts is None or ends is None or (call.node.has(4) and steps is None) or (call.node.has(3) and axes is None):
        return None
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if any(s <= 0 for s in steps) or (rank is None and any(a < 0 for a in axes)):
        return None
    parts: dict[int, str] = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        last = "" if end.isdecimal() and int(end) >= _OPEN else end
        text = f"{'' if start == '0' else start}:{last}" + ("" if step == 1 else f":{step}")
        parts[axis if rank is None else axis_of(axis, rank)] = text
    return f"{call.arg(0)}[{_listed([parts.get(d, ':') for d in range(max(parts) + 1)])}]"


def _gather(call: Call) -> str | None:
    axis, rank = int(call.node.attr("axis", 0)), call.rank()
    if axis < 0 and rank is None:
        return None
    before = ":, " * (axis if rank is None else axis_of(axis, rank))
    fixed = call.node.const(1)
    if fixed is not None and fixed.dim() == 0:
        return f"{call.arg(0)}[{before}{int(fixed)}]"
    items = call.ints(1) if call.rank(1) == 0 else None
    return f"{call.arg(0)}[{before}{items[0] if items else call.arg(1)}]"


def _shape(call: Call) -> str | None:
    start, end = call.node.attr("start", 0), call.node.attr("end")
    cut = "" if not start and end is None else f"[{start or ''}:{'' if end is None else end}]"
    return f"torch.tensor({call.arg(0)}.shape{cut})"


def _range(call: Call) -> str | None:
    items = [call.ints(k) for k in range(3)]
    texts = [item[0] for item in items if item]
    kind = call.dtype(call.node.dtype())
    if len(texts) < 3 or kind is None:
        return None
    if texts[2] == "1":
        texts = texts[1:2] if texts[0] == "0" else texts[:2]
    return f"torch.arange({_listed(texts)}{'' if kind == 'torch.int64' else f', dtype={kind}'})"


def _constant_of_shape(call: Call) -> str | None:
    shape, tensor = call.ints(0), call.node.attr("value")
    fill = 0.0 if tensor is None else tensor.numpy().reshape(-1)[0].item()
    kind = call.dtype(ir.DataType.FLOAT if tensor is None else tensor.dtype)
    if shape is None or kind is None:
        return None
    return f"torch.full(({_listed(shape)}{',' if len(shape) == 1 else ''}), {number(fill)}, dtype={kind})"


def _pad(call: Call) -> str | None:
    pads, rank = call.ints(1, "pads"), call.rank()
    axes = call.numbers(3) if call.node.has(3) else None
    if pads is None or rank is None or (call.node.has(3) and axes is None):
        return None
    chosen = list(range(rank)) if axes is None else [axis_of(a, rank) for a in axes]
    around = {d: (pads[k], pads[k + len(chosen)]) for k, d in enumerate(chosen)}
    last = max([rank - d for d, pair in around.items() if pair != ("0", "0")], default=0)
    if not last:
        return call.arg(0)
    flat = [n for d in range(rank - 1, rank - 1 - last, -1) for n in around.get(d, ("0", "0"))]
    mode = str(call.node.attr("mode", "constant"))
    if mode != "constant":
        found = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(mode)
        fits = rank >= 3 and len(flat) == 2 * (rank - 2) and all(n.isdecimal() for n in flat)
        return f"F.pad({call.arg(0)}, [{_listed(flat)}], mode={found!r})" if found and fits else None
    fill = float(call.node.attr("value", 0.0))
    if call.node.has(2):
        known = call.node.const(2)
        if known is None:
            return None
        fill = known.item() if known.numel() else 0.0
    if math.isinf(fill):
        call.layout.imports.add("math")
    return f"F.pad({call.arg(0)}, [{_listed(flat)}]{'' if not fill else f', value={number(fill)}'})"


def _trilu(call: Call) -> str | None:
    shift = call.ints(1) if call.node.has(1) else ["0"]
    if not shift:
        return None
    name = "triu" if call.node.attr("upper", 1) else "tril"
    return f"torch.{name}({call.arg(0)}{'' if shift[0] == '0' else f', {shift[0]}'})"


# -- reductions ------------------------------------------------------------------------------------------------------


def _reduce(text: str) -> Form:
    def form(call: Call) -> str | None:
        axes, rank = call.numbers(1, "axes"), call.rank()
        nothing = not axes and (not call.node.has(1) or axes == [])
        if not call.floats() or (axes is None and call.node.has(1)) or not rank:
            return None
        if nothing:
            if call.node.attr("noop_with_empty_axes", 0):
                return None
            axes = list(range(rank))
        keep = ", keepdim=True" if call.node.attr("keepdims", 1) else ""
        which = axes[0] if axes is not None and len(axes) == 1 else axes
        return text.format(x=call.arg(0), how=f"dim={which}{keep}")

    return form


def _cumsum(call: Call) -> str | None:
    axis = call.numbers(1)
    if not axis or call.node.attr("exclusive", 0) or call.node.attr("reverse", 0) or not call.floats():
        return None
    return f"torch.cumsum({call.arg(0)}, dim={axis[0]})"


# -- products and norms ---------------------------------------------------------------------------------------------


def _batch_norm(call: Call) -> str | None:
    """BatchNormalization whose weights others read, too (as a module that is called twice), or that computes them."""
    node = call.node
    if node.attr("training_mode", 0) or node.outputs > 1 or len({node.dtype(k) for k in range(5)}) != 1:
        return None
    x, scale, bias, mean, variance = call.args()
    training = "self.training" if {3, 4} <= call.leaves.keys() else "False"
    options = [number(round(1 - float(node.attr("momentum", 0.9)), 6)), number(float(node.attr("epsilon", 1e-5)))]
    return f"F.batch_norm({x}, {mean}, {variance}, {scale}, {bias}, {training}, {_listed(options)})"


def _attention(call: Call) -> str | None:
    """Attention without a cache, and without what torch's has no argument for."""
    node, rank = call.node, call.rank()
    odd = ("softcap", "softmax_precision", "qk_matmul_output_mode")
    windows = [node.attr(name, -1) for name in ("left_window_size", "right_window_size")]
    causal = bool(node.attr("is_causal", 0))
    if rank not in (3, 4) or node.outputs > 1 or any(node.has(k) for k in (4, 5, 6)) or any(node.attr(n) for n in odd):
        return None
    if windows != [-1, -1] or (causal and node.has(3)):
        return None
    heads = [node.attr(name) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    parts = [call.arg(k) for k in range(3)]
    grouped = heads[0] != heads[1]
    if rank == 3:
        parts = [f"{x}.unflatten(-1, ({n}, -1)).transpose(1, 2)" for x, n in zip(parts, heads, strict=True)]
    else:
        q, k = call.shape(0), call.shape(1)
        grouped = q is None or k is None or q[1] != k[1]
    parts += [f"attn_mask={call.arg(3)}"] if node.has(3) else []
    parts += ["is_causal=True"] if causal else []
    parts += [f"scale={number(float(node.attr('scale')))}"] if node.attr("scale") is not None else []
    parts += ["enable_gqa=True"] if grouped else []
    text = f"F.scaled_dot_product_attention({_listed(parts)})"
    return f"{text}.transpose(1, 2).flatten(2)" if rank == 3 else text


def _einsum(call: Call) -> str | None:
    return f"torch.einsum({call.node.attr('equation').replace(' ', '')!r}, {_listed(call.args())})"


def _matmul(call: Call) -> str | None:
    return f"{call.arg(0)} @ {call.arg(1)}"


def _function(text: str) -> Form:
    def form(call: Call) -> str | None:
        return f"{text}({_listed(call.args())})"

    return form


FORMS: dict[str, Form] = {
    "Add": _infix("+"), "Sub": _infix("-"), "Mul": _infix("*"), "Div": _div, "Pow": _pow, "MatMul": _matmul,
    "Greater": _infix(">"), "GreaterOrEqual": _infix(">="), "Less": _infix("<"), "LessOrEqual": _infix("<="),
    "Equal": _infix("=="), "Max": _fold("torch.maximum"), "Min": _fold("torch.minimum"), "Sum": _fold("torch.add"),
    "Clip": _clip, "Cast": _cast, "CastLike": _cast_like, "Identity": lambda call: call.arg(0), "Einsum": _einsum,
    "LeakyRelu": _with("F.leaky_relu", ("alpha", 0.01)), "Elu": _with("F.elu", ("alpha", 1.0)),
    "Celu": _with("F.celu", ("alpha", 1.0)), "Gelu": _gelu, "HardSigmoid": _hard_sigmoid,
    "HardSwish": _function("F.hardswish"), "Softplus": _function("F.softplus"),
    "Softmax": _over("torch.softmax"), "LogSoftmax": _over("torch.log_softmax"),
    "Reshape": _reshape, "Transpose": _transpose, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
    "Expand": _expand, "Tile": _tile, "Concat": _concat, "Split": _split, "Slice": _slice, "Gather": _gather,
    "Shape": _shape, "Range": _range, "ConstantOfShape": _constant_of_shape, "Pad": _pad, "Trilu": _trilu,
    "ReduceMean": _reduce("{x}.mean({how})"), "ReduceSum": _reduce("{x}.sum({how})"),
    "ReduceMax": _reduce("{x}.amax({how})"), "ReduceMin": _reduce("{x}.amin({how})"),
    "ReduceL2": _reduce("torch.linalg.vector_norm({x}, {how})"), "CumSum": _cumsum,
    "GlobalAveragePool": overall("mean"), "GlobalMaxPool": overall("amax"), "MaxPool": pool, "AveragePool": pool,
    "BatchNormalization": _batch_norm, "Attention": _attention,
    "Resize": resize, "Upsample": resize, "DepthToSpace": depth_to_space,
}  # fmt: skip
"""Forms of ai.onnx; those with weights of their own are tried first (`spa.interpreter.export.modules`)."""
