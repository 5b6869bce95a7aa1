"""Read a model into a clean working copy, and write one: the only door between files and `spa`.

`load` trusts nothing: it checks structure, types and weights, throws `value_info` away and infers
it anew, inlines local functions and sorts the nodes. Everything behind it may rely on that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import ml_dtypes  # noqa: F401  # registers bfloat16 and float8 with numpy
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]  # no types are shipped

from spa.blocks import blocks
from spa.errors import ModelError, OutputError, SpaError, UnsupportedModelError, UsageError
from spa.external import Detached, File, Weights, adopt, attach, detach, lighten, map_model, root_cause
from spa.inference import children, infer
from spa.store import save, to_proto
from spa.wire import LIMIT

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

__all__ = ["Graph", "Source", "load", "restore", "save", "to_proto"]

Source: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | ir.Model | gs.Graph"
Form: TypeAlias = Literal["path", "proto", "ir", "gs"]

OLDEST_OPSET = 7
READ_WHOLE = 8 << 20
"""Files up to this size are read at once. Windows reads all, as it lets nobody replace a file that is open."""
_SCAN = 1 << 20


@dataclass(frozen=True, eq=False)
class Graph:
    """A loaded model."""

    model: ir.Model
    """The prepared working copy, never the caller's object."""
    sha256: str
    """Of the `.onnx` file's bytes, or of the deterministic serialization of an in-memory source."""
    path: Path | None
    """Where the model was read from."""
    form: Form
    """What kind of source it was."""
    external: bool
    """Whether the source used external data."""
    file_bytes: int
    """Size of the main file and of its external data."""
    shard: int | None = None
    """Bytes of the largest file with external data if there are several."""


# --- load ------------------------------------------------------------------------------------------------------------


def load(source: Source, *, weights: bool = True) -> Graph:
    """Prepared working copy of a model: a path, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`.

    Weights in external files are mapped, never read into memory as a whole; the files stay usable
    when a new model is saved over them.

    Args:
        source: the model.
        weights: look at them. Without, external data is not opened and may be absent: enough to analyse a model.

    Raises:
        UsageError: the source is none of these kinds.
        ModelError: the file cannot be read, is damaged, or is not a valid model (with NaN weights, too).
        UnsupportedModelError: valid, but an opset or construct outside of what is supported.
        ExternalDataError: external data is missing, too short or outside of the model's folder.
    """
    form, path, label = _form(source)
    try:
        if form == "ir":
            proto, tensors, sha256, external, size = _from_ir(cast(ir.Model, source), label)
            parts = list[int]()
        else:
            found, sha256, size = _read(path, weights) if path else _serialized(_as_proto(source, form))
            proto, tensors, parts = found
            external, size = bool(parts), size + sum(parts)
        model = _prepare(proto, label)
        attach(model, tensors)
        if weights:
            _refuse_nan(model, label)
    except (SpaError, MemoryError):
        raise
    except Exception as error:  # the libraries raise anything on a damaged model; none may reach the user raw
        raise ModelError(f"{label}: not a valid ONNX model ({root_cause(error)}); export it again.") from error
    return Graph(model, sha256, path, form, external, size, max(parts) if len(parts) > 1 else None)


def _form(source: object) -> tuple[Form, Path | None, str]:
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return "path", path, str(path)
    if isinstance(source, onnx.ModelProto):
        return "proto", None, "the model"
    if isinstance(source, ir.Model):
        return "ir", None, "the model"
    if type(source).__module__.startswith("onnx_graphsurgeon.") and hasattr(source, "nodes"):
        return "gs", None, "the model"
    raise UsageError(
        f"Cannot load a model from {type(source).__name__}; pass a path, onnx.ModelProto, onnx_ir.Model "
        "or onnx_graphsurgeon.Graph."
    )


def _read(path: Path, weights: bool) -> tuple[Detached, str, int]:
    """The file's light message with its weights, the file's hash and size."""
    if path.is_dir():
        raise ModelError(f"{path}: is a directory; pass the .onnx file inside of it.")
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: is not a regular file; pass a .onnx file.")
    try:
        file = File(path)
        with open(file.descriptor, "rb", closefd=False) as stream:
            start = stream.read(64)
            stream.seek(0)
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file; check the path.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({root_cause(error)}); check path and permissions.") from error
    if not file.size:
        raise ModelError(f"{path}: the file is empty; copy or export the model again.")
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: is a Git LFS pointer, not a model; run 'git lfs pull'.")
    if start[4:8] == b"ORTM":
        raise UnsupportedModelError(f"{path}: is in ONNX Runtime's own format; pass the original .onnx file.")
    if file.size > LIMIT:
        raise UnsupportedModelError(f"{path}: is above 2 GB; save it again with external data.")
    mapped = map_model(file, str(path), read=weights) if file.size > READ_WHOLE and os.name != "nt" else None
    return mapped or _parsed(file, str(path), weights), sha256, file.size


