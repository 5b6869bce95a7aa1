"""From a plan to a file: rewrite, write to a staging folder, prove, compensate, measure, publish."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from spa.budget.select import Align, Optimality, Selection
from spa.closed_loop import ClosedLoop
from spa.cost import Metric, parameters_of
from spa.errors import OutputError
from spa.evidence import Vector
from spa.feeds import load_feeds
from spa.graph import Graph, restore
from spa.groups import Analysis
from spa.latency.query import LatencyReport
from spa.metrics import Drop
from spa.plan import Plan
from spa.progress import Progress
from spa.removal import Mask
from spa.rewrite import rewritten
from spa.schedule import Schedule
from spa.signature import inputs_of
from spa.store import publish, save
from spa.study import Fit
from spa.twin import Twin
from spa.verify import Verification, border, compare, masked, require, zeroed

STAGES = (  # in the order of a run; `search` evaluates models for a metric target
    "load",
    "analyze",
    "calibrate",
    "table",
    "compare",
    "score",
    "search",
    "plan",
    "rewrite",
    "verify",
    "compensate",
    "measure",
    "save",
)


@dataclass(frozen=True)
class Change:
    """A quantity before and after."""

    before: int
    after: int


@dataclass(frozen=True)
class Reshaped:
    """An input or output whose shape changed (`--allow-io`)."""

    name: str
    before: tuple[int | str | None, ...]
    """Sizes, names of axes, or None."""
    after: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Reached:
    """One model of a search or family, with what it was measured to be."""

    share: float
    """What was asked of the cost that is minimised, as a share of the original's."""
    costs: Mapping[str, float]
    """By the names of `spa.cost.Metric`, of the cut as planned."""
    drop: Drop
    draft: bool
    """Whether the weights are those of the closed form, where the method goes on from there."""
    met: bool = True
    """Whether the metric's target was kept to; true where there is none."""


@dataclass(frozen=True)
class Held:
    """How a target on a metric was met."""

    target: str
    limit: float
    """By how much the metric may get worse, in its own unit."""
    drop: Drop
    data: str
    """What the held-out samples are."""
    minimised: str
    reached: tuple[Reached, ...]
    """Everything that was evaluated on the way, in order."""

    @property
    def note(self) -> str:
        """What is to be said about how sure the drop is; empty if the samples resolve the limit."""
        error, n = self.drop.error, self.drop.samples
        if error is None:
            return "the metric gives one number, so that its standard error is not known"
        if self.limit >= error and error > 0:
            return ""
        if error == 0:
            return f"no difference on any of the {n} held-out samples: that does not tell how large it is on others"
        return (
            f"the tolerance of {self.limit:g} is below one standard error of the measured drop ({error:.2g} over {n} "
            "held-out samples): these samples cannot tell such a drop from none; give more with --evaluate"
        )


@dataclass(frozen=True)
class Answer:
    """What a search decided, with the weights that were evaluated."""

    selection: Selection
    twin: Twin
    fit: Fit | None
    held: Held


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
    latency: LatencyReport | None = None
    """Latency before and after; None unless it was asked for."""
    metric: Held | None = None
    """The metric that was a target, on held-out samples; None unless there was one."""
    border: tuple[Reshaped, ...] = ()
    """Inputs and outputs with other shapes than before."""

    def to_json(self) -> dict[str, Any]:
        """As `spa prune --json` prints it."""
        body = asdict(self)
        body["seconds"] = {k: round(v, 4) for k, v in self.seconds.items()}
        if self.latency is not None:
            body["latency"]["share"] = self.latency.share
        if self.metric is not None:
            body["metric"]["note"] = self.metric.note
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
    analysis: Analysis | None = field(default=None, repr=False, compare=False)
    """Of the model before."""
    curves: Mapping[str, Vector] | None = field(default=None, repr=False, compare=False)
    """Estimated error of the outputs after k units of a group left, [units + 1]; None where no trials were made."""


