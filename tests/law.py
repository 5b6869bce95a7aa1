"""The law that every rule must obey: op(restrict x) == restrict(op(x')).

A case is one operator with operands. The rules say which positions of which axes may leave together; random sets of
them do. The pruned model runs on restricted inputs. The original runs on x': the removed positions are zero where the
rule says that they are summed, gone where it says that a statistic runs over them, and alive everywhere else. After
restriction both must agree. The reference is made here with numpy, from nothing but the case; `spa.verify.masked`, the
reference that users rely on, is held against the same result.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from spa import exactness
from spa.errors import RuntimeFailure
from spa.groups import Analysis, analyze_model
from spa.removal import changed_leaves
from spa.rewrite import rewrite
from spa.rules import Flow, Op
from spa.runtime import open_session, run
from spa.verify import masked

Array = NDArray[Any]
Mask = NDArray[np.bool_]

IR_VERSION = 10
OPSET = 21
TYPES: dict[str, Any] = {
    "f": np.float32, "p": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64,
    "u8": np.uint8, "i8": np.int8, "u16": np.uint16, "i16": np.int16, "u32": np.uint32, "i32": np.int32, "i64": np.int64, "u64": np.uint64, "bool": np.bool_,
}  # fmt: skip
_TOKEN = re.compile(r"(!)?(?:(\w+?)(?:<(\d+))?:)?(\[.*\]|\{.*\}|\d+(?:x\d+)*|\(\))")


class LawBroken(AssertionError):
    """A rule says something that the operator does not do."""


@dataclass(frozen=True)
class Tolerance:
    """How far two runs may differ, relative to the largest magnitude in an output, and why."""

    relative: float
    reason: str


FLOAT32 = Tolerance(2e-5, "sums of a few dozen float32 products in another order")
FLOAT16 = Tolerance(4e-3, "float16 keeps 11 bits, bfloat16 accumulates in float32")
QUANTISED = Tolerance(0.02, "a value on the border between two quantisation steps may fall on either side")


@dataclass(frozen=True)
class Case:
    """One operator with operands, and what must be prunable."""

    op: str
    """Operator, or `domain::Operator`."""
    operands: str
    """Blank-separated: `2x3x4` random floats, `p:3` between 1.1 and 2, `f<1:3` between -0.9 and 0.9, `i64<5:2` integers below 5, `u8:2x3`, `bool:4`;
    `[1,2]` and `{3}` constants of rank 1 and 0; `()` a scalar; `-` absent; a leading `!` makes an initializer."""
    free: str
    """Dimensions with free positions, per input, then `>`, then per output: `01 0 > 1`; `-` for none."""
    opset: int = OPSET
    outs: str = "1"
    """Which outputs are present: `1`, `101`."""
    tolerance: Tolerance = FLOAT32
    zeros: Mapping[int, int] = field(default_factory=dict)
    """Inputs whose zero is another number: the zero point."""
    carriers: tuple[int, ...] = ()
    """Inputs where a zero silences the product; all that carry the summed axis if empty."""
    model: str = ""
    """The model as ONNX text, for operators with subgraphs; `operands` then lists the graph's inputs."""
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        attributes = "".join(f" {k}={v}" for k, v in self.attributes.items() if not isinstance(v, onnx.GraphProto))
        outs = f" -> {self.outs}" if self.outs != "1" else ""
        return f"{self.op} {self.operands}{attributes}{outs}" + (f" @{self.opset}" if self.opset != OPSET else "")

    @property
    def domain(self) -> str:
        return self.op.rpartition("::")[0]

    @property
    def operator(self) -> str:
        return self.op.rpartition("::")[2]

    @cached_property
    def subject(self) -> Subject:
        return _built(self)


def case(op: str, operands: str, free: str, **options: Any) -> Case:
    """A case in one line; what is no field of `Case` is an attribute of the node, as is what stands in `more`."""
    names = ("opset", "outs", "tolerance", "zeros", "carriers", "model")
    fields = {k: options.pop(k) for k in names if k in options}
    return Case(op, operands, free, **fields, attributes=options | options.pop("more", {}))


