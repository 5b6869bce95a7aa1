"""Latency in sentences: only what was measured to be faster is called so."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spa.latency.query import LatencyReport


def headline(found: LatencyReport | None) -> str:
    """The first line of a summary."""
    if found is None:
        return "latency was not measured: whether this is faster, `spa bench` tells"
    if not found.measured or found.versus_original is None:
        return (
            f"predicted, not measured: {100 * found.share:.1f}% of the original's latency on {found.device}; "
            "the latency table is of another machine or runtime than this one"
        )
    versus = found.versus_original
    interval = f"{versus.speedup:.2f}x [{versus.low:.2f}, {versus.high:.2f}]"
    where = f"{found.provider}, threads {found.threads or 'auto'}, batch {found.batch}"
    if versus.verdict == "faster":
        return f"faster: {interval} the original's speed, measured on {found.device} ({where})"
    words = "slower than the original" if versus.verdict == "slower" else "not measurably faster than the original"
    return f"NOT faster: {words}, {interval} its speed, measured on {found.device} ({where})"


def attempts(found: LatencyReport) -> list[str]:
    """What was asked for, what was reached, and how."""
    kind = "measured" if found.measured else "predicted"
    asked = "" if found.asked is None else f"; asked for {100 * found.asked:.1f}%"
    lines = [
        f"latency: {found.before_ms:.3g} -> {found.after_ms:.3g} ms, {100 * found.share:.1f}% ({kind}{asked}; "
        f"the table predicts {100 * found.predicted:.1f}%)"
    ]
    if found.asked is not None and found.measured and abs(found.share / found.asked - 1) > 0.03:
        lines.append(
            "this is the nearest that widths of this model allow, or the machine was busy while it was measured"
        )
    if len(found.attempts) > 1:
        steps = ", ".join(f"{100 * a.predicted:.1f}% -> {100 * a.measured:.1f}%" for a in found.attempts)
        lines.append(f"predicted -> measured in {len(found.attempts)} turns: {steps}")
    return lines
