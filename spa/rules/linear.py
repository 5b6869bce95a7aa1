"""Operators that multiply and add: convolutions, matrix products, Einsum."""

from __future__ import annotations

import math

from spa.rules.base import FACTOR, Leaving, Op, Operand, Rule, Zero, register
from spa.rules.notation import Attr, Einsum, einsum

WEIGHTED = Zero(any_of=(0, 1), all_of=(2,))
"""x W + b: zero where a factor and the bias are."""

_CHANNEL = {"i": "channel", "o": "channel", "g": "channel"}
_GROUPS = {"g": Attr("group", 1)}
_POINTS = {0: 2, 1: 3}
"""Zero points of integer products."""


def _conv(op: Op) -> None:
    """A kernel of one position leaves its axis as it is: products over channels beside a feature axis."""
    weight = op.input(1)
    kernel = weight.shape[2:] if weight is not None else ()
    strides, pads = op.attr("strides") or [1] * len(kernel), op.attr("pads") or [0] * (2 * len(kernel))
    names = [
        f"p{k}" if size == strides[k] == 1 and pads[k] == pads[k + len(kernel)] == 0 else "~"
        for k, size in enumerate(kernel)
    ]
    space = " ".join(names) if names.count("~") <= 1 else "~"
    passing = " ".join(name for name in space.split() if name != "~")
    text = f"b (g i) {space}, (g o) i ~, (g o) -> b (g o) {space}"
    Einsum(text, _GROUPS, macs=f"b g o i ~1 ~y {passing}", roles=_CHANNEL)(op)


register("Conv", Rule(_conv, "b (g i) ~, (g o) i ~, (g o) -> b (g o) ~, a kernel of 1 lets its axis pass", WEIGHTED))
register(
    "ConvTranspose",
    einsum(
        "b (g i) ~, (g i) o ~, (g o) -> b (g o) ~", zero=WEIGHTED, macs="b g o i ~1 ~0", roles=_CHANNEL, sizes=_GROUPS
    ),
)
register(
    "ConvInteger",
    einsum(
        "b (g i) ~, (g o) i ~, ~, (g o) -> b (g o) ~",
        zero=Zero(any_of=(0, 1)),
        macs="b g o i ~1 ~y",
        roles=_CHANNEL,
        sizes=_GROUPS,
        points=_POINTS,
    ),
)
register(
    "FusedConv",
    einsum(
        "b (g i) ~, (g o) i ~, (g o), b (g o) ~ -> b (g o) ~",
        zero=Zero(any_of=(0, 1), all_of=(2, 3)),
        macs="b g o i ~1 ~y",
        roles=_CHANNEL,
        sizes=_GROUPS,
    ),
    domain="com.microsoft",
)


def _deform_conv(op: Op) -> None:
    if op.attr("offset_group", 1) != 1:
        op.freeze_all("DeformConv with several offset groups")
    else:
        text = "b (g i) ~, (g o) i ~, b ~, (g o), b ~ -> b (g o) ~"
        Einsum(text, _GROUPS, macs="b g o i ~1 ~y", roles=_CHANNEL)(op)


register("DeformConv", Rule(_deform_conv, "as Conv; frozen with several offset groups"))


def _col2im(op: Op) -> None:
    block = op.ints(2)
    if not block or None in block:
        op.freeze_all("Col2Im of blocks known only at run time")
    else:
        Einsum(f"b (c {math.prod(n or 1 for n in block)}) ~, ~, ~ -> b c ~")(op)


register("Col2Im", Rule(_col2im, "b (c k) ~ -> b c ~, k the positions of a block", FACTOR))


def _matmul_text(op: Op, left: str = "m k", right: str = "k n", extra: str = "") -> str | None:
    a, b = op.input(0), op.input(1)
    if a is None or b is None or not a.dims or not b.dims:
        return None
    x = "k" if len(a.dims) == 1 else f"... {left}"
    y = "k" if len(b.dims) == 1 else f"... {right}"
    out = ("..." if "..." in x + y else "") + ("" if x == "k" else " m") + ("" if y == "k" else " n")
    return f"{x}, {y}{extra} -> {out}"


_VIEWS = ("Transpose", "Cast", "Unsqueeze", "Squeeze", "Identity")


def _is_weight(op: Op, operand: Operand | None) -> bool:
    """Whether an operand is a weight, or matrices looked up in a stack of them: those of a token's experts."""
    if operand is None or operand.constant:
        return True
    node = operand.value.producer()
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    source = node.inputs[0] if node is not None and node.op_type in ("Gather", "GatherND") else None
    stack = op.resolve(source) if source is not None else None
    return stack is not None and stack.constant and len(stack.dims) > 2


def _roles(op: Op) -> dict[str, str]:
    """Two activations: attention; one weight: neurons."""
    if not any(_is_weight(op, op.input(k)) for k in (0, 1)):
        return {"...": "head", "k": "qk-dim", "n": "v-dim"}
    return {"n": "neuron", "m": "neuron", "k": "neuron"}