def _parsed(file: File, label: str, weights: bool) -> Detached:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(file.read(0, file.size).tobytes())
    except DecodeError as error:
        raise ModelError(f"{label}: not an ONNX model, or truncated or damaged; copy or export it again.") from error
    return _detached(proto, label, file.path.parent, weights)


def _detached(proto: onnx.ModelProto, label: str, folder: Path | None, weights: bool = True) -> Detached:
    if not proto.HasField("graph"):
        raise ModelError(f"{label}: not an ONNX model (it has no graph); pass a .onnx file.")
    return detach(proto, label, folder, read=weights)


def _as_proto(source: object, form: Form) -> onnx.ModelProto:
    if form == "gs":
        import onnx_graphsurgeon

        return cast(onnx.ModelProto, onnx_graphsurgeon.export_onnx(source))
    return cast(onnx.ModelProto, source)


def _serialized(proto: onnx.ModelProto) -> tuple[Detached, str, int]:
    try:
        data = proto.SerializeToString(deterministic=True)
    except EncodeError as error:
        raise UnsupportedModelError(
            "the model: is above 2 GB in memory; save it with external data and pass the path."
        ) from error
    sha256, size = hashlib.sha256(data).hexdigest(), len(data)
    del data
    return _detached(proto, "the model", None), sha256, size


def _from_ir(model: ir.Model, label: str) -> tuple[onnx.ModelProto, Weights, str, bool, int]:
    proto, lent = lighten(model, attributes=True)
    weights, external = adopt(lent, label)
    data = proto.SerializeToString(deterministic=True)
    digest = hashlib.sha256(data)
    for weight in weights:
        digest.update(weight.tobytes())
    return proto, weights, digest.hexdigest(), external, len(data) + sum(weight.nbytes for weight in weights)


def _prepare(proto: onnx.ModelProto, label: str) -> ir.Model:
    """Checked, flat, sorted and typed; the weights are placeholders."""
    if not proto.graph.node:
        raise ModelError(f"{label}: the graph has no nodes; pass a model with layers.")
    for function in proto.functions:
        function.ClearField("value_info")
    _check_opset(proto, label)
    if proto.functions:
        proto = _inlined(proto, label)
    if not _check_values(proto.graph, [], label)[0]:
        model = ir.from_proto(proto)
        try:
            model.graph.sort()
        except ValueError as error:
            raise ModelError(f"{label}: the graph has a cycle; export the model again.") from error
        proto = ir.to_proto(model)
    infer(proto, label)
    return ir.from_proto(proto)


def _check_opset(proto: onnx.ModelProto, label: str) -> None:
    for entry in proto.opset_import:
        if entry.domain == "ai.onnx":
            entry.domain = ""
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    if len(versions) < len({(entry.domain, entry.version) for entry in proto.opset_import}):
        raise ModelError(f"{label}: the same opset is imported in two versions; export the model again.")
    newest = onnx.defs.onnx_opset_version()
    if "" not in versions:
        if any(node.domain in ("", "ai.onnx") for node in _all_nodes(proto.graph)):
            raise ModelError(f"{label}: no ONNX opset is imported; the file is truncated or was exported wrongly.")
    elif not OLDEST_OPSET <= versions[""] <= newest:
        raise UnsupportedModelError(
            f"{label}: opset {versions['']} is not supported ({OLDEST_OPSET} to {newest} are); "
            "convert it with onnx.version_converter."
        )


def _inlined(proto: onnx.ModelProto, label: str) -> onnx.ModelProto:
    """Without local functions; nodes of custom domains that have no function stay."""
    calls = {
        (function.domain, function.name, function.overload): {
            (node.domain, node.op_type, node.overload) for node in _all_nodes(function)
        }
        for function in proto.functions
    }
    while leaves := [name for name, called in calls.items() if not called & calls.keys()]:
        for name in leaves:
            del calls[name]
    if calls:
        raise ModelError(f"{label}: the local function '{next(iter(calls))[1]}' calls itself; export the model again.")
    flat = onnx.inliner.inline_local_functions(proto)
    if flat.functions:
        flat = onnx.inliner.inline_local_functions(proto, convert_version=True)
    if flat.functions:
        names = ", ".join(sorted({function.name for function in flat.functions}))
        raise UnsupportedModelError(
            f"{label}: the local function {names} uses another opset than the model; export with one opset."
        )
    return flat


