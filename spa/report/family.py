"""Families of models on pages: a page about one, and the part that the page about a single model shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spa.budget.targets import COSTS
from spa.finish import Result
from spa.frontier.index import Family, Point
from spa.metrics import METRICS
from spa.readable import count, share, size
from spa.report import figures, sections
from spa.report.data import Frontier, FrontierPoint
from spa.report.figures import clip
from spa.report.markup import Child, Markup, document, tag

Cost = tuple[str, Callable[[Point], float]]
"""Name of an axis, and a point's place on it."""


def axes(family: Family) -> list[Cost]:
    """What models may be compared by, that which was minimised first."""
    known: dict[str, Cost] = {
        "macs": ("MACs (M)", lambda p: p.costs["macs"] / 1e6),
        "size": ("size (MB)", lambda p: p.costs["bytes"] / 1e6),
        "params": ("parameters (M)", lambda p: p.costs["parameters"] / 1e6),
    }
    if "latency" in family.original:
        measured = any(p.measured_ms is not None for p in family.points)
        text = "latency (ms)" if measured else "latency by the table (ms)"
        known["latency"] = (text, lambda p: p.costs["latency"] if p.measured_ms is None else p.measured_ms)
    order = sorted(known, key=lambda name: name != family.minimised)
    return [known[name] for name in order]


def frontier_of(family: Family, result: Result | None = None, axis: Cost | None = None) -> Frontier:
    """The family against one cost, by default that which was minimised; `result` is one of its models, picked."""
    name, place = axis or axes(family)[0]
    held = None if result is None else result.report.metric
    points = [FrontierPoint(f"point {p.index} ({p.share:g})", place(p), p.drop.after) for p in family.points]
    if held is not None:
        mine = held.reached[-1]
        cost = next((p for p in family.points if p.share == mine.share), None)
        if cost is not None:
            points.append(FrontierPoint("this model", place(cost), mine.drop.after, chosen=True))
    return Frontier(name, family.metric, family.higher_is_better, tuple(points))


def searched(result: Result) -> Frontier | None:
    """What the search for a metric target went through; None if there was none."""
    held = result.report.metric
    if held is None:
        return None
    metric = METRICS.get(held.drop.metric)
    cost = COSTS[held.minimised]
    text, unit = {"latency": ("latency by the table (ms)", 1.0), "bytes": ("size (MB)", 1e6)}.get(
        cost, (f"{'MACs' if cost == 'macs' else 'parameters'} (M)", 1e6)
    )
    last = max((k for k, p in enumerate(held.reached) if p.drop == held.drop), default=-1)
    points = tuple(
        FrontierPoint(
            f"{p.share:.3f} {'draft' if p.draft else 'refit'}", p.costs[cost] / unit, p.drop.after, chosen=k == last
        )
        for k, p in enumerate(held.reached)
    )
    return Frontier(text, held.drop.metric, metric.higher_is_better if metric else True, points)


def render(family: Family, command: str = "") -> str:
    """The page of a family, as one HTML file that needs nothing else."""
    first = f"{len(family.front)} models to choose from, of {len(family.points)} that were made"
    pictures: list[Child] = [
        tag(
            "section",
            tag("h2", f"{family.metric} against {axis[0]}", id=f"axis{k}"),
            figures.frontier(frontier_of(family, axis=axis)),
            aria_labelledby=f"axis{k}",
        )
        for k, axis in enumerate(axes(family))
    ]
    body = (
        tag("a", "Skip to the content", href="#about", class_="skip"),
        tag("header", tag("h1", first, class_="plain"), tag("p", tag("code", clip(family.model)), class_="files")),
        tag("main", _about(family), pictures, _table(family), _origin(family, command)),
    )
    return document(f"{first} - {family.model}", body, styles=("base.css", "page.css"), scripts=("page.js",))


def _about(family: Family) -> Markup:
    direction = "higher is better" if family.higher_is_better else "lower is better"
    known = METRICS.get(family.metric)
    what = f" ({known.text}; {direction})" if known else f" ({direction})"
    drafts = any(p.draft for p in family.points)
    note = (
        " Weights are those of a closed form that needs no pass over the samples; spa pick refits them on the pruned "
        "model, which makes a model better than it looks here."
        if drafts
        else ""
    )
    held = family.calibration
    return sections.section(
        "about",
        "What this shows",
        tag(
            "p",
            f"Each dot is one pruned model, and its {family.metric}{what} on {held['held_samples']} samples of "
            f"{held['held']} that nothing was fit on. The dense model has {family.before:.4g}. Points on the line are "
            f"the best for their cost.{note}",
        ),
    )


def _table(family: Family) -> Markup:
    rows: list[Sequence[Child]] = []
    timed = "latency" in family.original
    for p in family.points:
        error = "" if p.drop.error is None else f" ± {p.drop.error:.2g}"
        row: list[Child] = [
            sections.name(f"point {p.index}", "" if p.front else "another is better in both"),
            f"{count(round(p.costs['macs']))} ({share(p.costs['macs'], family.original['macs'])})",
            count(round(p.costs["parameters"])),
            size(round(p.costs["bytes"])),
        ]
        if timed:
            row.append(f"{p.costs['latency'] if p.measured_ms is None else p.measured_ms:.3g} ms")
        rows.append([*row, f"{p.drop.after:.4g}", f"{p.drop.drop:.4g}{error}"])
    columns = ["model", "MACs", "parameters", "size", *(["latency"] if timed else []), family.metric]
    body = sections.rows([*columns, "worse by ± one standard error"], rows, "Models to choose from", "models")
    how = tag("p", "Make one with ", tag("code", f"spa pick {family.folder} --index N -o OUT.onnx"), ".")
    return sections.section("models", "Models", body, how)


def _origin(family: Family, command: str) -> Markup:
    samples = family.calibration
    facts: list[tuple[str, Child]] = [
        ("method", family.method),
        ("fit on", f"{samples['samples'] or 0} samples of {samples['name'] or 'nothing'}"),
        ("measured on", f"{samples['held_samples']} samples of {samples['held']}"),
        ("sha256 of the model", tag("code", family.sha256)),
    ]
    if command:
        facts.append(("command", tag("code", command)))
    return sections.section("origin", "How it was made", sections.facts(facts))
