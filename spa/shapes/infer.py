"""The walk over a model that finds the shape, the type and, where it is small, the value of everything in it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from spa.shapes import basic, linear, movement, spatial
from spa.shapes.control import CONTROL
from spa.shapes.op import FLOATS, INTS, Const, Op, Result, Shape, ShapeRule, fits
from spa.shapes.schema import output_shapes, output_types
from spa.shapes.values import VALUES
from spa.symbols import Size, Sym, fresh, symbol

_RULES: dict[tuple[str, str], ShapeRule] = {**basic.SHAPES, **movement.SHAPES, **spatial.SHAPES, **linear.SHAPES}
_NOTHING: list[Shape | None] = []


class Shapes:
    """What is known about the values of a model; a value is looked up by identity."""

    def __init__(self, facts: _Inference) -> None:
        self._facts = facts

    def shape(self, value: ir.Value) -> Shape | None:
        """Its dims as numbers and symbols, None if the rank is unknown."""
        return self._facts.shape(value)

    def const(self, value: ir.Value) -> NDArray[Any] | None:
        """The value itself if it is known and small.

        Integers and booleans come as an object array of `Size` (unknown items are None), floats as they are.
        """
        known = self._facts.known(value)
        if known is None:
            return None
        if known.dtype in FLOATS:
            return np.array(known.items, dtype=known.dtype.numpy()).reshape(known.dims) if known.static() else None
        return known.array()

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Its element type."""
        return self._facts.dtype(value)


def infer(model: ir.Model) -> Shapes:
    """Shapes and small values of all values of a model, subgraphs included.

    Unknown is always possible, and nothing in a model makes this fail.
    """
    facts = _Inference(dict(model.graph.opset_imports))
    facts.enter(model.graph)
    facts.walk(model.graph)
    return Shapes(facts)


class _Inference:
    """What is known so far."""

    def __init__(self, opsets: dict[str, int]) -> None:
        self._opsets = opsets
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._consts: dict[ir.Value, Const | None] = {}
        self._dtypes: dict[ir.Value, ir.DataType | None] = {}
        self._types: dict[tuple[str, str], list[int | ir.DataType | None]] = {}
        self._names: set[str] = set()
        self._count = 0

    # -- asking ------------------------------------------------------------------------------------------------------

    def shape(self, value: ir.Value) -> Shape | None:
        """Shape of a value; an initializer's is that of its tensor."""
        if value in self._shapes:
            return self._shapes[value]
        tensor = value.const_value
        dims = None if tensor is None else tuple(d for d in tensor.shape if isinstance(d, int))
        self._shapes[value] = dims
        return dims

    def known(self, value: ir.Value) -> Const | None:
        """The value itself; tensors are read only if they are small."""
        if value not in self._consts:
            tensor = value.const_value
            self._consts[value] = None if tensor is None else _read(tensor)
        return self._consts[value]

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """Element type of a value."""
        found = self._dtypes.get(value)
        if found is None:
            found = value.dtype
            if found is None and value.const_value is not None:
                found = value.const_value.dtype
            self._dtypes[value] = found
        return found

    def number(self) -> int:
        """Number of the next unknown size."""
        self._count += 1
        return self._count

    # -- setting -----------------------------------------------------------------------------------------------------

    def settle(self, value: ir.Value, shape: Shape | None, const: Const | None, dtype: ir.DataType | None) -> None:
        """Set what is known about a value."""
        self._shapes[value] = self._checked(shape)
        self._consts[value] = const
        self._dtypes[value] = dtype or value.dtype

    def _checked(self, shape: Shape | None) -> Shape | None:
        """A negative size is a broken model or our mistake: unknown."""
        if shape is None or all(not isinstance(d, int) or d >= 0 for d in shape):
            return shape
        return tuple(fresh(self.number()) if isinstance(d, int) and d < 0 else d for d in shape)

    def enter(self, graph: ir.Graph) -> None:
        """The inputs of the model; those with a default value count as initializers."""
        inputs = [value for value in graph.inputs if value.const_value is None]
        dims = [d for value in inputs for d in value.shape or ()]
        self._names = {d.value for d in dims if isinstance(d, ir.SymbolicDim) and d.value and d.value.isidentifier()}
        for value in inputs:
            self.settle(value, self._declared(value.shape, named=True), None, value.dtype)

    def _declared(self, shape: ir.Shape | None, named: bool) -> Shape | None:
        return None if shape is None else tuple(self._dim(d, named) for d in shape)

    def _dim(self, dim: int | ir.SymbolicDim, named: bool) -> Size:
        """A declared dim; a name counts if it is declared by an input, or an expression of such names."""
        if isinstance(dim, int):
            return dim
        name = dim.value
        if not name:
            return fresh(self.number())
        size = _expression(name, self._names)
        if size is not None:
            return size
        return symbol(name) if named else fresh(self.number())

    # -- walking -----------------------------------------------------------------------------------------------------

    def walk(self, graph: ir.Graph) -> None:
        """Infer all nodes of a graph, in order."""
        for node in graph:
            self._visit(node)

    def _visit(self, node: ir.Node) -> None:
        domain = "" if node.domain == "ai.onnx" else node.domain
        op = Op(node, self, self._opsets.get(domain, self._opsets.get("ai.onnx", 1) if not domain else 1))
        if (domain, node.op_type) in CONTROL:
            _attempt(CONTROL[domain, node.op_type], op)
            self._complete(node)
            return
        if not domain and node.op_type == "Constant":
            self._constant(node)
            return
        self._walk_unknown(node)
        op.dtypes = self._output_types(node, domain, op)
        rule = _RULES.get((domain, node.op_type))
        if rule is not None:
            op.outs = _listed(_attempt(rule, op), len(node.outputs))
        else:
            op.outs = self._by_schema(node, domain, op)
        consts: list[Const | None] = []
        if (value_rule := VALUES.get((domain, node.op_type))) is not None:
            found = _attempt(value_rule, op)
            consts = found if isinstance(found, list) else [found]
        for k, value in enumerate(node.outputs):
            const = consts[k] if k < len(consts) else None
            shape = op.outs[k]
            if const is not None:
                shape = const.dims
                const = None if const.unknown() and const.items else const
            self.settle(value, self._reconciled(shape, value.shape), const, op.dtypes[k])

    def _complete(self, node: ir.Node) -> None:
        for value in node.outputs:
            self._shapes[value] = self._reconciled(self._shapes.get(value), value.shape)
            self._consts.setdefault(value, None)

    def _walk_unknown(self, node: ir.Node) -> None:
        """Subgraphs of operators without a rule: nothing is known about their inputs."""
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                self.walk(attribute.as_graph())

    def _constant(self, node: ir.Node) -> None:
        value = node.outputs[0]
        tensor = _attempt(_constant_tensor, node)
        if tensor is None:
            self.settle(value, self._declared(value.shape, named=False), None, value.dtype)
            return
        dims = tuple(d for d in tensor.shape if isinstance(d, int))
        self.settle(value, dims, _read(tensor), tensor.dtype)

    def _reconciled(self, mine: Shape | None, stored: ir.Shape | None) -> Shape | None:
        """Inferred dims and those that the file or ONNX's inference noted: a number replaces an unknown size."""
        if stored is None or (mine is not None and len(mine) != len(stored)):
            return mine
        if mine is None:
            return self._declared(stored, named=False)
        if not any(isinstance(d, Sym) for d in mine):
            return mine
        return tuple(
            noted if isinstance(noted, int) and isinstance(d, Sym) and _vague(d) else d
            for d, noted in zip(mine, stored, strict=True)
        )

    def _output_types(self, node: ir.Node, domain: str, op: Op) -> list[ir.DataType | None]:
        key = domain, node.op_type
        if key not in self._types:
            self._types[key] = output_types(domain, node.op_type, op.version)
        sources = self._types[key]
        return [value.dtype or self._output_type(op, sources, k) for k, value in enumerate(node.outputs)]

    def _output_type(self, op: Op, sources: list[int | ir.DataType | None], slot: int) -> ir.DataType | None:
        attribute = {"Cast": "to", "EyeLike": "dtype", "RandomNormal": "dtype", "RandomUniform": "dtype"}
        if (name := attribute.get(op.node.op_type)) is not None and (code := op.attr(name)) is not None:
            return ir.DataType(code)
        if op.node.op_type == "ConstantOfShape":
            tensor = op.attr("value")
            return ir.DataType.FLOAT if tensor is None else tensor.dtype
        if op.node.op_type == "QuantizeLinear" and not op.has(2):
            return ir.DataType(op.attr("output_dtype", 0) or ir.DataType.UINT8)
        source = sources[slot] if slot < len(sources) else None
        return op.dtype(source) if type(source) is int else source  # type: ignore[return-value]  # `source` is a DataType or None here

    def _by_schema(self, node: ir.Node, domain: str, op: Op) -> list[Shape | None]:
        """Operators without a rule: ONNX's own inference, with symbols passed through by name."""
        found = [self._declared(value.shape, named=False) for value in node.outputs]
        if all(shape is not None and all(isinstance(d, int) for d in shape) for shape in found):
            return found
        inferred = _attempt(lambda: output_shapes(op, domain, self._known_tensors(op)))
        if inferred is None:
            return found
        return [own if own is not None else noted for own, noted in zip(inferred, found, strict=True)]

    def _known_tensors(self, op: Op) -> dict[str, NDArray[Any]]:
        """The inputs whose value is completely known, by name."""
        tensors = {}
        for value in op.inputs:
            const = None if value is None else self.known(value)
            if value is not None and value.name and const is not None and const.static() and const.dtype in INTS:
                tensors[value.name] = np.array(const.items, dtype=const.dtype.numpy()).reshape(const.dims)
        return tensors


