"""How fast a model is before and after, measured for the page in a few seconds, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from spa.bench import Latency, NodeTime, bench
from spa.bench.operators import node_times
from spa.errors import UsageError
from spa.feeds import load_feeds, runnable_feeds
from spa.latency.query import LatencyReport
from spa.report.data import OperatorTime, Speed, Timing
from spa.runtime import Provider, open_session
from spa.signature import InputSpec, inputs_of

ROUNDS = 24
SECONDS = 6.0
"""About the time for rounds; opening the models comes on top."""
NODES = 200
"""Slowest nodes that are kept."""


def measure(
    before: Path,
    after: Path,
    *,
    known: LatencyReport | None = None,
    provider: Provider = "cpu",
    dims: Mapping[str, int] | None = None,
    inputs: Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Speed:
    """Time two models against each other, and their operators.

    Operators are timed on the CPU only: on a GPU the runtime's clock sees them being launched, not run.

    Args:
        before: the original.
        after: the pruned model, with the same inputs.
        known: what was measured already; then only operators are timed, in the same way.
        provider: see `spa.runtime.open_session`.
        dims: sizes of symbolic axes of made-up inputs.
        inputs: an .npz file with the inputs instead.
        seed: of made-up inputs.
        progress: told how many rounds are done.

    Raises:
        RuntimeFailure: a model does not run.
        UsageError: the inputs do not fit.
    """
    specs = inputs_of(before)
    batch = 1 if known is None else known.batch
    sizes = {} if inputs is not None else {**_samples(specs, batch), **(dims or {})}
    found = _compared(before, after, provider, sizes, inputs, seed, progress) if known is None else _as_known(known)
    nodes: list[OperatorTime] = []
    if found.provider == "cpu":
        feeds = (
            load_feeds(inputs, specs)
            if inputs is not None
            else runnable_feeds(before, open_session(before, provider="cpu", deterministic=False), seed, sizes)
        )
        nodes = _matched(*(node_times(model, feeds, threads=found.threads) for model in (before, after)))
    return replace(found, operators=tuple(_by_operator(nodes)), nodes=tuple(nodes[:NODES]))


def _compared(
    before: Path,
    after: Path,
    provider: Provider,
    sizes: Mapping[str, int],
    inputs: Path | None,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Speed:
    found = bench(
        [before, after],
        ["the model before pruning", "the model after pruning"],
        provider=provider,
        dims=sizes,
        inputs=inputs,
        repeats=ROUNDS,
        warmup=1,
        seconds=SECONDS,
        seed=seed,
        memory=False,
        progress=progress,
    )
    first, second = found.models
    versus = second.versus_first
    assert versus is not None  # there are two models
    cores = "1 core" if found.cores == 1 else f"{found.cores} cores"
    return Speed(
        before=_timing(first.latency),
        after=_timing(second.latency),
        speedup=versus.speedup,
        low=versus.low,
        high=versus.high,
        confidence=versus.confidence,
        verdict=versus.verdict,
        provider=second.provider,
        batch=found.batch,
        threads=found.threads,
        runtime=found.runtime,
        device=f"{found.cpu}, {cores}",
        rounds=found.rounds,
    )


def _as_known(found: LatencyReport) -> Speed:
    versus = found.versus_original
    if versus is None:
        raise UsageError(
            f"the target was latency on {found.device} with ONNX Runtime {found.runtime}, which is not here; its table "
            f"predicts {found.after_ms:.3g} ms instead of {found.before_ms:.3g} ms"
        )
    return Speed(
        before=Timing(found.before_ms, None, None),
        after=Timing(found.after_ms, None, None),
        speedup=versus.speedup,
        low=versus.low,
        high=versus.high,
        confidence=versus.confidence,
        verdict=versus.verdict,
        provider=found.provider,
        batch=found.batch,
        threads=found.threads,
        runtime=found.runtime,
        device=found.device,
        rounds=None,
    )


def _timing(latency: Latency) -> Timing:
    return Timing(latency.median_ms, latency.p10_ms, latency.p90_ms)


def _samples(specs: Sequence[InputSpec], batch: int) -> dict[str, int]:
    """So many samples per run, where the model leaves that open: one is what costs are counted for."""
    first = [(spec.shape[0] or f"{spec.name}:0") for spec in specs if spec.shape]
    return {symbol: batch for symbol in first if isinstance(symbol, str)}


def _matched(before: list[NodeTime], after: list[NodeTime]) -> list[OperatorTime]:
    """Nodes of both models by name and operator; slowest before first."""
    first = {(node.name, node.operator): node.ms for node in before}
    second = {(node.name, node.operator): node.ms for node in after}
    return [
        OperatorTime(name, operator, first.get((name, operator)), second.get((name, operator)))
        for name, operator in sorted({**first, **second}, key=lambda k: -max(first.get(k, 0.0), second.get(k, 0.0)))
    ]


def _by_operator(nodes: Iterable[OperatorTime]) -> list[OperatorTime]:
    totals: dict[str, list[float | None]] = {}
    for node in nodes:
        total = totals.setdefault(node.operator, [None, None])
        for k, ms in enumerate((node.before_ms, node.after_ms)):
            if ms is not None:
                total[k] = (total[k] or 0.0) + ms
    rows = [OperatorTime(operator, operator, before, after) for operator, (before, after) in totals.items()]
    return sorted(rows, key=lambda row: -max(row.before_ms or 0.0, row.after_ms or 0.0))
