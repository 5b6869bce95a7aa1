"""`torch:package.module:factory`: a module that the user's own function makes, by either of torch's exporters."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import RuntimeFailure, UsageError
from spa.export.drivers.base import (
    Array,
    attribute,
    called,
    made_up,
    need,
    open_axes,
    output_names,
    refused,
    versions,
    widened,
)
from spa.export.request import Input, Request

DYNAMO_OPSET = 18
"""What torch's own conversions are written for; it converts to others afterwards."""
SCRIPT_OPSET = 17
"""The newest in which the older exporter says everything."""
_TRACES = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")
"""Notes of the exporter that hold file names of the machine, a line for every frame."""


class TorchSource:
    """A module in evaluation mode, with example inputs in the order of its `forward`."""

    def __init__(self, module: Any, examples: Mapping[str, Array], request: Request, *, keywords: bool = False) -> None:
        self.torch = need("torch")
        self.torch.manual_seed(request.seed)
        self.module = module
        self.request = request
        self.keywords = keywords
        self.examples: dict[str, Array] = {name: widened(array, request) for name, array in examples.items()}
        self.axes = open_axes(request, self.examples)
        self.outputs: Sequence[str] = ()
        self.exporter = ""

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """All tensors among the outputs, in the order in which torch lists them."""
        missing = [name for name in self.examples if name not in feeds]
        if missing:
            raise RuntimeFailure(f"the ONNX file lacks the input {missing[0]!r}, which has no effect; remove it")
        arguments, keywords = self._arguments({name: feeds[name] for name in self.examples})
        with self.torch.no_grad():
            outputs = self.module(*arguments, **keywords)
        leaves = self.torch.utils._pytree.tree_flatten_with_path(outputs)[0]
        tensors = [(path, y) for path, y in leaves if isinstance(y, self.torch.Tensor)]
        self.outputs = output_names([path for path, _ in tensors])
        return [self._array(y) for _, y in tensors]

    def _array(self, y: Any) -> Array:
        y = y.detach().cpu()
        return np.asarray((y.float() if y.dtype == self.torch.bfloat16 else y).numpy())

    def _arguments(self, feeds: Mapping[str, Array]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tensors = {name: self.torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        return ((), tensors) if self.keywords else (tuple(tensors.values()), {})

    def export(self, path: Path) -> None:
        """By the exporter that was asked for; `auto` falls back to the older one.

        Raises:
            UsageError: the newer one lacks a package.
            RuntimeFailure: the exporter fails.
        """
        wanted = self.request.exporter
        scripted = importlib.util.find_spec("onnxscript") is None
        if wanted == "dynamo" and scripted:
            need("onnxscript")
        self.run(self.examples)  # a model that does not run is not the exporter's fault
        ways: dict[str, Callable[[Path], None]] = {"dynamo": self._dynamo, "torchscript": self._script}
        names = [wanted] if wanted != "auto" else ["torchscript"] if scripted else ["dynamo", "torchscript"]
        failures: list[RuntimeFailure] = []
        for name in names:
            try:
                with warnings.catch_warnings(), self.torch.no_grad():
                    warnings.simplefilter("ignore")
                    ways[name](path)
            except Exception as error:  # of torch's exporters, which raise anything
                failure = refused(f"torch's {name} exporter", error, self._advice(name))
                failure.__cause__ = error
                failures.append(failure)
                print(failure, file=sys.stderr)
                continue
            self.exporter = f"torch.onnx {name}, {versions('torch', *(['onnxscript'] if name == 'dynamo' else []))}"
            return
        raise failures[0]

    def _advice(self, name: str) -> str:
        other = "torchscript" if name == "dynamo" else "dynamo"
        tried = "both were tried" if self.request.exporter == "auto" else f"try --exporter {other}"
        return f"{tried}; --static-batch keeps the batch of the examples"

    def _dynamo(self, path: Path) -> None:
        torch = self.torch
        arguments, keywords = self._arguments(self.examples)
        dims: dict[str, Any] = {}
        shapes = {
            name: {k: dims.setdefault(symbol, torch.export.Dim(symbol)) for k, symbol in axes.items()} or None
            for name, axes in self.axes.items()
        }
        program = torch.onnx.export(
            self.module,
            arguments,
            None,
            kwargs=keywords or None,
            dynamo=True,
            verbose=False,
            opset_version=self.request.opset or DYNAMO_OPSET,
            dynamic_shapes=(shapes if self.keywords else tuple(shapes.values())) if dims else None,
        )
        save_program(program, path, list(self.examples))

    def _script(self, path: Path) -> None:
        arguments, keywords = self._arguments(self.examples)
        self.torch.onnx.export(
            self.module,
            arguments,
            str(path),
            kwargs=keywords or None,
            dynamo=False,
            opset_version=self.request.opset or SCRIPT_OPSET,
            input_names=list(self.examples),
            dynamic_axes={name: axes for name, axes in self.axes.items() if axes},
        )


def save_program(program: Any, path: Path, inputs: Sequence[str]) -> None:
    """What the newer exporter made, in one file where that is possible, without names of local files."""
    model = program.model
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    for node in model.graph.all_nodes():
        for trace in _TRACES:
            node.metadata_props.pop(trace, None)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    program.save(str(path), external_data=size > 1_800_000_000)  # 2 GiB is the most that protobuf writes


def open_source(request: Request) -> TorchSource:
    """The module that a factory makes, with its examples or those of `--input`."""
    torch = need("torch")
    torch.manual_seed(request.seed)
    found = attribute(request.source)
    made = found if isinstance(found, torch.nn.Module) else called(found)
    module, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise UsageError(f"gave {type(module).__name__}; return a torch.nn.Module, or a module and example inputs")
    # of the outermost module: the older exporter puts back, for all modules inside, the mode that this one has
    return TorchSource(module.eval(), _examples(request, module, given, torch), request)


def _examples(request: Request, module: Any, given: Any, torch: Any) -> dict[str, Array]:
    if given is None:
        if not request.inputs:
            raise UsageError(
                "has no example inputs: give --input NAME=1x3x224x224 for each input, or return a module and a tuple "
                "of tensors"
            )
        return made_up(request.inputs, request.seed)
    tensors = dict(given) if isinstance(given, Mapping) else None
    if tensors is None:
        values = list(given) if isinstance(given, (tuple, list)) else [given]
        tensors = dict(zip(input_names(module.forward, request.inputs, len(values)), values, strict=False))
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(f"the example input {name!r} is {type(tensor).__name__}; only tensors can be exported")
    return {name: np.asarray(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}


def input_names(forward: Callable[..., Any], said: Sequence[Input], count: int) -> list[str]:
    """Names of positional inputs: those that were given, else those of the arguments.

    Raises:
        UsageError: not as many were given.
    """
    if said:
        if len(said) != count:
            raise UsageError(f"takes {count} inputs, but --input was given {len(said)} times; name all, in their order")
        return [i.name for i in said]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds]
    except ValueError:
        names = []
    return [names[k] if k < len(names) else f"input_{k}" for k in range(count)]
