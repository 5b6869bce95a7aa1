"""`spa.export`: a framework's model to an ONNX file that computes the same, or to one clear sentence."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from spa.errors import ModelError, OutputError, RuntimeFailure, SpaError, UnsupportedModelError, UsageError
from spa.export.check import Checked, compare
from spa.export.process import Worker, Written
from spa.export.request import BATCH, Exporter, Input, Request, check_names, parse_input
from spa.export.sources import find
from spa.graph import load
from spa.options import check_output
from spa.progress import Progress, silent
from spa.store import publish, save

__all__ = ["Exported", "export"]

_KNOWN = {
    "StatefulPartitionedCall": "it is a function of TensorFlow's that tf2onnx did not look into: replace its layer",
}
"""Operators in exported files that no ONNX has, and where they come from."""


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was exported."""

    source: str
    """What it was made of."""
    output: Path
    """The file."""
    exporter: str
    """What wrote it, with versions."""
    opset: int
    """ONNX opset of the file."""
    inputs: tuple[Input, ...]
    """Names of open axes stand for their sizes."""
    outputs: tuple[str, ...]
    """Names of the outputs."""
    parameters: int
    """Numbers in initializers of floating-point types."""
    bytes: int
    """Of the file and its external data."""
    verify: Checked | None
    """The file's outputs against the source's; None if that was not asked for."""

    def to_json(self) -> dict[str, Any]:
        """As `spa export --json` prints it."""
        verify = None if self.verify is None else asdict(self.verify)
        inputs = [asdict(i) for i in self.inputs]
        return {**vars(self), "output": str(self.output), "inputs": inputs, "verify": verify}


def export(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inputs: Sequence[str | Input] = (),
    exporter: Exporter = "auto",
    opset: int | None = None,
    static_batch: bool = False,
    python: str | os.PathLike[str] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    check: bool = True,
    printed: Callable[[str], object] | None = None,
    progress: Progress = silent,
) -> Exported:
    """Export a framework's model to ONNX and compare the file's outputs with the model's own.

    The framework runs in a process of its own. What it writes is read, checked and written anew: local functions are
    inlined, shapes are inferred again (exporters write wrong ones), and there is one file below 1.8 GB of weights.

    Args:
        source: `torch:package.module:factory`, `jax:package.module:function`, a `.pt2` or `.keras` file, or a folder
            (SavedModel, Hugging Face, Paddle inference).
        output: the ONNX file.
        inputs: `NAME=1x3x224x224:float32` for each input, where the source does not say them itself.
        exporter: torch's `dynamo` or `torchscript`; `auto` takes the first, and the second if that fails.
        opset: ONNX opset; by default the one that the exporter does best.
        static_batch: keep the first axis of the inputs as it is in the examples.
        python: another Python, which has the framework; it need not have spa.
        dims: sizes of open axes, for the comparison.
        seed: of example inputs and of those of the comparison.
        check: compare before the file appears.
        printed: called at the end, also of a failing run, with what the framework printed.
        progress: called with (stage, done, total); stages `export`, `load`, `verify`, `save`.

    Raises:
        UsageError: an option is wrong, the source is of no known kind, or its framework is not installed.
        ModelError, UnsupportedModelError: the source, or what was exported, cannot be read.
        RuntimeFailure: the exporter fails, or one of both does not run.
        VerifyError: the outputs differ; nothing is written.
        OutputError: the file cannot be written.
    """
    label = os.fspath(source)
    driver, where = find(source)
    given = tuple(parse_input(i) if isinstance(i, str) else i for i in inputs)
    check_names(given)
    check_output(output)
    path = Path(output)
    _check_source(Path(where), path)
    request = Request(driver, where, given, exporter, opset, static_batch, seed)
    with _folder(path) as name, Worker(request, label, python) as worker, _told(worker, printed):
        folder = Path(name)
        progress("export", 0, 1)
        raw = folder / "raw" / "model.onnx"
        raw.parent.mkdir()
        wrote = worker.export(raw)
        progress("load", 0, 1)
        model = _read(raw, label, wrote)
        file = folder / path.name
        size = save(model, file, external=False)
        verify = None
        if check:
            progress("verify", 0, 1)
            verify = _compared(worker, file, model, wrote.examples, seed, dims or {}, label)
        progress("save", 0, 1)
        _publish(file, path)
    graph = model.graph
    tensors = [v.const_value for v in graph.initializers.values() if v.const_value is not None]
    return Exported(
        label,
        path,
        wrote.exporter,
        graph.opset_imports.get("", 0),
        tuple(_described(v) for v in graph.inputs if v.name not in graph.initializers),
        tuple(v.name or "" for v in graph.outputs),
        sum(t.size for t in tensors if t.dtype.is_floating_point()),
        size,
        verify,
    )


def _check_source(source: Path, output: Path) -> None:
    """Raise UsageError if the output is a part of the source: it may be the only copy."""
    there = output.resolve()
    inside = source.is_dir() and there.is_file() and there.suffix != ".onnx" and source.resolve() in there.parents
    beside = source.is_file() and there.is_file() and there.with_suffix("") == source.resolve().with_suffix("")
    if inside or (beside and there.suffix != ".onnx") or there == source.resolve():
        raise UsageError(f"{output}: is a part of the source; write to another file, the input is never overwritten")


