"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """A number in thousands, millions ...: 1.23 M."""
    for unit in ("", " K", " M", " G"):
        if abs(number) < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.4g} T"


def size(number: float) -> str:
    """A number of bytes: 1.23 MB."""
    return count(number) + ("B" if number >= 999.5 else " B")


def share(part: float, whole: float) -> str:
    """A percentage."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
