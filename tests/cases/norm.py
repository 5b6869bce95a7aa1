"""Cases of normalisations."""

from __future__ import annotations

from tests.subject import case

MS = "com.microsoft::"

CASES = [
    case("BatchNormalization", "2x4x3x3 4 4 4 p:4", "0123 0 0 0 0 > 0123"),
    case("BatchNormalization", "5x4 4 4 4 p:4", "01 0 0 0 0 > 01"),
    case("BatchNormalization", "2x4x3 4 4 4 p:4", "012 0 0 0 0 > 012", opset=9),
    case("BatchNormalization", "4x4x3 4 4 4 p:4", "01 0 0 0 0 > 01 0 0", training_mode=1, outs="111"),
    case("InstanceNormalization", "2x4x3x3 4 4", "0123 0 0 > 0123"),
    case("InstanceNormalization", "2x4x6 4 4", "012 0 0 > 012"),
    case("GroupNormalization", "2x8x3x3 4 4", "01 0 0 > 01", opset=18, num_groups=4),
    case("GroupNormalization", "2x8x3x3 8 8", "01 0 0 > 01", num_groups=4),
    case("GroupNormalization", "2x4x3 4 4", "01 0 0 > 01", num_groups=1),
    case("LayerNormalization", "2x3x8 8 8", "012 0 0 > 012"),
    case("LayerNormalization", "2x3x8 8", "012 0 > 012 01 01", axis=2, outs="111"),
    case("LayerNormalization", "2x4x6 4x6 4x6", "012 01 01 > 012", axis=1),
    case("LayerNormalization", "4x6 4x6 4x6", "01 01 01 > 01", axis=0),
    case("RMSNormalization", "2x3x8 8", "012 0 > 012", opset=23),
    case("RMSNormalization", "2x4x6 4x6", "012 01 > 012", opset=23, axis=1),
    case("SimplifiedLayerNormalization", "2x3x8 8", "012 0 > 012", opset=17, axis=-1),
    case("SimplifiedLayerNormalization", "2x3x8 8", "012 0 > 012 01", opset=17, axis=-1, outs="11"),
    case(MS + "SkipLayerNormalization", "2x3x8 2x3x8 8 8 8", "012 012 0 0 0 > 012"),
    case(MS + "SkipLayerNormalization", "2x3x8 2x3x8 8", "012 012 0 > 012 - - 012", outs="1001"),
    case(MS + "SkipLayerNormalization", "2x3x8 3x8 8 8", "012 01 0 0 > 012"),
    case(MS + "SkipSimplifiedLayerNormalization", "2x3x8 2x3x8 8", "012 012 0 > 012"),
    case(MS + "SkipSimplifiedLayerNormalization", "2x3x8 2x3x8 8 8", "012 012 0 0 > 012 - - 012", outs="1001"),
    case(MS + "EmbedLayerNormalization", "i32<5:2x3 i32<2:2x3 5x8 4x8 2x8 8 8", "- - 1 1 1 0 0 > 2 -", outs="11"),
    case(MS + "EmbedLayerNormalization", "i32<5:2x3 - 5x8 4x8 - 8 8 i32<2:2x3", "- - 1 1 - 0 0 - > 2 - 2", outs="111"),
    case("LpNormalization", "3x4x5", "012 > 012"),
    case("LpNormalization", "3x4x5", "012 > 012", axis=1, p=1),
    case("MeanVarianceNormalization", "2x4x3x3", "0123 > 0123"),
    case("MeanVarianceNormalization", "2x4x3", "012 > 012", axes=[1, 2]),
    case("LRN", "2x6x3x3", "023 > 023", size=3),
]
