"""Cases of recurrent operators."""

from __future__ import annotations

from tests.subject import Tolerance, case

DYNAMIC = Tolerance(0.05, "the state is quantised anew in every step, by its extremes")

# 5 steps, batch 2, 3 inputs, 4 hidden units
# fmt: off
# ruff: noqa: E501  # one line per case
CASES = [
    case("LSTM", "5x2x3 1x16x3 1x16x4", "12 12 12 > 23 12 12", hidden_size=4, outs="111"),
    case("LSTM", "5x2x3 1x16x3 1x16x4 1x32", "12 12 12 1 > 23 12 12", hidden_size=4, outs="111", direction="reverse"),
    case("LSTM", "5x2x3 1x16x3 1x16x4 1x32 i32:[4,5] 1x2x4 1x2x4 1x12", "12 12 12 1 0 12 12 1 > 23 12 12", hidden_size=4, outs="111"),
    case("LSTM", "5x2x3 2x16x3 2x16x4 2x32 - 2x2x4 2x2x4", "12 12 12 1 - 12 12 > 23 12 12", hidden_size=4, outs="111", direction="bidirectional"),
    case("LSTM", "2x5x3 1x16x3 1x16x4 1x32 - 2x1x4 2x1x4", "02 12 12 1 - 02 02 > 03 02 02", hidden_size=4, outs="111", layout=1),
    case("LSTM", "5x2x3 1x16x3 1x16x4 1x32 - - - 1x12", "12 12 12 1 - - - 1 > 23", hidden_size=4, outs="1", input_forget=1),
    case("GRU", "5x2x3 1x12x3 1x12x4", "12 12 12 > 23 12", hidden_size=4, outs="11"),
    case("GRU", "5x2x3 1x12x3 1x12x4 1x24 - 1x2x4", "12 12 12 1 - 12 > 23 12", hidden_size=4, outs="11", linear_before_reset=1),
    case("GRU", "5x2x3 2x12x3 2x12x4 2x24 - 2x2x4", "12 12 12 1 - 12 > 23 12", hidden_size=4, outs="11", direction="bidirectional"),
    case("GRU", "2x5x3 1x12x3 1x12x4 1x24", "02 12 12 1 > 03 02", hidden_size=4, outs="11", layout=1),
    case("RNN", "5x2x3 1x4x3 1x4x4", "12 12 12 > 23 12", hidden_size=4, outs="11"),
    case("RNN", "5x2x3 1x4x3 1x4x4 1x8 - 1x2x4", "12 12 12 1 - 12 > - 12", hidden_size=4, outs="01", direction="reverse"),
    case("RNN", "5x2x3 2x4x3 2x4x4 2x8 i32:[3,5]", "12 12 12 1 0 > 23 12", hidden_size=4, outs="11", direction="bidirectional"),
    case("RNN", "2x5x3 1x4x3 1x4x4 1x8", "02 12 12 1 > 03 02", hidden_size=4, outs="11", layout=1),
    case(
        "com.microsoft::DynamicQuantizeLSTM",
        "h:5x2x3 !i8:1x3x16 !i8:1x4x16 1x32 - - - - [0.01] i8:[0] [0.01] i8:[0]",
        "2 12 12 1 - - - - - - - - > 3 2 2",
        hidden_size=4,
        outs="111",
        tolerance=DYNAMIC,
    ),
    case(
        "com.microsoft::DynamicQuantizeLSTM",
        "h:5x2x3 !i8:2x3x16 !i8:2x4x16 2x32 - 2x2x4 2x2x4 - [0.01,0.02] i8:[0,0] [0.01,0.02] i8:[0,0]",
        "2 12 12 1 - 2 2 - - - - - > 3 2 2",
        hidden_size=4,
        outs="111",
        direction="bidirectional",
        tolerance=DYNAMIC,
    ),
]