def _check_values(graph: onnx.GraphProto, outer: list[set[str]], label: str) -> tuple[bool, set[str]]:
    """Whether the graph is sorted, and the outer values it reads; every read value must be defined exactly once."""
    defined = [info.name for info in graph.input]
    inputs = set(defined)
    weights = [tensor.name for tensor in graph.initializer]
    defined += [name for name in weights if name not in inputs]
    given = set(defined)
    for node in graph.node:
        defined += [name for name in node.output if name]
    scope = set(defined)
    if len(scope) < len(defined) or len(set(weights)) < len(weights):
        twice = next(name for name in defined + weights if defined.count(name) > 1 or weights.count(name) > 1)
        raise ModelError(f"{label}: the value '{twice}' is defined twice; export the model again.")
    inner, ordered, free = [*outer, scope], True, set[str]()
    for node in graph.node:
        reads = {name for name in node.input if name}
        for child in children(node):
            child_ordered, captured = _check_values(child, inner, label)
            ordered &= child_ordered
            reads |= captured
        for name in sorted(reads - scope):
            if not any(name in names for names in outer):
                raise ModelError(
                    f"{label}: node '{node.name}' ({node.op_type}) reads '{name}', which nothing defines; "
                    "export the model again."
                )
        free |= reads - scope
        ordered &= reads - free <= given
        given.update(node.output)
    for info in graph.output:
        if info.name not in scope and not any(info.name in names for names in outer):
            raise ModelError(f"{label}: nothing computes the output '{info.name}'; export the model again.")
    _check_inputs(graph, label)
    return ordered, free


def _check_inputs(graph: onnx.GraphProto, label: str) -> None:
    """An initializer that is also an input must agree with its declared type."""
    declared = {info.name: info.type.tensor_type for info in graph.input if info.type.HasField("tensor_type")}
    for tensor in graph.initializer:
        kind = declared.get(tensor.name)
        if kind is None:
            continue
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        shape_fits = not kind.HasField("shape") or (
            len(dims) == len(tensor.dims)
            and all(want in (None, have) for want, have in zip(dims, tensor.dims, strict=True))
        )
        if kind.elem_type != tensor.data_type or not shape_fits:
            raise ModelError(
                f"{label}: initializer '{tensor.name}' of shape {list(tensor.dims)} contradicts its declaration "
                "as a graph input; export the model again."
            )


def _all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for child in children(node):
            yield from _all_nodes(child)


# --- weights ---------------------------------------------------------------------------------------------------------


def _refuse_nan(model: ir.Model, label: str) -> None:
    """Infinities are fine, masks use them; so is a scalar NaN, a fill value."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and _has_nan(value.const_value):
                raise ModelError(f"{label}: weight '{value.name}' contains NaN; train or export the model again.")
        for node in graph:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and attribute.type == ir.AttributeType.TENSOR and _has_nan(attribute.as_tensor()):
                name = node.outputs[0].name
                raise ModelError(f"{label}: constant '{name}' contains NaN; train or export the model again.")


def _has_nan(tensor: ir.TensorProtocol) -> bool:
    if not tensor.dtype.is_floating_point() or tensor.dtype.bitwidth < 8 or not len(tensor.shape):
        return False
    parts = _chunks(tensor)
    if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):  # as integers: halves are slow to compare
        limit = 0x7C00 if tensor.dtype == ir.DataType.FLOAT16 else 0x7F80
        return any((part.view("<u2") & 0x7FFF).max() > limit for part in parts)
    if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        with np.errstate(invalid="ignore"):
            return any(np.isnan(part.max()) for part in parts)  # the maximum of NaN is NaN
    return any(bool(np.isnan(part).any()) for part in parts)


def _chunks(tensor: ir.TensorProtocol) -> Iterator[Any]:
    for block in blocks(tensor):
        flat = block.reshape(-1)
        yield from (flat[start : start + _SCAN] for start in range(0, len(flat), _SCAN))


def restore(graph: Graph, model: ir.Model) -> ir.Model | onnx.ModelProto | gs.Graph:
    """`model` as the kind of object that `graph` was loaded from (for a path: the model itself, to be saved).

    A `gs.Graph` cannot hold everything: the model's domain, version and documentation, and the
    metadata of nodes and values are lost there.

    Raises:
        OutputError: onnx-graphsurgeon cannot represent the model.
    """
    if graph.form in ("path", "ir"):
        return model
    proto = to_proto(model)
    if graph.form == "proto":
        return proto
    import onnx_graphsurgeon

    try:
        return onnx_graphsurgeon.import_onnx(proto)
    except Exception as error:  # the library raises anything
        cause = root_cause(error)
        raise OutputError(f"onnx-graphsurgeon cannot hold the model ({cause}); save it to a file.") from error
