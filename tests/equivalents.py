"""Mutants that change what a rule says but not what is true: per operator, each with the reason."""

from __future__ import annotations

EQUIVALENT: dict[str, dict[str, str]] = {
    "DynamicQuantizeMatMul": {
        "... m k, k n, n, n, n -> ... m n: k passes instead of sum": (
            "the rule states this sum once more, by hand: zeros must stand in the left operand"
        ),
    },
    "DynamicQuantizeLSTM": {
        f"s b i, {d} i (4 h), {d} h (4 h), {d} (8 h), b, {d} b h, {d} b h, {d} (3 h), ~, ~, ~, ~ -> "
        f"s {d} b h, {d} b h, {d} b h: i passes instead of sum": (
            "the rule states this sum once more, by hand: zeros must stand in the left operand"
        )
        for d in (1, 2)
    },
    "LSTM": {
        "zero: Zero(any_of=(4,), all_of=(), parts=False, never=False, outputs=())": (
            "a sequence of length 0 gives zeros: true, but lengths are never weights"
        ),
    },
    "QGemm": {
        "zero: Zero(any_of=(4,), all_of=(), parts=False, never=False, outputs=())": (
            "a scale of 0 gives zeros: true as long as the output's zero point is 0, which nothing needs to know"
        ),
    },
}
