"""Which nodes to leave in floating point so that a quantised model reaches its gates: as few as that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from spa.calibration import Calibration
from spa.edge.fidelity import Fidelity, Samples, compare_files
from spa.edge.quantize import Quantizer
from spa.progress import Progress, silent

__all__ = ["Good", "search", "sensitivity"]

Good = Callable[[Fidelity], bool]
"""Whether a model so far from its input is near enough."""
PROBED = 64
"""Samples on which nodes are tried one by one."""


def sensitivity(quantizer: Quantizer, on: Samples, progress: Progress = silent) -> list[tuple[str, float]]:
    """(node, squared error of the outputs relative to their variance when it alone is quantised), worst first."""
    names = quantizer.candidates()
    probe = replace(on, data=_few(on.data), metric=None)
    trial = quantizer.folder / "trial.onnx"
    found = []
    progress("sensitivity", 0, len(names))
    for k, name in enumerate(names):
        quantizer.write(trial, only=[name])
        found.append((name, compare_files(quantizer.source, trial, probe).error))
        progress("sensitivity", k + 1, len(names))
    return sorted(found, key=lambda pair: -pair[1])


def _few(data: Calibration) -> Calibration:
    return data if data.samples <= PROBED else data.split(PROBED)[1]


def search(quantizer: Quantizer, target: Path, on: Samples, good: Good, progress: Progress = silent) -> list[str]:
    """Write the quantised model with the fewest of the worst nodes left alone that reaches its gates.

    Nodes are ordered by what each does alone; how many leave is found by doubling, then halving. If even half of them
    do not help, the model with all of them quantised is written: the gates then say what is missing.

    Returns:
        the nodes left alone.
    """

    def reached(count: int) -> bool:
        quantizer.write(target, without=order[:count])
        return good(compare_files(quantizer.source, target, on))

    order: list[str] = []
    if reached(0):
        return []
    order = [name for name, error in sensitivity(quantizer, on, progress) if error > 0]
    low, high, most = 0, 1, len(order) // 2
    while high <= most and not reached(high):
        low, high = high, high * 2
    if high > most:
        low, high = low, most
        if not most or not reached(most):
            quantizer.write(target)
            return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    quantizer.write(target, without=order[:high])
    return order[:high]
