"""A `torch.export` file (`.pt2`), after it was made sure that nothing in it is executed by being read."""

from __future__ import annotations

import ast
import io
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import ModelError, UnsupportedModelError
from spa.export.drivers.base import Array, need, refused, versions
from spa.export.drivers.from_torch import DYNAMO_OPSET, TorchSource, save_program
from spa.export.request import BATCH, Request

_CALLS = ("torch.ops.aten.", "torch.ops.prims.", "torch.ops.higher_order.", "torch.sym_", "_operator.", "math.", "#")
"""Beginnings of functions that a graph may call: operators, and arithmetic on sizes."""
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.Constant, ast.Name, ast.Load, ast.operator,
    ast.unaryop, ast.cmpop, ast.boolop, ast.Call, ast.keyword,
)  # fmt: skip

_FUNCTIONS = frozenset(
    [
        "Symbol",
        "Integer",
        "Float",
        "Rational",
        "Add",
        "Mul",
        "Pow",
        "Max",
        "Min",
        "Mod",
        "Abs",
        "FloorDiv",
        "CeilDiv",
        "CleanDiv",
        "CeilToInt",
        "FloorToInt",
        "ModularIndexing",
        "PythonMod",
        "TruncToInt",
        "TruncToFloat",
        "ToFloat",
        "RoundToInt",
        "RoundDecimal",
        "IntTrueDiv",
        "FloatTrueDiv",
        "FloatPow",
        "PowByNatural",
        "LShift",
        "RShift",
        "Identity",
        "Where",
        "Eq",
        "Ne",
        "Unequality",
        "Equality",
        "Ge",
        "Gt",
        "Le",
        "Lt",
        "And",
        "Or",
        "Not",
        "floor",
        "ceiling",
        "sqrt",
    ]
)


def open_source(request: Request) -> Program:
    """The program of a file."""
    torch = need("torch")
    path = Path(request.source)
    check(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(str(path))
    except Exception as error:  # torch raises anything on a damaged file
        raise ModelError("cannot be loaded by this torch; write it again with torch.export.save") from error
    return Program(program, request)


class Program(TorchSource):
    """An exported program: its axes are open where it was exported so."""

    def __init__(self, program: Any, request: Request) -> None:
        self.program = program
        examples = self._examples()
        super().__init__(program.module(), examples, request)
        self.examples = examples  # of the program's own sizes
        self.axes = self._axes()

    def _examples(self) -> dict[str, Array]:
        if self.program.example_inputs is None:
            raise UnsupportedModelError("has no example inputs; write it with a torch that stores them")
        arguments, keywords = self.program.example_inputs
        if keywords or not all(hasattr(a, "detach") for a in arguments):
            raise UnsupportedModelError(
                "takes inputs that are not plain tensors; export a module that takes tensors only"
            )
        names = [n for n in self.program.graph_signature.user_inputs if isinstance(n, str)]
        return {name: np.asarray(x.detach().cpu().numpy()) for name, x in zip(names, arguments, strict=True)}

    def _axes(self) -> dict[str, dict[int, str]]:
        """Axes that the program left open; the first one that is a first axis is the batch."""
        values = {n.name: n.meta["val"].shape for n in self.program.graph.nodes if n.name in self.examples}
        symbols = {name: {k: str(s) for k, s in enumerate(v) if not isinstance(s, int)} for name, v in values.items()}
        batch = next((axes[0] for axes in symbols.values() if 0 in axes), None)
        return {name: {k: BATCH if s == batch else s for k, s in axes.items()} for name, axes in symbols.items()}

    def export(self, path: Path) -> None:
        """By the newer exporter, the only one that reads such files.

        Raises:
            UsageError: onnxscript is missing.
            RuntimeFailure: the exporter fails.
        """
        need("onnxscript")
        opset = self.request.opset or DYNAMO_OPSET
        self.run(self.examples)
        try:
            with warnings.catch_warnings(), self.torch.no_grad():
                warnings.simplefilter("ignore")
                made = self.torch.onnx.export(self.program, (), None, dynamo=True, verbose=False, opset_version=opset)
        except Exception as error:  # see TorchSource.export
            raise refused(
                "torch's dynamo exporter", error, "export the module itself with torch:package.module:factory"
            ) from error
        save_program(made, path, list(self.examples))
        self.exporter = f"torch.onnx dynamo, {versions('torch', 'onnxscript')}"


def check(path: Path) -> None:
    """Refuse a file that holds Python objects, or anything else that loading it would execute.

    torch itself unpickles what a file says is pickled, calls any function of torch by name, and evaluates sizes.

    Raises:
        ModelError: it is no such file.
        UnsupportedModelError: it may not be loaded.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(n.endswith("/archive_format") for n in names) or max(Counter(names).values()) > 1:
                raise UnsupportedModelError(
                    "is of an old format, which holds Python objects; write it again with torch.export.save"
                )
            for name in names:
                _check_part(name.partition("/")[2], archive, name)
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError) as error:
        raise ModelError("is not a file of torch.export.save; write it again") from error


def _check_part(part: str, archive: zipfile.ZipFile, name: str) -> None:
    if part.startswith("data/aotinductor/"):
        raise UnsupportedModelError("holds compiled code, which is never loaded; write it with torch.export.save")
    if part.endswith((".pt", ".pkl")) and not part.startswith("data/sample_inputs/"):
        raise _pickled(part)
    if part.startswith("data/sample_inputs/"):
        try:
            need("torch").load(io.BytesIO(archive.read(name)), weights_only=True)
        except Exception as error:  # of the restricted unpickler
            raise _pickled(part) from error
    elif part.endswith(".json"):
        for key, value in _entries(json.loads(archive.read(name))):
            if (key == "use_pickle" and value) or (
                key == "path_name" and str(value).startswith(("custom_obj", "opaque_obj"))
            ):
                raise _pickled(part)
            if key == "target" and isinstance(value, str) and "." in value and not value.startswith(_CALLS):
                raise UnsupportedModelError(f"calls {value!r}, which is no operator of torch; it is not loaded")
            if key == "expr_str" and not _arithmetic(str(value)):
                raise UnsupportedModelError(f"has a size {str(value)!r}, which is no arithmetic; it is not loaded")


def _pickled(part: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"holds Python objects ({part}), which are never loaded; export a module of plain tensors"
    )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _arithmetic(text: str) -> bool:
    """Numbers, names, operators, and calls of what torch itself writes, such as `Max(a, 2)`."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError):
        return False
    values = [n.value for n in nodes if isinstance(n, ast.Constant)]
    constants = all(isinstance(v, (int, float)) or (isinstance(v, str) and v.isidentifier()) for v in values)
    names = all(n.id[:1] != "_" for n in nodes if isinstance(n, ast.Name))
    calls = all(isinstance(n.func, ast.Name) and n.func.id in _FUNCTIONS for n in nodes if isinstance(n, ast.Call))
    return all(isinstance(n, _ARITHMETIC) for n in nodes) and constants and names and calls
