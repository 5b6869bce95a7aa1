"""Operators to test: a line of text becomes a model with data, and something that runs it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from spa.errors import RuntimeFailure
from spa.runtime import open_session, run

Array = NDArray[Any]

IR_VERSION = 10
OPSET = 21
TYPES: dict[str, Any] = {
    "f": np.float32, "p": np.float32, "h": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64,
    "u8": np.uint8, "i8": np.int8, "u16": np.uint16, "i16": np.int16, "u32": np.uint32, "i32": np.int32,
    "i64": np.int64, "u64": np.uint64, "bool": np.bool_,
}  # fmt: skip
_TOKEN = re.compile(r"(!)?(?:(\w+?)(?:<(\d+))?:)?(\[.*\]|\{.*\}|\d+(?:x\d+)*|\(\))")


@dataclass(frozen=True)
class Tolerance:
    """How far two runs may differ, relative to the largest magnitude in an output, and why."""

    relative: float
    reason: str


FLOAT32 = Tolerance(2e-5, "sums of a few dozen float32 products in another order")
FLOAT16 = Tolerance(4e-3, "float16 keeps 11 bits, bfloat16 accumulates in float32")
SEVEN_BITS = 63
"""Of an int8: two products of larger ones with a uint8 are cut off at 16 bits by processors with AVX2 and no VNNI."""
QUANTISED = Tolerance(0.02, "a value on the border between two quantisation steps may fall on either side")


@dataclass(frozen=True, eq=False)
class Case:
    """One operator with operands, and what must be prunable."""

    op: str
    """Operator, or `domain::Operator`."""
    operands: str
    """Blank-separated: `2x3x4` random floats, `p:3` between 1.1 and 2, `f<1:3` between -0.9 and 0.9, `h:3` with a few
    that are much larger, `i64<5:2` integers below 5, `u8:2x3`, `bool:4`; `[1,2]` and `{3}` constants of rank 1 and 0;
    `()` a scalar; `-` absent; a leading `!` makes an initializer."""
    free: str
    """Dimensions with free positions, per input, then `>`, then per output: `01 0 > 1`; `-` for none."""
    opset: int = OPSET
    outs: str = "1"
    """Which outputs are present: `1`, `101`."""
    tolerance: Tolerance = FLOAT32
    zeros: Mapping[int, int | str] = field(default_factory=dict)
    """Inputs whose zero is another number, the zero point, or stands in an input (`i3`), along the last axis."""
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

    @cached_property
    def engine(self) -> str:
        return engine_for(self.subject)


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
    zeros: Mapping[str, int | str] = field(default_factory=dict)
    carriers: tuple[int, ...] = ()

    @cached_property
    def model(self) -> ir.Model:
        """The model that is analysed; nothing changes it."""
        return ir.from_proto(self.with_arrays(self.arrays))

    def with_arrays(self, arrays: Mapping[str, Array]) -> onnx.ModelProto:
        """The model for arrays of any shape."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        for name, array in arrays.items():
            if name in self.fixed:
                model.graph.initializer.append(_tensor(array, name))
            else:
                model.graph.input.append(helper.make_tensor_value_info(name, _code(array.dtype), list(array.shape)))
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
    elif kind == "h":
        array = rng.standard_normal(shape) ** 5
    elif dtype.kind == "b":
        array = rng.random(shape) < 0.5
    elif dtype.kind in "iu":
        low, high = (0, int(below or 9))
        if dtype == np.uint8 and not below:
            high = 255
        elif dtype == np.int8 and not below:
            low, high = -SEVEN_BITS, SEVEN_BITS + 1
        array = rng.integers(low, high, shape)
    else:
        array = rng.uniform(-0.9, 0.9, shape) if below == "1" else rng.standard_normal(shape)
    return np.asarray(array).astype(dtype), bool(constant)


# -- running ---------------------------------------------------------------------------------------------------------

ENGINES = ("ort", "reference")


class BiasAdd(OpRun):
    """Only CUDA has a kernel."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, bias: Array, skip: Array) -> tuple[Array]:
        return (x + bias + skip,)


class FusedGemm(OpRun):
    """Only accelerators have a kernel."""

    op_domain = "com.microsoft"

    def _run(self, a: Array, b: Array, c: Array | float = 0.0, transB: int = 0, **_: Any) -> tuple[Array]:  # noqa: N803  # the attribute's name
        return (np.maximum(a @ (b.T if transB else b) + c, 0),)


class GemmFastGelu(OpRun):
    """Only accelerators have a kernel."""

    op_domain = "com.microsoft"

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