def each(ops: str, operands: str, free: str, *, domain: str = "", **options: Any) -> list[Case]:
    """The same case for several operators."""
    return [case(domain + op, operands, free, **options) for op in ops.split()]


@dataclass(frozen=True)
class Subject:
    """A model to test: a proto without initializers, and all arrays that go into it."""

    proto: onnx.ModelProto
    arrays: dict[str, Array]
    """Graph inputs and initializers by name."""
    fixed: frozenset[str]
    """Those that are initializers."""
    single: bool
    """One node that reads `arrays` directly."""
    tolerance: Tolerance
    zeros: Mapping[str, int] = field(default_factory=dict)
    carriers: tuple[int, ...] = ()

    def with_arrays(self, arrays: Mapping[str, Array]) -> onnx.ModelProto:
        """The model for arrays of any shape."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        for name, array in arrays.items():
            if name in self.fixed:
                model.graph.initializer.append(_tensor(array, name))
            else:
                model.graph.input.append(
                    helper.make_tensor_value_info(name, _code(array.dtype), list(array.shape))
                )
        return model

    def feeds(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: array for name, array in arrays.items() if name not in self.fixed}


def _code(dtype: Any) -> int:
    return int(ir.DataType.from_numpy(np.dtype(dtype)))


def _tensor(array: Array, name: str) -> onnx.TensorProto:
    return helper.make_tensor(name, _code(array.dtype), array.shape, np.ascontiguousarray(array).tobytes(), raw=True)


# -- building --------------------------------------------------------------------------------------------------------


def _built(spec: Case) -> Subject:
    rng = np.random.default_rng(0)
    names, arrays, fixed = [], {}, set()
    for k, token in enumerate(spec.operands.split()):
        if token == "-":
            names.append("")
            continue
        names.append(f"i{k}")
        arrays[f"i{k}"], constant = _operand(token, rng)
        if constant:
            fixed.add(f"i{k}")
    zeros = {f"i{k}": zero for k, zero in spec.zeros.items()}
    if spec.model:
        proto = onnx.parser.parse_model(_header(spec) + spec.model)
        del proto.graph.input[:]
        return Subject(proto, arrays, frozenset(fixed), False, spec.tolerance, zeros)
    while names and not names[-1]:
        names.pop()
    outputs = [f"o{k}" if present == "1" else "" for k, present in enumerate(spec.outs)]
    attributes = {k: v for k, v in spec.attributes.items() if v is not None}
    node = helper.make_node(spec.operator, names, outputs, name="n", domain=spec.domain, **attributes)
    values = [onnx.ValueInfoProto(name=name) for name in outputs if name]
    graph = helper.make_graph([node], "g", [], values)
    opsets = [helper.make_opsetid("", spec.opset), *([helper.make_opsetid(spec.domain, 1)] if spec.domain else [])]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return Subject(proto, arrays, frozenset(fixed), True, spec.tolerance, zeros, spec.carriers)


def _header(spec: Case) -> str:
    return f'<ir_version: {IR_VERSION}, opset_import: ["" : {spec.opset}, "com.microsoft" : 1]>\n'


def _operand(token: str, rng: np.random.Generator) -> tuple[Array, bool]:
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise ValueError(f"cannot read operand {token!r}")
    constant, kind, below, body = match.groups()
    if body[0] in "[{":
        value = ast.literal_eval(body if body[0] == "[" else body[1:-1])
        array = np.array(value, dtype=TYPES[kind] if kind else None)
        return array.astype(np.float32) if array.dtype == np.float64 and not kind else array, True
    shape = () if body == "()" else tuple(int(n) for n in body.split("x"))
    dtype = np.dtype(TYPES[kind or "f"])
    if kind == "p":
        array = rng.uniform(1.1, 2.0, shape)
    elif dtype.kind == "b":
        array = rng.random(shape) < 0.5
    elif dtype.kind in "iu":
        low, high = (0, int(below)) if below else (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.itemsize == 1 else (0, 9)
        array = rng.integers(low, high, shape)
    else:
        array = rng.uniform(-0.9, 0.9, shape) if below == "1" else rng.standard_normal(shape)
    return np.asarray(array).astype(dtype), bool(constant)


# -- running ---------------------------------------------------------------------------------------------------------

ENGINES = ("ort", "reference")


class BiasAdd(OpRun):  # type: ignore[misc]  # onnx ships it untyped
    """Only CUDA has a kernel."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array, skip: Array) -> tuple[Array]:
        return (x + bias + skip,)


