"""A `.keras` file, or `keras:package.module:factory`, by Keras' own ONNX export."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import ModelError, UnsupportedModelError, UsageError
from spa.export.drivers.base import (
    Array,
    attribute,
    called,
    first_line,
    fixed_batch,
    made_up,
    named_axes,
    need,
    output_names,
    refused,
    versions,
)
from spa.export.request import BATCH, Input, Request


def open_source(request: Request) -> Keras:
    """The model of a file; what would execute Python code of the file is refused.

    Raises:
        UsageError: Keras or its backend is missing.
        ModelError: the file cannot be read.
        UnsupportedModelError: it holds Python code.
    """
    keras = need("keras", "keras tensorflow-cpu tf2onnx")
    need("tensorflow", "tensorflow-cpu") if keras.config.backend() == "tensorflow" else None
    path = Path(request.source)
    model = _read(keras, path) if path.is_file() else _made(keras, request.source)
    return Keras(keras, model, request)


def _made(keras: Any, where: str) -> Any:
    """What the user's own function returns."""
    found = attribute(where)
    model = found if isinstance(found, keras.Model) else called(found)
    if not isinstance(model, keras.Model):
        raise UsageError(f"gave {type(model).__name__}; return a keras.Model")
    return model


def _read(keras: Any, path: Path) -> Any:
    try:
        return keras.saving.load_model(str(path), compile=False, safe_mode=True)
    except Exception as error:  # Keras raises anything
        if "unsafe" in str(error) or "safe_mode" in str(error):
            raise UnsupportedModelError(
                "holds Python code (a Lambda layer), which is never executed; replace it by a layer, or by keras.ops"
            ) from error
        raise ModelError(
            f"cannot be loaded by Keras ({first_line(error)}); if it has layers of your own, export "
            "keras:package.module:function, a function that loads it"
        ) from error


@contextmanager
def _open_functions(backend: str) -> Iterator[None]:
    """Without the compiled functions that Keras wraps grouped convolutions in: tf2onnx does not look inside."""
    if backend != "tensorflow":
        yield
        return
    tf = need("tensorflow")
    function = tf.function

    def plain(*arguments: Any, **options: Any) -> Any:
        return (lambda body: body) if options.get("jit_compile") else function(*arguments, **options)

    tf.function = plain
    try:
        yield
    finally:
        tf.function = function


class Keras:
    """A Keras model."""

    def __init__(self, keras: Any, model: Any, request: Request) -> None:
        self.keras, self.model, self.request = keras, model, request
        known = getattr(model, "inputs", None)  # a subclass of Model may have none
        self.inputs = [self._input(tensor) for tensor in known] if known else list(request.inputs)
        if not self.inputs:
            raise UsageError("does not say what its inputs are: give --input NAME=1x224x224x3 for each, in their order")
        if request.static_batch:
            self.inputs = fixed_batch(self.inputs)
        self.axes = named_axes(self.inputs)
        self.examples: dict[str, Array] = made_up(self.inputs, request.seed)
        self.outputs: Sequence[str] = ()
        self.exporter = ""

    def _input(self, tensor: Any) -> Input:
        said = {i.name: i for i in self.request.inputs}
        if tensor.name in said:
            return said[tensor.name]
        sizes = enumerate(tensor.shape)
        shape = tuple(size if size is not None else BATCH if k == 0 else f"axis_{k}" for k, size in sizes)
        return Input(tensor.name, shape, str(tensor.dtype))

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs in evaluation mode."""
        given = [self.keras.ops.convert_to_tensor(feeds[i.name]) for i in self.inputs]
        outputs = self.model(given if len(given) > 1 else given[0], training=False)
        leaves = self.keras.tree.flatten_with_path(outputs)
        self.outputs = output_names([path for path, _ in leaves])
        return [np.asarray(self.keras.ops.convert_to_numpy(y)) for _, y in leaves]

    def export(self, path: Path) -> None:
        """By `keras.Model.export`, which uses tf2onnx or torch.

        Raises:
            UsageError: one of them is missing.
            RuntimeFailure: the exporter fails.
        """
        backend = self.keras.config.backend()
        self.run(self.examples)  # Keras exports no model that has never been called
        need("tf2onnx" if backend == "tensorflow" else "torch")
        options = {} if self.request.opset is None else {"opset_version": self.request.opset}
        try:
            with warnings.catch_warnings(), _open_functions(backend):
                warnings.simplefilter("ignore")
                self.model.export(str(path), format="onnx", verbose=False, input_signature=self._signature(), **options)
        except Exception as error:  # exporters raise anything
            raise refused(
                "keras' ONNX export", error, "save a SavedModel (model.export(folder)) and export that"
            ) from error
        self.exporter = f"keras.Model.export, {versions('keras', 'tf2onnx' if backend == 'tensorflow' else 'torch')}"

    def _signature(self) -> list[Any]:
        sizes = [tuple(s if isinstance(s, int) else None for s in i.shape) for i in self.inputs]
        spec = self.keras.InputSpec
        return [spec(dtype=i.dtype, shape=s, name=i.name) for i, s in zip(self.inputs, sizes, strict=True)]
