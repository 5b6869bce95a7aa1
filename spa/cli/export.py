"""spa export: a framework's model to ONNX."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from spa.cli import output
from spa.cli.options import Dims, Json, NoVerify, Output, Seed, Verbose, read_dims

if TYPE_CHECKING:
    from spa.export.run import Exported

Source: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="torch:package.module:factory, keras:..., jax:package.module:function, a .pt2 or .keras file, or a "
        "folder: SavedModel, Hugging Face, Paddle.",
        show_default=False,
    ),
]
ModelInputs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME=SIZES",
        help="An input that SOURCE does not say itself: x=1x3x224x224, ids=batch,sequence:int64; repeatable, in order.",
    ),
]
ExporterName: TypeAlias = Annotated[
    Literal["auto", "dynamo", "torchscript"],
    typer.Option("--exporter", help="Which of torch's exporters; auto: the first, and the second if it fails."),
]
Opset: TypeAlias = Annotated[
    int | None, typer.Option("--opset", metavar="N", help="ONNX opset.", min=7, show_default="the exporter's best")
]
StaticBatch: TypeAlias = Annotated[
    bool, typer.Option("--static-batch", help="Keep the first axis of the inputs as it is in the examples.")
]
Python: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--python",
        metavar="PATH",
        help="A Python that has the framework, and need not have spa.",
        show_default="this one",
    ),
]


def export(
    source: Source,
    out: Output,
    model_inputs: ModelInputs = None,
    exporter: ExporterName = "auto",
    opset: Opset = None,
    static_batch: StaticBatch = False,
    python: Python = None,
    seed: Seed = 0,
    dim: Dims = None,
    no_verify: NoVerify = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Export a framework's model to ONNX, and compare the file's outputs with the model's own."""
    from spa.export.run import export as run

    with output.stages(quiet=json) as progress:
        made = run(
            source,
            out,
            inputs=model_inputs or (),
            exporter=exporter,
            opset=opset,
            static_batch=static_batch,
            python=python,
            dims=read_dims(dim),
            seed=seed,
            check=not no_verify,
            printed=sys.stderr.write if verbose else None,
            progress=progress,
        )
    if json:
        output.emit(made.to_json())
    else:
        show(made)


def show(made: Exported, *, kept: bool = True) -> None:
    """What an export did; without `kept` its file is not mentioned."""
    screen = output.console()
    screen.print(f"exported by {made.exporter}, opset {made.opset}", soft_wrap=True)
    for spec in made.inputs:
        screen.print(f"input {spec.name}: {spec.dtype} [{', '.join(map(str, spec.shape))}]", soft_wrap=True)
    screen.print(f"outputs: {', '.join(made.outputs)}", soft_wrap=True)
    screen.print(f"{made.parameters:,} parameters, {output.size(made.bytes)}")
    if made.verify is None:
        screen.print("not verified")
    else:
        sizes = ", ".join(map(str, made.verify.batches))
        batches = f" with batches of {sizes}" if sizes else ""
        screen.print(
            f"proof: the file computes what {made.source} does{batches}: max relative error "
            f"{made.verify.max_rel_error:.1e} (accepted: {made.verify.tolerance:.0e})",
            soft_wrap=True,
        )
    if kept:
        screen.print(f"wrote {made.output}", soft_wrap=True)
