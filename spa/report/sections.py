"""The sections of a page about one run. Each figure comes with a sentence that says what it shows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import groupby

from spa.readable import count, share, size
from spa.report import figures
from spa.report.data import OperatorTime, Page, Sensitivity, Width
from spa.report.figures import clip
from spa.report.markup import Child, Markup, tag

SHOWN = 12
"""Rows of a table that are open; the rest is folded."""
LISTED = 800
"""Rows of a table at most."""


def section(identifier: str, title: str, *children: Child) -> Markup:
    """One part of the page, with its heading."""
    return tag("section", tag("h2", title, id=identifier), children, aria_labelledby=identifier)


def rows(columns: Sequence[str], body: Sequence[Sequence[Child]], caption: str, more: str = "rows") -> Markup:
    """A table whose first rows are open; the first column names the row, others are numbers or pictures."""
    listed = body[:LISTED]
    parts: list[Child] = [_table(columns, listed[:SHOWN], caption)]
    if len(listed) > SHOWN:
        rest = f"{len(listed) - SHOWN:,} more {more}"
        parts.append(tag("details", tag("summary", rest), _table(columns, listed[SHOWN:], f"{caption}, continued")))
    if len(body) > len(listed):
        parts.append(tag("p", f"... and {len(body) - len(listed):,} {more} that are not listed here.", class_="note"))
    return tag("div", parts, class_="search")


def _table(columns: Sequence[str], body: Iterable[Sequence[Child]], caption: str, class_: str = "") -> Markup:
    head = tag("tr", [tag("th", column, scope="col") for column in columns])
    lines = [tag("tr", tag("th", first, scope="row"), [tag("td", cell) for cell in rest]) for first, *rest in body]
    pictures = "<svg" in lines[0] if lines else False
    return tag(
        "table",
        tag("caption", caption, class_="hidden"),
        tag("thead", head),
        tag("tbody", lines),
        class_=class_ or ("pictures" if pictures else None),
    )


def facts(pairs: Iterable[tuple[str, Child]]) -> Markup:
    """Names and values."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs])


def name(text: str, note: str = "") -> Markup:
    """A name from the model, and a remark in small letters."""
    shown = text if isinstance(text, Markup) else tag("code", clip(text))
    return tag("span", shown, tag("small", clip(note, 160)) if note else None, class_="name")


