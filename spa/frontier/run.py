"""Making a family of models: one calibration, many plans, each measured on held-out samples."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from spa.budget.targets import COSTS, Target
from spa.cost import Metric
from spa.errors import OutputError, TargetError, UsageError
from spa.finish import Clock
from spa.frontier.index import NAME, PLANS, Family, Point, read, write
from spa.frontier.judge import Judge, chosen
from spa.frontier.search import Candidate, check_minimise, judge_of, made
from spa.graph import Source
from spa.metrics import Custom
from spa.metrics import Metric as Measure
from spa.options import check_output
from spa.prepare import Hold, Options, Prepared, prepared
from spa.progress import Progress, silent
from spa.version import __version__

SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3)
"""Of the cost that is minimised, where nobody says."""
_PLACE = frozenset({"calibration", "cache", "memory", "provider", "check", "batch", "inputs"})
"""Options that decide where and how things are run, not what comes out."""


def frontier(
    source: Source,
    *,
    output: str | os.PathLike[str],
    shares: Sequence[float] = SHARES,
    minimise: str = "macs",
    metric: str | Custom | None = None,
    evaluate: Any = None,
    refit: bool = False,
    reached: Callable[[Point], None] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> Family:
    """A family of pruned models, from large to small, with what each costs and how good it is on held-out samples.

    A run that was stopped goes on where it was, if the same is asked for again; other shares are added to those there.

    Args:
        source: as for `spa.prune`; not changed.
        output: folder for the index, a plan per point and a page.
        shares: of the minimised cost, one point each.
        minimise: `macs`, `params`, `size`, or `latency` (as the table has it).
        metric: a name in `spa.metrics.METRICS`, or a function, see `spa.prune`; by default top1 with labels, else
            divergence.
        evaluate: held-out samples, as `calibration`; by default a fifth of the calibration samples.
        refit: measure each point with the method's own compensation, where that runs the pruned model layer by layer
            (minutes per point); by default with the closed form, which a refit improves on.
        reached: told about every point as it is finished.
        progress: see `spa.prune`; `frontier` counts the points.
        **options: of `spa.prune`: `method`, `calibration`, `cache` ...; by default method `obspa` with samples.

    Raises:
        UsageError: an option is wrong, or the folder holds a frontier of something else.
        TargetError: nothing can be pruned, or no share can be reached.
        ModelError, RuntimeFailure, OutputError: as `spa.prune`.
    """
    given = Options.of(options)
    if given.method is None and given.criterion is None and given.calibration is not None:
        given = replace(given, method="obspa")
    smallest = COSTS[check_minimise(minimise)]
    wanted = sorted({round(float(s), 6) for s in shares}, reverse=True)
    if not wanted or wanted[0] > 1 or wanted[-1] <= 0:
        raise UsageError("--shares: give shares of the original's cost above 0 and at most 1, such as 0.9,0.7,0.5")
    if given.steps > 1:
        raise UsageError("--steps is for targets on costs: leave it out where a metric is measured")
    folder = Path(output)
    check_output(folder / "x" if folder.is_dir() else folder)
    clock = Clock(progress)
    hold = Hold(evaluate)
    with prepared(source, given, (), clock, timed=smallest == "latency", hold=hold) as query:
        assert query.held is not None
        what = chosen(metric, query.held)
        judge = judge_of(query, what)
        start = _described(query, judge, what, folder, minimise, evaluate, wanted, refit)
        family = _resumed(start)
        if family.complete:
            return family
        with clock.stage("score"):
            scored = query.study.score()
        known = {f"{p.share:g}" for p in family.points} | set(family.skipped)
        with clock.stage("search"):
            for k, share in enumerate(wanted):
                progress("frontier", k, len(wanted))
                if f"{share:g}" in known:
                    continue
                target = Target(smallest, share, True, f"{minimise}={share:g}")
                query.texts[:] = [target.text]
                try:
                    selection = query.study.select(scored, None, [target])
                except TargetError as error:
                    family = replace(family, skipped={**family.skipped, f"{share:g}": str(error)})
                else:
                    point = _point(query, made(query, judge, selection, share, draft=_drafts(query, refit)), folder)
                    family = ranked(family, point, smallest)
                    if reached is not None:
                        reached(next(p for p in family.points if p.share == share))
                family.write()
            progress("frontier", len(wanted), len(wanted))
        if not family.points:
            raise TargetError(f"none of the shares can be reached: {next(iter(family.skipped.values()))}")
        return family


def _drafts(query: Prepared, refit: bool) -> bool:
    return not refit and query.study.method.compensate == "obs"


def _point(query: Prepared, found: Candidate, folder: Path) -> Point:
    """Write the plan of a model; its index is given later."""
    plan = query.plan(found.selection)
    name = f"{PLANS}/{found.reached.share:.6g}.json"
    write(folder / name, plan.to_json())
    costs = {"macs": 0.0, "parameters": 0.0, "bytes": 0.0} | dict(found.reached.costs)
    measured = None
    if query.loop is not None and query.loop.watch is not None:
        measured = query.loop.watch.ratio(found.twin.model)[1]
    return Point(0, found.reached.share, costs, found.reached.drop, name, found.reached.draft, measured_ms=measured)


def ranked(family: Family, point: Point, cost: Metric) -> Family:
    """With one more point: all in the order of their cost, those that others beat marked."""
    points = sorted((*family.points, point), key=lambda p: (p.cost(cost), p.drop.drop, p.share))
    best, out = np.inf, []
    for k, p in enumerate(points):
        out.append(replace(p, index=k, front=p.drop.drop < best))
        best = min(best, p.drop.drop)
    return replace(family, points=tuple(out))


def _described(
    query: Prepared,
    judge: Judge,
    what: Measure | Custom,
    folder: Path,
    minimise: str,
    evaluate: Any,
    shares: Sequence[float],
    refit: bool,
) -> Family:
    """A family without points."""
    options, held, data = query.options, query.held, query.data
    assert held is not None
    plain = Options()
    given = {
        f.name: _text(value)
        for f in fields(Options)
        if f.name != "calibration" and (value := getattr(options, f.name)) != getattr(plain, f.name)
    }
    if options.method == "auto":
        given["method"] = query.study.method.name  # `spa pick` need not compare methods again
    calibration = {
        "source": _place(options.calibration),
        "evaluate": _place(evaluate),
        "name": None if data is None else data.name,
        "samples": None if data is None else data.samples,
        "sha256": None if data is None else data.digest,
        "held": held.name,
        "held_samples": held.samples,
        "held_sha256": held.digest,
    }
    decides = {k: v for k, v in given.items() if k not in _PLACE}
    digests = [query.graph.sha256, calibration["sha256"], calibration["held_sha256"]]
    asked = [__version__, digests, decides, judge.name, minimise, refit, query.study.method.settings()]
    table = query.loop.table.key if query.loop is not None else None
    text = json.dumps([*asked, None if table is None else asdict(table)], sort_keys=True, default=str)
    cost = query.analysis.cost
    model = query.graph.path
    return Family(
        folder=folder,
        model="" if model is None else str(model.resolve()),
        sha256=query.graph.sha256,
        metric=judge.name,
        higher_is_better=what.higher_is_better if isinstance(what, Measure) else True,
        minimised=minimise,
        original={str(m): float(v) for m, v in cost.totals(cost.full).items()},
        before=judge.before,
        method=query.study.method.name,
        calibration=calibration,
        options=given,
        request=hashlib.sha256(text.encode()).hexdigest(),
        shares=tuple(shares),
    )


def _text(value: Any) -> Any:
    """An option as the index has it."""
    if isinstance(value, Mapping):
        return {str(k): _text(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_text(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _place(source: Any) -> str | None:
    """Where samples came from, if `spa pick` can read them again."""
    if not isinstance(source, (str, os.PathLike)):
        return None
    return str(source) if str(source) in ("none", "noise", "bn") else str(Path(source).resolve())


def _resumed(start: Family) -> Family:
    """What is there already of the same family.

    Raises:
        UsageError: the folder holds another one.
        OutputError: it holds something else.
    """
    folder = start.folder
    if not (folder / NAME).exists():
        if folder.is_dir() and any(p for p in folder.iterdir() if p.name != PLANS and not p.name.startswith(".")):
            raise OutputError(f"{folder}: is not empty and holds no frontier; name a new or empty folder")
        start.write()
        return start
    for left in (*folder.glob(".*.tmp"), *(folder / PLANS).glob(".*.tmp")):  # of a run that was killed as it wrote
        left.unlink(missing_ok=True)
    found = read(folder)
    if found.request != start.request:
        raise UsageError(
            f"{folder}: holds a frontier of another model, other samples or options; name another folder, or remove it"
        )
    shares = sorted({*found.shares, *start.shares}, reverse=True)
    return replace(found, folder=folder, shares=tuple(shares))
