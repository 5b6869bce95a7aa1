"""spa prune, spa apply and spa verify."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from spa.cli import implant as implants
from spa.cli import output
from spa.cli.latency import attempts, headline
from spa.cli.metric import held_lines, show_reached
from spa.cli.options import (
    Batch,
    Dims,
    Inputs,
    Json,
    MaxLength,
    Memory,
    Model,
    NoLatency,
    Normalised,
    NoVerify,
    Output,
    Preprocess,
    Report,
    Samples,
    SamplesProvider,
    Seed,
    Server,
    Tokenizer,
    Verbose,
    check_output,
    read_dims,
    read_list,
    text_file,
)
from spa.cli.page import command_line, write_page
from spa.cli.query import (
    Aggregated,
    Alignment,
    Allocated,
    AllowIO,
    CacheFolder,
    CalibrationSource,
    Compensated,
    CriterionName,
    Evaluated,
    Ignored,
    Kinds,
    LatencyBatch,
    LatencyTable,
    LatencyThreads,
    LossName,
    MethodName,
    MetricName,
    Minimised,
    MinKept,
    NoCache,
    Recalibrated,
    ScopeName,
    Steps,
)
from spa.errors import UsageError, VerifyError

if TYPE_CHECKING:
    from spa.budget.select import Optimality
    from spa.pipeline import Result
    from spa.study import Fit
    from spa.verify import Verification

MORE = "spa.cli.prune.MORE"
"""Where a command that ends in this one leaves, in its context, what it has to say: a `More`."""
_SHOWN = 30
"""Groups without --verbose."""


@dataclass(frozen=True)
class More:
    """What was done before pruning."""

    export: dict[str, Any]
    """Of the model, as JSON."""
    kept: bool
    """Whether the model is still there afterwards."""


PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN.json", help="Plan written by `spa prune --plan`.")]


def prune(
    context: typer.Context,
    model: Model,
    out: Output,
    target: Annotated[
        list[str],
        typer.Option(
            "--target",
            metavar="METRIC=LIMIT",
            help="At most: macs=0.6 (of the original), macs=2.0G, params=50%, size=10MB, latency=5ms; or the smallest "
            "model with top1-drop=0.01; repeatable.",
            show_default=False,
        ),
    ],
    minimise: Minimised = None,
    metric: MetricName = None,
    evaluate: Evaluated = None,
    method: MethodName = None,
    criterion: CriterionName = None,
    aggregation: Aggregated = None,
    normalisation: Normalised = None,
    allocation: Allocated = None,
    compensate: Compensated = None,
    recalibrate: Recalibrated = None,
    calibration: CalibrationSource = None,
    samples: Samples = None,
    batch: Batch = 32,
    preprocess: Preprocess = None,
    tokenizer: Tokenizer = None,
    max_length: MaxLength = None,
    loss: LossName = "auto",
    memory: Memory = "4GB",
    provider: SamplesProvider = "cpu",
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    steps: Steps = 1,
    latency_table: LatencyTable = None,
    threads: LatencyThreads = 0,
    batch_size: LatencyBatch = None,
    scope: ScopeName = "exact",
    kinds: Kinds = None,
    ignore: Ignored = None,
    allow_io: AllowIO = None,
    align: Alignment = "auto",
    min_keep: MinKept = "auto",
    seed: Seed = 0,
    plan: Annotated[
        Path | None, typer.Option(metavar="PLAN.json", help="Write the plan there, for `spa apply` and `spa verify`.")
    ] = None,
    report: Report = None,
    no_latency: NoLatency = False,
    dim: Dims = None,
    inputs: Inputs = None,
    no_verify: NoVerify = False,
    server: Server = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Prune a model until it meets its targets, prove that the surgery is exact, compensate, and write it."""
    from spa.cache import default_folder
    from spa.folder import Folder
    from spa.pipeline import prune as here
    from spa.runtime import check_installation

    check_output(model, out, inputs)
    folder = Folder(model, out) if model.is_dir() else None
    run: Callable[..., Result] = here
    if not no_verify:
        output.warn(check_installation())
    if no_latency and report is None:
        raise UsageError("--no-latency is about the page of --report: give --report PAGE.html, or leave it out")
    if server is not None:
        from spa.cli.remote import far

        run = far(server, analysis=report is not None, quiet=json)
    if folder is not None:
        model, run = folder.model, folder.around(run)
    held: dict[str, Any] = {
        k: v
        for k, v in {"minimise": minimise, "metric": metric, "evaluate": evaluate, "allow_io": allow_io}.items()
        if v is not None
    }
    if server is None and not json:
        held["reached"] = show_reached
    taken = (model, out, *filter(None, (plan, inputs)))
    with (
        text_file(plan, model, out) as write,
        text_file(report, *taken) as write_report,
        output.stages(quiet=json) as progress,
    ):
        result = run(
            model,
            target=target,
            output=out,
            method=method,
            criterion=criterion,
            aggregation=aggregation,
            normalisation=normalisation,
            allocation=allocation,
            compensate=compensate,
            recalibrate=recalibrate,
            calibration=calibration,
            samples=samples,
            batch=batch,
            preprocess=preprocess,
            tokenizer=tokenizer,
            max_length=max_length,
            loss=loss,
            memory=memory,
            provider=provider,
            cache=None if no_cache else cache or default_folder(),
            steps=steps,
            latency_table=latency_table,
            threads=threads,
            batch_size=batch_size,
            scope=scope,
            kinds=read_list(kinds),
            ignore=ignore or (),
            align=read_align(align),
            min_keep=min_keep,
            seed=seed,
            dims=read_dims(dim),
            inputs=inputs,
            check=not no_verify,
            progress=progress,
            **held,
        )
        write(result.plan.to_json())
        if report is not None:
            write_page(
                write_report,
                result,
                model,
                command=command_line(context),
                latency=not no_latency,
                provider=provider,
                dims=read_dims(dim),
                inputs=inputs,
                seed=seed,
                progress=progress,
            )
    before: More | None = context.meta.get(MORE)
    if json:
        more = {} if before is None else {"export": before.export}
        more |= {} if folder is None else folder.to_json()
        output.emit({**summary(result, plan), "page": None if report is None else str(report), **more})
        return
    show(result, model if before is None or before.kept else None, verbose)
    for line in () if folder is None else folder.lines():
        output.console().print(line, soft_wrap=True)
    if plan is not None:
        output.console().print(f"plan: {plan}", soft_wrap=True)
    if report is not None:
        output.console().print(f"report: {report}", soft_wrap=True)