def _matmul(op: Op) -> None:
    text = _matmul_text(op)
    if text is None:
        op.freeze_all("MatMul of a scalar")
    else:
        Einsum(text, macs="... m k n", roles=_roles(op))(op)


register("MatMul", Rule(_matmul, "... m k, ... k n -> ... m n", WEIGHTED))


def _matmul_integer(op: Op) -> None:
    text = _matmul_text(op, extra=", ~, n")
    if text is None:
        op.freeze_all("MatMulInteger of a scalar")
    else:
        Einsum(text, macs="... m k n", roles=_roles(op))(op)


register(
    "MatMulInteger", Rule(_matmul_integer, "... m k, ... k n, ~, n -> ... m n", Zero(any_of=(0, 1)), points=_POINTS)
)


def _matmul_integer_to_float(op: Op) -> None:
    text = _matmul_text(op, extra=", ~, n, ~, n, n")
    if text is None:
        op.freeze_all("MatMulIntegerToFloat of a scalar")
    else:
        Einsum(text, macs="... m k n", roles=_roles(op))(op)


register(
    "MatMulIntegerToFloat",
    Rule(
        _matmul_integer_to_float,
        "... m k, ... k n, ~, n, ~, n, n -> ... m n",
        Zero(any_of=(0, 1, 3), all_of=(6,)),
        points={0: 4, 1: 5},
    ),
    domain="com.microsoft",
)


def _dynamic_quantize_matmul(op: Op) -> None:
    """The scale of the left operand is found from its extremes and zero: only zeros in it leave that as it is."""
    left: dict[str, Leaving] = {"...": "sum", "m": "sum"}
    Einsum("... m k, k n, n, n, n -> ... m n", leaving=left, macs="... m k n", roles={"k": "neuron", "n": "neuron"})(op)
    x = op.input(0)
    if x is not None and x.dims:
        op.flow(x.dims[-1], [(0, len(x.dims) - 1)], leaving="sum")


register(
    "DynamicQuantizeMatMul",
    Rule(
        _dynamic_quantize_matmul, "... m k, k n, n, n, n -> ... m n", Zero(any_of=(0, 1, 2), all_of=(4,)), points={1: 3}
    ),
    domain="com.microsoft",
)


def _fused_matmul(op: Op) -> None:
    text = None
    if not op.attr("transBatchA", 0) and not op.attr("transBatchB", 0):
        text = _matmul_text(op, "k m" if op.attr("transA", 0) else "m k", "n k" if op.attr("transB", 0) else "k n")
    if text is None:
        op.freeze_all("FusedMatMul with transposed batches or a scalar")
    else:
        Einsum(text, macs="... m k n", roles=_roles(op))(op)


register(
    "FusedMatMul",
    Rule(_fused_matmul, "... m k, ... k n -> ... m n, with transA, transB", WEIGHTED),
    domain="com.microsoft",
)


def _gemm(op: Op) -> None:
    left = "k m" if op.attr("transA", 0) else "m k"
    right = "n k" if op.attr("transB", 0) else "k n"
    bias = op.input(2)
    third = ", n" if bias is not None and len(bias.dims) == 1 else ", m n"
    Einsum(f"{left}, {right}{third} -> m n", macs="m k n", roles=_roles(op))(op)


_GEMM = Rule(_gemm, "m k, k n, m n -> m n, with transA, transB", WEIGHTED)
register("Gemm", _GEMM)
register("GemmFastGelu FusedGemm", _GEMM, domain="com.microsoft")


def _einsum(op: Op) -> None:
    equation = str(op.attr("equation", "")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow:
        letters = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(letters)
    if any(len(set(t.replace("...", ""))) < len(t.replace("...", "")) for t in left.split(",")):
        op.freeze_all("Einsum with a repeated letter in one operand")
        return

    def spaced(term: str) -> str:
        return " ".join("..." if c == "|" else c for c in term.replace("...", "|"))

    text = ", ".join(spaced(t) for t in left.split(",")) + " -> " + spaced(right)
    weights = [k for k, x in enumerate(op.inputs) if x is not None and x.constant]
    contracted = set(left) - set(right) - set(",.")
    role = "neuron" if weights else "qk-dim"
    batch = {c: "head" for c in right if c.isalpha() and not weights and left.count(c) > 1}
    free = {c: "v-dim" for c in right if c.isalpha() and not weights and left.count(c) == 1}
    roles = {**{c: role for c in left if c.isalpha() and (weights or c in contracted)}, **batch, **free}
    names = " ".join(dict.fromkeys(c for c in left if c.isalpha()))
    Einsum(text, macs=f"... {names}" if "..." in left else names, roles=roles)(op)


def _any_factor(op: Op) -> Zero:
    return Zero(any_of=tuple(range(len(op.inputs))))


register("Einsum", Rule(_einsum, "its own equation", _any_factor))
