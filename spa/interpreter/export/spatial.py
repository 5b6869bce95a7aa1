"""Windows and resampling as one line of torch (see `spa.interpreter.export.forms`)."""

from __future__ import annotations

from collections.abc import Sequence

from spa.interpreter.export.call import Call
from spa.interpreter.export.modules import Form
from spa.interpreter.export.names import number
from spa.interpreter.ops.pool import Window


def overall(text: str) -> Form:
    """A reduction over all spatial axes."""

    def form(call: Call) -> str | None:
        rank = call.rank()
        return None if rank is None else f"{call.arg(0)}.{text}({list(range(2, rank))}, keepdim=True)"

    return form


def pool(call: Call) -> str | None:
    """MaxPool and AveragePool where torch's windows are the same."""
    window, average = Window(call.node), call.operator == "AveragePool"
    sizes = (call.sizes() or [])[2:]
    if call.node.wants(1) or not call.floats() or (window.same and not sizes):
        return None
    begins, ends = window.pads(sizes)
    x = call.arg(0)
    dilated = any(d != 1 for d in window.dilations)
    if average and (dilated or begins != ends):
        return None
    if begins != ends or any(2 * p > k for p, k in zip(begins, window.kernel, strict=True)):
        if window.ceil or average:
            return None
        around = [n for pair in zip(reversed(begins), reversed(ends), strict=True) for n in pair]
        x, begins = f"F.pad({x}, {around}, value=-math.inf)", [0] * window.rank
        call.layout.imports.add("math")
    options = [_tuple(window.kernel), _tuple(window.strides)]
    options += [f"padding={_tuple(begins)}"] if any(begins) else []
    options += [f"dilation={_tuple(window.dilations)}"] if dilated else []
    options += ["ceil_mode=True"] if window.ceil else []
    if average and any(begins) and not call.node.attr("count_include_pad", 0):
        options.append("count_include_pad=False")
    return f"F.{'avg' if average else 'max'}_pool{window.rank}d({x}, {', '.join(options)})"


def _tuple(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"({', '.join(map(str, numbers))})"


def resize(call: Call) -> str | None:
    """Resize and Upsample of the last axes of images, where torch resamples alike."""
    node, rank, modern = call.node, call.rank(), call.node.version >= 11 and call.operator == "Resize"
    if rank is None or not 3 <= rank <= 5 or not call.floats() or node.attr("axes") is not None:
        return None
    mode = str(node.attr("mode", "nearest"))
    how = str(node.attr("coordinate_transformation_mode", "half_pixel")) if modern else "asymmetric"
    near = str(node.attr("nearest_mode", "round_prefer_floor")) if modern else "floor"
    odd = ("exclude_outside", "antialias")
    if any(node.attr(name, 0) for name in odd) or str(node.attr("keep_aspect_ratio_policy", "stretch")) != "stretch":
        return None
    scales = node.attr("scales")
    factors = node.const(2 if modern else 1) if scales is None and node.has(2 if modern else 1) else None
    scales = [float(s) for s in (scales if scales is not None else [] if factors is None else factors.reshape(-1))]
    goals = call.ints(3) if modern and node.has(3) else None
    if goals is None and not scales:
        return None
    outer = scales[:2] == [1.0, 1.0] if scales else _unchanged(call, goals or [])
    if not outer:
        return None
    whole = bool(scales) and all(s == int(s) for s in scales)
    size = f"scale_factor={_factors(scales[2:])}" if scales else f"size=({', '.join((goals or [])[2:])},)"
    if mode == "nearest":
        # with whole factors every position lies inside one pixel, however it is rounded
        alike = (how, near) == ("asymmetric", "floor") or (whole and how == "half_pixel" and near.startswith("round"))
        exact = (how, near) == ("half_pixel", "round_prefer_ceil")
        kind = "nearest" if alike else "nearest-exact" if exact else None
        return f"F.interpolate({call.arg(0)}, {size}, mode={kind!r})" if kind else None
    kinds = {("linear", 3): "linear", ("linear", 4): "bilinear", ("linear", 5): "trilinear", ("cubic", 4): "bicubic"}
    if (mode, rank) not in kinds or how not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return None
    if mode == "cubic" and float(node.attr("cubic_coeff_a", -0.75)) != -0.75:
        return None
    corners = ", align_corners=True" if how == "align_corners" else ""
    return f"F.interpolate({call.arg(0)}, {size}, mode={kinds[mode, rank]!r}{corners})"


def _factors(scales: Sequence[float]) -> str:
    return number(scales[0]) if len(set(scales)) == 1 else f"({', '.join(map(number, scales))})"


def _unchanged(call: Call, goals: Sequence[str]) -> bool:
    """Whether batch and channels stay as they are."""
    shape, wanted = call.shape(), call.node.ir.inputs[3]
    known = None if wanted is None else call.node.facts.const(wanted)
    if shape is None or known is None or len(goals) != len(shape):
        return False
    return list(known.reshape(-1)[:2]) == list(shape[:2])


def depth_to_space(call: Call) -> str | None:
    """DepthToSpace in the order of torch's pixel shuffle."""
    crd = str(call.node.attr("mode", "DCR")) == "CRD"
    return f"F.pixel_shuffle({call.arg(0)}, {int(call.node.attr('blocksize'))})" if crd else None