class FusedGemm(OpRun):  # type: ignore[misc]
    """Only accelerators have a kernel."""

    op_domain = "com.microsoft"

    def _run(self, a: Array, b: Array, c: Array | float = 0.0, transB: int = 0, **_: Any) -> tuple[Array]:  # noqa: N803
        return (np.maximum(a @ (b.T if transB else b) + c, 0),)


class GemmFastGelu(FusedGemm):
    """Only accelerators have a kernel."""

    def _run(self, a: Array, b: Array, c: Array | float = 0.0, **_: Any) -> tuple[Array]:
        x = a @ b + c
        return ((x * 0.5 * (1 + np.tanh(x * (0.7978845608 + 0.0356774081 * x * x)))).astype(np.float32),)


KERNELS = [BiasAdd, FusedGemm, GemmFastGelu]


def execute(engine: str, model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs of a model, by ONNX Runtime or by ONNX's own interpreter (for kernels that the former lacks)."""
    if engine == "ort":
        session = open_session(model.SerializeToString(), provider="cpu", threads=1, optimize=False)
        return run(session, feeds)
    try:
        evaluator = ReferenceEvaluator(model, new_ops=KERNELS)
        return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))
    except Exception as error:  # it raises whatever numpy raises
        raise RuntimeFailure(f"the reference evaluator cannot run the model: {error}") from error


def engine_for(subject: Subject) -> str:
    """The first engine that runs a subject.

    Raises:
        RuntimeFailure: none does.
    """
    failures = []
    for engine in ENGINES:
        try:
            execute(engine, subject.with_arrays(subject.arrays), subject.feeds(subject.arrays))
            return engine
        except RuntimeFailure as error:
            failures.append(str(error))
    raise RuntimeFailure(" / ".join(failures))


