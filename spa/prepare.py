"""What every query of a model starts with: the model, its analysis, samples, a method, and what was measured before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from spa.budget.select import Align, Allocation, Selection
from spa.budget.targets import Target
from spa.cache import Cache
from spa.calibration import Calibration, load_calibration
from spa.closed_loop import ClosedLoop
from spa.cost import Metric
from spa.coupling import tensor_of
from spa.criteria import Aggregation, Normalisation
from spa.errors import UsageError
from spa.executors.collect import Setup
from spa.finish import Clock, Job
from spa.graph import Graph, Source, load
from spa.groups import Analysis, analyze_model
from spa.latency.query import Setting
from spa.methods import Compensation, Recalibration, resolve
from spa.options import Scope, check_border, check_choices, parse_memory, parse_min_keep
from spa.plan import GroupRecord, Plan
from spa.removal import kept_without, removals
from spa.runtime import Provider
from spa.schedule import Schedule
from spa.study import Query, Study, best_of
from spa.version import __version__

HELD = 0.2
"""Share of the samples that nothing is fit on, where a metric is measured and no others are given."""


@dataclass(frozen=True)
class Options:
    """How units are scored, chosen and compensated, on what: all of a query but its targets. See `spa.prune`."""

    method: str | None = None
    criterion: str | None = None
    aggregation: Aggregation | None = None
    normalisation: Normalisation | None = None
    allocation: Allocation | None = None
    compensate: Compensation | None = None
    recalibrate: Recalibration | None = None
    calibration: Any = None
    samples: int | None = None
    batch: int = 32
    preprocess: Any = None
    tokenizer: str | os.PathLike[str] | None = None
    max_length: int | None = None
    loss: Any = "auto"
    memory: str | int = "4GB"
    provider: Provider = "cpu"
    cache: str | os.PathLike[str] | None = None
    steps: int = 1
    latency_table: str | os.PathLike[str] | None = None
    threads: int = 0
    batch_size: int | None = None
    scope: Scope = "exact"
    kinds: Sequence[str] = ()
    ignore: Sequence[str] = ()
    align: Align = "auto"
    min_keep: str | int = "auto"
    seed: int = 0
    dims: Mapping[str, int] | None = None
    inputs: str | os.PathLike[str] | None = None
    check: bool = True
    allow_io: Sequence[str] = ()

    @staticmethod
    def of(given: Mapping[str, Any]) -> Options:
        """From keywords.

        Raises:
            UsageError: one of them is no option.
        """
        known = [f.name for f in fields(Options)]
        for name in given:
            if name not in known:
                raise UsageError(f"unknown option {name!r}; options are {', '.join(known)}")
        return Options(**given)


@dataclass(frozen=True)
class Hold:
    """Samples that nothing is fit on."""

    evaluate: Any = None
    """Where they come from; None: a part of the calibration samples."""


@dataclass
class Prepared:
    """A query that can be answered for any target."""

    options: Options
    graph: Graph
    analysis: Analysis
    clock: Clock
    store: Cache
    setup: Setup
    study: Schedule
    data: Calibration | None
    """What is fit on."""
    held: Calibration | None
    """What metrics are measured on."""
    loop: ClosedLoop | None
    whole: str = ""
    """Digest of all calibration samples, those that are held out included."""
    texts: list[str] = field(default_factory=list)
    """Targets, for plans."""

    def plan(self, selection: Selection) -> Plan:
        """What leaves, in terms of the input file."""
        kept = kept_without(self.analysis, selection.removed)
        records = tuple(GroupRecord(g.name, g.kind, g.units, units, g.exact) for g, units in selection.removed)
        options, data = self.options, self.data
        settings = {
            "targets": self.texts,
            **self.study.method.settings(),
            "calibration": None
            if data is None
            else {"name": data.name, "samples": data.samples, "sha256": data.digest},
            "scope": options.scope,
            "kinds": list(options.kinds),
            "ignore": list(options.ignore),
            "min_keep": str(options.min_keep),
            **({"steps": options.steps} if options.steps > 1 else {}),
            **({"allow_io": list(options.allow_io)} if options.allow_io else {}),
            "seed": options.seed,
            "align": selection.align,
        }
        return Plan(self.graph.sha256, removals(self.analysis, kept), records, settings, f"spa {__version__}")

    def job(self, plan: Plan, selection: Selection, output: str | os.PathLike[str] | None) -> Job:
        """A plan on its way to a file."""
        options, kept = self.options, kept_without(self.analysis, selection.removed)
        return Job(
            self.graph,
            self.analysis,
            plan,
            kept,
            self.clock,
            output,
            options.dims,
            options.inputs,
            options.seed,
            options.check,
            selection.align,
        )

    def full(self) -> dict[Metric, float]:
        """Bytes and parameters of the original, of which the written file may have more than was estimated."""
        return {"bytes": self.graph.file_bytes, "parameters": self.analysis.parameters}


def analyze(source: Source | Graph, *, dims: Mapping[str, int] | None = None, allow_io: Sequence[str] = ()) -> Analysis:
    """Find what can be pruned in a model: groups with their units, what is frozen and why.

    Args:
        source: path, `onnx.ModelProto`, `onnx_ir.Model`, `onnx_graphsurgeon.Graph`, or a loaded `Graph`.
        dims: sizes of symbolic axes by name, for the costs.
        allow_io: shell patterns of inputs and outputs that may change their shapes.

    Raises:
        ModelError: the model cannot be read (see `spa.load`).
        UsageError: a pattern matches no input and no output.
    """
    graph = source if isinstance(source, Graph) else load(source)
    check_border(graph.model, allow_io)
    return analyze_model(graph.model, dims, _overhead(graph), free=allow_io)


def _overhead(graph: Graph) -> int:
    """Bytes of the file that are not weights."""
    tensors = sum(v.const_value.nbytes for v in graph.model.graph.initializers.values() if v.const_value is not None)
    for node in graph.model.graph.all_nodes():
        tensor = tensor_of(node)
        tensors += tensor.nbytes if tensor is not None else 0
    return max(graph.file_bytes - tensors, 0)


@contextlib.contextmanager
def prepared(
    source: Source | Graph,
    options: Options,
    targets: Sequence[Target],
    clock: Clock,
    *,
    timed: bool = False,
    hold: Hold | None = None,
) -> Iterator[Prepared]:
    """Everything that does not depend on what exactly is asked for.

    Args:
        source: the model.
        options: of the query.
        targets: limits on costs, which groups and steps may depend on.
        clock: counts the stages.
        timed: whether latency counts.
        hold: whether a metric will be measured, and on what.

    Raises:
        UsageError: an option is wrong, or samples do not fit the model.
        ModelError: the model cannot be read.
        TargetError: the options leave nothing to prune.
    """
    timed = timed or options.latency_table is not None or any(t.metric == "latency" for t in targets)
    setting = Setting(
        "cuda" if options.provider == "cuda" else "cpu",
        options.threads,
        options.batch_size,
        None if options.latency_table is None else Path(options.latency_table),
    )
    if options.threads < 0 or (options.batch_size is not None and options.batch_size < 1):
        raise UsageError("--threads must be 0 (ONNX Runtime's choice) or more, and --batch-size 1 or more")
    chosen = resolve(
        options.method,
        criterion=options.criterion,
        aggregation=options.aggregation,
        normalisation=options.normalisation,
        allocation=options.allocation,
        compensate=options.compensate,
        recalibrate=options.recalibrate,
    )
    check_choices(options.scope, options.kinds, options.align)
    if options.allow_io and (options.calibration is not None or hold is not None or timed):
        raise UsageError(
            "--allow-io changes what the model is fed with: leave out --calibration, --evaluate and latency targets"
        )
    if options.steps < 1:
        raise UsageError(f"--steps: {options.steps} is too few; write 1 or more")
    if hold is not None and options.steps > 1:
        raise UsageError("--steps is for targets on costs: leave it out where a metric is measured")
    keep = parse_min_keep(options.min_keep)
    setup = Setup(options.batch, parse_memory(options.memory), options.provider)
    needed = [m.needs_data for m in chosen if m.needs_data]
    if needed and options.calibration is None:
        raise UsageError(
            f"{needed[0]} needs samples of the inputs: give --calibration PATH, or --calibration none to make them up"
        )
    if hold is not None and options.calibration is None and hold.evaluate is None:
        raise UsageError("a metric needs samples: give --evaluate PATH, or --calibration PATH to hold some of them out")
    with clock.stage("load"):
        graph = source if isinstance(source, Graph) else load(source)
    with clock.stage("analyze"):
        analysis = analyze(graph, dims=options.dims, allow_io=options.allow_io)
    with clock.stage("calibrate"):
        data = None if options.calibration is None else _samples(graph, options, options.calibration, options.samples)
        whole = "" if data is None else data.digest
        data, held = _held(graph, options, data, hold)
    store = Cache(None if options.cache is None else Path(options.cache), graph.sha256)
    with contextlib.ExitStack() as stack:
        loop: ClosedLoop | None = None
        if timed:
            with clock.stage("table"):
                loop = ClosedLoop(
                    graph,
                    analysis,
                    setting,
                    dims=options.dims,
                    inputs=None if options.inputs is None else Path(options.inputs),
                    cache=store.folder,
                    progress=clock.progress,
                )
                stack.callback(loop.close)
                analysis = loop.analysis
        query = Query(
            analysis, targets, options.scope, tuple(options.kinds), tuple(options.ignore), options.align, keep,
            options.loss,
        )  # fmt: skip
        if loop is not None:
            query = replace(query, widths=loop.widths, extend=loop.extend)
        studies = [Study(query, m, options.seed, data, setup, store, clock.progress) for m in chosen]
        if len(studies) > 1:
            with clock.stage("compare"):
                studies = [best_of(studies)]
        study = Schedule(studies[0], options.steps, options.dims)
        texts = [t.text for t in targets]
        yield Prepared(options, graph, analysis, clock, store, setup, study, data, held, loop, whole, texts)


def _samples(graph: Graph, options: Options, source: Any, samples: int | None) -> Calibration:
    return load_calibration(
        source,
        graph.model,
        samples=samples,
        seed=options.seed,
        preprocess=options.preprocess,
        tokenizer=options.tokenizer,
        max_length=options.max_length,
        dims=options.dims,
    )


def _held(
    graph: Graph, options: Options, data: Calibration | None, hold: Hold | None
) -> tuple[Calibration | None, Calibration | None]:
    """Samples to fit on, and others for the metric."""
    if hold is None:
        return data, None
    if hold.evaluate is not None:
        return data, _samples(graph, options, hold.evaluate, None)
    assert data is not None
    return data.split(max(1, round(HELD * data.samples)))
