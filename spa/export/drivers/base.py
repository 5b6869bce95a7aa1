"""What all drivers have in common."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from spa.errors import RuntimeFailure, SpaError, UsageError
from spa.export.request import BATCH, Input, Request

Array = npt.NDArray[Any]

_OPEN = 2
"""Example size of an open first axis: with 1, exporters take it for fixed."""
_OTHER = 8
"""Example size of any other open axis; one more for each further one, so that they are told apart."""


class Opened(Protocol):
    """A source that is ready to be exported and run."""

    @property
    def examples(self) -> Mapping[str, Array]:
        """Inputs on which it can be run, by name; empty if it does not know any."""

    @property
    def axes(self) -> Mapping[str, Mapping[int, str]]:
        """By input: which axes are open, and their names."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of the outputs, in the order of the ONNX file's; empty: the exporter's. Known after `export`."""

    @property
    def exporter(self) -> str:
        """What wrote the file, with versions; known after `export`."""

    def export(self, path: Path) -> None:
        """Write the ONNX file."""

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        """The source's own outputs, in the order of the ONNX file's."""


def need(module: str, package: str | None = None) -> Any:
    """Import a package of the framework.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise UsageError(
            f"this needs {module.partition('.')[0]}, which is not installed here: pip install "
            f"{package or module.partition('.')[0]}, or name a Python that has it with --python"
        ) from error


def versions(*packages: str) -> str:
    """`torch 2.13.0, onnxscript 0.7.2`."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def attribute(where: str) -> Any:
    """The object that `package.module:name` means; its module is imported, from the current folder too.

    Raises:
        UsageError: there is none.
    """
    module, colon, name = where.partition(":")
    if not colon or not module or not name:
        raise UsageError("cannot be read; write package.module:name")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise UsageError(f"there is no module {error.name!r}; run the command where it can be imported") from error
    except AttributeError as error:
        raise UsageError(f"the module {module!r} has no {name!r}; check the name") from error
    return found


def called(function: Callable[[], Any], advice: str = "wrap it in a function without arguments") -> Any:
    """What a factory returns.

    Raises:
        UsageError: it takes arguments, or is no function.
        RuntimeFailure: it fails.
    """
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise UsageError(f"cannot be called without arguments ({error}); {advice}") from error
    except ValueError:  # no signature is known: try it
        pass
    try:
        return function()
    except SpaError:
        raise
    except Exception as error:  # the user's own code
        raise RuntimeFailure(f"failed ({first_line(error)}); call it in Python to see where") from error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300].rstrip('.')}" if lines else type(error).__name__


def open_axes(request: Request, examples: Mapping[str, Array]) -> dict[str, dict[int, str]]:
    """By input which axes are open, and their names, where the source itself does not say.

    Those that `--input` names, and the first one of all inputs that have as many rows as the first input.
    """
    rows = next((a.shape[0] for a in examples.values() if a.ndim), 0)
    out = named_axes(request.inputs)
    for name, array in examples.items():
        axes = out.setdefault(name, {})
        if array.ndim and array.shape[0] == rows and not request.static_batch:
            axes.setdefault(0, BATCH)
    return out


def named_axes(inputs: Sequence[Input]) -> dict[str, dict[int, str]]:
    """The axes of a description that have names instead of sizes."""
    return {i.name: {k: size for k, size in enumerate(i.shape) if isinstance(size, str)} for i in inputs}


def fixed_batch(inputs: Sequence[Input]) -> list[Input]:
    """The same inputs with an open first axis of the size of examples."""
    return [Input(i.name, (_OPEN, *i.shape[1:]) if isinstance(i.shape[0], str) else i.shape, i.dtype) for i in inputs]


def made_up(inputs: Sequence[Input], seed: int) -> dict[str, Array]:
    """Seeded examples of inputs that are only described: normal numbers, indices 0 and 1, masks of ones."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    out: dict[str, Array] = {}
    for spec in inputs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str) and size not in sizes:
                first = axis == 0 or size == BATCH
                sizes[size] = _OPEN if first else _OTHER + sum(n >= _OTHER for n in sizes.values())
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            out[spec.name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind == "b" or "mask" in spec.name:
            out[spec.name] = np.ones(shape, dtype)
        else:
            out[spec.name] = rng.integers(0, 2, size=shape).astype(dtype)
    return out


def widened(array: Array, request: Request) -> Array:
    """An example with a batch of 1 as one of 2, since exporters take an axis of size 1 for fixed."""
    alone = array.ndim and array.shape[0] == 1 and not request.static_batch
    return np.concatenate([array] * _OPEN) if alone else array


def output_names(paths: Sequence[Sequence[Any]]) -> list[str]:
    """Names of outputs by where they are in what a model returns: `logits`, `text.pooled`, `output_0`; one is `output`.

    Args:
        paths: keys and indices on the way to each, as the framework's tree functions give them.
    """
    names = [".".join(_entry(entry) for entry in path) for path in paths]
    if len(names) == 1 and (not names[0] or names[0].isdecimal()):
        return ["output"]
    return [f"output_{name}" if not name or name[0].isdecimal() else name for name in names]


def _entry(entry: Any) -> str:
    found = (getattr(entry, kind, None) for kind in ("key", "name", "idx"))
    return str(next((value for value in found if value is not None), entry))


def refused(what: str, error: BaseException, advice: str) -> RuntimeFailure:
    """An exporter's failure, in one sentence."""
    return RuntimeFailure(f"{what} cannot export this model ({first_line(error)}); {advice}")
