"""Options and output that the commands about deployment share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from spa.cli import output
from spa.cli.options import check_output
from spa.errors import GateError

if TYPE_CHECKING:
    from spa.edge import Data, Fidelity, Step

Gates: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="NAME=LIMIT",
        help="What must be reached: agreement=0.98, max_error=0.02, size=2MB, accuracy_drop=0.01; repeatable.",
    ),
]
Compared: TypeAlias = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="PATH|none|noise|bn",
        help="Samples on which outputs are compared: .npz, folder of images, .jsonl or .txt; noise makes them up.",
    ),
]


def single(
    stage: str, model: Path, out: Path, data: Data, gate: Sequence[str] | None, json: bool, **options: Any
) -> None:
    """Run one stage and print what it did."""
    from spa.edge import convert

    check_output(model, out, Path(data.source) if Path(str(data.source)).is_file() else None)
    with output.stages(quiet=json) as progress:
        step = convert(stage, model, output=out, data=data, gate=list(gate or ()), progress=progress, **options)
    if json:
        output.emit(step.to_json())
        return
    screen = output.console()
    screen.print(steps_table([step]))
    for line in lines(step):
        screen.print(line, soft_wrap=True)
    screen.print(f"wrote {out}", soft_wrap=True)


def steps_table(steps: Sequence[Step]) -> Any:
    """One row per stage."""
    columns = ("stage", "size", "of its input", "max error", "error", "agreement", "accuracy", "seconds", "gates")
    return output.table(columns, [_row(step) for step in steps], right=columns[1:8])


def _row(step: Step) -> tuple[str, ...]:
    f = step.fidelity
    missed = [check.gate for check in step.checks if not check.passed]
    gates = "missed " + ", ".join(missed) if missed else f"{len(step.checks)} passed" if step.checks else "-"
    accuracy = "-" if f is None or f.accuracy is None else f"{100 * f.accuracy:.2f} %"
    return (
        step.stage,
        output.size(step.bytes_after),
        output.share(step.bytes_after, step.bytes_before),
        "-" if f is None else f"{f.max_error:.2g}",
        "-" if f is None else f"{f.error:.2g}",
        "-" if f is None or f.agreement is None else f"{100 * f.agreement:.2f} %",
        accuracy,
        f"{step.seconds:.1f}",
        gates,
    )


def lines(step: Step) -> list[str]:
    """What the table has no column for."""
    out = []
    f: Fidelity | None = step.fidelity
    if f is not None and f.accuracy is not None and f.accuracy_before is not None:
        out.append(f"{step.stage}: accuracy {100 * f.accuracy_before:.2f} % -> {100 * f.accuracy:.2f} %")
    if f is not None and f.metric is not None and f.metric_before is not None:
        out.append(f"{step.stage}: metric {f.metric_before:.4g} -> {f.metric:.4g}")
    left = step.detail.get("excluded") or step.detail.get("kept")
    if left:
        out.append(f"{step.stage}: left in floating point: {', '.join(left)}")
    if "speedup" in step.detail:
        before, after = step.detail["before_ms"], step.detail["after_ms"]
        how = f"{step.detail['verdict']}, {step.detail['speedup']:.2f}x"
        out.append(f"{step.stage}: {before:.3g} ms -> {after:.3g} ms: {how}")
    return out


def missed(step: Step) -> str:
    """One sentence about the gates that a step missed."""
    from spa.edge import require

    try:
        require(step)
    except GateError as error:
        return str(error)
    return ""
