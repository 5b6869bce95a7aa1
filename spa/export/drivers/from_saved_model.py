"""A TensorFlow SavedModel folder, by tf2onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import ModelError, UnsupportedModelError
from spa.export.drivers.base import Array, first_line, fixed_batch, made_up, named_axes, need, refused, versions
from spa.export.request import BATCH, Input, Request

OPSET = 18
"""The newest that tf2onnx writes."""


def open_source(request: Request) -> SavedModel:
    """The default signature of a folder; loading one runs no Python code of it.

    Raises:
        UsageError: TensorFlow is missing.
        ModelError: the folder cannot be read.
        UnsupportedModelError: it has no signature.
    """
    tf = need("tensorflow", "tensorflow-cpu")
    try:
        loaded = tf.saved_model.load(request.source)
    except Exception as error:  # TensorFlow raises anything
        raise ModelError(f"cannot be loaded by TensorFlow ({first_line(error)}); save the model again") from error
    signatures = dict(loaded.signatures)
    name = "serving_default" if "serving_default" in signatures else next(iter(signatures), None)
    if name is None:
        raise UnsupportedModelError("has no signature; save it with signatures, or with keras' model.export(folder)")
    return SavedModel(tf, loaded, signatures[name], request)


class SavedModel:
    """One signature."""

    def __init__(self, tf: Any, loaded: Any, signature: Any, request: Request) -> None:
        self.tf, self.loaded, self.signature, self.request = tf, loaded, signature, request
        said = {i.name: i for i in request.inputs}
        specs = signature.structured_input_signature[1]
        self.inputs = [said.get(name) or self._input(name, spec) for name, spec in specs.items()]
        if request.static_batch:
            self.inputs = fixed_batch(self.inputs)
        self.axes = named_axes(self.inputs)
        self.examples: dict[str, Array] = made_up(self.inputs, request.seed)
        self.outputs: Sequence[str] = ()
        self.exporter = ""

    def _input(self, name: str, spec: Any) -> Input:
        if spec.shape.rank is None:
            raise UnsupportedModelError(f"the input {name!r} has no shape; give --input {name}=SIZES")
        sizes = enumerate(spec.shape.as_list())
        shape = tuple(size if size is not None else BATCH if k == 0 else f"axis_{k}" for k, size in sizes)
        return Input(name, shape, spec.dtype.name)

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs, in the order of their names."""
        outputs = self.signature(**{i.name: self.tf.constant(feeds[i.name]) for i in self.inputs})
        return [np.asarray(outputs[name].numpy()) for name in self._outputs()]

    def _outputs(self) -> list[str]:
        return list(self.signature.structured_outputs)

    def export(self, path: Path) -> None:
        """By tf2onnx.

        Raises:
            UsageError: it is missing.
            RuntimeFailure: it fails.
        """
        tf, tf2onnx = self.tf, need("tf2onnx")
        specs = [
            tf.TensorSpec([s if isinstance(s, int) else None for s in i.shape], i.dtype, name=i.name)
            for i in self.inputs
        ]
        self.outputs = self._outputs()
        names, signature, outputs = [i.name for i in self.inputs], self.signature, self._outputs()

        @tf.function(input_signature=specs)  # type: ignore[untyped-decorator]  # TensorFlow ships no types
        def positional(*arguments: Any) -> list[Any]:
            found = signature(**dict(zip(names, arguments, strict=True)))
            return [tf.identity(found[name], name=name) for name in outputs]

        try:
            tf2onnx.convert.from_function(
                positional, input_signature=specs, opset=self.request.opset or OPSET, output_path=str(path)
            )
        except Exception as error:  # tf2onnx raises anything
            raise refused("tf2onnx", error, "try another --opset") from error
        self.exporter = f"tf2onnx, {versions('tensorflow', 'tensorflow-cpu', 'tf2onnx')}"
