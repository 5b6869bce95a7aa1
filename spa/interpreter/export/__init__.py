"""Models as the source of torch modules, for those who want to train elsewhere; and where their weights belong.

The layers with weights are modules of `torch.nn`, other operators one line of torch each (`forms`), and what no form
covers is the interpreter's own function, copied (`copied`). Shape arithmetic becomes Python integers (`sizes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from spa.interpreter.export.call import Weight
from spa.interpreter.export.document import text
from spa.interpreter.export.writer import written
from spa.interpreter.module import compiled

__all__ = ["Exported", "Weight", "exported"]


@dataclass(frozen=True)
class Exported:
    """A model as source."""

    text: str
    """The module's code; it imports torch, numpy and the standard library."""
    weights: Mapping[str, Weight]
    """Tensors by their name in the module's state dict."""
    inputs: tuple[str, ...]
    """Arguments of `forward`, in the order of the graph's inputs that must be fed."""
    helpers: int
    """How many functions were copied from the interpreter."""

    def state(self) -> dict[str, Tensor]:
        """The numbers of the model, as the state dict has them."""
        return {name: weight.tensor for name, weight in self.weights.items()}


def exported(model: ir.Model, title: str, file: str) -> Exported:
    """The source of a model. The same model gives the same text.

    Args:
        model: as `spa.load` gives it.
        title: what the module's document calls the model.
        file: name of the file of weights that the module will read.

    Raises:
        UnsupportedModelError: a node cannot be computed, or has no source form; the message names it.
    """
    compiler, leaves = compiled(model)
    code = written(model, compiler, leaves)
    return Exported(text(model, code, title, file), code.weights, code.inputs, len(code.helpers))
