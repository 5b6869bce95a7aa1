"""The only place that knows the order of steps: load, analyse, score, plan, rewrite, verify, write."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from spa.budget import parse_targets
from spa.budget.select import Align, Allocation, Optimality, Selection
from spa.cache import Cache
from spa.calibration import load_calibration
from spa.cost import Metric, parameters_of
from spa.coupling import tensor_of
from spa.criteria import Aggregation, Normalisation
from spa.errors import OutputError, PlanError, UsageError
from spa.executors.collect import Setup
from spa.feeds import load_feeds
from spa.graph import Graph, Source, load, restore
from spa.groups import Analysis, analyze_model
from spa.methods import Compensation, Recalibration, resolve
from spa.options import Scope, check_choices, check_output, parse_memory, parse_min_keep
from spa.plan import GroupRecord, Plan
from spa.plan import read as read_plan
from spa.progress import Progress, silent
from spa.removal import Mask, kept_by, kept_without, removals
from spa.rewrite import rewritten
from spa.runtime import Provider
from spa.schedule import Schedule
from spa.signature import inputs_of
from spa.store import publish, save
from spa.study import Fit, Query, Study, best_of
from spa.verify import Verification, compare, masked, require, same_structure, zeroed
from spa.version import __version__

STAGES = ("load", "analyze", "calibrate", "compare", "score", "plan", "rewrite", "verify", "compensate", "save")


@dataclass(frozen=True)
class Change:
    """A quantity before and after."""

    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """What pruning did, in numbers."""

    macs: Change
    """Multiply-accumulates of one forward pass (batch 1 unless `dims` says otherwise)."""
    parameters: Change
    bytes: Change
    """Of the model with its external data."""
    groups: int
    """Groups that lost units."""
    removed_units: int
    verify: Verification | None
    """None if verification was switched off."""
    seconds: Mapping[str, float]
    """Wall time per stage."""
    align: Align = "auto"
    """Alignment that was used."""
    method: str = ""
    """The method, or the criterion where none was named."""
    fit: Fit | None = None
    """How well the compensated model does; None without calibration samples."""
    optimality: Optimality | None = None
    """How good the widths are by predicted losses; None unless the allocation is `knapsack`."""

    def to_json(self) -> dict[str, Any]:
        """As `spa prune --json` prints it."""
        body = asdict(self)
        body["seconds"] = {k: round(v, 4) for k, v in self.seconds.items()}
        return body


@dataclass(frozen=True)
class Result:
    """A pruned model and how it came about."""

    model: Any
    """The pruned model, of the same kind as the source; None if it was written to a file."""
    output: Path | None
    """Where it was written."""
    plan: Plan
    report: Report


@dataclass
class _Clock:
    progress: Progress
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.progress(name, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start
        self.progress(name, 1, 1)


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
        target: such as `macs=0.6` (at most 60 % of the original), `macs=2.0G`, `params=0.5`, `size=10MB`.
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
        provider: where samples are run: `cpu`, `cuda`, or `auto`.
        cache: folder in which measurements are kept for further queries; None keeps nothing.
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
    clock = _Clock(progress)
    targets = parse_targets(target)
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
    query = Query(analysis, targets, scope, tuple(kinds), tuple(ignore), align, keep, loss)
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
        "calibration": None if data is None else {"name": data.name, "samples": data.samples, "sha256": data.digest},
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
            selection = study.select(scored, spare)
            kept = kept_without(analysis, selection.removed)
            records = tuple(GroupRecord(g.name, g.kind, g.units, units, g.exact) for g, units in selection.removed)
            settings["align"] = selection.align
            plan = Plan(graph.sha256, removals(analysis, kept), records, settings, f"spa {__version__}")
        job = _Job(graph, analysis, plan, kept, clock, output, dims, inputs, seed, check, selection.align)
        try:
            return _finish(job, most, study, selection)
        except _Oversize as error:
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
    clock = _Clock(progress)
    plan, label = (plan, "the plan") if isinstance(plan, Plan) else (read_plan(Path(plan)), str(plan))
    check_output(output)
    with clock.stage("load"):
        graph = load(source)
    _check_model(graph, plan, label)
    with clock.stage("analyze"):
        analysis = analyze(graph, dims=dims)
    with clock.stage("plan"):
        kept = kept_by(analysis, plan, label)
    return _finish(_Job(graph, analysis, plan, kept, clock, output, dims, inputs, 0, check, "auto"))


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
    job = _Job(graph, analysis, plan, kept, _Clock(silent), None, dims, inputs, seed, True, "auto")
    model = load(pruned).model
    found = _compare(job, model)
    if found.passed or not plan.compensated or not same_structure(rewritten(analysis, kept).model, model):
        return found
    return replace(found, compensated=True)


def _check_model(graph: Graph, plan: Plan, label: str) -> None:
    if plan.sha256 != graph.sha256:
        raise PlanError(
            f"{label} belongs to another model (sha256 {plan.sha256[:12]}..., this one is {graph.sha256[:12]}...); "
            "use the model it was made for, or make the plan anew"
        )


# -- finishing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A plan on its way to a file."""

    graph: Graph
    analysis: Analysis
    plan: Plan
    kept: Mask
    clock: _Clock
    output: str | os.PathLike[str] | None
    dims: Mapping[str, int] | None
    inputs: str | os.PathLike[str] | None
    seed: int
    check: bool
    align: Align


