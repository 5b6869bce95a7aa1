"""One model of a family, made and proved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from spa.budget.select import Selection
from spa.budget.targets import COSTS, Goal, Target, parse_request
from spa.errors import PlanError, TargetError, UsageError
from spa.finish import Answer, Clock, Held, Reached, Result, finish
from spa.frontier.index import Family, Point, read
from spa.frontier.judge import chosen, tolerance
from spa.frontier.search import judge_of
from spa.graph import Source, load
from spa.methods import Compensation
from spa.metrics import METRICS, Custom
from spa.options import check_output
from spa.plan import Plan
from spa.plan import read as read_plan
from spa.prepare import Hold, Options, Prepared, prepared
from spa.progress import Progress, silent
from spa.removal import kept_without
from spa.rewrite import rewritten


def pick(
    folder: str | os.PathLike[str] | Family,
    *,
    output: str | os.PathLike[str] | None = None,
    target: str | list[str] | None = None,
    index: int | None = None,
    model: Source | None = None,
    calibration: Any = None,
    evaluate: Any = None,
    metric: Custom | None = None,
    compensate: Compensation | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = silent,
) -> Result:
    """Make one model of a family: cut as its plan says, prove the cut, compensate, measure the metric, write.

    Args:
        folder: of the family, or the family.
        output: file to write; without it the model is in the result.
        target: such as `macs=0.6` or `top1-drop=0.01`: the best point by the metric within limits on costs, the
            cheapest one where the metric is a target.
        index: of the point, instead of a target.
        model: the dense model, where it is no longer where it was.
        calibration: its samples, likewise.
        evaluate: held-out samples, likewise.
        metric: the function that the family was measured with, if it was one.
        compensate: in place of the method's; `stitch` gives exactly what a draft of the family was measured with.
        cache: folder with measurements; by default that of the family.
        progress: see `spa.prune`.

    Raises:
        UsageError: neither or both of target and index; or samples are not those of the family.
        PlanError: the folder holds no family, or the model is another one.
        TargetError: no point meets the target.
        VerifyError, RuntimeFailure, ModelError, OutputError: as `spa.prune`.
    """
    family = folder if isinstance(folder, Family) else read(Path(folder))
    point, goal = choose(family, target, index)
    check_output(output)
    source = model if model is not None else family.model
    if isinstance(source, str) and not (source and Path(source).is_file()):
        raise UsageError(f"the model {source or 'of this frontier'} is not there any more: give it with --model MODEL")
    clock = Clock(progress)
    with clock.stage("load"):
        graph = load(source)
    if graph.sha256 != family.sha256:
        raise PlanError(
            f"{family.folder}: belongs to another model (sha256 {family.sha256[:12]}..., {source} is "
            f"{graph.sha256[:12]}...); give the one it was made for, or make the frontier anew"
        )
    options = _options(family, calibration, compensate, cache)
    hold = Hold(_again(evaluate, family.calibration.get("evaluate")))
    with prepared(graph, options, (), clock, hold=hold) as query:
        _same(family, query)
        plan = read_plan(family.folder / point.plan)
        if plan.sha256 != family.sha256:
            raise PlanError(f"{family.folder / point.plan}: belongs to another model; make the frontier anew")
        return _made(family, point, goal, query, plan, metric, output)


def choose(family: Family, target: str | list[str] | None, index: int | None) -> tuple[Point, Goal | None]:
    """The point that is meant.

    Raises:
        UsageError: neither or both of target and index, or an index that there is not.
        TargetError: no point meets the target.
    """
    if (target is None) == (index is None):
        raise UsageError("say which point: either --target macs=0.6 (top1-drop=0.01, ...) or --index N")
    if not family.points:
        raise UsageError(f"{family.folder}: has no points yet; let `spa frontier` go on first")
    if index is not None:
        if not 0 <= index < len(family.points):
            raise UsageError(f"--index {index}: there is no such point; they go from 0 to {len(family.points) - 1}")
        return family.points[index], None
    assert target is not None
    limits, goal = parse_request(target)
    if goal is not None and goal.metric not in ("metric", family.metric):
        raise UsageError(
            f"{goal.text}: this frontier was measured with {family.metric}; write {family.metric}-drop=..."
        )
    fits = [p for p in family.points if all(_within(p, t, family) for t in limits)]
    if goal is None:
        if not fits:
            raise TargetError(_nearest(family, limits))
        return min(fits, key=lambda p: (p.drop.drop, p.index)), None
    limit = _limit(family, goal)
    good = [p for p in fits if p.drop.within(limit)]
    if not good:
        least = min(p.drop.drop for p in fits or family.points)
        raise TargetError(f"no point of {family.folder} keeps to {goal.text}: the smallest drop there is {least:.4g}")
    cost = COSTS[family.minimised]
    return min(good, key=lambda p: (p.cost(cost), p.index)), goal


def _limit(family: Family, goal: Goal) -> float:
    known = METRICS.get(family.metric)
    return tolerance(goal, known if known is not None else (lambda outputs, labels: 0.0), family.before)


def _within(point: Point, target: Target, family: Family) -> bool:
    if target.metric not in point.costs or target.metric not in family.original:
        raise UsageError(f"{target.text}: this frontier does not know that cost; it has {', '.join(family.original)}")
    return point.cost(target.metric) <= target.bound(family.original[target.metric]) * (1 + 1e-9)


def _nearest(family: Family, limits: tuple[Target, ...]) -> str:
    texts = " and ".join(t.text for t in limits)
    least = ", ".join(
        f"{t.metric}={min(p.cost(t.metric) for p in family.points) / family.original[t.metric]:.3g}" for t in limits
    )
    return f"no point of {family.folder} meets {texts}: the smallest there is {least}; make a frontier with more shares"


def _options(family: Family, calibration: Any, compensate: Compensation | None, cache: Any) -> Options:
    stored: Mapping[str, Any] = family.options
    options = Options.of({k: v for k, v in stored.items() if k != "calibration"})
    options = replace(options, calibration=_again(calibration, family.calibration.get("source")))
    if family.calibration.get("sha256") is not None and options.calibration is None:
        raise UsageError("this frontier's samples were no file: give them with calibration=")
    if compensate is not None:
        options = replace(options, compensate=compensate)
    return options if cache is None else replace(options, cache=cache)


def _again(given: Any, known: Any) -> Any:
    return given if given is not None else known


def _same(family: Family, query: Prepared) -> None:
    """Refuse other samples: the numbers of the family would not be those of the model."""
    known = family.calibration
    here = (None if query.data is None else query.data.digest, query.held.digest if query.held is not None else None)
    if here != (known.get("sha256"), known.get("held_sha256")):
        raise UsageError(
            f"the samples are not those that {family.folder} was made with: give the same --calibration and --evaluate"
        )


def _made(
    family: Family,
    point: Point,
    goal: Goal | None,
    query: Prepared,
    plan: Plan,
    metric: Custom | None,
    output: str | os.PathLike[str] | None,
) -> Result:
    groups = {g.name: g for g in query.analysis.groups}
    try:
        removed = tuple((groups[r.name], r.removed) for r in plan.groups)
    except KeyError as error:
        raise PlanError(f"{family.folder / point.plan}: names a group {error} that the model does not have") from None
    align = plan.settings.get("align", "auto")
    selection = Selection(removed, {}, {}, align)
    kept = kept_without(query.analysis, removed)
    twin, fit = rewritten(query.analysis, kept), None
    with query.clock.stage("compensate"):
        if query.data is not None:
            fit = query.study.compensate(kept, twin, removed)
    assert query.held is not None
    if family.metric not in METRICS and metric is None:
        raise UsageError("this frontier was measured with a function: give it again with metric=")
    what = metric if metric is not None else chosen(family.metric, query.held)
    drop = judge_of(query, what)(twin.model)
    draft = query.study.method.compensate == "stitch"
    limit = float("inf") if goal is None else _limit(family, goal)
    reached = Reached(point.share, point.costs, drop, draft, drop.within(limit))
    text = f"point {point.index}" if goal is None else goal.text
    held = Held(text, limit, drop, query.held.name, family.minimised, (reached,))
    settings = {**plan.settings, **query.study.method.settings()}
    plan = replace(plan, settings=settings)
    job = query.job(plan, selection, output)
    return finish(job, None, query.study, selection, None, Answer(selection, twin, fit, held))
