"""Types and shapes of all values, inferred anew: what a file claims is not used, but for operators nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import onnx
import onnx.defs
import onnx.shape_inference

from spa.errors import ModelError

__all__ = ["children", "infer"]

_GRAPH_ATTRIBUTES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


def children(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The node's subgraphs."""
    for attribute in node.attribute:
        if attribute.type in _GRAPH_ATTRIBUTES:
            yield from (attribute.g,) if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs


def _unknown(node: onnx.NodeProto) -> bool:
    """An operator of the user's own: what the file says about its outputs is all there is."""
    return node.domain != "com.microsoft" and not onnx.defs.has(node.op_type, node.domain)


def _strip(graph: onnx.GraphProto) -> None:
    """Drop `value_info`, which may be wrong, except for its documentation and for outputs of unknown operators."""
    mysterious = {name for node in graph.node if _unknown(node) for name in node.output}
    notes = [i for i in graph.value_info if i.doc_string or i.metadata_props or i.name in mysterious]
    del graph.value_info[:]
    for note in notes:
        if note.name not in mysterious:
            note.ClearField("type")
        graph.value_info.append(note)
    for node in graph.node:
        for child in children(node):
            _strip(child)


def infer(proto: onnx.ModelProto, label: str | None, *, names: bool = False) -> None:
    """Fill `value_info` by ONNX's own inference, and correct the outputs' shapes.

    With `names` axes whose size inference does not know keep the names that they have.

    With a `label` a contradiction that any runtime rejects is a `ModelError`. When inference fails
    for another reason the values simply stay unknown.
    """
    named = dict(_named(proto.graph)) if names else {}
    _strip(proto.graph)
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    _undeclare(bare.graph)
    try:
        typed = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except Exception:  # some of onnx's errors are plain Exceptions
        if label is not None and (contradiction := _contradiction(bare)):
            raise ModelError(f"{label}: {contradiction}; export the model again.") from None
        try:
            typed = onnx.shape_inference.infer_shapes(bare, data_prop=True)
        except Exception:  # as above; then types stay unknown
            return
    _take_types(proto.graph, typed.graph, label, named)


Names = Mapping[str, Sequence[str]]
"""Of the axes of a value; empty where there is none."""


def _named(graph: onnx.GraphProto) -> Iterator[tuple[str, Sequence[str]]]:
    for info in graph.value_info:
        yield info.name, [dim.dim_param for dim in info.type.tensor_type.shape.dim]
    for node in graph.node:
        for child in children(node):
            yield from _named(child)


def _undeclare(graph: onnx.GraphProto) -> None:
    trusted = [info for info in graph.value_info if info.HasField("type")]
    del graph.value_info[:]
    graph.value_info.extend(trusted)
    inputs = {info.name: info.type for info in graph.input}
    for info in graph.output:
        if info.name in inputs:  # handed through: no node says what it is
            info.type.CopyFrom(inputs[info.name])
        else:
            info.ClearField("type")
    for node in graph.node:
        for child in children(node):
            _undeclare(child)


def _contradiction(bare: onnx.ModelProto) -> str | None:
    """What ONNX Runtime would reject, too: an operator's own complaint, not one about an unknown input."""
    try:
        onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True)
    except Exception as error:  # as above
        for op, node, complaint in re.findall(r"\(op_type:(\w+)(?:, node name: (.*?))?\): (.*)", str(error)):
            # "Inference error(s)" are those of an operator's function body, which runtimes need not use
            if "instead is null" not in complaint and "Inference error(s)" not in complaint:
                return f"node '{node}' ({op}) is inconsistent: {complaint.strip().rstrip('.')}"
    return None


def _take_types(graph: onnx.GraphProto, typed: onnx.GraphProto, label: str | None, named: Names) -> None:
    notes = {info.name: info for info in graph.value_info}
    names = {tensor.name for tensor in graph.initializer}
    declared = {info.name: info for info in graph.output}
    infos = [info for info in typed.value_info if info.name not in names]
    for info in [*infos, *typed.output]:
        _forget_invented(info.type)
        _name(info.type, named.get(info.name, ()))
        if info.name in declared:
            _reconcile(declared[info.name], info.type, label)
    fresh = {info.name: info for info in infos if info.name not in declared}
    del graph.value_info[:]
    for name, note in notes.items():
        if name in fresh:
            note.type.CopyFrom(fresh.pop(name).type)
        graph.value_info.append(note)
    graph.value_info.extend(fresh.values())
    for node, typed_node in zip(graph.node, typed.node, strict=True):
        for child, typed_child in zip(children(node), children(typed_node), strict=True):
            _take_types(child, typed_child, label, named)


def _name(kind: onnx.TypeProto, names: Sequence[str]) -> None:
    """Give the axes of unknown size their names."""
    dims = kind.tensor_type.shape.dim
    for dim, name in zip(dims, names, strict=True) if len(dims) == len(names) else ():
        if name and not dim.WhichOneof("value"):
            dim.dim_param = name


def _forget_invented(kind: onnx.TypeProto) -> None:
    """Inference invents names for unknown dims; they are no symbols of the model."""
    for dim in kind.tensor_type.shape.dim if kind.HasField("tensor_type") else ():
        if dim.dim_param.startswith("unk__"):
            dim.ClearField("dim_param")


def _reconcile(info: onnx.ValueInfoProto, inferred: onnx.TypeProto, label: str | None) -> None:
    """Keep an output's declared dims unless inference knows a static size."""
    if not inferred.HasField("tensor_type"):
        return
    declared, known = info.type.tensor_type, inferred.tensor_type
    if label is not None and declared.elem_type and known.elem_type and declared.elem_type != known.elem_type:
        have, want = (onnx.TensorProto.DataType.Name(kind.elem_type) for kind in (known, declared))
        raise ModelError(f"{label}: output '{info.name}' is {have} but declared as {want}; export the model again.")
    dims = list(declared.shape.dim)
    if not declared.HasField("shape") or len(dims) != len(known.shape.dim):
        if known.HasField("shape") or not info.HasField("type"):
            info.type.CopyFrom(inferred)
        return
    for dim, truth in zip(dims, known.shape.dim, strict=True):
        if truth.HasField("dim_value") or not dim.WhichOneof("value"):
            denotation = dim.denotation
            dim.CopyFrom(truth)
            if denotation:
                dim.denotation = denotation