class _Oversize(Exception):
    """What is written has more bytes or parameters than a target allows: structure and un-shared weights took more
    than estimated."""

    def __init__(self, metric: Metric, excess: float) -> None:
        super().__init__(metric, excess)
        self.metric, self.excess = metric, excess


def _finish(
    job: _Job,
    most: Mapping[Metric, float] | None = None,
    study: Schedule | None = None,
    chosen: Selection | None = None,
) -> Result:
    """Rewrite, write to a staging folder, verify, compensate, publish; at most `most` of a metric is accepted."""
    clock = job.clock
    with clock.stage("rewrite"):
        twin = rewritten(job.analysis, job.kept)
        model = twin.model
    path = Path(job.output) if job.output is not None else None
    name = path.name if path is not None else "pruned.onnx"
    try:
        folder = Path(tempfile.mkdtemp(prefix=".spa-", dir=path.parent if path is not None else None))
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with clock.stage("save"):
            size = save(model, folder / name, external=job.graph.external)
        written = _within(model, size, most)
        verification = None
        if job.check:
            with clock.stage("verify"):
                verification = _compare(job, folder / name)
                require(verification, str(path or "the pruned model"))
        fit = None
        if study is not None and chosen is not None and study.data is not None:
            with clock.stage("compensate"):
                fit = study.compensate(job.kept, twin, chosen.removed)
            with clock.stage("save"):
                size = save(model, folder / name, external=job.graph.external)
            written = _within(model, size, most)
        if path is not None:
            try:
                publish({path.with_name(f.name): f for f in sorted(folder.iterdir(), reverse=True)})
            except OSError as error:
                raise _unwritable(path, error) from error
        finished = restore(job.graph, model) if path is None else None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = _report(job, written, verification)
    if study is not None and chosen is not None:
        report = replace(report, method=study.method.name, fit=fit, optimality=chosen.optimality)
    return Result(finished, path, job.plan, report)


def _within(model: ir.Model, size: int, most: Mapping[Metric, float] | None) -> dict[Metric, float]:
    """What was written, if a target allows it."""
    written: dict[Metric, float] = {"bytes": size, "parameters": parameters_of(model)}
    for metric, limit in (most or {}).items():
        if written[metric] > limit:
            raise _Oversize(metric, int(written[metric] - limit) + 1)
    return written


def _report(job: _Job, written: Mapping[Metric, float], verification: Verification | None) -> Report:
    cost = job.analysis.cost
    before = cost.totals(cost.full)
    counts = job.analysis.coupling.solution.counts(job.kept)
    after = cost.totals([c if isinstance(c, int) else full for c, full in zip(counts, cost.full, strict=True)])
    return Report(
        Change(round(before["macs"]), round(after["macs"])),
        Change(job.analysis.parameters, round(written["parameters"])),
        Change(job.graph.file_bytes, round(written["bytes"])),
        len(job.plan.groups),
        sum(len(g.removed) for g in job.plan.groups),
        verification,
        job.clock.seconds,
        job.align,
    )


def _unwritable(path: Path | None, error: OSError) -> OutputError:
    where = tempfile.gettempdir() if path is None else str(path)
    return OutputError(f"{where}: cannot be written ({error.strerror}); check the folder's permissions and free space")


def _compare(job: _Job, pruned: ir.Model | Path) -> Verification:
    model = job.graph.model
    exact = is_exact(job.analysis, job.kept)
    reference = zeroed(model, job.plan.removed) if exact else masked(job.analysis, job.kept)
    feeds = load_feeds(Path(job.inputs), inputs_of(model)) if job.inputs is not None else None
    return compare(reference, pruned, exact=exact, seed=job.seed, dims=job.dims, feeds=feeds, original=model)


def is_exact(analysis: Analysis, kept: Mask) -> bool:
    """Whether a removal touches exact groups only."""
    return not any((~kept[g.positions]).any() for g in analysis.groups if not g.exact)


__all__ = [
    "Change",
    "Report",
    "Result",
    "analyze",
    "apply",
    "prune",
    "verify",
]
