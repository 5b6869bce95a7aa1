"""The page of a run, for commands that have `--report`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spa.errors import SpaError
from spa.progress import Progress

if TYPE_CHECKING:
    from spa.pipeline import Result
    from spa.report.data import Frontier, Speed
    from spa.runtime import Provider


def command_line(context: typer.Context) -> str:
    """The command that runs, as a POSIX shell takes it."""
    arguments = context.find_root().obj
    return shlex.join(["spa", *arguments]) if isinstance(arguments, tuple) else ""


def write_page(
    write: Callable[[str], None],
    result: Result,
    model: Path,
    *,
    command: str,
    latency: bool,
    provider: Provider,
    dims: Mapping[str, int],
    inputs: Path | None,
    seed: int,
    progress: Progress,
    frontier: Frontier | None = None,
) -> None:
    """Measure what the page needs and write it.

    The pruned model is written by then, so that what cannot be measured is said on the page and is no error.

    Args:
        write: writes the text to its file.
        result: what pruning gave.
        model: the model before.
        command: that made the result.
        latency: whether to measure it.
        provider: where to run the models.
        dims: sizes of symbolic axes.
        inputs: an .npz file of inputs.
        seed: of made-up inputs.
        progress: told how far the measurement is (`latency`).
        frontier: other models that are known; by default those of a search for a metric target.
    """
    from spa.report import gather, render
    from spa.report.family import searched
    from spa.report.speed import measure

    speed: Speed | None = None
    reason = "--no-latency was given" if not latency else ""
    if latency and result.output is not None:
        try:
            speed = measure(
                model,
                result.output,
                known=result.report.latency,
                provider=provider,
                dims=dims,
                inputs=inputs,
                seed=seed,
                progress=lambda done, total: progress("latency", done, total),
            )
        except SpaError as error:
            reason = str(error).rstrip(".")
    frontier = frontier or searched(result)
    page = gather(result, model=str(model), command=command, frontier=frontier, speed=speed, unmeasured=reason)
    write(render(page))
