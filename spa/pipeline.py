"""The only place that knows the order of steps: load, analyse, score, plan, rewrite, verify, write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spa.budget import parse_targets
from spa.budget.select import Align, Allocation
from spa.cache import Cache
from spa.calibration import load_calibration
from spa.closed_loop import ClosedLoop
from spa.cost import Metric
from spa.coupling import tensor_of
from spa.criteria import Aggregation, Normalisation
from spa.errors import PlanError, UsageError
from spa.executors.collect import Setup
from spa.finish import Change, Clock, Job, Oversize, Report, Result, compared, finish, is_exact
from spa.graph import Graph, Source, load
from spa.groups import Analysis, analyze_model
from spa.latency.query import LatencyReport, Setting
from spa.methods import Compensation, Recalibration, resolve
from spa.options import Scope, check_choices, check_output, parse_memory, parse_min_keep
from spa.plan import GroupRecord, Plan
from spa.plan import read as read_plan
from spa.progress import Progress, silent
from spa.removal import kept_by, kept_without, removals
from spa.rewrite import rewritten
from spa.runtime import Provider
from spa.schedule import Schedule
from spa.study import Query, Study, best_of
from spa.verify import Verification, same_structure
from spa.version import __version__


def analyze(source: Source | Graph, *, dims: Mapping[str, int] | None = None) -> Analysis:
    """Find what can be pruned in a model: groups with their units, what is frozen and why.

    Args:
        source: path, `onnx.ModelProto`, `onnx_ir.Model`, `onnx_graphsurgeon.Graph`, or a loaded `Graph`.
        dims: sizes of symbolic axes by name, for the costs.

    Raises:
        ModelError: the model cannot be read (see `spa.load`).
    """
    graph = source if isinstance(source, Graph) else load(source)
    return analyze_model(graph.model, dims, _overhead(graph))


def _overhead(graph: Graph) -> int:
    """Bytes of the file that are not weights."""
    tensors = sum(v.const_value.nbytes for v in graph.model.graph.initializers.values() if v.const_value is not None)
    for node in graph.model.graph.all_nodes():
        tensor = tensor_of(node)
        tensors += tensor.nbytes if tensor is not None else 0
    return max(graph.file_bytes - tensors, 0)


def prune(
    source: Source,
    *,
    target: str | Sequence[str],
    output: str | os.PathLike[str] | None = None,
    method: str | None = None,
    criterion: str | None = None,
    aggregation: Aggregation | None = None,
    normalisation: Normalisation | None = None,
    allocation: Allocation | None = None,
    compensate: Compensation | None = None,
    recalibrate: Recalibration | None = None,
    calibration: Any = None,
    samples: int | None = None,
    batch: int = 32,
    preprocess: Any = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    loss: Any = "auto",
    memory: str | int = "4GB",
    provider: Provider = "cpu",
    cache: str | os.PathLike[str] | None = None,
    steps: int = 1,
    latency_table: str | os.PathLike[str] | None = None,
    threads: int = 0,
    batch_size: int | None = None,
    scope: Scope = "exact",
    kinds: Sequence[str] = (),
    ignore: Sequence[str] = (),
    align: Align = "auto",
    min_keep: str | int = "auto",
    seed: int = 0,
    dims: Mapping[str, int] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    check: bool = True,
    progress: Progress = silent,
) -> Result:
    """Prune a model until it meets every target, prove that the surgery is exact, compensate, and write it.

    Args:
        source: path, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`; it is not changed.
        target: such as `macs=0.6` (at most 60 % of the original), `macs=2.0G`, `params=0.5`, `size=10MB`, or
            `latency=5ms`.
        output: file to write; without it `Result.model` holds the pruned model, of the same kind as `source`.
        method: name in `spa.METHODS`, which stands for a criterion, a budget rule and a compensation, or `auto`: the
            one of several that does best on samples held out; by default l2 norms without compensation.
        criterion: name in `spa.CRITERIA`; this and the next five override a part of the method.
        aggregation: how the scores of a unit's members are joined.
        normalisation: how scores of different groups are made comparable.
        allocation: `global` ranking, the same share of every group (`uniform`), least loss per cost (`efficient`), or
            least loss (`knapsack`).
        compensate: `bias` puts the mean of what was removed into the biases; `obs` refits all weights behind it in
            closed form, on the pruned model's own activations; `obs-dense` on the original's; `none`.
        recalibrate: `norm` re-estimates norm statistics, `auto` keeps that if it helps, `none`.
        calibration: samples: see `spa.load_calibration`; `none`, `noise` and `bn` make inputs up.
        samples: use only so many of them.
        batch: samples per run.
        preprocess: how images become inputs, see `spa.load_calibration`.
        tokenizer: `tokenizer.json` for texts.
        max_length: tokens per text.
        loss: for criteria that need gradients: `ce` (labels of the samples), `sampled` (labels drawn from the model's
            own outputs), `gaussian`, `lm`, `auto`, or a callable, see `spa.interpreter.objective`.
        memory: what measurements and activations may take, such as `4GB`.
        provider: where samples are run, and latency is measured: `cpu`, `cuda`, or `auto`.
        cache: folder in which measurements are kept for further queries; None keeps nothing.
        latency_table: table of operators, see `spa profile`; without it latency targets measure one, and keep it in
            `cache`. With it `align="auto"` means the widths that are worth having on its device.
        threads: inside one operator, where latency is measured; 0 lets ONNX Runtime choose.
        batch_size: of the inputs, where latency is measured; by default 1.
        steps: prune in so many steps and score what is left again after each, on the model as it is by then.
        scope: `exact` prunes only atoms that leave exactly; `all` also those that meet a statistic.
        kinds: only these kinds of units (all if empty).
        ignore: shell patterns; groups whose name, tensors or nodes match are left alone.
        align: kept units per group are a multiple of this.
        min_keep: units kept per group: a number, a share such as "10%", or per kind: "head=2,channel=8"; `auto` keeps
            a tenth of every group unless a target needs more to leave.
        seed: of random scores, of the choice of samples and of the inputs used for verification.
        dims: sizes of symbolic axes by name, for costs and verification.
        inputs: `.npz` with one array per graph input, for verification instead of synthetic inputs.
        check: verify before anything is written.
        progress: called with (stage, done, total) while it runs, see `spa.progress`: stages of `Report.seconds`, and
            inside them `collect` (samples), `weigh` (trials of groups), `refit` and `norms` (layers).

    Raises:
        UsageError: an option is wrong, or samples do not fit the model.
        ModelError: the model cannot be read.
        TargetError: a target cannot be reached.
        VerifyError: the result differs from its reference; nothing is written.
        RuntimeFailure: the model does not run, so that it cannot be verified or measured.
        OutputError: the result cannot be written.
    """
    clock = Clock(progress)
    targets = parse_targets(target)
    timed = latency_table is not None or any(t.metric == "latency" for t in targets)
    setting = Setting(
        "cuda" if provider == "cuda" else "cpu",
        threads,
        batch_size,
        None if latency_table is None else Path(latency_table),
    )
    if threads < 0 or (batch_size is not None and batch_size < 1):
        raise UsageError("--threads must be 0 (ONNX Runtime's choice) or more, and --batch-size 1 or more")
    chosen = resolve(
        method,
        criterion=criterion,
        aggregation=aggregation,
        normalisation=normalisation,
        allocation=allocation,
        compensate=compensate,
        recalibrate=recalibrate,
    )
    check_choices(scope, kinds, align)
    if steps < 1:
        raise UsageError(f"--steps: {steps} is too few; write 1 or more")
    keep = parse_min_keep(min_keep)
    setup = Setup(batch, parse_memory(memory), provider)
    needed = [m.needs_data for m in chosen if m.needs_data]
    if needed and calibration is None:
        raise UsageError(
            f"{needed[0]} needs samples of the inputs: give --calibration PATH, or --calibration none to make them up"
        )
    check_output(output)
    with clock.stage("load"):
        graph = load(source)
    with clock.stage("analyze"):
        analysis = analyze(graph, dims=dims)
    data = None
    with clock.stage("calibrate"):
        if calibration is not None:
            data = load_calibration(
                calibration,
                graph.model,
                samples=samples,
                seed=seed,
                preprocess=preprocess,
                tokenizer=tokenizer,
                max_length=max_length,
                dims=dims,
            )
    store = Cache(None if cache is None else Path(cache), graph.sha256)
    with contextlib.ExitStack() as stack:
        loop: ClosedLoop | None = None
        if timed:
            with clock.stage("table"):
                loop = ClosedLoop(
                    graph,
                    analysis,
                    setting,
                    dims=dims,
                    inputs=None if inputs is None else Path(inputs),
                    cache=store.folder,
                    progress=progress,
                )
                stack.callback(loop.close)
                analysis = loop.analysis
        query = Query(analysis, targets, scope, tuple(kinds), tuple(ignore), align, keep, loss)
        if loop is not None:
            query = replace(query, widths=loop.widths, extend=loop.extend)
        studies = [Study(query, m, seed, data, setup, store, clock.progress) for m in chosen]
        if len(studies) > 1:
            with clock.stage("compare"):
                studies = [best_of(studies)]
        study = Schedule(studies[0], steps, dims)
        with clock.stage("score"):
            scored = study.score()
        settings = {
            "targets": [t.text for t in targets],
            **study.method.settings(),
            "calibration": None
            if data is None
            else {"name": data.name, "samples": data.samples, "sha256": data.digest},
            "scope": scope,
            "kinds": list(kinds),
            "ignore": list(ignore),
            "min_keep": str(min_keep),
            **({"steps": steps} if steps > 1 else {}),
            "seed": seed,
        }
        full: dict[Metric, float] = {"bytes": graph.file_bytes, "parameters": analysis.parameters}
        most: dict[Metric, float] = {}
        for t in targets:
            if t.metric in full:
                most[t.metric] = min(t.bound(full[t.metric]), most.get(t.metric, float("inf")))
        spare: dict[Metric, float] = {}
        while True:
            with clock.stage("plan"):
                selection = study.select(scored, spare) if loop is None else loop.select(study, scored, targets, spare)
                kept = kept_without(analysis, selection.removed)
                records = tuple(GroupRecord(g.name, g.kind, g.units, units, g.exact) for g, units in selection.removed)
                settings["align"] = selection.align
                plan = Plan(graph.sha256, removals(analysis, kept), records, settings, f"spa {__version__}")
            job = Job(graph, analysis, plan, kept, clock, output, dims, inputs, seed, check, selection.align)
            try:
                return replace(finish(job, most, study, selection, loop), curves=scored.curves)
            except Oversize as error:
                spare[error.metric] = spare.get(error.metric, 0) + error.excess


def apply(
    source: Source,
    plan: Plan | str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    dims: Mapping[str, int] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    check: bool = False,
    progress: Progress = silent,
) -> Result:
    """Cut a model as a plan says: the same bytes on any machine.

    Raises:
        PlanError: the plan is malformed or belongs to another model.
        ModelError, OutputError: as `prune`.
        VerifyError, RuntimeFailure: as `prune`, with `check` only.
    """
    clock = Clock(progress)
    plan, label = (plan, "the plan") if isinstance(plan, Plan) else (read_plan(Path(plan)), str(plan))
    check_output(output)
    with clock.stage("load"):
        graph = load(source)
    _check_model(graph, plan, label)
    with clock.stage("analyze"):
        analysis = analyze(graph, dims=dims)
    with clock.stage("plan"):
        kept = kept_by(analysis, plan, label)
    return finish(Job(graph, analysis, plan, kept, clock, output, dims, inputs, 0, check, "auto"))


def verify(
    source: Source,
    pruned: Source,
    plan: Plan | str | os.PathLike[str],
    *,
    dims: Mapping[str, int] | None = None,
    inputs: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Verification:
    """Compare a pruned model with the reference that its plan defines on the original.

    A plan does not hold weights. Where its settings say that they were changed after the cut, a model that differs from
    the reference has passed (`Verification.compensated`) if it has the structure of the cut, and finite outputs of the
    right shapes: the numbers in its weights are not checked.

    Raises:
        PlanError: the plan is malformed or belongs to another model.
        ModelError: one of the models cannot be read.
        RuntimeFailure: one of the models does not run.
    """
    plan, label = (plan, "the plan") if isinstance(plan, Plan) else (read_plan(Path(plan)), str(plan))
    graph = load(source)
    _check_model(graph, plan, label)
    analysis = analyze(graph, dims=dims)
    kept = kept_by(analysis, plan, label)
    job = Job(graph, analysis, plan, kept, Clock(silent), None, dims, inputs, seed, True, "auto")
    model = load(pruned).model
    found = compared(job, model)
    if found.passed or not plan.compensated or not same_structure(rewritten(analysis, kept).model, model):
        return found
    return replace(found, compensated=True)


def _check_model(graph: Graph, plan: Plan, label: str) -> None:
    if plan.sha256 != graph.sha256:
        raise PlanError(
            f"{label} belongs to another model (sha256 {plan.sha256[:12]}..., this one is {graph.sha256[:12]}...); "
            "use the model it was made for, or make the plan anew"
        )


__all__ = [
    "Change",
    "LatencyReport",
    "Report",
    "Result",
    "analyze",
    "apply",
    "is_exact",
    "prune",
    "verify",
]