# --- helpers ---------------------------------------------------------------------------------------------------------


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
    """The result, None for a graph that a rule did not expect: unknown is always an answer."""
    try:
        return function(*args)
    except Exception:  # rules index and unpack what a graph claims to have: they may raise anything
        return None


def _listed(result: Result, count: int) -> list[Shape | None]:
    """One shape per output."""
    shapes = result if isinstance(result, list) else [result]
    return shapes[:count] + [None] * (count - len(shapes))


def _vague(size: Sym) -> bool:
    """Whether something in it is known by a number only."""
    return any(name.startswith("?") for name in size.free)


def _read(tensor: ir.TensorProtocol) -> Const | None:
    """A small tensor's value; None if it is large, of another kind, or its file is missing."""
    dtype = tensor.dtype
    if not fits(tensor.size, dtype):
        return None
    array = _attempt(tensor.numpy)
    return None if array is None else Const.of(array, dtype)


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor of a Constant node, however it is written."""
    for name, dtype in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32),
                        ("value_floats", np.float32)):  # fmt: skip
        if (attribute := node.attributes.get(name)) is not None:
            return ir.tensor(np.array(attribute.value, dtype=dtype))
    attribute = node.attributes.get("value")
    if attribute is None or attribute.type != ir.AttributeType.TENSOR:
        return None
    return attribute.value  # type: ignore[no-any-return]  # `as_tensor` checks a protocol, slowly: 0.3 ms each


def _expression(text: str, names: Iterable[str]) -> Size | None:
    """A dim such as `past + 1` where every name in it is an input's dim, else None: exporters write sizes like this."""
    if text in names or text.isidentifier():
        return None if text not in names else symbol(text)
    if not any(sign in text for sign in "+-*/%"):
        return None
    try:
        return _evaluated(ast.parse(text, mode="eval").body, set(names))
    except (SyntaxError, ValueError, ArithmeticError, RecursionError):
        return None


def _evaluated(tree: ast.expr, names: set[str]) -> Size:
    match tree:
        case ast.Name(id=name) if name in names:
            return symbol(name)
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=sign, right=right):
            a, b = _evaluated(left, names), _evaluated(right, names)
            match sign:
                case ast.Add():
                    return a + b
                case ast.Sub():
                    return a - b
                case ast.Mult():
                    return a * b
                case ast.FloorDiv():
                    return a // b
                case ast.Mod():
                    return a % b
    raise ValueError(ast.dump(tree))
