"""How metrics on held-out samples are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spa.cli import output

if TYPE_CHECKING:
    from spa.finish import Held, Reached
    from spa.metrics import Drop


def show_reached(point: Reached) -> None:
    """One line about a model of a search, as soon as it was measured."""
    kept = "keeps to the target" if point.met else "does not"
    how = ", draft" if point.draft else ""
    macs = output.count(round(point.costs["macs"]))
    size = output.size(round(point.costs["bytes"]))
    output.console().print(
        f"at {point.share:.3f} ({macs} MACs, {size}{how}): {dropped(point.drop)}: {kept}", soft_wrap=True
    )


def dropped(drop: Drop) -> str:
    """`top1 0.912 -> 0.905, drop 0.007 +- 0.004`."""
    error = "" if drop.error is None else f" +- {drop.error:.2g}"
    return f"{drop.metric} {drop.before:.4g} -> {drop.after:.4g}, drop {drop.drop:.4g}{error}"


def held_lines(held: Held) -> list[str]:
    """What a target on a metric came to."""
    lines = [f"{held.target}: {dropped(held.drop)} (one standard error) on {held.drop.samples} samples of {held.data}"]
    if held.note:
        lines.append(held.note)
    return lines
