"""Cases of quantised operators."""

from __future__ import annotations

from tests.subject import QUANTISED, case

MS = "com.microsoft::"

# fmt: off
# ruff: noqa: E501  # one line per case
CASES = [
    case("QuantizeLinear", "3x4 {0.1} u8:{7}", "01 - - > 01", tolerance=QUANTISED),
    case("QuantizeLinear", "3x4 {0.1} u8:{0}", "01 - - > 01"),
    case("QuantizeLinear", "3x4 {0.1}", "01 - > 01"),
    case("QuantizeLinear", "3x4x5 p:4 u8:4", "012 0 0 > 012"),
    case("QuantizeLinear", "3x4x5 p:3 i8:3", "012 0 0 > 012", axis=0),
    case("QuantizeLinear", "3x8 p:3x2 u8:3x2", "01 01 01 > 01", axis=1, block_size=4),
    case("DequantizeLinear", "u8:3x4 {0.1} u8:{7}", "01 - - > 01"),
    case("DequantizeLinear", "u8:3x4 {0.1}", "01 - > 01"),
    case("DequantizeLinear", "i8:3x4x5 p:4 i8:4", "012 0 0 > 012"),
    case("DequantizeLinear", "i8:3x4 p:4", "01 0 > 01"),
    case("DequantizeLinear", "u8:3x4 p:3 u8:3", "01 0 0 > 01", axis=0),
    case("DequantizeLinear", "u8:8x3 p:2x3 u8:2x3", "01 01 01 > 01", axis=0, block_size=4),
    case(MS + "QuantizeLinear", "3x4x5 p:4 u8:4", "012 0 0 > 012", axis=1),
    case(MS + "DequantizeLinear", "u8:3x4x5 p:4 u8:4", "012 0 0 > 012", axis=1),
    case(MS + "DequantizeLinear", "u8:3x4 {0.1} u8:{7}", "01 - - > 01"),
    case("DynamicQuantizeLinear", "3x4", "01 > 01 - -", outs="111"),
    case("QLinearConv", "u8:2x4x5x5 {0.1} u8:{7} u8:6x4x3x3 {0.2} u8:{9} {4.0} u8:{3}", "01 - - 01 - - - - > 01", zeros={0: 7, 3: 9}),
    case("QLinearConv", "u8:2x6x5x5 {0.1} u8:{7} i8:8x3x3x3 p:8 i8:[1,-1,2,0,3,1,0,2] {40.0} u8:{3} i32<3000:8", "01 - - 01 0 0 - - 0 > 01", group=2, zeros={0: 7}, carriers=(0,)),
    case("QLinearMatMul", "u8:3x4 {0.1} u8:{7} u8:4x5 {0.1} u8:{9} {4.0} u8:{3}", "01 - - 01 - - - - > 01", zeros={0: 7, 3: 9}),
    case("QLinearMatMul", "u8:2x3x4 {0.1} u8:{7} i8:4x5 p:5 i8:[2,2,2,2,2] {4.0} u8:{3}", "012 - - 01 0 0 - - > 012", zeros={0: 7, 3: 2}),
    case(MS + "QLinearAdd", "u8:3x4 {0.1} u8:{7} u8:4 {0.1} u8:{9} {0.2} u8:{3}", "01 - - 0 - - - - > 01"),
    case(MS + "QLinearWhere", "bool:3x4 u8:3x4 {0.1} u8:{7} u8:4 {0.1} u8:{9} {0.2} u8:{3}", "01 01 - - 0 - - - - > 01"),
    case(MS + "QLinearSoftmax", "u8:2x3x4 {0.1} u8:{7} {0.01} u8:{3}", "01 - - - - > 01", more={"opset": 13}),
    case(MS + "QLinearMul", "u8:3x4 {0.1} u8:{7} u8:3x4 {0.1} u8:{9} {2.0} u8:{3}", "01 - - 01 - - - - > 01"),
    case(MS + "QLinearSigmoid", "u8:3x4 {0.1} u8:{7} {0.01} u8:{3}", "01 - - - - > 01"),
    case(MS + "QLinearLeakyRelu", "u8:3x4 {0.1} u8:{7} {0.1} u8:{3}", "01 - - - - > 01", alpha=0.1),
    case(MS + "QLinearGlobalAveragePool", "u8:2x4x3x3 {0.1} u8:{2} {0.1} u8:{9}", "01 - - - - > 01"),
    case(MS + "QLinearAveragePool", "u8:2x4x4x4 {0.1} u8:{2} {0.1} u8:{9}", "01 - - - - > 01", kernel_shape=[2, 2]),
    case(MS + "QGemm", "u8:3x4 {0.1} u8:{7} u8:4x5 {0.1} u8:{9} i32:5 {4.0} u8:{3}", "01 - - 01 - - 0 - - > 01", alpha=1.0, zeros={0: 7, 3: 9}),
    case(MS + "QGemm", "u8:3x4 {0.1} u8:{7} i8:5x4 p:5 i8:[2,2,2,2,2]", "01 - - 01 0 0 > 01", transB=1, zeros={0: 7, 3: 2}),
    case(MS + "QLinearConcat", "{0.2} u8:{3} u8:2x3 {0.1} u8:{7} u8:2x4 {0.1} u8:{9}", "- - 01 - - 01 - - > 01", axis=1),
    case(MS + "MatMulNBits", "3x64 !u8:5x4x8 !p:5x4", "01 01 01 > 01", K=64, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "2x3x64 !u8:5x4x8 !p:20", "012 01 0 > 012", K=64, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "3x64 !u8:5x4x8 !p:5x4 !u8:5x2", "01 01 01 01 > 01", K=64, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "3x64 !u8:5x4x8 !p:20 !u8:10", "01 01 0 0 > 01", K=64, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "3x48 !u8:5x3x8 !p:5x3 !u8:5x2", "0 0 0 0 > 01", K=48, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "3x64 !u8:5x4x16 !p:5x4 !u8:5x4", "01 01 01 01 > 01", K=64, N=5, bits=8, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulBnb4", "3x64 !u8:160 !p:20", "01 0 0 > 01", K=64, N=5, quant_type=1, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulBnb4", "3x24 !u8:60 !p:8", "- - - > -", K=24, N=5, quant_type=1, block_size=16),
    case(MS + "MatMulNBits", "3x64 !u8:5x4x8 !p:5x4 !5x4", "01 01 01 01 > 01", K=64, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "3x64 !u8:5x4x8 !p:5x4 - - 5", "01 01 01 - - 0 > 01", K=64, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "3x60 !u8:5x4x8 !p:5x4", "0 0 0 > 01", K=60, N=5, bits=4, block_size=16, carriers=(0, 2)),
    case(MS + "MatMulNBits", "3x64 !u8:5x4x16 !p:5x4", "01 01 01 > 01", K=64, N=5, bits=8, block_size=16, carriers=(0, 2)),
    case(MS + "QEmbedLayerNormalization", "i32<5:2x3 i32<2:2x3 u8:5x8 u8:4x8 u8:2x8 u8:8 u8:8 - {0.1} {0.1} {0.1} {0.1} {0.1} u8:{7} u8:{6} u8:{5} u8:{4} u8:{3}", "- - 1 1 1 0 0 - - - - - - - - - - - > 2 -", outs="11"),
    case(MS + "GatherBlockQuantized", "!u8:6x16 i64<6:2x3 !p:6x2", "1 01 1 > 012", bits=4, block_size=16),
    case(MS + "GatherBlockQuantized", "!u8:6x32 i64<6:4 !p:6x4 !u8:6x2", "- 0 - - > 0", bits=4, block_size=16),
    case(MS + "GatherBlockQuantized", "!u8:6x64 i64<6:4 !p:6x4 !u8:6x4", "1 0 1 1 > 01", bits=8, block_size=16),
    case(MS + "GatherBlockQuantized", "!u8:6x40 i64<6:4 !p:6x3", "- - - > -", bits=8, block_size=16),
]
