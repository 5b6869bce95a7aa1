"""LSTM, GRU, RNN: gate blocks are a fixed outer factor of the hidden axis; both directions share the hidden axis."""

from __future__ import annotations

from spa.rules.base import NEVER, Op, Rule, register
from spa.rules.notation import Einsum

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def _recurrent(op: Op) -> None:
    gates = _GATES[op.node.op_type]
    d = 2 if op.attr("direction", "forward") == "bidirectional" else 1
    x = "b s i" if op.attr("layout", 0) else "s b i"
    y = f"b s {d} h" if op.attr("layout", 0) else f"s {d} b h"
    state = f"b {d} h" if op.attr("layout", 0) else f"{d} b h"
    cell = f", {state}, {d} (3 h)" if op.node.op_type == "LSTM" else ""
    cell_out = f", {state}" if op.node.op_type == "LSTM" else ""
    text = (
        f"{x}, {d} ({gates} h) i, {d} ({gates} h) h, {d} ({2 * gates} h), b, {state}{cell}"
        f" -> {y}, {state}{cell_out}"
    )
    bound = Einsum(
        text, macs=f"{d} {gates} s b h i, {d} {gates} s b h h", roles={"h": "hidden", "i": "neuron"}
    ).bind(op)
    if not bound:
        return
    if "s" in bound:
        op.freeze(bound["s"], f"{op.node.op_type} runs over time")
    # the state is multiplied by the recurrent weights
    op.flow(bound["h"], [(2, 2)], leaving="sum", role="hidden")
    op.edit("hidden_size", None, bound["h"])


register("LSTM GRU RNN", Rule(_recurrent, "s b i, d (4 h) i, d (4 h) h, d (8 h), b, d b h, d b h -> s d b h, d b h, d b h", NEVER))