def apply(
    model: Model,
    plan: PlanArgument,
    out: Output,
    dim: Dims = None,
    inputs: Inputs = None,
    no_verify: NoVerify = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Cut a model as a plan says: the same plan gives the same bytes on any machine."""
    from spa.pipeline import apply as run

    check_output(model, out, plan, inputs)
    if implants.is_record(plan):
        implants.again(model, plan, out, dim, inputs, check=not no_verify, json=json, verbose=verbose)
        return
    with output.stages(quiet=json) as progress:
        result = run(
            model, plan, output=out, dims=read_dims(dim), inputs=inputs, check=not no_verify, progress=progress
        )
    if json:
        output.emit(summary(result, plan))
    else:
        show(result, model, verbose)


def verify(
    model: Model,
    pruned: Annotated[Path, typer.Argument(metavar="OUT", help="The pruned model.")],
    plan: Annotated[Path, typer.Option(metavar="PLAN.json", help="Plan that made OUT from MODEL.", show_default=False)],
    seed: Seed = 0,
    dim: Dims = None,
    inputs: Inputs = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare a pruned model with the reference that its plan defines on the original."""
    from spa.pipeline import verify as run

    planted = implants.is_record(plan)
    with output.stages(quiet=json) as progress:
        progress("verify", 0, 1)
        found = (implants.verify if planted else run)(
            model, pruned, plan, seed=seed, dims=read_dims(dim), inputs=inputs
        )
    body: dict[str, Any] = {**_verification(found), "passed": found.passed}
    if found.passed:
        text = _changed(found, pruned, plan) if found.compensated else _proof(found)
        text = implants.proof(found) if planted else text
        output.emit(body) if json else output.console().print(text, soft_wrap=True)
        return
    message = (
        f"{pruned} differs from its reference by {found.max_rel_error:.3g} of the output's magnitude "
        f"(accepted: {found.tolerance:g}); it is not what {plan} makes of {model}"
    )
    output.complain(message)
    if json:
        output.emit({**body, "error": {"code": VerifyError.code, "message": message}})
    raise typer.Exit(VerifyError.exit_status)


def _changed(found: Verification, pruned: Path, plan: Path) -> str:
    return (
        f"{pruned} has the structure that {plan} makes, and finite outputs; its weights were changed after the cut, "
        "and the plan does not hold them, so that they cannot be checked: they move the outputs by up to "
        f"{found.max_rel_error:.3g} of their magnitude"
    )


def read_align(text: str) -> int | Literal["auto"]:
    """`auto` or a number.

    Raises:
        UsageError: it is neither.
    """
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise UsageError(f"--align: cannot read {text!r}; write auto or a number such as 8")
    return int(text)


def _verification(found: Verification) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found)


