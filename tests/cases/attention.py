"""Cases of fused attention and rotary embeddings."""

from __future__ import annotations

from tests.subject import case

MS = "com.microsoft::"

# batch 2, 3 query tokens, 5 key tokens, 4 heads of 6 (values of 8)
# fmt: off
# ruff: noqa: E501  # one line per case
CASES = [
    case("Attention", "2x4x3x6 2x4x5x6 2x4x5x8", "013 013 013 > 013", opset=23),
    case("Attention", "2x4x3x6 2x4x5x6 2x4x5x8", "013 013 013 > 013", opset=23, scale=0.3),
    case("Attention", "2x4x3x6 2x2x5x6 2x2x5x8 3x5", "013 013 013 - > 013", opset=23),
    case("Attention", "2x4x3x6 2x2x5x6 2x2x5x8 2x4x3x5", "013 013 013 01 > 013", opset=23),
    case("Attention", "2x4x3x6 2x2x5x6 2x2x5x8 2x1x3x5", "013 013 013 0 > 013", opset=24),
    case("Attention", "2x4x5x6 2x4x5x6 2x4x5x6", "013 013 013 > 013", opset=23, is_causal=1, softcap=2.0),
    case("Attention", "2x3x24 2x5x24 2x5x32", "02 02 02 > 02", opset=23, q_num_heads=4, kv_num_heads=4),
    case("Attention", "2x3x24 2x5x12 2x5x16", "02 02 02 > 02", opset=24, q_num_heads=4, kv_num_heads=2),
    case("Attention", "2x3x24 2x5x12 2x5x16 bool:3x5", "02 02 02 - > 02", opset=23, q_num_heads=4, kv_num_heads=2),
    case("Attention", "2x4x3x6 2x4x3x6 2x4x3x8 3x7 2x4x4x6 2x4x4x8", "013 013 013 - 013 013 > 013 013 013", opset=23, outs="111"),
    case("Attention", "2x3x24 2x3x12 2x3x16 - 2x2x4x6 2x2x4x8", "02 02 02 - 013 013 > 02 013 013", opset=23, q_num_heads=4, kv_num_heads=2, outs="111"),
    case("Attention", "2x4x3x6 2x4x5x6 2x4x5x8", "- - - > - - - -", opset=23, outs="1001"),
    case("RotaryEmbedding", "2x4x3x6 2x3x3 2x3x3", "013 02 02 > 013", opset=23),
    case("RotaryEmbedding", "2x4x3x6 2x3x3 2x3x3", "013 02 02 > 013", opset=23, interleaved=1),
    case("RotaryEmbedding", "2x4x3x6 7x3 7x3 i64<7:2x3", "013 1 1 0 > 013", opset=23),
    case("RotaryEmbedding", "2x3x24 2x3x3 2x3x3", "02 02 02 > 02", opset=23, num_heads=4),
    case("RotaryEmbedding", "2x3x24 2x3x3 2x3x3", "02 02 02 > 02", opset=23, num_heads=4, interleaved=1),
    case("RotaryEmbedding", "2x4x3x6 2x3x2 2x3x2", "- - - > -", opset=23, rotary_embedding_dim=4),
    case(MS + "RotaryEmbedding", "2x4x3x8 i64<7:2x3 9x4 9x4", "013 0 1 1 > 013"),
    case(MS + "RotaryEmbedding", "2x4x3x8 i64<7:2x3 9x4 9x4", "013 0 1 1 > 013", interleaved=1),
    case(MS + "RotaryEmbedding", "2x3x32 i64<7:2x3 9x4 9x4", "02 0 1 1 > 02", num_heads=4),
    case(MS + "RotaryEmbedding", "2x3x32 [2] 9x4 9x4", "02 - 1 1 > 02", num_heads=4, interleaved=1),
    case(MS + "Attention", "2x3x10 10x72 72", "2 01 0 > 2", num_heads=4),
    case(MS + "Attention", "2x3x10 10x72 72", "2 01 0 > 2", num_heads=4, scale=0.3),
    case(MS + "Attention", "2x3x10 10x80 80", "2 01 0 > 2", num_heads=4, qkv_hidden_sizes=[24, 24, 32]),
    case(MS + "Attention", "2x3x10 10x72 72 i32<2:2x3", "2 01 0 - > 2", num_heads=4),
    case(MS + "Attention", "2x3x10 10x72 72 - - 2x4x3x3", "- - - - - - > -", num_heads=4),
    case(MS + "QAttention", "u8:2x3x10 !i8:10x72 72 {0.01} {0.01} - u8:{7} i8:{0}", "2 01 0 - - - - - > 2", num_heads=4, zeros={0: 7}, carriers=(0,)),
    case(MS + "QAttention", "u8:2x3x10 !i8:10x72 72 {0.01} !p:72 i32<4:2 u8:{7} !i8:72", "2 01 0 - 0 - - 0 > 2", num_heads=4, zeros={0: 7, 1: "i7"}, carriers=(0,)),
    case(MS + "MultiHeadAttention", "2x3x24 2x5x24 2x5x32", "02 02 02 > 02", num_heads=4),
    case(MS + "MultiHeadAttention", "2x3x24 2x5x24 2x5x32 80", "02 02 02 0 > 02", num_heads=4),
    case(MS + "MultiHeadAttention", "2x3x24 2x5x24 2x5x32", "02 02 02 > 02", num_heads=4, scale=0.3),
    case(MS + "MultiHeadAttention", "2x3x24 2x5x24 2x5x32 - - 2x4x3x5", "02 02 02 - - 01 > 02", num_heads=4),
    case(MS + "MultiHeadAttention", "2x3x24 2x5x24 2x5x32 - - 2x1x3x5", "02 02 02 - - 0 > 02", num_heads=4),
    case(MS + "MultiHeadAttention", "2x3x24 2x3x24 2x3x24 - - - 2x4x2x6 2x4x2x6", "02 02 02 - - - 013 013 > 02 013 013", num_heads=4, outs="111"),
    case(
        MS + "GroupQueryAttention",
        "2x1x32 2x1x16 2x1x16 2x2x4x8 2x2x4x8 i32:[3,3] i32:{4}",
        "02 02 02 01 01 0 - > 02 01 01",
        num_heads=4,
        kv_num_heads=2,
        outs="111",
    ),
]
