"""spa import-weights: weights that were trained elsewhere, back in their graph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spa.cli import output
from spa.cli.export_torch import spoken
from spa.cli.options import Dims, Inputs, Json, Model, Output, Seed, check_output, read_dims


def import_weights(
    model: Model,
    weights: Annotated[
        Path,
        typer.Argument(
            metavar="WEIGHTS", help="State dict of the module: .npz, .safetensors or .pt.", show_default=False
        ),
    ],
    out: Output,
    inputs: Inputs = None,
    seed: Seed = 0,
    dim: Dims = None,
    json: Json = False,
) -> None:
    """Put the weights of a module of export-torch, BatchNorm statistics included, into the model it was made of."""
    from spa.train import import_weights as run

    check_output(model, out, weights, inputs)
    with output.stages(quiet=json) as progress:
        found = run(model, weights, out, inputs=inputs, dims=read_dims(dim), seed=seed, progress=spoken(progress))
    if json:
        output.emit(found.to_json())
        return
    screen = output.console()
    screen.print(f"{found.changed} of {found.tensors} weights and statistics are others now")
    screen.print(
        f"proof: ONNX Runtime computes what was trained: max relative error {found.verify.max_rel_error:.1e} "
        f"(accepted: {found.verify.tolerance:.0e})"
    )
    screen.print(f"wrote {found.output}", soft_wrap=True)
