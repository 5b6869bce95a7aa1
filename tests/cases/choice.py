"""Cases of routers: what is chosen by number, and what the numbers look up."""

from __future__ import annotations

from tests.subject import case

# i0: logits of 5 tokens for 6 experts, i1: their matrices
GATHER = """g (float[5,6] i0, float[6,4,3] i1) => (float[5,2,4,3] o0, float[5,2] o1) {
  k = Constant<value_ints = [2]>()
  s = Softmax<axis = -1>(i0)
  o1, n = TopK<axis = -1>(s, k)
  o0 = Gather<axis = 0>(i1, n)
}"""
GATHER_ND = """g (float[5,6] i0, float[6,4,3] i1) => (float[5,2,4,3] o0, float[5,2] o1) {
  k = Constant<value_ints = [2]>()
  e = Constant<value_ints = [-1]>()
  s = LogSoftmax<axis = -1>(i0)
  o1, n = TopK<axis = -1>(s, k)
  c = Unsqueeze(n, e)
  o0 = GatherND(i1, c)
}"""
SCATTER = """g (float[5,6] i0, float[6,4,3] i1) => (float[5,4,3] o0) {
  k = Constant<value_ints = [2]>()
  d = Constant<value_ints = [5, 6]>()
  b, n = TopK<axis = -1>(i0, k)
  z = ConstantOfShape(d)
  g = ScatterElements<axis = -1>(z, n, b)
  o0 = Einsum<equation = "te,eab->tab">(g, i1)
}"""
ELEMENTS = """g (float[5,6] i0, float[6,4,3] i1, float[6] i2) => (float[5,2,4,3] o0, float[5,2] o1) {
  k = Constant<value_ints = [2]>()
  s = Sigmoid(i0)
  c = Add(s, i2)
  b, n = TopK<axis = -1>(c, k)
  o1 = GatherElements<axis = -1>(s, n)
  o0 = Gather<axis = 0>(i1, n)
}"""
ONE_HOT = """g (float[5,6] i0, float[6,4,3] i1) => (float[5,4,3] o0) {
  d = Constant<value_ints = [6]>()
  v = Constant<value = float[2] {0.0, 1.0}>()
  n = ArgMax<axis = -1, keepdims = 0>(i0)
  m = OneHot<axis = 0>(n, d, v)
  o0 = Einsum<equation = "et,eab->tab">(m, i1)
}"""
EQUAL = """g (float[5,6] i0, float[6,4,3] i1) => (float[5,4,3] o0) {
  a = Constant<value = int64[6] {0, 1, 2, 3, 4, 5}>()
  n = ArgMax<axis = 1, keepdims = 1>(i0)
  q = Equal(n, a)
  m = Cast<to = 1>(q)
  o0 = Einsum<equation = "te,eab->tab">(m, i1)
}"""
FIXED = {
    3: GATHER.replace("TopK<axis = -1>", "TopK<axis = -1, largest = 0>"),
    4: GATHER.replace("[2]", "[6]").replace("5,2", "5,6"),
    7: GATHER.replace("float[5,2] o1) {", "float[5,2] o1, int64[5,2] n) {"),
}
"""Tokens -> a router whose experts stay: the worst are chosen, all are chosen, their numbers are an output."""

MOE = "com.microsoft::MoE"

CASES = [
    case("Softmax", "5x6 !6x4x3", "01 012 > 023 0", model=GATHER),
    case("Gather", "5x6 !6x4x3", "01 012 > 023 0", model=GATHER),
    case("GatherND", "5x6 !6x4x3", "01 012 > 023 0", model=GATHER_ND),
    case("ScatterElements", "5x6 !6x4x3", "01 012 > 012", model=SCATTER),
    case("GatherElements", "5x6 !6x4x3 !6", "01 012 0 > 023 0", model=ELEMENTS),
    case("OneHot", "5x6 !6x4x3", "01 012 > 012", model=ONE_HOT),
    case("Equal", "5x6 !6x4x3", "01 012 > 012", model=EQUAL),
    case(MOE, "5x8 5x6 !6x4x8 !6x4 !6x8x4 !6x8", "1 1 012 01 012 01 > 1", k=2, activation_type="relu"),
    case(
        MOE, "2x3x8 6x6 !6x4x8 - !6x8x4", "2 1 012 - 012 > 2", k=3, activation_type="silu", normalize_routing_weights=1
    ),
    case(
        MOE, "5x8 5x6 !6x8x8 !6x8 !6x8x4 !6x8", "1 1 012 01 012 01 > 1", k=2, activation_type="swiglu", swiglu_fusion=1
    ),
    case(MOE, "5x8 5x6 !6x4x8 - !6x8x4", "1 - 12 - 12 > 1", k=2, activation_type="relu", use_sparse_mixer=1),
    case(MOE, "5x8 5x2 !2x4x8 !2x4 !2x8x4 !2x8", "1 - 12 1 12 1 > 1", k=2, activation_type="gelu"),
    *(
        case("TopK", f"{n}x6 !6x4x3", "0 12 > 023 0" + " 0" * text.count("int64"), model=text.replace("[5", f"[{n}"))
        for n, text in FIXED.items()
    ),
]
