"""Small ONNX models that reduce activations to moments, where the activations are: on the CPU or on the GPU.

They are models of their own, so that neither the opset nor the operators of the user's model matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.moments import Joint
from spa.runtime import Provider, Session, Value, fetch, open_session, place, run_values

_OPSET = 17
_IR_VERSION = 8


class _Builder:
    """Straight-line ONNX code."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.constants: list[ir.Value] = []

    def input(self, name: str, dtype: ir.DataType, rank: int | None = None) -> ir.Value:
        shape = None if rank is None else ir.Shape([None] * rank)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
        self.inputs.append(value)
        return value

    def constant(self, array: NDArray[Any]) -> ir.Value:
        name = f"c{len(self.constants)}"
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        self.constants.append(value)
        return value

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, dtype=np.int64))

    def __call__(self, op: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        attrs = [ir.AttrInt64(k, v) if isinstance(v, int) else ir.AttrInt64s(k, list(v)) for k, v in attributes.items()]
        node = ir.Node("", op, inputs, attrs, num_outputs=1, name=f"n{len(self.nodes)}")
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def session(self, outputs: Mapping[str, ir.Value], provider: Provider, threads: int) -> Session:
        finals = []
        for name, value in outputs.items():
            final = self("Identity", value)
            final.name = name
            final.type = ir.TensorType(ir.DataType.FLOAT)
            finals.append(final)
        graph = ir.Graph(
            self.inputs,
            finals,
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": _OPSET},
            name="kernel",
        )
        data = ir.to_proto(ir.Model(graph, ir_version=_IR_VERSION)).SerializeToString()
        return open_session(data, provider=provider, threads=threads, optimize=True, arena=False)


@dataclass(frozen=True)
class Form:
    """How the columns of a linear operator lie in its operands."""

    tokens: bool
    """x [..., g c] with one row per leading index; else x [batch, g c, space ...]."""
    groups: int
    channels: int
    taps: int
    rows: int
    """Targets per group; 0 for none."""
    x_type: ir.DataType = ir.DataType.FLOAT
    t_type: ir.DataType = ir.DataType.FLOAT
    width: int = 0
    """Channels of the target as it comes; more than `groups x rows` where only some are looked at."""
    skip: bool = False
    """The target gets (plus - minus) / scale on top."""
    half: bool = False
    """Only some of the leading axis, given as an index `who`."""
    pick: bool = True
    """Rows are picked by an index; else all are taken as they lie (tokens only)."""
    carry: bool = False
    """Rows are put behind others that are held."""


def _float(b: _Builder, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return value if dtype == ir.DataType.FLOAT else b("Cast", value, to=int(ir.DataType.FLOAT))


def _rows(b: _Builder, x: ir.Value, tokens: bool, width: int, index: ir.Value | None, pad: bool) -> ir.Value:
    """[batch, positions, width], the positions picked by `index`."""
    if tokens:
        x = b("Reshape", x, b.ints(0, -1, width) if index is not None else b.ints(1, -1, width))
    else:
        x = b("Transpose", b("Reshape", x, b.ints(0, width, -1)), perm=[0, 2, 1])
        if pad:
            x = b("Pad", x, b.ints(0, 0, 0, 0, 1, 0))
    return x if index is None else b("Gather", x, index, axis=1)


def _grouped(b: _Builder, x: ir.Value, groups: int, width: int, taps: int) -> ir.Value:
    """[batch, rows taps, width] -> [g, batch rows, taps width / g]."""
    if groups == 1:
        return b("Reshape", x, b.ints(1, -1, taps * width))
    x = b("Reshape", x, b.ints(-1, taps, groups, width // groups))
    return b("Reshape", b("Transpose", x, perm=[2, 0, 1, 3]), b.ints(groups, -1, taps * (width // groups)))


def _product(b: _Builder, left: ir.Value, right: ir.Value, groups: int, m: int, d: int) -> ir.Value:
    """left^T right per group, [g, m, d]."""
    if groups == 1:
        flat = b("Gemm", b("Reshape", left, b.ints(-1, m)), b("Reshape", right, b.ints(-1, d)), transA=1)
        return b("Reshape", flat, b.ints(1, m, d))
    return b("MatMul", b("Transpose", left, perm=[0, 2, 1]), right)


def _bent(b: _Builder, groups: int, m: int, t: ir.Value, other: ir.Value | None, rows: ir.Value) -> ir.Value:
    """Targets that only ask for what survives an activation f = clip(scale y + shift + other, low, high).

    Where the original is below `low`, any value below is as good: the target is then what the current weights give,
    or `low` if they give more; likewise above `high`. Least squares towards these targets never increases the sum of
    (f(y) - y')^2 where the original passes and of what is passed where it does not: a bound of the error behind the
    activation (alternating minimisation as in Zhang et al., "Accelerating very deep convolutional networks", 2016).
    """
    scale, shift = (b("Reshape", b.input(n, ir.DataType.FLOAT, 1), b.ints(groups, 1, m)) for n in ("scale", "shift"))
    weight, offset = (b.input(n, ir.DataType.FLOAT, 3) for n in ("weight", "offset"))
    low, high = (b.input(n, ir.DataType.FLOAT, 0) for n in ("low", "high"))
    now = b("Add", b("MatMul", rows, b("Transpose", weight, perm=[0, 2, 1])), offset)  # [g, N, m]
    rest = shift if other is None else b("Add", shift, other)
    want, have = (b("Add", b("Mul", v, scale), rest) for v in (t, now))
    want = b("Where", b("Less", want, low), b("Min", have, low), want)
    want = b("Where", b("Greater", want, high), b("Max", have, high), want)
    return b("Div", b("Sub", want, rest), scale)


@lru_cache(maxsize=256)
def _rows_session(form: Form, provider: Provider, threads: int) -> Session:
    b = _Builder()
    who = b.input("who", ir.DataType.INT64, 1) if form.half else None

    def given(name: str, dtype: ir.DataType) -> ir.Value:
        value = b.input(name, dtype)
        return _float(b, value if who is None else b("Gather", value, who, axis=0), dtype)

    def after(name: str, rows: ir.Value) -> ir.Value:
        return b("Concat", b.input(name, ir.DataType.FLOAT, 3), rows, axis=1) if form.carry else rows

    x = given("x", form.x_type)
    patches = b.input("patches", ir.DataType.INT64, 1) if form.pick else None
    width = form.groups * form.channels
    rows = _rows(b, x, form.tokens, width, patches, not form.tokens)
    rows = _grouped(b, rows, form.groups, width, form.taps)
    outputs = {"rows": after("held_rows", rows)}
    if form.rows:
        t = given("t", form.t_type)
        picks = b.input("picks", ir.DataType.INT64, 1) if form.pick else None
        width = form.groups * form.rows
        select = b.input("select", ir.DataType.INT64, 1) if form.width > width else None

        def looked_at(value: ir.Value) -> ir.Value:
            value = _rows(b, value, form.tokens, form.width, picks, False)
            return value if select is None else b("Gather", value, select, axis=2)

        t = looked_at(t)
        if form.skip:
            plus = looked_at(given("plus", form.t_type))
            minus = _rows(b, given("minus", form.t_type), form.tokens, width, picks, False)
            t = b("Add", t, b("Div", b("Sub", plus, minus), b.input("scale", ir.DataType.FLOAT, 1)))
            outputs["beside"] = after("held_minus", _grouped(b, minus, form.groups, width, 1))
        outputs["targets"] = after("held_targets", _grouped(b, t, form.groups, width, 1))
    return b.session(outputs, provider, threads)


@lru_cache(maxsize=256)
def _moments_session(
    groups: int, d: int, m: int, inner: bool, bend: bool, skip: bool, provider: Provider, threads: int
) -> Session:
    b = _Builder()

    def centred(rows: ir.Value) -> tuple[ir.Value, ir.Value]:
        mean = b("ReduceMean", rows, axes=[1], keepdims=1)
        return b("Squeeze", mean, b.ints(1)), b("Sub", rows, mean)

    rows = b.input("rows", ir.DataType.FLOAT, 3)
    mean, x = centred(rows)
    outputs = {"mean_x": mean}
    if inner:
        ends = [*range(0, d, _tile(groups, d)), d]
        tiles = [b("Slice", x, b.ints(i), b.ints(j), b.ints(2)) if len(ends) > 2 else x for i, j in pairwise(ends)]
        for k, (i, j) in enumerate(pairwise(ends)):
            for row, (u, v) in zip(tiles[: k + 1], pairwise(ends), strict=False):
                outputs[f"xx {u} {i}"] = _product(b, row, tiles[k], groups, v - u, j - i)
    if m:
        targets = b.input("targets", ir.DataType.FLOAT, 3)
        if bend:
            targets = _bent(b, groups, m, targets, b.input("minus", ir.DataType.FLOAT, 3) if skip else None, rows)
        outputs["mean_t"], t = centred(targets)
        outputs["tx"] = _product(b, t, x, groups, m, d)
        outputs["tt"] = b("ReduceSum", b("Mul", t, t), b.ints(1), keepdims=0)
    return b.session(outputs, provider, threads)


@dataclass(frozen=True)
class Picks:
    """Which rows of an operator's operands count, as indices that ONNX Runtime holds."""

    patches: Value | None
    """[rows taps]: positions of x; the position behind the last one reads as zero. None takes all (tokens)."""
    targets: Value | None
    """[rows]: positions of the target."""


@dataclass(frozen=True)
class Rows:
    """Observations of one operator, where ONNX Runtime has them."""

    inputs: Value
    """[g, N, d]"""
    targets: Value | None = None
    """[g, N, m]"""
    minus: Value | None = None
    """The residual branch behind the operator, [g, N, m], see `Form.skip`."""

    @property
    def count(self) -> int:
        """N."""
        return int(self.inputs.shape()[1])

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        return sum(int(v.tensor_size_in_bytes()) for v in (self.inputs, self.targets, self.minus) if v is not None)


def rows(
    form: Form,
    x: Value,
    picks: Picks,
    target: Mapping[str, Value] | None = None,
    who: NDArray[np.int64] | None = None,
    held: Rows | None = None,
    *,
    provider: Provider = "cpu",
    threads: int = 0,
) -> Rows:
    """The observations in one batch, behind those that are `held`.

    `target` holds `t`, and as `form` asks for them: `select` (channels of t); `plus`, `minus`, `scale` (residual
    branch).
    """
    session = _rows_session(replace(form, carry=held is not None), provider, threads)
    feeds = {"x": x}
    if who is not None:
        feeds["who"] = indices(who)
    if picks.patches is not None:
        feeds["patches"] = picks.patches
    names = ["rows"]
    if target is not None:
        feeds.update(target)
        names.extend(["targets", "beside"] if form.skip else ["targets"])
        if picks.targets is not None:
            feeds["picks"] = picks.targets
    if held is not None:
        feeds["held_rows"] = held.inputs
        if held.targets is not None:
            feeds["held_targets"] = held.targets
        if held.minus is not None:
            feeds["held_minus"] = held.minus
    got = run_values(session, feeds, names)
    return Rows(got["rows"], got.get("targets"), got.get("beside"))


def moments(
    found: Rows,
    *,
    inner: bool = True,
    bend: Mapping[str, Value] | None = None,
    provider: Provider = "cpu",
    threads: int = 0,
) -> Joint:
    """Joint moments of observations; without `inner` xx is zero.

    With `bend` the targets follow a clipping activation, see `_bent`: `scale` and `shift` [g m], `low` and `high`,
    `weight` [g, m, d], `offset` [g, 1, m].
    """
    g, count, d = (int(n) for n in found.inputs.shape())
    m = 0 if found.targets is None else int(found.targets.shape()[2])
    skip = bend is not None and found.minus is not None
    session = _moments_session(g, d, m, inner, bend is not None, skip, provider, threads)
    names = [output.name for output in session.get_outputs()]
    feeds = {"rows": found.inputs} | ({} if found.targets is None else {"targets": found.targets})
    if bend is not None:
        feeds |= bend if found.minus is None else {**bend, "minus": found.minus}
    got = {n: fetch(v).astype(np.float64) for n, v in run_values(session, feeds, names).items()}
    return Joint(
        count,
        got["mean_x"],
        got.get("mean_t", np.zeros((g, 0))),
        _assembled(got, g, d),
        got.get("tx", np.zeros((g, 0, d))),
        got.get("tt", np.zeros((g, 0))),
    )


def _tile(groups: int, d: int) -> int:
    """Columns of one tile of a Gram matrix: it is symmetric, and what lies below its diagonal need not be computed."""
    return -(-d // 4) if groups == 1 and d >= 1024 else d


def _assembled(tiles: Mapping[str, NDArray[np.float64]], groups: int, d: int) -> NDArray[np.float64]:
    """The Gram matrix whose upper tiles are called `xx ROW COLUMN`; zero if there is none."""
    out = np.zeros((groups, d, d))
    for name, tile in tiles.items():
        if name.startswith("xx"):
            i, j = (int(n) for n in name.split()[1:])
            out[:, i : i + tile.shape[1], j : j + tile.shape[2]] = tile
            if i != j:
                out[:, j : j + tile.shape[2], i : i + tile.shape[1]] = tile.transpose(0, 2, 1)
    return out


def indices(array: NDArray[np.int64]) -> Value:
    """Indices, handed to ONNX Runtime."""
    return place(np.ascontiguousarray(array.reshape(-1), dtype=np.int64))


@lru_cache(maxsize=256)
def _profile(
    rank: int, axis: int, inner: bool, width: int, dtype: ir.DataType, provider: Provider, threads: int
) -> Session:
    b = _Builder()
    x = _float(b, b.input("x", dtype), dtype)
    batch = b.input("batch", ir.DataType.INT64, 1)
    if inner:
        x, over = b("Reshape", x, b("Concat", batch, b.ints(width, -1), axis=0)), 2
    else:
        if axis != rank - 1:
            x = b("Transpose", x, perm=[*(k for k in range(rank) if k != axis), axis])
        x, over = b("Reshape", x, b("Concat", batch, b.ints(-1, width), axis=0)), 1
    mean = b("ReduceMean", x, axes=[over], keepdims=1)
    centred = b("Sub", x, mean)
    return b.session(
        {
            "mean": b("Squeeze", mean, b.ints(over)),
            "variance": b("ReduceMean", b("Mul", centred, centred), axes=[over], keepdims=0),
            "absolute": b("ReduceMean", b("Abs", x), axes=[over], keepdims=0),
        },
        provider,
        threads,
    )


def profile(
    rank: int, axis: int, dtype: ir.DataType, x: Value, batch: int, *, provider: Provider = "cpu", threads: int = 0
) -> tuple[NDArray[np.float64], int]:
    """Statistics of one axis, per sample: [batch, 3, width] (mean, variance, mean magnitude), and positions each.

    An activation that does not divide into `batch` samples counts as one.
    """
    shape = x.shape()
    width, total = int(shape[axis]), int(np.prod(shape))
    batch = batch if (total // width) % batch == 0 else 1
    inner = axis == 1 and rank > 2 and shape[0] == batch  # then nothing needs to be moved
    session = _profile(rank, axis, inner, width, dtype, provider, threads)
    got = run_values(session, {"x": x, "batch": place(np.array([batch]))}, ["mean", "variance", "absolute"])
    rows = np.stack([fetch(got[n]).astype(np.float64) for n in ("mean", "variance", "absolute")], axis=1)
    return rows, total // (batch * width)
