"""A Paddle inference folder: a program (`.json` or `.pdmodel`) and its weights (`.pdiparams`), by paddle2onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spa.errors import ModelError, RuntimeFailure, UnsupportedModelError
from spa.export.drivers.base import (
    Array,
    first_line,
    made_up,
    named_axes,
    need,
    output_names,
    refused,
    versions,
)
from spa.export.request import BATCH, Input, Request

OPSET = 17


def open_source(request: Request) -> Paddle:
    """The program of a folder, or of the file that is named.

    Raises:
        UsageError: Paddle is missing.
        ModelError, UnsupportedModelError: the folder has no program, several, or one that cannot be read.
    """
    paddle = need("paddle", "paddlepaddle")
    program, weights = files(Path(request.source))
    try:
        layer = paddle.jit.load(str(program.with_suffix("")))
        layer.eval()
        inputs = layer._input_spec()
    except Exception as error:  # Paddle raises anything
        raise ModelError(
            f"cannot be loaded by Paddle ({first_line(error)}); save it again with paddle.jit.save"
        ) from error
    return Paddle(paddle, program, weights, layer, inputs, request)


def files(place: Path) -> tuple[Path, Path]:
    """The program and its weights.

    Raises:
        ModelError: there are none.
        UnsupportedModelError: there are several.
    """
    found = sorted(place.glob("*.pdiparams")) if place.is_dir() else [place.with_suffix(".pdiparams")]
    if not found:
        raise ModelError("has no .pdiparams; save the model with paddle.jit.save")
    if len(found) > 1:
        raise UnsupportedModelError(f"has {len(found)} models; name one, such as {found[0].with_suffix('.json')}")
    program = next((p for s in (".json", ".pdmodel") if (p := found[0].with_suffix(s)).is_file()), None)
    if program is None or not found[0].is_file():
        raise ModelError(f"has no program and weights of the name {found[0].stem}; save the model with paddle.jit.save")
    return program, found[0]


class Paddle:
    """A program for inference."""

    def __init__(
        self, paddle: Any, program: Path, weights: Path, layer: Any, inputs: Sequence[Any], request: Request
    ) -> None:
        self.paddle, self.program, self.weights, self.layer, self.request = paddle, program, weights, layer, request
        said = {i.name: i for i in request.inputs}
        self.inputs = [said.get(i.name) or self._input(i) for i in inputs]
        self.axes = named_axes(self.inputs)
        self.examples: dict[str, Array] = made_up(self.inputs, request.seed)
        self.outputs: Sequence[str] = ()
        self.exporter = ""

    def _input(self, spec: Any) -> Input:
        sizes = enumerate(spec.shape)
        shape = tuple(int(s) if s > 0 else BATCH if k == 0 else f"axis_{k}" for k, s in sizes)
        return Input(spec.name, shape, str(spec.dtype).rpartition(".")[2].lower())

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Outputs, in the program's order."""
        with self.paddle.no_grad():
            outputs = self.layer(*(self.paddle.to_tensor(feeds[i.name]) for i in self.inputs))
        leaves = [np.asarray(y.numpy()) for y in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]
        self.outputs = output_names([(k,) for k in range(len(leaves))])
        return leaves

    def export(self, path: Path) -> None:
        """By paddle2onnx.

        Raises:
            UsageError: it is missing.
            RuntimeFailure: it fails.
        """
        paddle2onnx = need("paddle2onnx")
        self.run(self.examples)
        advice = "try another --opset"
        try:
            paddle2onnx.export(
                str(self.program),
                str(self.weights),
                save_file=str(path),
                opset_version=self.request.opset or OPSET,
                verbose=False,
                enable_onnx_checker=False,
            )
        except SystemExit as error:  # it ends the program where it fails
            raise RuntimeFailure(f"paddle2onnx cannot export this model; {advice}, or see --verbose") from error
        except Exception as error:  # or raises anything
            raise refused("paddle2onnx", error, advice) from error
        if not path.is_file():
            raise RuntimeFailure(f"paddle2onnx wrote nothing; {advice}, or see --verbose")
        self.exporter = f"paddle2onnx, {versions('paddlepaddle', 'paddle2onnx')}"
