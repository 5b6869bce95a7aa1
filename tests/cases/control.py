"""Cases of operators with subgraphs, and of small graphs around operators that mean nothing alone."""

from __future__ import annotations

from tests.subject import case

IF = """g (float[3,4] i0, bool i1, float[4,5] i2, float[4,5] i3) => (float[3,5] o0) {
  o0 = If (i1) <then_branch = t () => (float[3,5] a) { a = MatMul(i0, i2) },
                else_branch = e () => (float[3,5] b) { b = MatMul(i0, i3) }>
}"""
IF_SIZES = """g (float[3,4] i0, bool i1) => (o0) {
  o0 = If (i1) <then_branch = t () => (float[3,4] a) { a = Relu(i0) },
                else_branch = e () => (float[1,4] b) { n = Constant<value_ints = [0]>() b = ReduceSum(i0, n) }>
}"""
LOOP = """g (float[3,4] i0, float[4,4] i1, float[3,4] i2) => (float[3,4] o0, float[2,3,4] o1) {
  m = Constant<value_int = 2>()
  c = Constant<value = bool {1}>()
  o0, o1 = Loop (m, c, i0) <body = b (int64 it, bool ci, float[3,4] h) => (bool co, float[3,4] hn, float[3,4] sc) {
    co = Identity(ci)
    z = MatMul(h, i1)
    t = Tanh(z)
    hn = Add(t, i2)
    sc = Identity(t)
  }>
}"""
SCAN = """g (float[2,4] i0, float[5,2,3] i1, float[3,4] i2, float[4,4] i3) => (float[2,4] o0, float[5,2,4] o1) {
  o0, o1 = Scan (i0, i1) <num_scan_inputs = 1, body = b (float[2,4] h, float[2,3] x) => (float[2,4] hn, float[2,4] y) {
    u = MatMul(x, i2)
    v = MatMul(h, i3)
    w = Add(u, v)
    hn = Tanh(w)
    y = Identity(hn)
  }>
}"""
SCAN_AXES = """g (float[2,4] i0, float[2,5,4] i1) => (float[2,4] o0, float[2,4,5] o1) {
  o0, o1 = Scan (i0, i1) <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [-1],
    body = b (float[2,4] h, float[2,4] x) => (float[2,4] hn, float[2,4] y) {
      hn = Add(h, x)
      y = Relu(hn)
  }>
}"""
CONSTANT = """g (float[3,4] i0) => (float[3,4] o0) {
  c = Constant<value = float[4] {1, 2, 3, 4}>()
  o0 = Add(i0, c)
}"""
SIZES = """g (float[3,4] i0, float[4,8] i1) => (float[3,8] o0, float o1) {
  h = MatMul(i0, i1)
  s = Shape(h)
  k = Constant<value_ints = [1]>()
  n = Gather(s, k)
  f = Cast<to = 1>(n)
  r = Sqrt(f)
  o0 = Div(h, r)
  z = Size(h)
  o1 = Cast<to = 1>(z)
}"""
HEADS = """g (float[2,3,24] i0, float[24,24] i1) => (float[2,3,24] o0) {
  h = MatMul(i0, i1)
  s = Shape<start = 0, end = 2>(h)
  d = Constant<value_ints = [4, 6]>()
  t = Concat<axis = 0>(s, d)
  r = Reshape(h, t)
  p = Transpose<perm = [0, 2, 1, 3]>(r)
  q = Relu(p)
  b = Transpose<perm = [0, 2, 1, 3]>(q)
  e = Constant<value_ints = [0, 0, -1]>()
  o0 = Reshape(b, e)
}"""

CASES = [
    case("If", "3x4 bool:() 4x5 4x5", "01 - 01 01 > 01", model=IF),
    case("If", "3x4 bool:()", "1 - > 1", model=IF_SIZES),
    case("Loop", "3x4 4x4 3x4", "01 01 01 > 01 12", model=LOOP),
    case("Scan", "2x4 5x2x3 3x4 4x4", "01 12 01 01 > 01 12", model=SCAN),
    case("Scan", "2x4 2x5x4", "01 02 > 01 01", model=SCAN_AXES),
    case("Constant", "3x4", "01 > 01", model=CONSTANT),
    case("Shape", "3x4 !4x8", "01 01 > 01 -", model=SIZES),
    case("Reshape", "2x3x24 !24x24", "012 01 > 012", model=HEADS),
]
