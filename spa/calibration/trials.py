"""Samples that nothing is fit on, for trials."""

from __future__ import annotations

from spa.calibration.data import Calibration

PART, MOST = 5, 128
"""One sample in so many is held out, but no more than this."""


def held_out(data: Calibration) -> tuple[Calibration, Calibration]:
    """Samples to fit on and others for trials; the same ones twice where there are too few to part with any."""
    held = _held(data.samples, data.fixed)
    return data.split(held) if held else (data, data)


def needed(fit: int, fixed: int | None) -> int:
    """How many samples there have to be for `fit` of them to be fit on; `fixed` is the batch size of the graph."""
    samples = fit
    while samples - _held(samples, fixed) < fit:
        samples += 1
    return samples


def _held(samples: int, fixed: int | None) -> int:
    """How many of so many are held out: whole batches where the graph fixes their size."""
    step = fixed or 1
    return -(-min(MOST, samples // PART) // step) * step if samples // step >= PART else 0
