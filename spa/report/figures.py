"""Pictures as inline SVG. Their text is HTML around them: it keeps its size where a picture shrinks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spa.report.data import Frontier, FrontierPoint, Width
from spa.report.markup import Child, Markup, tag

BARS = 240
"""In one picture of widths; more groups share bars."""
LONGEST = 120
"""Characters of a name."""
POINTS = 400
"""Of a frontier."""


def _stretched(width: float, height: float, *children: Child, label: str | None, class_: str) -> Markup:
    """A picture that fills its box, whatever its shape; without a label it only repeats the text beside it."""
    return tag(
        "svg",
        tag("title", label) if label else None,
        children,
        viewBox=f"0 0 {width:g} {height:g}",
        preserveAspectRatio="none",
        class_=class_,
        role="img" if label else None,
        aria_label=label,
        aria_hidden=None if label else "true",
        focusable="false",
    )


def _rect(x: float, y: float, width: float, height: float, class_: str, *children: Child) -> Markup:
    return tag("rect", children, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), class_=class_)


def kept(after: float, before: float) -> Markup:
    """How much of a whole is left, as a bar."""
    part = min(max(after / before, 0.0), 1.0) if before else 1.0
    return _stretched(
        100, 10, _rect(0, 0, 100, 10, "before"), _rect(0, 0, 100 * part, 10, "after"), label=None, class_="bar"
    )


def pair(before: float | None, after: float | None, most: float) -> Markup:
    """Two bars, one above the other, on a scale that ends at `most`."""
    scale = 100 / most if most > 0 else 0.0
    bars = [
        _rect(0, y, scale * value, 9, class_)
        for y, value, class_ in ((0, before, "solid-before"), (11, after, "after"))
        if value is not None
    ]
    return _stretched(100, 20, bars, label=None, class_="bar two")


def spread(low: float, high: float, least: float, most: float) -> Markup:
    """From one value to another on a logarithmic scale between `least` and `most`."""
    span = math.log(most / least) or 1.0
    start, end = (100 * min(max(math.log(max(v, least) / least) / span, 0.0), 1.0) for v in (low, high))
    return _stretched(
        100,
        10,
        _rect(0, 4.5, 100, 1, "before"),
        _rect(min(start, 97), 3, max(end - start, 3), 4, "range"),
        _rect(min(start, 97), 0, 3, 10, "after"),
        _rect(min(max(end, start), 97), 0, 3, 10, "strong"),
        label=None,
        class_="bar",
    )


def skyline(widths: Sequence[Width], kind: str) -> Markup:
    """Units of each group of one kind, in the order of the network: what there was, and in front of it what is left."""
    size = math.ceil(len(widths) / BARS)
    bins = [widths[k : k + size] for k in range(0, len(widths), size)]
    tallest = max(w.before for w in widths)
    bars = []
    for k, members in enumerate(bins):
        before, after = (sum(v) / len(members) for v in ([w.before for w in members], [w.after for w in members]))
        names = f"{members[0].name} to {members[-1].name}" if len(members) > 1 else members[0].name
        said = tag("title", f"{clip(names, 80)}: {before:g} to {after:g}")
        height, left = 100 * before / tallest, 100 * after / tallest
        bars.append(
            tag(
                "g",
                said,
                _rect(10 * k, 100 - height, 8.5, height, "before"),
                _rect(10 * k, 100 - left, 8.5, left, "after"),
            )
        )
    total, rest = sum(w.before for w in widths), sum(w.after for w in widths)
    label = f"Units per group of kind {kind}, in network order: {total} before and {rest} after in {len(widths)} groups"
    shared = f"; each bar is the mean of up to {size} groups" if size > 1 else ""
    narrow = 10 * max(len(bins), 12)
    return tag(
        "figure",
        tag(
            "div",
            tag("span", f"{tallest:,}", class_="top"),
            tag("span", "0", class_="bottom"),
            class_="axis",
            aria_hidden="true",
        ),
        _stretched(narrow, 100, bars, label=label + shared, class_="skyline"),
        tag("figcaption", tag("strong", kind), f": {len(widths)} groups, {total:,} units, {rest:,} kept{shared}"),
        class_="widths",
    )


def frontier(found: Frontier) -> Markup:
    """Quality against cost, one dot per model; the best for their cost are joined."""
    points = sorted(filter(drawn, found.points), key=lambda p: p.cost)[:POINTS]
    x = _Scale([p.cost for p in points], 46, 330)
    y = _Scale([p.quality for p in points], 196, 12)
    best = best_of(points, found.higher_is_better)
    front = set(best)
    cost, quality = clip(found.cost, 60), clip(found.quality, 60)
    line = " ".join(f"{x.at(p.cost):.1f},{y.at(p.quality):.1f}" for p in best)
    grid = [
        *(tag("line", x1=46, x2=330, y1=y.at(v), y2=y.at(v), class_="grid") for v in y.ticks),
        *(tag("text", f"{v:g}", x=40, y=y.at(v) + 4, text_anchor="end") for v in y.ticks),
        *(tag("text", f"{v:g}", x=x.at(v), y=214, text_anchor="middle") for v in x.ticks),
    ]
    dots = [
        tag(
            "circle",
            tag("title", f"{clip(p.label, 80)}: {cost} {p.cost:g}, {quality} {p.quality:g}"),
            cx=x.at(p.cost),
            cy=y.at(p.quality),
            r=7 if p.chosen else 4.5,
            class_="strong" if p.chosen else "after" if p in front else "solid-before",
        )
        for p in sorted(points, key=lambda p: p.chosen)
    ]
    label = f"{len(points)} models: {quality} against {cost}; the table below lists them"
    return tag(
        "svg",
        tag("title", label),
        grid,
        tag("polyline", points=line, class_="front"),
        dots,
        tag("text", quality, x=46, y=8, class_="label"),
        tag("text", cost, x=330, y=232, text_anchor="end", class_="label"),
        viewBox="0 -4 340 242",
        class_="frontier",
        role="img",
        aria_label=label,
    )


def drawn(point: FrontierPoint) -> bool:
    """Whether a point has a place."""
    return math.isfinite(point.cost) and math.isfinite(point.quality)


def best_of(points: Sequence[FrontierPoint], higher_is_better: bool) -> list[FrontierPoint]:
    """Points that no other beats in both cost and quality, by ascending cost."""
    sign = 1 if higher_is_better else -1
    out: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, -sign * p.quality)):
        if not out or sign * point.quality > sign * out[-1].quality:
            out.append(point)
    return out


class _Scale:
    """Numbers to places, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end
        raw = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
        first = math.ceil(self.low / step)
        self.ticks = [round(k * step, 12) for k in range(first, math.floor(self.high / step) + 1)]

    def at(self, value: float) -> float:
        """The place of a number."""
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def clip(text: str, most: int = LONGEST) -> str:
    """A name of bounded length: what is too much is left out of its middle."""
    if len(text) <= most:
        return text
    rest = most - 3
    return f"{text[: rest - rest // 2]} … {text[len(text) - rest // 2 :]}"
