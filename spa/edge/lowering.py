"""Older opsets, operator by operator: what an older version describes in the same way stays, what moved is moved back.

onnx's own converter knows the way up; on the way down it stops at the first operator without an adapter, which on
graphs of today's exporters is nearly always (Pad, Reduce*, Split, Cast at opset 18 and 19, say). Here a node is taken
as it is where the older schema has its attributes, inputs and outputs, unless the operator's meaning changed in
between (`_CHANGED`); inputs that used to be attributes become attributes again; and operators that did not exist are
replaced by the function that onnx defines them by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import defs, inliner, numpy_helper

from spa.errors import UnsupportedModelError
from spa.inference import children

__all__ = ["lowered"]

_DEFAULT = ("", "ai.onnx")


@dataclass(frozen=True)
class _Place:
    """A node, and what is around it."""

    node: onnx.NodeProto
    constants: Mapping[str, onnx.TensorProto]
    ranks: Mapping[str, int]
    producers: Mapping[str, onnx.NodeProto]
    """Of the same graph."""
    before: list[onnx.NodeProto] = field(default_factory=list)
    """To be put before it."""
    after: list[onnx.NodeProto] = field(default_factory=list)

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """A constant before the node; returns its name."""
        name = f"{self.node.output[0]}_{name}"
        made = onnx.NodeProto(op_type="Constant", output=[name])
        made.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(numpy_helper.from_array(array))
        self.before.append(made)
        return name


def _input_to_attribute(position: int, name: str) -> Callable[[_Place], str | None]:
    """An input that was an attribute: it must be constant. Returns why it cannot be done, or None."""

    def move(place: _Place) -> str | None:
        node = place.node
        if len(node.input) <= position or not node.input[position]:
            return None
        tensor = place.constants.get(node.input[position])
        if tensor is None:
            return f"its input {position} ({name}) is computed, and was an attribute then"
        values = [int(v) for v in numpy_helper.to_array(tensor).ravel()]
        rest = list(node.input)[position + 1 :]
        del node.input[position:]
        if any(rest):
            return f"it has inputs behind {name}"
        _set_ints(node, name, values)
        return None

    return move


def _set_ints(node: onnx.NodeProto, name: str, values: list[int]) -> None:
    _drop(node, name)
    attribute = node.attribute.add(name=name, type=onnx.AttributeProto.INTS)
    attribute.ints.extend(values)


def _drop(node: onnx.NodeProto, name: str) -> None:
    kept = [a for a in node.attribute if a.name != name]
    if len(kept) < len(node.attribute):
        copies = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept]
        del node.attribute[:]
        node.attribute.extend(copies)


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((a for a in node.attribute if a.name == name), None)


def _reduce(place: _Place) -> str | None:
    """Axes as an input, and `noop_with_empty_axes`, came with opset 18 (ReduceSum: 13)."""
    node = place.node
    noop = _attribute(node, "noop_with_empty_axes")
    empty = len(node.input) < 2 or not node.input[1]
    if not empty:
        tensor = place.constants.get(node.input[1])
        empty = tensor is not None and 0 in tensor.dims
    if noop is not None and noop.i and empty:
        return "it reduces nothing where it has no axes"
    _drop(node, "noop_with_empty_axes")
    if empty:
        del node.input[1:]
        return None
    return _input_to_attribute(1, "axes")(place)


def _split(place: _Place) -> str | None:
    """`num_outputs` came with opset 18; before it, equal parts were the default."""
    _drop(place.node, "num_outputs")
    return None


def _softmax(place: _Place) -> str | None:
    """Before opset 13 the input was flattened to a matrix at `axis`, and the default was 1 instead of -1."""
    axis = _attribute(place.node, "axis")
    value, rank = -1 if axis is None else axis.i, place.ranks.get(place.node.input[0])
    if rank is None or value not in (-1, rank - 1):
        return "it runs over an axis that is not known to be the last one"
    _drop(place.node, "axis")
    attribute = place.node.attribute.add(name="axis", type=onnx.AttributeProto.INT)
    attribute.i = rank - 1
    return None


def _reshape(place: _Place) -> str | None:
    """`allowzero` came with opset 14: a 0 in the shape is a size, and no copy of the input's.

    A size that is computed is taken not to be 0: that is an empty tensor.
    """
    allow, shape = _attribute(place.node, "allowzero"), place.node.input[1]
    parts = [shape]
    if shape in place.producers and place.producers[shape].op_type == "Concat":
        parts = list(place.producers[shape].input)
    known = [numpy_helper.to_array(place.constants[name]) for name in parts if name in place.constants]
    if allow is not None and allow.i and any(0 in array for array in known):
        return "its shape holds a 0 that is a size"
    _drop(place.node, "allowzero")
    return None


def _shape(place: _Place) -> str | None:
    """`start` and `end` came with opset 15."""
    node = place.node
    start, end = _attribute(node, "start"), _attribute(node, "end")
    first, last = 0 if start is None else start.i, np.iinfo(np.int64).max if end is None else end.i
    _drop(node, "start")
    _drop(node, "end")
    if start is None and end is None:
        return None
    names = [place.constant(name, np.array([value])) for name, value in (("start", first), ("end", last))]
    whole, wanted = f"{node.output[0]}_whole", node.output[0]
    node.output[0] = whole
    place.after.append(onnx.NodeProto(op_type="Slice", name=f"{wanted}_part", input=[whole, *names], output=[wanted]))
    return None


def _resize(place: _Place) -> str | None:
    """Inputs that are not given had to be empty tensors before opset 13."""
    for k, name in enumerate(place.node.input):
        if not name and k in (1, 2):
            place.node.input[k] = place.constant(f"none_{k}", np.zeros(0, np.float32))
    return None


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
_MOVES: Mapping[tuple[str, int], Callable[[_Place], str | None]] = {
    **{(f"Reduce{name}", 18): _reduce for name in _REDUCTIONS},
    ("ReduceSum", 13): _reduce,
    ("Reshape", 14): _reshape,
    ("Resize", 13): _resize,
    ("Shape", 15): _shape,
    ("Squeeze", 13): _input_to_attribute(1, "axes"),
    ("Unsqueeze", 13): _input_to_attribute(1, "axes"),
    ("Split", 18): _split,
    ("Split", 13): _input_to_attribute(1, "split"),
    ("Softmax", 13): _softmax,
    ("LogSoftmax", 13): _softmax,
    ("Hardmax", 13): _softmax,
}
"""(operator, opset that changed it) -> what to do to go below that opset."""
_CHANGED = {("GroupNormalization", 21), ("GridSample", 20), ("Resize", 11), ("AveragePool", 19), ("RoiAlign", 16)}
"""(operator, opset) whose meaning, or a default, changed although the older schema looks the same."""


def lowered(proto: onnx.ModelProto, version: int, label: str) -> onnx.ModelProto:
    """The same model in an older opset of the default domain.

    Args:
        proto: no functions; it is not changed.
        version: at most the model's.
        label: how messages call the model.

    Raises:
        UnsupportedModelError: names the first operator and node that have no counterpart, and the opset that they need.
    """
    done = onnx.ModelProto()
    done.CopyFrom(proto)
    done = _expanded(done, version)
    current = next(o.version for o in done.opset_import if o.domain in _DEFAULT)
    ranks = _ranks(done)
    _lower(done.graph, current, version, {}, ranks, label)
    for entry in done.opset_import:
        if entry.domain in _DEFAULT:
            entry.version = version
    return done


def _expanded(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Operators younger than `version`, as the functions that define them."""
    current = next(o.version for o in proto.opset_import if o.domain in _DEFAULT)
    for _ in range(3):  # functions may be made of others
        young = {
            node.op_type
            for node in _nodes(proto.graph)
            if node.domain in _DEFAULT and _since(node.op_type, current) and not _since(node.op_type, version)
        }
        if not young:
            break
        proto = _inlined(proto, young)
    return proto


