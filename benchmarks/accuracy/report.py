"""Tables of the accuracy benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.accuracy.rows import (
    OURS,
    PEER,
    PUBLISHED,
    Comparison,
    Key,
    Mean,
    Row,
    best,
    comparisons,
    key_of,
    means,
)
from benchmarks.measure import table

LOWER_IS_BETTER = frozenset({"tinystories"})


def tables(rows: Sequence[Row], headline: dict[str, str]) -> str:
    """What there is, one table per kind of suite."""
    parts = []
    compared = [c for c in comparisons(rows, headline) if c.key[0] in ("cifar", "imagenet")]
    if compared:
        parts += ["Top-1 in percent right after pruning, no training; means over seeds", _against_peer(compared)]
    for suite, title in (
        ("deit", "DeiT-tiny, accuracy kept in percent of the dense network's, means over seeds"),
        ("text", "Texts: 100 x Spearman correlation (sts-b), perplexity (tinystories), means over seeds"),
    ):
        found = [row for row in rows if row.suite == suite]
        if found:
            parts += [title, _by_method(found, retention=suite == "deit")]
    others = _others(rows, headline)
    if others:
        parts += ["Our other methods", others]
    errors = dict.fromkeys(
        f"- {row.network}, {row.tool} {row.method}, {row.target}: {row.error}" for row in rows if row.error
    )
    if errors:
        parts.append("\n".join(errors))
    return "\n\n".join(parts) + "\n"


def _against_peer(compared: Iterable[Comparison]) -> str:
    headings = (
        "network", "data", "target", "dense", "ours", "MACs", "drop", "best peer", "MACs", "drop", "criterion",
        "drop / drop", "demanded",
    )  # fmt: skip
    rows = []
    for c in compared:
        dense = next((m.dense for m in (c.ours, c.peer) if m is not None), None)
        verdict = {None: "", True: " met", False: " MISSED"}[c.met]
        rows.append([
            _short(c.key[1]), c.key[2], c.key[3], _number(dense), *_figures(c.ours), *_figures(c.peer),
            c.peer.method if c.peer else "-", _number(c.ratio),
            "-" if c.demanded is None else f"{c.demanded:g}{verdict}",
        ])  # fmt: skip
    return table(headings, rows)


def _figures(mean: Mean | None) -> list[str]:
    if mean is None:
        return ["-", "-", "-"]
    spread = f" ±{mean.spread:.2f}" if mean.seeds > 1 else ""
    return [f"{mean.value:.2f}{spread}", _number(mean.reached, 3), _number(mean.drop)]


def _by_method(rows: Sequence[Row], retention: bool) -> str:
    """A column per method of ours, the peer's best, and what is published."""
    keys = list(dict.fromkeys(key_of(row) for row in rows))
    ours = list(dict.fromkeys(row.method for row in rows if row.tool == OURS))
    peer, published = (any(row.tool == tool for row in rows) for tool in (PEER, PUBLISHED))
    headings = ["network", "data", "target", "dense", *ours, *(["best peer", "criterion"] if peer else [])]
    headings += ["published VBP"] if published else []
    body = []
    for key in keys:
        by_name = {m.method: m for m in means(rows, OURS, key)}
        other = best(means(rows, PEER, key), key[2] in LOWER_IS_BETTER)
        any_row = next((m for m in (*by_name.values(), other) if m is not None), None)
        line = [_short(key[1]), key[2], key[3], _number(any_row.dense if any_row else None)]
        line += [_kept(by_name.get(method), retention) for method in ours]
        line += [_kept(other, retention), other.method if other else "-"] if peer else []
        if published:
            line.append(_kept(next(iter(means(rows, PUBLISHED, key)), None), retention))
        body.append(line)
    return table(headings, body)


def _kept(mean: Mean | None, retention: bool) -> str:
    if mean is None:
        return "-"
    scale = 100 / mean.dense if retention else 1.0
    spread = f" ±{mean.spread * scale:.2f}" if mean.seeds > 1 else ""
    return f"{mean.value * scale:.2f}{spread}"


def _others(rows: Sequence[Row], headline: dict[str, str]) -> str:
    keys: list[Key] = list(
        dict.fromkeys(key_of(r) for r in rows if r.tool == OURS and r.suite in ("cifar", "imagenet"))
    )
    body = [
        [_short(key[1]), key[2], key[3], m.method, *_figures(m), *_figures(best(means(rows, PEER, key)))]
        for key in keys
        for m in means(rows, OURS, key)
        if m.method != headline.get(key[0])
    ]
    return (
        table(("network", "data", "target", "method", "ours", "MACs", "drop", "best peer", "MACs", "drop"), body)
        if body
        else ""
    )


def _short(network: str) -> str:
    return network.partition("_")[0]


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
