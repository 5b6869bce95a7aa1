"""spa implant: let channels of convolutions become 1 x 1."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spa.cli import output
from spa.cli.options import (
    Batch,
    Dims,
    Inputs,
    Json,
    Memory,
    Model,
    Normalised,
    NoVerify,
    Output,
    Preprocess,
    Samples,
    SamplesProvider,
    Seed,
    Verbose,
    check_output,
    read_dims,
    text_file,
)
from spa.errors import UsageError

if TYPE_CHECKING:
    from spa.implant import Implanted
    from spa.verify import Verification

_SHOWN = 30
"""Convolutions without --verbose."""


def implant(
    model: Model,
    out: Output,
    share: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Share of the channels that become 1 x 1: of all that can, or of those that --plan removes.",
            show_default=False,
        ),
    ],
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN.json",
            help="Plan of `spa prune`: what it removes leaves, its most important channels become 1 x 1 instead.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write what was done there, for `spa apply` and `spa verify`."),
    ] = None,
    weights: Annotated[
        Literal["auto", "fit", "sum", "centre", "zero"],
        typer.Option(
            help="Of the implants: fit to the outputs on samples, sum of the taps, the kernel's centre, or zero; "
            "auto: fit with samples, else sum."
        ),
    ] = "auto",
    method: Annotated[
        str | None, typer.Option(help="Method whose criterion is used.", show_default="the plan's, else l2")
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="How units are scored: l2, hap, lrp ... (`spa methods`).", show_default="the method's"),
    ] = None,
    normalisation: Normalised = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|none|noise|bn",
            help="Samples: .npz, or folder of images; none makes inputs up.",
            show_default=False,
        ),
    ] = None,
    samples: Samples = None,
    batch: Batch = 32,
    preprocess: Preprocess = None,
    loss: Annotated[
        Literal["auto", "ce", "sampled", "gaussian", "lm"],
        typer.Option(help="What gradients are taken of, for criteria that look at them."),
    ] = "auto",
    memory: Memory = "4GB",
    provider: SamplesProvider = "cpu",
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave groups alone whose name, tensors or nodes match; repeatable."),
    ] = None,
    align: Annotated[
        str, typer.Option(metavar="auto|N", help="Implants per group are a multiple of this; auto: what kernels like.")
    ] = "auto",
    seed: Seed = 0,
    dim: Dims = None,
    inputs: Inputs = None,
    no_verify: NoVerify = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Let channels of k x k convolutions be computed by 1 x 1 convolutions: HAP's neural implant."""
    from spa.implant import implant as run

    check_output(model, out, plan, inputs)
    if align != "auto" and not (align.isdecimal() and int(align)):
        raise UsageError(f"--align: cannot read {align!r}; write auto or a number such as 8")
    taken = [path for path in (model, out, plan) if path is not None]
    with text_file(record, *taken) as write, output.stages(quiet=json) as progress:
        result = run(
            model,
            share=share,
            output=out,
            plan=plan,
            method=method,
            criterion=criterion,
            normalisation=normalisation,
            weights=weights,
            calibration=calibration,
            samples=samples,
            batch=batch,
            preprocess=preprocess,
            loss=loss,
            memory=memory,
            provider=provider,
            ignore=ignore or (),
            align="auto" if align == "auto" else int(align),
            seed=seed,
            dims=read_dims(dim),
            inputs=inputs,
            check=not no_verify,
            progress=progress,
        )
        write(result.record.to_json())
    if json:
        output.emit(body(result, record))
    else:
        show(result, verbose)
        if record is not None:
            output.console().print(f"record: {record}", soft_wrap=True)


def is_record(path: Path) -> bool:
    """Whether a file is a record of implants rather than a plan."""
    from spa.implant import is_record as run

    return run(path)


def again(
    model: Path,
    record: Path,
    out: Path,
    dim: list[str] | None,
    inputs: Path | None,
    *,
    check: bool,
    json: bool,
    verbose: bool,
) -> None:
    """What `spa apply` does with a record."""
    from spa.implant import apply as run

    with output.stages(quiet=json) as progress:
        result = run(model, record, output=out, dims=read_dims(dim), inputs=inputs, check=check, progress=progress)
    if json:
        output.emit(body(result, record))
    else:
        show(result, verbose)


def verify(
    model: Path, implanted: Path, record: Path, *, seed: int, dims: dict[str, int], inputs: Path | None
) -> Verification:
    """What `spa verify` does with a record."""
    from spa.implant import verify as run

    return run(model, implanted, record, dims=dims, inputs=inputs, seed=seed)


def body(result: Implanted, record: Path | None) -> dict[str, Any]:
    """What --json prints."""
    places = [{"output": p.output, "channels": len(p.channels)} for p in result.record.implants]
    return {
        **result.report.to_json(),
        "implanted": places,
        "output": str(result.output),
        "record": None if record is None else str(record),
    }


def show(result: Implanted, verbose: bool) -> None:
    """Tables of costs and of what was split."""
    screen = output.console()
    report = result.report
    cells = [
        ("MACs", output.count(report.macs.before), output.count(report.macs.after), report.macs),
        (
            "parameters",
            output.count(report.parameters.before),
            output.count(report.parameters.after),
            report.parameters,
        ),
        ("file", output.size(report.bytes.before), output.size(report.bytes.after), report.bytes),
    ]
    columns = ("", "before", "after", "kept")
    rows = [(name, before, after, output.share(c.after, c.before)) for name, before, after, c in cells]
    screen.print(output.table(columns, rows, right=columns[1:]))
    places = result.record.implants
    shown = places if verbose else places[:_SHOWN]
    screen.print(
        output.table(
            ("convolution", "implants"), [(p.output, str(len(p.channels))) for p in shown], right=("implants",)
        )
    )
    if len(shown) < len(places):
        screen.print(f"... and {len(places) - len(shown)} more convolutions; --verbose lists all")
    if verbose:
        for name, why in report.refused.items():
            screen.print(f"{name}: holds no implants, as {why}", soft_wrap=True)
    screen.print(
        f"{report.implants} channels of {report.convolutions} convolutions are 1 x 1, weights: {report.weights}"
    )
    screen.print("not verified" if report.verify is None else proof(report.verify), soft_wrap=True)
    screen.print(f"wrote {result.output}", soft_wrap=True)


def proof(found: Verification) -> str:
    """The proof in words."""
    return (
        "proof: same outputs as the original with these kernels zero but for their middle: max relative error "
        f"{found.max_rel_error:.1e} (accepted: {found.tolerance:.0e})"
    )