def summary(result: Result, plan: Path | None) -> dict[str, Any]:
    """As `--json` prints it."""
    return {
        **result.report.to_json(),
        "output": str(result.output),
        "plan": None if plan is None else str(plan),
    }


def show(result: Result, model: Path | None, verbose: bool) -> None:
    """What a run did, as tables; `model` is None if it is gone."""
    screen = output.console()
    report = result.report
    screen.print(headline(report.latency), soft_wrap=True)
    rows = [
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
    cells = [(name, before, after, output.share(c.after, c.before)) for name, before, after, c in rows]
    screen.print(output.table(columns, cells, right=columns[1:]))
    groups = sorted(result.plan.groups, key=lambda g: -len(g.removed))
    shown = groups if verbose else groups[:_SHOWN]
    screen.print()
    screen.print(
        output.table(
            ("group", "kind", "units", "left", "exact"),
            [
                (g.name, g.kind, str(g.units), str(g.units - len(g.removed)), "exact" if g.exact else "statistic")
                for g in shown
            ],
            right=("units", "left"),
        )
    )
    if len(shown) < len(groups):
        screen.print(f"... and {len(groups) - len(shown)} more groups; --verbose lists all")
    screen.print(f"{report.removed_units} units removed from {report.groups} groups")
    for change in report.border:
        before, after = (
            ", ".join("?" if n is None else str(n) for n in sizes) for sizes in (change.before, change.after)
        )
        screen.print(f"{change.name}: [{before}] -> [{after}]", soft_wrap=True, markup=False)
    if report.align != "auto":
        screen.print(f"kept units are a multiple of {report.align}")
    if report.latency is not None:
        for line in attempts(report.latency):
            screen.print(line, soft_wrap=True)
    if report.optimality is not None:
        screen.print(_optimality(report.optimality), soft_wrap=True)
    screen.print()
    proof = "not verified" if report.verify is None else _proof(report.verify)
    screen.print(proof, soft_wrap=True)
    if report.metric is not None:
        for line in held_lines(report.metric):
            screen.print(line, soft_wrap=True)
    if report.fit is not None:
        screen.print(_fit(report.method, report.fit), soft_wrap=True)
    screen.print("seconds: " + ", ".join(f"{k} {v:.2f}" for k, v in report.seconds.items() if v))
    screen.print(f"wrote {result.output}", soft_wrap=True)
    models = " ".join(quote(str(path)) for path in (model, result.output) if path is not None)
    command = f"spa bench {models}"
    screen.print(f"Fewer MACs are not automatically faster: measure with `{command}`.", soft_wrap=True)


def _optimality(found: Optimality) -> str:
    reached = ", ".join(f"{100 * share:.1f}% of {target}" for target, share in found.reached.items())
    less = f", {100 * (1 - found.loss / found.efficient):.1f}% below efficient's" if found.efficient > 0 else ""
    return f"widths: predicted loss within {100 * found.gap:.2g}% of a lower bound{less}; used {reached}"


def _fit(method: str, fit: Fit) -> str:
    note = f" ({fit.note})" if fit.note else ""
    norms = ", norms re-estimated" if fit.recalibrated else ""
    return (
        f"{method} on {fit.samples} samples of {fit.calibration}{note}: error of the outputs "
        f"{fit.error_before:.3f} of their variance before compensation, {fit.error_after:.3f} after it{norms}"
    )


def _proof(found: Verification) -> str:
    reference = (
        "the original with the removed slices zeroed"
        if found.exact
        else "the masked original, its statistics taken over what is left"
    )
    return (
        f"proof: the pruned model equals {reference}: max relative error {found.max_rel_error:.1e} "
        f"(accepted: {found.tolerance:.0e})"
    )
