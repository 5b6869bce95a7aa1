"""What a benchmark finds, as plain data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spa.bench.machine import Clocks
from spa.bench.operators import Profile
from spa.footprint import Memory

Verdict = Literal["faster", "slower", "no measurable difference"]
Copies = Literal["included", "excluded"]
"""Of inputs to a GPU and of outputs from it, in what is timed."""


@dataclass(frozen=True)
class Quantiles:
    """Times of single runs, in milliseconds; None where there were too few runs to tell (`estimates.enough`)."""

    count: int
    """Runs that were timed."""
    p50_ms: float | None
    """Half of the runs were faster."""
    p90_ms: float | None
    """Nine runs in ten were faster."""
    p99_ms: float | None
    """99 runs in a hundred were faster."""
    max_ms: float
    """The slowest run."""


@dataclass(frozen=True)
class Latency:
    """Times of one run, in milliseconds, over the rounds."""

    median_ms: float
    """Half of the rounds were faster."""
    p10_ms: float
    """One round in ten was faster."""
    p90_ms: float
    """Nine rounds in ten were faster."""
    min_ms: float
    """The fastest round."""
    mad_ms: float
    """Spread: median absolute deviation from the median."""
    rounds_ms: tuple[float, ...]
    """The time of one run in each round, in order; rounds with the same place are paired across models."""
    runs_per_round: int
    """How many runs each round's time is the median of; more than 1 for fast models."""
    runs: Quantiles | None = None
    """Of the single runs of all rounds; None in reports of older versions."""


@dataclass(frozen=True)
class Comparison:
    """One model against the first, from the same rounds."""

    speedup: float
    """Median over the rounds of (time of the first model) / (time of this one); above 1 is faster."""
    low: float
    """Lower end of the confidence interval of `speedup`."""
    high: float
    """Upper end of the confidence interval of `speedup`."""
    confidence: float
    """Probability that the interval is made for, such as 0.95."""
    verdict: Verdict
    """What the interval says: a difference only if all of it lies beyond `estimates.SMALLEST_EFFECT`."""


@dataclass(frozen=True)
class ModelBench:
    """All figures of one model."""

    name: str
    """As given by the caller."""
    file_bytes: int
    """Size of the model, with its external data."""
    provider: Literal["cpu", "cuda"]
    """What it really ran on."""
    latency: Latency
    """Times of one run."""
    throughput: float
    """Samples per second at the median latency."""
    memory: Memory | None
    """Host memory; None if it was not asked for or the system does not tell."""
    versus_first: Comparison | None
    """Against the first model; None for the first model itself."""
    profile: Profile | None = None
    """Where the time goes; None if it was not asked for, or the model ran on a GPU."""


@dataclass(frozen=True)
class BenchReport:
    """The result of `bench`, and of each setting of a `sweep`."""

    models: tuple[ModelBench, ...]
    """One for each model, in the order given."""
    batch: int
    """Samples in one run: size of axis 0 of the first input that has axes, else 1."""
    inputs: Mapping[str, tuple[int, ...]]
    """Shape of each input."""
    rounds: int
    """Rounds that were timed."""
    blocks: int
    """How many times the sessions were opened anew, each for a part of the rounds."""
    threads: int
    """Threads inside one operator, as asked for; 0: chosen by ONNX Runtime."""
    seed: int
    """Of the made-up inputs, the order in each round, and the confidence intervals."""
    runtime: str
    """ONNX Runtime's version."""
    cpu: str
    """The processor's model name."""
    cores: int
    """Processors this process may use."""
    measured: str
    """What the figures mean, in a sentence."""
    warmup: int | None = None
    """Untimed runs of each model in every block before its first round; None in reports of older versions."""
    copies: Literal["none", "included", "excluded"] | None = None
    """Whether copies to and from a GPU were timed; `none`: there was none. None in reports of older versions."""
    clocks: Clocks | None = None
    """How fast the processors ran; None where the system does not tell."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers, ready for `json.dumps`."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain
