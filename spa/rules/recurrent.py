"""LSTM, GRU, RNN: gate blocks are a fixed outer factor of the hidden axis; both directions share the hidden axis."""

from __future__ import annotations

from spa.rules.base import NEVER, Op, Rule, Zero, register
from spa.rules.notation import Einsum

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _zero(op: Op) -> Zero:
    """The candidate state is f(0) = 0 where weights and biases are, and the state stays zero if it starts so."""
    return NEVER if op.attr("activations") else Zero(all_of=(1, 2, 3, 5, 6))


def _recurrent(op: Op) -> None:
    gates = _GATES[op.node.op_type]
    d = 2 if op.attr("direction", "forward") == "bidirectional" else 1
    x = "b s i" if op.attr("layout", 0) else "s b i"
    y = f"b s {d} h" if op.attr("layout", 0) else f"s {d} b h"
    state = f"b {d} h" if op.attr("layout", 0) else f"{d} b h"
    cell = f", {state}, {d} (3 h)" if op.node.op_type == "LSTM" else ""
    cell_out = f", {state}" if op.node.op_type == "LSTM" else ""
    text = f"{x}, {d} ({gates} h) i, {d} ({gates} h) h, {d} ({2 * gates} h), b, {state}{cell} -> {y}, {state}{cell_out}"
    bound = Einsum(text, macs=f"{d} {gates} s b h i, {d} {gates} s b h h", roles={"h": "hidden", "i": "neuron"}).bind(
        op
    )
    if not bound:
        return
    if "s" in bound:
        op.freeze(bound["s"], f"{op.node.op_type} runs over time")
    # the state is multiplied by the recurrent weights
    op.flow(bound["h"], [(2, 2)], leaving="sum", role="hidden")
    op.edit("hidden_size", None, bound["h"])


register(
    "LSTM GRU RNN",
    Rule(_recurrent, "s b i, d (4 h) i, d (4 h) h, d (8 h), b, d b h, d b h -> s d b h, d b h, d b h", _zero),
)


def _quantized_lstm(op: Op) -> None:
    """As LSTM with [d, i, 4 h] weights; the kernel scales input and state by their extremes and zero."""
    d = 2 if op.attr("direction", "forward") == "bidirectional" else 1
    scales = op.input(8)
    state, scale = f"{d} b h", f"{d} (4 h)" if scales is not None and len(scales.dims) == 2 else "~"
    text = (
        f"s b i, {d} i (4 h), {d} h (4 h), {d} (8 h), b, {state}, {state}, {d} (3 h),"
        f" {scale}, {scale}, {scale}, {scale} -> s {d} b h, {state}, {state}"
    )
    macs = f"{d} 4 s b h i, {d} 4 s b h h"
    bound = Einsum(text, macs=macs, roles={"h": "hidden", "i": "neuron"}).bind(op)
    if not bound:
        return
    op.freeze(bound["s"], "DynamicQuantizeLSTM runs over time")
    op.freeze(bound["b"], "DynamicQuantizeLSTM scales a whole batch by its extremes")
    op.freeze(bound["b"], "DynamicQuantizeLSTM finds its scales over the batch")
    op.flow(bound["i"], [(0, 2)], leaving="sum", role="neuron")
    op.flow(bound["h"], [(2, 1)], leaving="sum", role="hidden")
    op.edit("hidden_size", None, bound["h"])


register(
    "DynamicQuantizeLSTM",
    Rule(
        _quantized_lstm,
        "s b i, d i (4 h), d h (4 h), d (8 h), ... -> s d b h, d b h, d b h",
        _zero,
        points={1: 9, 2: 11},
    ),
    domain="com.microsoft",
)
