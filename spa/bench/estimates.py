"""From times to figures: quantiles that the number of runs supports, and ratios with an interval."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from spa.bench.figures import Comparison, Latency, Quantiles, Verdict

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CONFIDENCE = 0.95
"""Of the intervals of ratios, and of quantiles."""
SMALLEST_EFFECT = 0.02
"""Ratios closer to 1 are not called a difference: two copies of one model differ by about as much."""
_RESAMPLES = 2000


def enough(q: float) -> int:
    """How many runs a quantile needs: 5 for the median, 29 for 0.9, 299 for 0.99.

    With so many the slowest of them lies beyond the true quantile with a probability of `CONFIDENCE`
    (1 - q^n >= 0.95; S. S. Wilks, Determination of sample sizes for setting tolerance limits, 1941). With fewer, the
    quantile of the sample says little more than its largest value.
    """
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(q))


def quantiles(seconds: Floats) -> Quantiles:
    """Of single runs; linear between neighbours."""
    ms = seconds * 1e3
    p50, p90, p99 = (float(np.quantile(ms, q)) if ms.size >= enough(q) else None for q in (0.5, 0.9, 0.99))
    return Quantiles(int(ms.size), p50, p90, p99, float(ms.max()))


def latency(rounds: Floats, runs: Floats, runs_per_round: int) -> Latency:
    """From the seconds of one model's rounds, and of its single runs."""
    ms = rounds * 1e3
    median = float(np.median(ms))
    return Latency(
        median_ms=median,
        p10_ms=float(np.percentile(ms, 10)),
        p90_ms=float(np.percentile(ms, 90)),
        min_ms=float(ms.min()),
        mad_ms=float(np.median(np.abs(ms - median))),
        rounds_ms=tuple(float(value) for value in ms),
        runs_per_round=runs_per_round,
        runs=quantiles(runs),
    )


def compare(first: Floats, other: Floats, blocks: Ints, rng: np.random.Generator) -> Comparison:
    """Median of the ratios within rounds: a slow moment slows both models of a round.

    The interval is a bootstrap over blocks, and over the rounds of each: rounds of one block are not independent.
    """
    ratios = first / other
    groups = [ratios[blocks == block] for block in np.unique(blocks)]
    medians = np.empty(_RESAMPLES)
    for k in range(_RESAMPLES):
        drawn = [groups[block] for block in rng.integers(0, len(groups), size=len(groups))]
        medians[k] = np.median(np.concatenate([rng.choice(group, size=len(group)) for group in drawn]))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    verdict: Verdict = "no measurable difference"
    if low > 1 + SMALLEST_EFFECT:
        verdict = "faster"
    elif high < 1 - SMALLEST_EFFECT:
        verdict = "slower"
    return Comparison(float(np.median(ratios)), float(low), float(high), CONFIDENCE, verdict)