def _inlined(proto: onnx.ModelProto, operators: set[str]) -> onnx.ModelProto:
    known = {info.name for info in proto.graph.value_info}
    for tensor in proto.graph.initializer:  # the inliner looks for types here only
        if tensor.name not in known:
            info = proto.graph.value_info.add(name=tensor.name)
            info.type.tensor_type.elem_type = tensor.data_type
            info.type.tensor_type.shape.dim.extend(onnx.TensorShapeProto.Dimension(dim_value=n) for n in tensor.dims)
    return inliner.inline_selected_functions(proto, [("", name) for name in operators], inline_schema_functions=True)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for child in children(node):
            yield from _nodes(child)


def _since(operator: str, version: int) -> int | None:
    """The opset at most `version` that describes the operator; None before it existed."""
    try:
        return int(defs.get_schema(operator, version, "").since_version)
    except defs.SchemaError:
        return None


def _ranks(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto)
    infos = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {i.name: len(i.type.tensor_type.shape.dim) for i in infos if i.type.tensor_type.HasField("shape")}


def _lower(
    graph: onnx.GraphProto,
    current: int,
    version: int,
    outer: Mapping[str, onnx.TensorProto],
    ranks: Mapping[str, int],
    label: str,
) -> None:
    constants = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
    producers = {name: node for node in graph.node for name in node.output}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in _DEFAULT:
            _constant(node, constants)
        for child in children(node):
            _lower(child, current, version, constants, ranks, label)
        place = _Place(node, constants, ranks, producers)
        if node.domain in _DEFAULT:
            why = _down(place, current, version)
            if why is not None:
                raise UnsupportedModelError(
                    f"{label}: cannot be converted to opset {version}: operator {node.op_type} of node "
                    f"{(node.name or node.output[0])!r} cannot go there ({why}); choose a newer opset, or export anew"
                )
        nodes += [*place.before, node, *place.after]
    if len(nodes) > len(graph.node):
        copies = onnx.GraphProto(node=nodes)
        del graph.node[:]
        graph.node.extend(copies.node)


def _constant(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> None:
    """Remember the value; forms that came with opset 12 become a tensor."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        constants[node.output[0]] = attribute.t
        return
    plain = {"value_int": attribute.i, "value_ints": list(attribute.ints)}
    real = {"value_float": attribute.f, "value_floats": list(attribute.floats)}
    if attribute.name not in {**plain, **real}:
        return
    array = (
        np.array(plain[attribute.name], np.int64)
        if attribute.name in plain
        else np.array(real[attribute.name], np.float32)
    )
    tensor = numpy_helper.from_array(array)
    del node.attribute[:]
    node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t.CopyFrom(tensor)
    constants[node.output[0]] = tensor


def _down(place: _Place, current: int, version: int) -> str | None:
    """Take a node down, one change of its operator at a time; returns why that is impossible, or None."""
    node, at = place.node, _since(place.node.op_type, current)
    goal = _since(node.op_type, version)
    if at is None or at == goal:
        return None
    if goal is None:
        return f"it came with opset {_first(node.op_type, version)}, and nothing older says the same"
    while at > goal:
        below = _since(node.op_type, at - 1)
        assert below is not None  # `goal` is one
        if (node.op_type, at) in _CHANGED:
            return f"its meaning changed with opset {at}"
        move = _MOVES.get((node.op_type, at))
        why = move(place) if move is not None else None
        if why is None:
            why = _fits(node, defs.get_schema(node.op_type, at, ""), defs.get_schema(node.op_type, below, ""))
        if why is not None:
            return f"{why}, before opset {at}"
        at = below
    return None


def _first(operator: str, above: int) -> int:
    newest = defs.onnx_opset_version()
    return next((v for v in range(above + 1, newest + 1) if _since(operator, v)), newest)


def _fits(node: onnx.NodeProto, new: defs.OpSchema, old: defs.OpSchema) -> str | None:
    """Why the older schema does not describe this node, or None; attributes that say the default are dropped."""
    while node.input and not node.input[-1]:
        del node.input[-1]
    if not old.min_input <= len(node.input) <= old.max_input:
        return f"it had {old.max_input} inputs at most, and this node has {len(node.input)}"
    for k, name in enumerate(node.input):
        formal = old.inputs[min(k, len(old.inputs) - 1)]
        if not name and formal.option == defs.OpSchema.FormalParameterOption.Single:
            return f"it needed its input {k} ({formal.name})"
    if len(node.output) > old.max_output:
        return f"it had {old.max_output} outputs at most, and this node has {len(node.output)}"
    for attribute in list(node.attribute):
        if attribute.name in old.attributes:
            continue
        default = new.attributes[attribute.name].default_value if attribute.name in new.attributes else None
        if default is None or not _same(attribute, default):
            return f"it had no attribute {attribute.name!r}"
        _drop(node, attribute.name)
    for name, attribute in old.attributes.items():
        if attribute.required and _attribute(node, name) is None:
            return f"it needed the attribute {name!r}"
    return None


def _same(a: onnx.AttributeProto, b: onnx.AttributeProto) -> bool:
    """Whether two attributes have the same value; the second may be an empty default."""
    fields = ("i", "f", "s", "ints", "floats", "strings")
    return a.type == b.type and all(getattr(a, name) == getattr(b, name) for name in fields)