@contextmanager
def _told(worker: Worker, printed: Callable[[str], object] | None) -> Iterator[None]:
    try:
        yield
    finally:
        if printed is not None:
            printed(worker.printed())


def _folder(path: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=".spa-export-", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: cannot be written ({error.strerror}); check the folder's permissions and free space")


def _read(raw: Path, label: str, wrote: Written) -> ir.Model:
    """The exported graph as everything else here reads graphs, with names for outputs and open axes."""
    try:
        model = load(raw).model
    except SpaError as error:
        cause = str(error).removeprefix(f"{raw}: ").rpartition(";")[0] or str(error)
        raise ModelError(
            f"{label}: {wrote.exporter} wrote a file that is not valid ({cause}); try another opset or exporter"
        ) from error
    _without_erfc(model)
    for node in model.graph.all_nodes():
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type):
            advice = _KNOWN.get(node.op_type, "replace the layer that it comes from")
            raise UnsupportedModelError(
                f"{label}: {wrote.exporter} wrote the operator {node.op_type}, which ONNX does not have; {advice}"
            )
    _shorten_names(model)
    _name_axes(model, label, wrote)
    _name_outputs(model, wrote.outputs)
    return model


def _without_erfc(model: ir.Model) -> None:
    """1 - Erf instead of TensorFlow's Erfc, which tf2onnx (1.17) writes as it is for Keras' exact GELU."""
    for node in list(model.graph.all_nodes()):
        graph = node.graph
        if node.op_type != "Erfc" or node.domain not in ("", "ai.onnx") or not isinstance(graph, ir.Graph):
            continue
        name, dtype = node.outputs[0].name, node.outputs[0].dtype or ir.DataType.FLOAT
        one = ir.Value(name=f"{name}_one", const_value=ir.tensor(np.ones((), dtype.numpy()), name=f"{name}_one"))
        graph.register_initializer(one)
        erf = ir.node("Erf", [node.inputs[0]], name=f"{node.name}_erf")
        rest = ir.node("Sub", [one, erf.outputs[0]], name=node.name)
        erf.outputs[0].name = f"{name}_erf"
        ir.convenience.replace_nodes_and_values(graph, node, [node], [erf, rest], [node.outputs[0]], [rest.outputs[0]])


def _shorten_names(model: ir.Model) -> None:
    """Without what every name of a TensorFlow function begins with, where names stay different."""
    inner = [v for node in model.graph.all_nodes() for v in node.outputs if v.name]
    values = {id(v): v for v in (*model.graph.initializers.values(), *inner)}.values()
    short = [_short(v.name or "") for v in values]
    if len(set(short)) == len(short) and not set(short) & {v.name for v in model.graph.inputs}:
        for value, name in zip(list(values), short, strict=True):
            if value.name != name:
                value.name = name
    for node in model.graph.all_nodes():
        node.name = _short(node.name or "")


def _short(name: str) -> str:
    while (rest := name.removeprefix("StatefulPartitionedCall/")) != name and rest:
        name = rest
    return name


def _name_axes(model: ir.Model, label: str, wrote: Written) -> None:
    """Open axes get their names, so that runtimes know which ones agree.

    Raises:
        RuntimeFailure: one is fixed in the file.
    """
    for value in model.graph.inputs:
        sizes = list(value.shape or ())
        for axis, symbol in wrote.axes.get(value.name or "", {}).items():
            if axis < len(sizes) and isinstance(sizes[axis], int):
                raise RuntimeFailure(
                    f"{label}: {wrote.exporter} fixed axis {axis} of the input {value.name} to {sizes[axis]}, since "
                    f"the model's code looks at its size; change that, or accept it with "
                    f"{'--static-batch' if symbol == BATCH else f'a number for {symbol} in --input'}"
                )
            sizes[axis : axis + 1] = [ir.SymbolicDim(symbol)]
        if sizes and not value.is_initializer():
            value.shape = ir.Shape(sizes)


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """What the source calls its outputs, where nothing else has the name."""
    outputs = model.graph.outputs
    if len(names) != len(outputs):
        return
    inner = [v for node in model.graph.all_nodes() for v in node.outputs]
    taken = {v.name for v in (*model.graph.inputs, *model.graph.initializers.values(), *inner)}
    for value, name in zip(outputs, names, strict=True):
        while name in taken and name != value.name:
            name += "_"
        if not value.is_graph_input() and not value.is_initializer():
            value.name = name
            taken.add(name)


def _compared(
    worker: Worker,
    file: Path,
    model: ir.Model,
    examples: Mapping[str, Any],
    seed: int,
    dims: Mapping[str, int],
    label: str,
) -> Checked:
    try:
        return compare(worker, file, model, examples, seed, dims, label)
    except RuntimeFailure as error:
        text = str(error).rstrip(".").replace(str(file), "the exported file")
        if text.startswith(label):
            raise
        raise RuntimeFailure(
            f"{label}: the exported file could not be compared ({text}); try another opset or exporter, or "
            "--static-batch"
        ) from error


def _publish(file: Path, path: Path) -> None:
    data = file.with_name(file.name + ".data")
    parts = {path.with_name(path.name + ".data"): data, path: file} if data.exists() else {path: file}
    try:
        publish(parts)
    except OSError as error:
        raise _unwritable(path, error) from error


def _described(value: ir.Value) -> Input:
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
    return Input(value.name or "", shape, "" if value.dtype is None else str(value.dtype.numpy()))