@dataclass
class Clock:
    """Wall time per stage."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done inside."""
        self.progress(name, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start
        self.progress(name, 1, 1)


@dataclass(frozen=True)
class Job:
    """A plan on its way to a file."""

    graph: Graph
    analysis: Analysis
    plan: Plan
    kept: Mask
    clock: Clock
    output: str | os.PathLike[str] | None
    dims: Mapping[str, int] | None
    inputs: str | os.PathLike[str] | None
    seed: int
    check: bool
    align: Align


class Oversize(Exception):
    """What is written has more bytes or parameters than a target allows: structure, un-shared weights and new biases
    took more than estimated."""

    def __init__(self, metric: Metric, over: float) -> None:
        """`over` is what was not foreseen."""
        super().__init__(metric, over)
        self.metric, self.over = metric, over


def finish(
    job: Job,
    most: Mapping[Metric, float] | None = None,
    study: Schedule | None = None,
    chosen: Selection | None = None,
    loop: ClosedLoop | None = None,
    answer: Answer | None = None,
) -> Result:
    """Rewrite, write to a staging folder, verify, compensate, time, publish; at most `most` of a metric is accepted.

    Where a search has compensated already (`answer`), the cut is proved, and its weights are written.
    """
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
            size = save(model, folder / name, external=job.graph.external, shard=job.graph.shard)
        written = _within(job, model, size, most)
        verification = None
        if job.check:
            with clock.stage("verify"):
                verification = compared(job, folder / name)
                require(verification, str(path or "the pruned model"))
        fit = None
        if study is not None and chosen is not None and study.data is not None:
            with clock.stage("compensate"):
                if answer is None:
                    fit = study.compensate(job.kept, twin, chosen.removed, lambda: _within(job, twin.model, size, most))
                else:
                    model, fit = answer.twin.model, answer.fit
            with clock.stage("save"):
                size = save(model, folder / name, external=job.graph.external, shard=job.graph.shard)
            written = _within(job, model, size, most)
        latency = None
        if loop is not None:
            with clock.stage("measure"):
                latency = loop.report(folder / name, job.kept)
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
        report = replace(report, method=study.method.name, fit=fit, optimality=chosen.optimality, latency=latency)
    if answer is not None:
        report = replace(report, metric=answer.held)
    return Result(finished, path, job.plan, report, job.analysis)


def _within(job: Job, model: ir.Model, size: int, most: Mapping[Metric, float] | None) -> dict[Metric, float]:
    """What was written, if a target allows it."""
    written: dict[Metric, float] = {"bytes": size, "parameters": parameters_of(model)}
    for metric, limit in (most or {}).items():
        if written[metric] > limit:
            raise Oversize(metric, written[metric] - _planned(job)[metric])
    return written


def _planned(job: Job) -> dict[Metric, float]:
    """What the cost model says of the plan."""
    cost = job.analysis.cost
    counts = job.analysis.coupling.solution.counts(job.kept)
    return cost.totals([c if isinstance(c, int) else full for c, full in zip(counts, cost.full, strict=True)])


def _report(job: Job, written: Mapping[Metric, float], verification: Verification | None) -> Report:
    cost = job.analysis.cost
    before, after = cost.totals(cost.full), _planned(job)
    return Report(
        Change(round(before["macs"]), round(after["macs"])),
        Change(job.analysis.parameters, round(written["parameters"])),
        Change(job.graph.file_bytes, round(written["bytes"])),
        len(job.plan.groups),
        sum(len(g.removed) for g in job.plan.groups),
        verification,
        job.clock.seconds,
        job.align,
        border=tuple(_reshaped(job)),
    )


def _reshaped(job: Job) -> Iterator[Reshaped]:
    left, graph = border(job.analysis, job.kept), job.graph.model.graph
    for value in (*graph.inputs, *graph.outputs):
        name = value.name or ""
        if name in left and value.shape is not None:
            before = tuple(size if isinstance(size, int) else size.value for size in value.shape)
            new = {axis: len(index) for axis, index in left[name]}
            yield Reshaped(name, before, tuple(new.get(axis, size) for axis, size in enumerate(before)))


def _unwritable(path: Path | None, error: OSError) -> OutputError:
    where = tempfile.gettempdir() if path is None else str(path)
    return OutputError(f"{where}: cannot be written ({error.strerror}); check the folder's permissions and free space")


def compared(job: Job, pruned: ir.Model | Path) -> Verification:
    """A pruned model against the reference that its plan defines."""
    model = job.graph.model
    exact = is_exact(job.analysis, job.kept)
    reference = zeroed(model, job.plan.removed) if exact else masked(job.analysis, job.kept)
    feeds = load_feeds(Path(job.inputs), inputs_of(model)) if job.inputs is not None else None
    return compare(
        reference,
        pruned,
        exact=exact,
        seed=job.seed,
        dims=job.dims,
        feeds=feeds,
        original=model,
        border=border(job.analysis, job.kept),
    )


def is_exact(analysis: Analysis, kept: Mask) -> bool:
    """Whether a removal touches exact groups only."""
    return not any((~kept[g.positions]).any() for g in analysis.groups if not g.exact)
