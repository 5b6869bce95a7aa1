"""Cases of reductions, pooling, and operators that run along an axis."""

from __future__ import annotations

from tests.subject import case, each

REDUCTIONS = "ReduceSum ReduceMean ReduceL1 ReduceL2 ReduceSumSquare ReduceMax ReduceMin ReduceProd"
LOGS = "ReduceLogSum ReduceLogSumExp"

# fmt: off
CASES = [
    *each(f"{REDUCTIONS} {LOGS}", "p:3x4x5 [1]", "012 - > 02"),
    *each(f"{REDUCTIONS} {LOGS}", "p:3x4x5 [-1,0]", "012 - > 0", keepdims=0),
    *each(f"{REDUCTIONS} {LOGS}", "p:3x4", "01 > -"),
    *each(f"{REDUCTIONS} {LOGS}", "p:3x4x5", "012 > 01", opset=11, axes=[1], keepdims=0),
    case("ReduceSum", "3x4 []", "01 - > 01", noop_with_empty_axes=1),
    case("ReduceSum", "3x4", "01 > 01", noop_with_empty_axes=1),
    case("ReduceMean", "3x4", "01 > -", keepdims=0, noop_with_empty_axes=0),
    case("ReduceSum", "3x4x5", "012 > 02", opset=11, axes=[-2]),
    case("ReduceSum", "3x4 i64<2:1", "- - > -"),
    case("ReduceMax", "i64:3x4 [1]", "01 - > 0"),
    *each("AveragePool MaxPool", "2x4x5x5", "01 > 01", kernel_shape=[2, 2], strides=[1, 2]),
    *each("AveragePool MaxPool", "2x4x6", "01 > 01", kernel_shape=[3], pads=[1, 1]),
    *each("AveragePool MaxPool", "2x4x6x5", "013 > 013", kernel_shape=[3, 1], pads=[1, 0, 1, 0], strides=[2, 1]),
    *each("AveragePool MaxPool", "2x4x5x5", "01 > 01", kernel_shape=[1, 1], strides=[2, 2]),
    case("AveragePool", "2x4x5x5", "01 > 01", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
    case("LpPool", "2x4x5x5", "01 > 01", kernel_shape=[2, 2], p=2),
    case("MaxPool", "2x4x5x5", "- > - -", kernel_shape=[2, 2], outs="11"),
    *each("GlobalAveragePool GlobalMaxPool GlobalLpPool", "2x4x3x5", "0123 > 01"),
    case("MaxRoiPool", "2x4x6x6 [[0.0,0.0,0.0,3.0,3.0],[1.0,1.0,1.0,5.0,5.0]]", "1 0 > 01", pooled_shape=[6, 6]),
    case("MaxRoiPool", "1x4x6x6 [[0.0,0.0,0.0,3.0,3.0],[0.0,1.0,1.0,5.0,5.0]]", "1 0 > 01", pooled_shape=[2, 2]),
    case("RoiAlign", "2x4x6x6 p:3x4 i64<2:3", "1 0 0 > 01", output_height=2, output_width=2),
    case("GridSample", "2x4x5x5 2x3x3x2", "01 0 > 01"),
    *each("Softmax LogSoftmax Hardmax", "3x4x5", "01 > 01"),
    *each("Softmax LogSoftmax Hardmax", "3x4x5", "02 > 02", axis=1),
    *each("Softmax LogSoftmax Hardmax", "3x4x5", "0 > 0", opset=11),
    *each("Softmax LogSoftmax", "3x4x5", "01 > 01", opset=11, axis=2),
    *each("ArgMax ArgMin", "3x4x5", "12 > 12"),
    *each("ArgMax ArgMin", "3x4x5", "01 > 01", axis=-1, keepdims=0),
    *each("ArgMax ArgMin", "3x4x5", "02 > 01", axis=1, keepdims=0),
    case("TopK", "3x4x5 [2]", "01 - > 01 01", outs="11"),
    case("TopK", "3x4x5 [2]", "12 - > 12 12", axis=0, outs="11"),
    case("CumSum", "3x4 {1}", "0 - > 0"),
    case("CumSum", "3x4x5 {-2}", "02 - > 02", reverse=1, exclusive=1),
    case("Det", "3x4x2x2", "01 > 01"),
    case("Det", "3x3", "- > -"),
    case("Trilu", "3x4x5", "0 > 0"),
    case("Trilu", "3x4x5 {1}", "0 - > 0", upper=0),
    case("ReverseSequence", "3x4x5 [1,2,3,3]", "2 - > 2"),
    case("ReverseSequence", "3x4x5 [1,2,4]", "2 - > 2", batch_axis=0, time_axis=1),
    case("CumProd", "3x4 {1}", "0 - > 0", opset=26),
    *each("Shape Size", "3x4", "01 > -"),
]