def difference(a: Array, b: Array) -> float:
    """Largest difference relative to the largest finite magnitude of `a`; NaNs and infinities must coincide."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.dtype.kind in "OUS":
        return 0.0 if np.array_equal(a, b) else float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        gap = np.nan_to_num(np.where(same, 0.0, np.abs(x - y)), nan=np.inf)
    finite = np.abs(x[np.isfinite(x)])
    scale = float(finite.max()) if finite.size else 0.0
    worst = float(gap.max()) if gap.size else 0.0
    return worst / scale if scale else worst


# -- the law ---------------------------------------------------------------------------------------------------------


class Law:
    """One subject under the rules as they are now."""

    def __init__(self, subject: Subject, engine: str = "") -> None:
        self.subject = subject
        self.engine = engine or engine_for(subject)
        self.model = ir.from_proto(subject.with_arrays(subject.arrays))
        self.analysis: Analysis = analyze_model(self.model, border=False)
        self.coupling = self.analysis.coupling
        self.solution = self.coupling.solution
        self.values = {v.name: v for v in (*self.model.graph.inputs, *self.model.graph.initializers.values())}

    @property
    def op(self) -> Op:
        return self.coupling.ops[0]

    # -- what is free ------------------------------------------------------------------------------------------------

    def free(self) -> str:
        """Dimensions with free positions, in the notation of `Case.free`."""
        if self.subject.single:
            inputs = [() if o is None else o.dims for o in self.op.inputs]
            outputs = [() if o is None else o.dims for o in self.op.outputs]
        else:
            inputs = [self.coupling.dims(self.values[n]) or () for n in self.subject.arrays]
            outputs = [self.coupling.dims(v) or () for v in self.model.graph.outputs]
        sides = (" ".join(self._free(dims) for dims in side) for side in (inputs, outputs))
        return " > ".join(sides)

    def _free(self, dims: Sequence[int]) -> str:
        return "".join(str(d) for d, dim in enumerate(dims) if self._open(dim)) or "-"

    def _open(self, dim: int) -> bool:
        sizes = self.solution.leaf_size
        if any(not isinstance(sizes[leaf], int) for leaf in self.solution.leaves(dim)):
            return False
        fixed = self.solution.frozen | np.repeat(np.diff(self.solution.base) < 2, np.diff(self.solution.base))
        return not bool(self.solution.keep(dim, fixed).all())

    def buckets(self) -> list[list[NDArray[np.int64]]]:
        """Free atoms, those that touch the same leaves together."""
        base, label = self.solution.base, self.solution.label
        leaf = np.repeat(np.arange(len(base) - 1), np.diff(base))
        free = np.flatnonzero(~self.solution.frozen & (np.diff(base)[leaf] > 1))
        found: dict[tuple[int, ...], list[NDArray[np.int64]]] = {}
        for atom in np.unique(label[free]):
            positions = free[label[free] == atom]
            found.setdefault(tuple(leaf[positions].tolist()), []).append(positions)
        return list(found.values())

    def removals(self, seeds: int) -> Iterator[Mask]:
        """Each bucket alone: one unit, about half, all but one; then random mixtures."""
        rng = np.random.default_rng(0)
        buckets = self.buckets()
        chosen: list[list[NDArray[np.int64]]] = []
        for atoms in buckets:
            order = [atoms[k] for k in rng.permutation(len(atoms))]
            sizes = sorted({1, len(atoms) // 2, len(atoms) - 1} - {0}) or [1]
            chosen.extend(order[:size] for size in sizes)
        if len(buckets) > 1:
            for _ in range(seeds):
                shares = rng.random(len(buckets))
                chosen.append([a for atoms, share in zip(buckets, shares, strict=True) for a in atoms if rng.random() < share])
        for atoms in chosen:
            kept = self._without(atoms)
            if not kept.all():
                yield kept

    def _without(self, atoms: Sequence[NDArray[np.int64]]) -> Mask:
        """Remove atoms one after the other, as long as every leaf keeps a position."""
        kept = np.ones(self.solution.positions, dtype=bool)
        base = self.solution.base
        for positions in atoms:
            trial = kept.copy()
            trial[positions] = False
            alive = np.concatenate([[0], np.cumsum(trial)])[base]
            if ((alive[1:] > alive[:-1]) | (np.diff(base) == 0)).all():
                kept = trial
        return kept

    # -- both sides --------------------------------------------------------------------------------------------------

    def check(self, seeds: int = 3) -> int:
        """Try removals; returns how many.

        Raises:
            LawBroken: pruned and reference differ, or the pruned model does not run.
        """
        count = 0
        for kept in self.removals(seeds):
            count += 1
            try:
                small = self.small(kept)
            except RuntimeFailure as error:
                raise LawBroken(f"{self._told(kept)}: the pruned model does not run: {error}") from error
            if self.subject.single:
                for which in range(self.carriers()):
                    self._compare(small, self.reference(kept, which), kept, "its operands restricted and zeroed")
                self.check_zeros(kept)
            if self.engine == "ort":
                self._compare(small, self.masked(kept), kept, "the masked reference")
        return count

    def _compare(self, small: Mapping[str, Array], wide: Mapping[str, Array], kept: Mask, what: str) -> None:
        for name, expected in wide.items():
            gap = difference(expected, small[name])
            if gap > self.subject.tolerance.relative:
                shapes = f"{expected.shape} and {small[name].shape}" if expected.shape != small[name].shape else f"{gap:.3g}"
                raise LawBroken(f"{self._told(kept)}: {name} differs from {what} ({shapes})")

    def _told(self, kept: Mask) -> str:
        gone = []
        for name, value in self.values.items():
            for d, dim in enumerate(self.coupling.dims(value) or ()):
                if self.solution.touched(dim, changed_leaves(self.solution, kept)):
                    gone.append(f"{name}.{d} without {np.flatnonzero(~self.solution.keep(dim, kept)).tolist()}")
        return "; ".join(gone) or "removal inside"

    def small(self, kept: Mask) -> dict[str, Array]:
        """Outputs of the pruned model on restricted inputs."""
        model = rewrite(self.analysis, kept)
        arrays = {name: self._cut(name, array, kept) for name, array in self.subject.arrays.items()}
        feeds = self.subject.feeds(arrays)
        for value in model.graph.inputs:
            if value.name in feeds:
                value.shape = ir.Shape(feeds[value.name].shape)
        return execute(self.engine, ir.to_proto(model), feeds)

    def _cut(self, name: str, array: Array, kept: Mask) -> Array:
        for d, dim in enumerate(self.coupling.dims(self.values[name]) or ()):
            if self.solution.touched(dim, changed_leaves(self.solution, kept)):
                array = np.compress(self.solution.keep(dim, kept), array, axis=d)
        return array

    def masked(self, kept: Mask) -> dict[str, Array]:
        """Outputs of `spa.verify.masked`, restricted.

        A node that runs on survivors only lays its outputs out again for other nodes, not for the graph's outputs.
        """
        wide = execute("ort", ir.to_proto(masked(self.analysis, kept)), self.subject.feeds(self.subject.arrays))
        everything = changed_leaves(self.solution, kept)
        out = {}
        for value in self.model.graph.outputs:
            array = wide[value.name or ""]
            dims = self.coupling.dims(value) or ()
            laid_out = all(size == self.solution.size(d, self.solution.leaf_size) for size, d in zip(array.shape, dims, strict=True))
            out[value.name or ""] = self._restricted(array, value, kept, set() if laid_out else self._gone(everything))
        return out

    def carriers(self) -> int:
        """How many operands a sum could be zeroed in: each one alone must do."""
        return max([len(self._slots(f)) for f in self.coupling.relations.flows if f.leaving == "sum"] or [1])

    def _slots(self, flow: Flow) -> list[int]:
        slots = {slot for slot, _ in flow.inputs}
        return sorted(slots & set(self.subject.carriers) or slots)

    def reference(self, kept: Mask, which: int) -> dict[str, Array]:
        """Outputs of the original operator on x', restricted."""
        changed = changed_leaves(self.solution, kept)
        gone = self._gone(changed)
        arrays = {name: array.copy() for name, array in self.subject.arrays.items()}
        names = [v.name if v is not None else None for v in self.op.node.inputs]
        for flow in self.coupling.relations.flows:
            leaves = (set(self.solution.leaves(flow.axis)) & changed) - gone
            slots = self._slots(flow)
            if flow.leaving != "sum" or not leaves or not slots:
                continue
            for slot, d in flow.inputs:
                if slot == slots[which % len(slots)]:
                    name, operand = names[slot] or "", self.op.inputs[slot]
                    assert operand is not None
                    mask = self.solution.keep(operand.dims[d], self._only(kept, leaves))
                    np.moveaxis(arrays[name], d, 0)[~mask] = self.subject.zeros.get(name, 0)
        for slot, operand in enumerate(self.op.inputs):
            for d, dim in enumerate(operand.dims if operand is not None else ()):
                if self.solution.touched(dim, gone):
                    keep = self.solution.keep(dim, self._only(kept, gone))
                    arrays[names[slot] or ""] = np.compress(keep, arrays[names[slot] or ""], axis=d)
        wide = execute(self.engine, self.subject.with_arrays(arrays), self.subject.feeds(arrays))
        return {v.name or "": self._restricted(wide[v.name or ""], v, kept, gone) for v in self.model.graph.outputs}

    def _gone(self, changed: set[int]) -> set[int]:
        """Leaves over which a statistic or a mean runs."""
        flows = [f for f in self.coupling.relations.flows if f.leaving in ("stat", "mean")]
        return {leaf for flow in flows for leaf in self.solution.leaves(flow.axis)} & changed

    def _restricted(self, array: Array, value: ir.Value, kept: Mask, gone: set[int]) -> Array:
        """`array` at the surviving positions; it has already lost those in the leaves `gone`."""
        for d, dim in enumerate(self.coupling.dims(value) or ()):
            if self.solution.touched(dim, changed_leaves(self.solution, kept)):
                there = self.solution.keep(dim, self._only(kept, gone))
                if array.shape[d] != there.sum():
                    raise LawBroken(f"{value.name}.{d} has {array.shape[d]} positions, the rule says {there.sum()}")
                array = np.compress(self.solution.keep(dim, kept)[there], array, axis=d)
        return array

    def _only(self, kept: Mask, leaves: set[int]) -> Mask:
        out = np.ones_like(kept)
        for leaf in leaves:
            span = slice(self.solution.base[leaf], self.solution.base[leaf + 1])
            out[span] = kept[span]
        return out

    # -- zero in, zero out -------------------------------------------------------------------------------------------

    def check_zeros(self, kept: Mask) -> None:
        """Where `spa.exactness` follows a zero through the operator, the original really gives zero."""
        rule = self.coupling.rules.get(0)
        if rule is None or (zero := rule.zero_of(self.op)).never:
            return
        changed = changed_leaves(self.solution, kept)
        present = [k for k, operand in enumerate(self.op.inputs) if operand is not None]
        summands = present if zero.all_of == "all" else [k for k in zero.all_of if k in present]
        if any(a.dtype.kind not in "iub" and not np.isfinite(a).all() for a in self.subject.arrays.values()):
            return  # zero times infinity is nobody's promise
        for factor in [k for k in zero.any_of if k in present] or [None]:
            slots = {*summands, *([] if factor is None else [factor])}
            if slots & set(rule.divisors):
                continue
            arrays = {name: array.copy() for name, array in self.subject.arrays.items()}
            claimed: dict[ir.Value, set[int]] = {}
            for slot in slots:
                operand, value = self.op.inputs[slot], self.op.node.inputs[slot]
                assert operand is not None and value is not None
                claimed[value] = set()
                for d, dim in enumerate(operand.dims):
                    leaves = set(self.solution.leaves(dim)) & changed
                    if leaves:
                        claimed[value] |= leaves
                        mask = self.solution.keep(dim, self._only(kept, leaves))
                        np.moveaxis(arrays[value.name or ""], d, 0)[~mask] = 0
            self._zero_out(zero, arrays, claimed, kept)

    def _zero_out(self, zero: Any, arrays: dict[str, Array], claimed: dict[ir.Value, set[int]], kept: Mask) -> None:
        known = dict(claimed)
        weights, self.coupling.weights = self.coupling.weights, {}
        try:
            exactness._forward(self.coupling, self.op, zero, known, set())
        finally:
            self.coupling.weights = weights
        wide = execute(self.engine, self.subject.with_arrays(arrays), self.subject.feeds(arrays))
        for value in self.model.graph.outputs:
            if value in claimed:
                continue
            for d, dim in enumerate(self.coupling.dims(value) or ()):
                leaves = set(self.solution.leaves(dim)) & known.get(value, set()) & changed_leaves(self.solution, kept)
                if leaves:
                    mask = self.solution.keep(dim, self._only(kept, leaves))
                    if np.any(np.compress(~mask, wide[value.name or ""], axis=d)):
                        raise LawBroken(f"{value.name}.{d} is not zero where its operands are: {self._told(kept)}")


def constant(array: Array, name: str) -> onnx.TensorProto:
    """An initializer of any type."""
    return numpy_helper.from_array(array, name) if array.dtype.kind in "OUS" else _tensor(array, name)