def some(number: int, what: str) -> str:
    """So many of something."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


# -- before and after --------------------------------------------------------------------------------------------------


def headline(page: Page) -> str:
    """The first line: what was gained, and plainly whether it is faster."""
    percent = share(page.macs.before - page.macs.after, page.macs.before).replace(" ", "\N{NO-BREAK SPACE}")
    less = f"{percent} fewer multiply-accumulates"
    speed = page.speed
    if speed is None:
        return f"{less}; whether it is faster was not measured"
    if speed.verdict == "faster":
        return f"{speed.speedup:.2f} times as fast, with {less}"
    if speed.verdict == "slower":
        return f"Not faster: {speed.speedup:.2f} times the speed of the original, although it has {less}"
    return f"Not measurably faster ({speed.speedup:.2f} times the speed), although it has {less}"


def cards(page: Page) -> Markup:
    """The headline in four numbers."""
    out = [
        _card(
            "Multiply-accumulates", count(page.macs.before), count(page.macs.after), page.macs.after, page.macs.before
        ),
        _card(
            "Parameters",
            count(page.parameters.before),
            count(page.parameters.after),
            page.parameters.after,
            page.parameters.before,
        ),
        _card("File size", size(page.bytes.before), size(page.bytes.after), page.bytes.after, page.bytes.before),
    ]
    if page.speed is not None:
        before, after = page.speed.before.median_ms, page.speed.after.median_ms
        out.append(_card("Latency, measured", ms(before), ms(after), after, before))
    return tag("div", out, class_="cards")


def _card(title: str, before: str, after: str, new: float, old: float) -> Markup:
    return tag(
        "div",
        tag("h2", title),
        tag("p", tag("span", before, class_="was"), " → ", tag("strong", after)),
        figures.kept(new, old),
        tag("p", share(new, old), " of the original", class_="note"),
        class_="card",
    )


def totals(page: Page) -> Markup:
    """The same, exactly."""
    lines: list[Sequence[Child]] = [
        (title, _whole(change.before), _whole(change.after), share(change.after, change.before))
        for title, change in (
            ("Multiply-accumulates", page.macs),
            ("Parameters", page.parameters),
            ("Bytes", page.bytes),
        )
    ]
    if page.speed is not None:
        before, after = page.speed.before.median_ms, page.speed.after.median_ms
        lines.append(("Median latency", ms(before), ms(after), share(after, before)))
    return section(
        "before-after",
        "Before and after",
        tag(
            "p",
            "One forward pass of the model costs so many multiply-accumulates (MACs); parameters are its weights, and "
            "bytes are what the file takes on disk. ",
            f"{page.removed_units:,} units were removed from {page.groups:,} of {len(page.widths):,} groups of coupled "
            "layers.",
        ),
        _table(("quantity", "before", "after", "kept"), lines, "Costs before and after pruning", "totals"),
    )


def _whole(number: int) -> list[Child]:
    """All digits, which may be broken at the commas where there is no room."""
    first, *rest = f"{number:,}".split(",")
    return [first, [[",", tag("wbr"), digits] for digits in rest]]


def ms(value: float | None) -> str:
    """Milliseconds."""
    if value is None:
        return "-"
    return f"{value:.3g} ms" if value < 999.5 else f"{value:,.0f} ms"


# -- widths ------------------------------------------------------------------------------------------------------------


def widths(page: Page) -> Markup | None:
    """How wide every group was and is."""
    if not page.widths:
        return None
    kinds = {kind: list(found) for kind, found in groupby(sorted(page.widths, key=lambda w: w.kind), lambda w: w.kind)}
    kinds = dict(sorted(kinds.items(), key=lambda item: -sum(w.before - w.after for w in item[1])))
    ranked = sorted(page.widths, key=lambda w: -(w.before - w.after) * w.parameters / max(w.before, 1))
    body = [(name(w.name, _about(w)), figures.kept(w.after, w.before), f"{w.before:,} → {w.after:,}") for w in ranked]
    return section(
        "widths",
        "Width of the layers",
        tag(
            "p",
            "Each bar is a group: layers that must keep the same width, such as all that are joined by a residual sum. "
            "Its full height is the number of units (channels, heads, neurons ...) before, ",
            tag("span", "the solid part", class_="key after-key"),
            " is what is left. From left to right as in the network.",
        ),
        [figures.skyline(found, kind) for kind, found in kinds.items()],
        tag("h3", "Every group"),
        tag("p", "Those that lost most weights come first."),
        rows(("group", "kept", "units"), body, "Units of each group before and after", "groups"),
    )


def _about(width: Width) -> str:
    return ", ".join(filter(None, (width.kind, "exact" if width.exact else "statistic", width.note)))


# -- sensitivity and frontier ------------------------------------------------------------------------------------------


def sensitivity(page: Page) -> Markup | None:
    """What pruning each group alone does to the outputs."""
    found = [s for s in page.sensitivity if s.errors and all(math.isfinite(e) for e in s.errors)]
    if not found:
        return None
    values = [max(e, 1e-9) for s in found for e in s.errors]
    least, most = 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values)))
    ranked = sorted(found, key=lambda s: -s.errors[0])
    body = [
        (
            name(s.name, f"{s.kind}; {s.chosen} of {s.units} removed in the end"),
            figures.spread(s.errors[0], s.errors[-1], least, most if most > least else 10 * least),
            _errors(s),
        )
        for s in ranked
    ]
    return section(
        "sensitivity",
        "Which layers matter",
        tag(
            "p",
            "Each group was pruned alone, twice, and the model was run on the samples: the bar goes from the error of "
            "its outputs after the first trial ",
            tag("span", "(few units gone)", class_="key after-key"),
            " to that after the second ",
            tag("span", "(most gone)", class_="key strong-key"),
            ". An error of 1 is as bad as always giving the mean. Layers far to the right are those that the model "
            f"cannot do without. The scale is logarithmic, from {least:g} to {most:g}.",
        ),
        rows(
            ("group", "error alone", "units gone: error"),
            body,
            "Error of the outputs when one group is pruned",
            "groups",
        ),
    )


def _errors(item: Sensitivity) -> list[Child]:
    lines = (tag("span", f"{k}: {e:.2g}", class_="line") for k, e in zip(item.removed, item.errors, strict=True))
    return [[line, " "] for line in lines]


def frontier(page: Page) -> Markup | None:
    """The family that the model was chosen from."""
    found = page.frontier
    if found is None or not found.points:
        return None
    best = set(figures.best_of(list(filter(figures.drawn, found.points)), found.higher_is_better))
    ranked = sorted(found.points, key=lambda p: p.cost)
    body = [
        (
            name(p.label, "this model" if p.chosen else "" if p in best else "another is better in both"),
            f"{p.cost:g}",
            f"{p.quality:g}",
        )
        for p in ranked
    ]
    better = "Higher and further left is better" if found.higher_is_better else "Lower and further left is better"
    return section(
        "frontier",
        "What else could be had",
        tag(
            "p",
            f"Each dot is a model that could be chosen instead. {better}; no model beats those on the line in both, "
            "and the large dot is the one of this page.",
        ),
        figures.frontier(found) if any(figures.drawn(p) for p in found.points) else None,
        rows(("model", clip(found.cost, 60), clip(found.quality, 60)), body, "Models to choose from", "models"),
    )


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(page: Page) -> Markup:
    """Measured latency, and where it goes."""
    found = page.speed
    if found is None:
        reason = page.unmeasured or "it was not asked for"
        return section(
            "latency",
            "Latency",
            tag("p", f"Latency was not measured: {reason}. Fewer multiply-accumulates are not automatically faster."),
        )
    threads = some(found.threads, "thread") if found.threads else "as many threads as ONNX Runtime likes"
    rounds = f"{found.rounds} rounds, " if found.rounds is not None else ""
    lines: list[Sequence[Child]] = [
        (title, ms(t.median_ms), ms(t.p10_ms), ms(t.p90_ms))
        for title, t in (("before", found.before), ("after", found.after))
    ]
    return section(
        "latency",
        "Latency",
        tag(
            "p",
            f"Both models took turns in one process on the same inputs: {rounds}batch {found.batch}, "
            f"{found.provider.upper()}, {threads}, ONNX Runtime {found.runtime}, on {found.device}. "
            f"The pruned model is {found.speedup:.2f} times as fast ({found.confidence:.0%} confidence interval "
            f"{found.low:.2f} to {found.high:.2f}): {found.verdict}. This holds for this machine.",
        ),
        _table(("model", "median", "10 % are below", "90 % are below"), lines, "Latency of one run"),
        _target(page),
        _operators(found.operators, found.nodes),
    )


def _target(page: Page) -> list[Child]:
    found = page.target
    if found is None or not found.attempts:
        return []
    asked = f"; {share(found.asked, 1)} was asked for" if found.asked is not None else ""
    body = [
        (f"{k}", share(a.requested, 1), share(a.predicted, 1), share(a.measured, 1))
        for k, a in enumerate(found.attempts, 1)
    ]
    return [
        tag("h3", "How the target was met"),
        tag(
            "p",
            "Widths were chosen for a latency, the model was timed, and what the table of latencies had predicted was "
            f"corrected, until that agreed. All as shares of the original's latency{asked}.",
        ),
        rows(("attempt", "requested", "predicted", "measured"), body, "Attempts to meet the latency", "attempts"),
    ]


def _operators(operators: Sequence[OperatorTime], nodes: Sequence[OperatorTime]) -> list[Child]:
    if not operators:
        return []
    legend = (
        tag("span", "before", class_="key before-key"),
        " and ",
        tag("span", "after", class_="key after-key"),
    )
    return [
        tag("h3", "Time per operator"),
        tag(
            "p",
            "Where the time of one run goes, by ONNX Runtime's own clock: ",
            legend,
            ". The clock itself takes time, so that the sum is more than the latency above. Operators that the "
            "runtime has fused count as one, and layers that it runs in another way after pruning have other names.",
        ),
        rows(("operator", "time", "before → after"), _times(operators), "Time per type of operator", "operators"),
        tag(
            "details",
            tag("summary", f"The slowest nodes ({len(nodes):,})"),
            _table(("node", "time", "before → after"), _times(nodes), "Time per node"),
            class_="search",
        ),
    ]


def _times(found: Sequence[OperatorTime]) -> list[Sequence[Child]]:
    most = max((v for t in found for v in (t.before_ms, t.after_ms) if v is not None), default=0.0)
    return [
        (
            name(t.name, "" if t.name == t.operator else t.operator),
            figures.pair(t.before_ms, t.after_ms, most),
            f"{ms(t.before_ms)} → {ms(t.after_ms)}",
        )
        for t in found
    ]


# -- trust -------------------------------------------------------------------------------------------------------------


def checks(page: Page) -> Markup:
    """The proof, and what compensation did."""
    return section(
        "checks",
        "Is it right?",
        tag("p", _proof(page)),
        tag("p", _fit(page)) if page.fit is not None else None,
        tag("p", _optimality(page)) if page.optimality is not None else None,
        tag("p", "None of this is an accuracy: measure that on data which the model has not seen.", class_="note"),
    )


def _proof(page: Page) -> list[Child]:
    found = page.verify
    if found is None:
        return [tag("strong", "Not verified."), " The run was told not to compare the result with its reference."]
    reference = (
        "the original with the removed slices set to zero"
        if found.exact
        else "the original with its removed units masked and its statistics taken over what is left"
    )
    return [
        tag("strong", "The cut is proved." if found.passed else "The proof failed."),
        f" Before any compensation, the pruned model computes what {reference} computes: over "
        f"{some(found.outputs, 'output')} the largest difference was {found.max_rel_error:.2e} of the output's "
        f"magnitude ({found.max_abs_error:.2e} absolute); {found.tolerance:.0e} would have been accepted.",
    ]


def _fit(page: Page) -> list[Child]:
    fit = page.fit
    assert fit is not None
    note = f" ({fit.note})" if fit.note else ""
    norms = " Norm statistics were estimated again." if fit.recalibrated else ""
    return [
        tag("strong", "Compensation."),
        f" On {fit.samples:,} samples of {clip(fit.calibration)}{note} the error of the outputs, relative to their "
        f"variance, was {fit.error_before:.4g} after the cut and is {fit.error_after:.4g} in the file that was "
        f"written: 0 is the original, 1 is as good as always giving the mean. These are the samples that the weights "
        f"were fit on.{norms}",
    ]


def _optimality(page: Page) -> list[Child]:
    found = page.optimality
    assert found is not None
    used = ", ".join(f"{share(part, 1)} of {target}" for target, part in found.reached.items())
    return [
        tag("strong", "Choice of widths."),
        f" No other widths can have less predicted loss than {found.bound:.4g}; these have {found.loss:.4g}, of "
        f"which at most {share(found.gap, 1)} could be saved. Of what the targets allow they use {used}.",
    ]


_BORDERS = {
    "graph input": "an input of the model: its shape must stay",
    "graph output": "an output of the model: its shape must stay",
}


def frozen(page: Page) -> Markup:
    """What cannot be pruned, and why."""
    body = [
        (
            name(
                tag("span", _BORDERS.get(cause.reason, clip(cause.reason, 160))),
                ("e.g. " if cause.axes > 1 else "") + ", ".join(clip(e, 80) for e in cause.examples),
            ),
            f"{cause.axes:,}",
            count(cause.parameters),
        )
        for cause in page.causes
    ]
    return section(
        "frozen",
        "What is frozen, and why",
        tag(
            "p",
            "Axes of weights that cannot be made shorter, by reason: how many, and the parameters along them. ",
            f"{share(page.prunable_parameters, page.parameters.before)} of all parameters could leave through at least "
            "one axis.",
        ),
        rows(("reason", "axes", "parameters"), body, "Reasons why axes are frozen", "reasons")
        if body
        else tag("p", "Nothing is frozen."),
    )


def origin(page: Page) -> Markup:
    """How to get the same again."""
    settings = [(key, json.dumps(value, ensure_ascii=False)) for key, value in page.settings.items()]
    spent = [(key, f"{value:.2f} s") for key, value in page.seconds.items() if value >= 0.005]
    return section(
        "reproduce",
        "How to get this again",
        [tag("p", "This command made the result:"), tag("pre", tag("code", page.command), class_="command")]
        if page.command
        else tag("p", "The result was made from Python, with the settings below."),
        tag(
            "details",
            tag("summary", "Settings, versions, checksums, time"),
            tag("h3", "Settings"),
            facts((key, tag("code", clip(text, 2000))) for key, text in settings),
            tag("h3", "Versions"),
            facts((key, text) for key, text in page.versions.items()),
            tag("h3", "sha256"),
            facts(
                (clip(label), tag("code", digest))
                for label, digest in ((page.model, page.sha256_before), (page.output, page.sha256_after))
                if digest
            ),
            tag("h3", "Seconds"),
            facts(spent),
            open=True,
        ),
    )
