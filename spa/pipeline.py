"""The only place that knows the order of steps: load, analyse, score, plan, rewrite, verify, write."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spa.budget.select import Align, Allocation
from spa.budget.targets import COSTS, parse_request
from spa.cost import Metric
from spa.criteria import Aggregation, Normalisation
from spa.errors import PlanError, UsageError
from spa.finish import Answer, Change, Clock, Job, Oversize, Reached, Report, Result, compared, finish, is_exact
from spa.frontier.search import Search, check_minimise
from spa.graph import Graph, Source, load
from spa.latency.query import LatencyReport
from spa.methods import Compensation, Recalibration
from spa.metrics import Custom
from spa.options import Scope, check_output
from spa.plan import Plan
from spa.plan import read as read_plan
from spa.prepare import Hold, Options, analyze, prepared
from spa.progress import Progress, silent
from spa.removal import kept_by
from spa.rewrite import rewritten
from spa.runtime import Provider
from spa.verify import Verification, same_structure


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
    allow_io: Sequence[str] = (),
    evaluate: Any = None,
    metric: str | Custom | None = None,
    minimise: str | None = None,
    reached: Callable[[Reached], None] | None = None,
    progress: Progress = silent,
) -> Result:
    """Prune a model until it meets every target, prove that the surgery is exact, compensate, and write it.

    Args:
        source: path, `onnx.ModelProto`, `onnx_ir.Model` or `onnx_graphsurgeon.Graph`; it is not changed.
        target: such as `macs=0.6` (at most 60 % of the original), `macs=2.0G`, `params=0.5`, `size=10MB`, or
            `latency=5ms`; or `top1-drop=0.01`: the smallest model whose metric gets worse by at most so much on samples
            that nothing was fit on (a name in `spa.metrics.METRICS`, or `metric`), within the other limits.
        output: file to write; without it `Result.model` holds the pruned model, of the same kind as `source`.
        method: name in `spa.METHODS`, which stands for a criterion, a budget rule and a compensation, or `auto`: the
            one of several that does best on samples held out; by default l2 norms without compensation.
        criterion: name in `spa.CRITERIA`; this and the next five override a part of the method.
        aggregation: how the scores of a unit's members are joined.
        normalisation: how scores of different groups are made comparable.
        allocation: `global` ranking, the same share of every group (`uniform`), least loss per cost (`efficient`), or
            least loss (`knapsack`).
        compensate: `bias` puts the mean of what was removed into the biases; `obs` refits all weights behind it in
            closed form, on the pruned model's own activations; `obs-dense` on the original's; `stitch` is that with
            attention heads mixed, which takes no pass over the samples; `none`.
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
        allow_io: shell patterns of inputs and outputs of the graph whose shapes may change, such as those of a KV
            cache; all others keep theirs. `Report.border` has the new ones.
        evaluate: samples for a metric target, as `calibration`; by default a fifth of the calibration samples, which
            are then not fit on.
        metric: what `metric-drop` is about: a name, or a function of all outputs [samples, ...] and labels that gives
            one number (or one per sample), larger is better. By default top1 with labels, else divergence.
        minimise: what the smallest model with a metric target is smallest in: `macs`, `params`, `size`, `latency`.
        reached: called with every point that the search for a metric target evaluates.
        progress: called with (stage, done, total) while it runs, see `spa.progress`: stages of `Report.seconds`, and
            inside them `collect` (samples), `weigh` (trials of groups), `refit` and `norms` (layers), and `evaluate`
            (held-out samples).

    Raises:
        UsageError: an option is wrong, or samples do not fit the model.
        ModelError: the model cannot be read.
        TargetError: a target cannot be reached.
        VerifyError: the result differs from its reference; nothing is written.
        RuntimeFailure: the model does not run, so that it cannot be verified or measured.
        OutputError: the result cannot be written.
    """
    clock = Clock(progress)
    targets, goal = parse_request(target)
    check_output(output)
    options = Options(
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
        cache=cache,
        steps=steps,
        latency_table=latency_table,
        threads=threads,
        batch_size=batch_size,
        scope=scope,
        kinds=kinds,
        ignore=ignore,
        align=align,
        min_keep=min_keep,
        seed=seed,
        dims=dims,
        inputs=inputs,
        check=check,
        allow_io=allow_io,
    )
    if goal is None and (evaluate is not None or metric is not None or minimise is not None):
        raise UsageError(
            "--evaluate, --metric and --minimise are about a metric that is a target: give --target top1-drop=0.01 or "
            "the like, or leave them out"
        )
    hold = None if goal is None else Hold(evaluate)
    smallest = COSTS[check_minimise(minimise or "macs")]
    timed = goal is not None and smallest == "latency"
    with prepared(source, options, targets, clock, timed=timed, hold=hold) as query:
        with clock.stage("score"):
            scored = query.study.score()
        search = None if goal is None else Search(query, scored, goal, metric, smallest, reached)
        most: dict[Metric, float] = {}
        full = query.full()
        for t in targets:
            if t.metric in full:
                most[t.metric] = min(t.bound(full[t.metric]), most.get(t.metric, float("inf")))
        spare: dict[Metric, float] = {}
        loop = query.loop
        while True:
            found: Answer | None = None
            with clock.stage("plan" if search is None else "search"):
                if search is not None:
                    found = search.answer(spare)
                    selection = found.selection
                elif loop is not None:
                    selection = loop.select(query.study, scored, targets, spare)
                else:
                    selection = query.study.select(scored, spare)
            plan = query.plan(selection)
            try:
                result = finish(query.job(plan, selection, output), most, query.study, selection, loop, found)
                return replace(result, curves=scored.curves)
            except Oversize as error:
                spare[error.metric] = max(math.ceil(error.over), spare.get(error.metric, 0) + 1)


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
        analysis = analyze(graph, dims=dims, allow_io=plan.settings.get("allow_io", ()))
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
    analysis = analyze(graph, dims=dims, allow_io=plan.settings.get("allow_io", ()))
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
