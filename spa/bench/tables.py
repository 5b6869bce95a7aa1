"""Benchmarks as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spa.bench.estimates import enough
from spa.bench.figures import BenchReport, Comparison, ModelBench
from spa.bench.machine import Clocks

if TYPE_CHECKING:
    from rich.table import Table

_TOP = 10
"""Nodes that are shown."""


def report_table(*reports: BenchReport) -> Table:
    """One or several reports of the same models as a `rich` table: a row for each setting and model."""
    from rich.table import Table

    first = reports[0]
    several = len(reports) > 1
    cores = "1 core" if first.cores == 1 else f"{first.cores} cores"
    title = "" if several else f"batch {first.batch}, {first.rounds} rounds, threads {_threads(first)}, "
    table = Table(title=f"{title}onnxruntime {first.runtime}", caption=f"{first.cpu}, {cores}")
    for heading in ("batch", "threads") if several else ():
        table.add_column(heading, justify="right")
    table.add_column("model", overflow="fold")
    for heading in ("p50 ms", "p90 ms", "p99 ms", "runs", "samples/s", "file", "memory peak"):
        table.add_column(heading, justify="right")
    table.add_column("speed against the first")
    for report in reports:
        setting = [str(report.batch), _threads(report)] if several else []
        for k, model in enumerate(report.models):
            last = k + 1 == len(report.models)
            table.add_row(*(setting if k == 0 else [""] * len(setting)), *_row(model), end_section=several and last)
    return table


def _threads(report: BenchReport) -> str:
    return str(report.threads or "auto")


def _row(model: ModelBench) -> list[str]:
    runs, memory = model.latency.runs, model.memory
    quantiles = ["-"] * 4 if runs is None else [*map(_ms, (runs.p50_ms, runs.p90_ms, runs.p99_ms)), f"{runs.count:,}"]
    return [
        f"{model.name} ({model.provider})",
        *quantiles,
        f"{model.throughput:,.0f}" if model.throughput >= 10 else f"{model.throughput:.2g}",
        _size(model.file_bytes),
        "-" if memory is None else _size(memory.peak),
        _sentence(model.versus_first),
    ]


def remarks(*reports: BenchReport) -> list[str]:
    """What must be known to read the table, in sentences."""
    first = reports[0]
    found = [first.measured, "p50, p90 and p99 are of all single runs; speed is compared within rounds"]
    counts = [model.latency.runs.count for report in reports for model in report.models if model.latency.runs]
    for q in (0.5, 0.9, 0.99):
        if counts and min(counts) < enough(q):
            found.append(
                f"too few runs for a p{100 * q:.0f}: it needs {enough(q)}, there were {min(counts)}; raise the number "
                "of repeats, or the seconds"
            )
    told = [(report, text) for report in reports if (text := _clocks(report.clocks))]
    if len({text for _, text in told}) > 1:
        return found + [f"batch {r.batch}, threads {_threads(r)}: {text}" for r, text in told]
    return found + [text for _, text in told[:1]]


def _clocks(clocks: Clocks | None) -> str:
    if clocks is None:
        return ""
    parts = []
    if clocks.before_mhz is not None and clocks.after_mhz is not None:
        parts.append(f"{clocks.before_mhz:.0f} MHz before, {clocks.after_mhz:.0f} MHz after the rounds")
    parts += [f"at most {clocks.limit_mhz:.0f} MHz"] if clocks.limit_mhz is not None else []
    parts += [f"governor {clocks.governor}"] if clocks.governor is not None else []
    parts += [f"boost {'on' if clocks.boost else 'off'}"] if clocks.boost is not None else []
    if clocks.gpu is not None:
        rates = (clocks.gpu_before_mhz, clocks.gpu_after_mhz, clocks.gpu_limit_mhz)
        before, after, limit = ("unknown" if rate is None else f"{rate:.0f} MHz" for rate in rates)
        parts.append(f"{clocks.gpu}: {before} before, {after} after, at most {limit}")
    return f"clocks: {', '.join(parts)}" if parts else ""


def _sentence(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    interval = f"{comparison.speedup:.2f}x [{comparison.low:.2f}, {comparison.high:.2f}]"
    return f"{interval} {comparison.verdict}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


# ---- operators --------------------------------------------------------------------------------------------------

_Row = tuple[float, tuple[str, ...]]
"""Milliseconds, and the cells that show them."""


def operator_tables(report: BenchReport) -> list[Table]:
    """Time per type of operator, and of the slowest nodes, side by side for all models that were profiled."""
    found = {model.name: model.profile for model in report.models if model.profile is not None}
    if not found:
        return []
    made = {row.operator for profile in found.values() for row in profile.operators if row.in_file == 0}
    types: dict[str, dict[tuple[str, ...], _Row]] = {
        name: {(row.operator,): (row.ms, (_ms(row.ms), str(row.nodes))) for row in profile.operators if row.nodes}
        for name, profile in found.items()
    }
    nodes: dict[str, dict[tuple[str, ...], _Row]] = {
        name: {(row.name, row.operator): (row.ms, (_ms(row.ms),)) for row in profile.nodes}
        for name, profile in found.items()
    }
    setting = f"batch {report.batch}, threads {_threads(report)}"
    runs = " and ".join(str(count) for count in sorted({profile.runs for profile in found.values()}))
    first = _pairs(f"time per operator: {setting}, {runs} profiled runs", ("operator",), types, made, ("nodes",))
    second = _pairs(f"the slowest nodes: {setting}", ("node", "operator"), nodes, made, (), _TOP)
    for table in (first, second):  # titles may be wider than the columns
        table.min_width = len(str(table.title)) + 4
    first.caption = "* made by ONNX Runtime: fused, or for another layout" if made else None
    return [first, second]


def _pairs(
    title: str,
    columns: Sequence[str],
    found: Mapping[str, Mapping[tuple[str, ...], _Row]],
    made: set[str],
    more: Sequence[str],
    most: int | None = None,
) -> Table:
    """A row for each key with its cells in each model, slowest first; `more` names the cells after milliseconds."""
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, overflow="fold")
    for name in found:
        for heading in (f"{name}: ms", *more):
            table.add_column(heading, justify="right", overflow="fold")
    worst: dict[tuple[str, ...], float] = {}
    for rows in found.values():
        for key, (ms, _) in rows.items():
            worst[key] = max(ms, worst.get(key, 0.0))
    missing: _Row = (0.0, ("-",) * (1 + len(more)))
    for key in sorted(worst, key=lambda key: (-worst[key], key))[:most]:
        cells = [cell for rows in found.values() for cell in rows.get(key, missing)[1]]
        table.add_row(*key[:-1], f"{key[-1]} *" if key[-1] in made else key[-1], *cells)
    return table


def operator_remarks(report: BenchReport) -> list[str]:
    """What cannot be seen in the tables of operators, in sentences: those that are not executed, and missing ones."""
    found = []
    for model in report.models:
        gone = [] if model.profile is None else [row for row in model.profile.operators if not row.nodes]
        if gone:
            listed = ", ".join(f"{row.in_file} {row.operator}" for row in gone)
            found.append(f"{model.name}: fused into others, or computed when the model was opened: {listed}")
        if model.profile is None and model.provider == "cuda":
            found.append(
                f"{model.name}: operators are timed on the CPU only; on a GPU the runtime's clock sees them being "
                "launched, not run"
            )
    return found
