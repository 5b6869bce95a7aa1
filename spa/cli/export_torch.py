"""spa export-torch: a model as the source of a torch module."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spa.cli import output
from spa.cli.options import Dims, Inputs, Json, Model, NoVerify, Seed, check_output, read_dims

if TYPE_CHECKING:
    from spa.progress import Progress
    from spa.train import Module


def export_torch(
    model: Model,
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="module.py", help="Python file; the weights go beside it.", show_default=False
        ),
    ],
    inputs: Inputs = None,
    seed: Seed = 0,
    dim: Dims = None,
    no_verify: NoVerify = False,
    json: Json = False,
) -> None:
    """Write a model as a torch module in plain source, to be trained without spa; import-weights takes it back."""
    from spa.train import export_torch as run

    check_output(model, out, inputs)
    check_output(model, out.with_suffix(".npz"), inputs)
    with output.stages(quiet=json) as progress:
        made = run(
            model, out, inputs=inputs, dims=read_dims(dim), seed=seed, check=not no_verify, progress=spoken(progress)
        )
    if json:
        output.emit(made.to_json())
    else:
        _show(made)


def spoken(progress: Progress) -> Progress:
    """Progress in the words of these commands."""
    words = {"export": "writing it as torch code", "verify": "comparing torch and ONNX Runtime"}

    def tell(stage: str, done: int, total: int) -> None:
        progress(words.get(stage, stage), done, total)

    return tell


def _show(made: Module) -> None:
    screen = output.console()
    copied = f"; {made.copied} functions copied from the interpreter" if made.copied else ""
    screen.print(f"{made.parameters:,} numbers to train{copied}")
    if made.verify is not None:
        screen.print(
            f"proof: the module computes what ONNX Runtime does: max relative error {made.verify.max_rel_error:.1e} "
            f"(accepted: {made.verify.tolerance:.0e})"
        )
    screen.print(f"wrote {made.output} and {made.weights}", soft_wrap=True)
