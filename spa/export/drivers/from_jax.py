"""`jax:package.module:function`: a function of arrays (or a flax module), by jax2onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import UsageError
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
from spa.export.drivers.from_torch import input_names
from spa.export.request import Request

_ADVICE = (
    "give --input NAME=1x8x8x3 for each input of the function, or name a function without arguments that returns "
    "(function, example inputs)"
)


def open_source(request: Request) -> Jax:
    """The function itself with `--input`; without, what it returns: a function and example inputs.

    Raises:
        UsageError: JAX is missing, or there are no inputs.
    """
    need("jax")
    found = attribute(request.source)
    if request.inputs:
        return Jax(found, made_up(request.inputs, request.seed), request)
    made = called(found, advice=_ADVICE)
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise UsageError(f"gave {type(made).__name__}; {_ADVICE}")
    function, given = made
    if isinstance(given, Mapping):
        raise UsageError("its example inputs are named; return them in the function's order, as a tuple of arrays")
    values = [np.asarray(x) for x in (given if isinstance(given, (tuple, list)) else [given])]
    names = input_names(function, request.inputs, len(values))
    return Jax(function, dict(zip(names, values, strict=True)), request)


class Jax:
    """A function of arrays."""

    def __init__(self, function: Any, examples: Mapping[str, Array], request: Request) -> None:
        self.function, self.request = function, request
        self.examples: dict[str, Array] = {name: widened(array, request) for name, array in examples.items()}
        self.axes = open_axes(request, self.examples)
        self.outputs: Sequence[str] = ()
        self.exporter = ""
        if hasattr(function, "eval"):
            function.eval()  # a flax module: dropout off, statistics as they are

    def run(self, feeds: Mapping[str, Array]) -> Sequence[Array]:
        """All arrays among the outputs, in JAX's order."""
        jax = need("jax")
        outputs = self.function(*(jax.numpy.asarray(feeds[name]) for name in self.examples))
        leaves = jax.tree_util.tree_flatten_with_path(outputs)[0]
        self.outputs = output_names([path for path, _ in leaves])
        return [np.asarray(y) for _, y in leaves]

    def export(self, path: Path) -> None:
        """By jax2onnx.

        Raises:
            UsageError: it is missing.
            RuntimeFailure: it fails.
        """
        jax, jax2onnx = need("jax"), need("jax2onnx")
        self.run(self.examples)  # a function that does not run is not the exporter's fault
        scope = jax.export.SymbolicScope()
        inputs = [
            jax.ShapeDtypeStruct(_shape(jax, scope, self.axes[name], array.shape), array.dtype)
            for name, array in self.examples.items()
        ]
        options: dict[str, Any] = {} if self.request.opset is None else {"opset": self.request.opset}
        try:
            jax2onnx.to_onnx(
                self.function,
                inputs=inputs,
                input_names=list(self.examples),
                return_mode="file",
                output_path=str(path),
                **options,
            )
        except Exception as error:  # jax2onnx raises anything
            raise refused("jax2onnx", error, "--static-batch keeps the batch of the examples") from error
        self.exporter = f"jax2onnx, {versions('jax', 'jax2onnx')}"


def _shape(jax: Any, scope: Any, axes: Mapping[int, str], sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Open axes as JAX's symbols."""
    if not axes:
        return sizes
    return tuple(jax.export.symbolic_shape(", ".join(axes.get(k, str(n)) for k, n in enumerate(sizes)), scope=scope))
