"""Targets as users write them, and whether what comes out is within them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spa
from spa.budget import parse_target, parse_targets
from spa.compensate import walk
from spa.errors import UsageError
from tests.net import Net


@pytest.mark.parametrize(
    ("text", "metric", "limit", "relative"),
    [
        ("macs=0.6", "macs", 0.6, True),
        ("macs=60%", "macs", 0.6, True),
        ("macs = .5", "macs", 0.5, True),
        ("macs=1", "macs", 1.0, True),
        ("macs=100%", "macs", 1.0, True),
        ("macs=2.0G", "macs", 2e9, False),
        ("macs=1.5", "macs", 1.5, False),
        ("macs=3e6", "macs", 3e6, False),
        ("MACs=12k", "macs", 12e3, False),
        ("params=0.5", "parameters", 0.5, True),
        ("parameters=10M", "parameters", 10e6, False),
        ("size=10MB", "bytes", 10e6, False),
        ("size=10MiB", "bytes", 10 * 2**20, False),
        ("size=1GiB", "bytes", 2**30, False),
        ("size=12345b", "bytes", 12345, False),
        ("bytes=0.9", "bytes", 0.9, True),
        (" params=25 % ", "parameters", 0.25, True),
    ],
)
def test_reading(text: str, metric: str, limit: float, relative: bool) -> None:
    target = parse_target(text)
    assert (target.metric, target.relative) == (metric, relative)
    assert target.limit == pytest.approx(limit)
    assert target.text == text.strip()
    assert target.bound(1000.0) == pytest.approx(limit * 1000 if relative else limit)


@pytest.mark.parametrize(
    "text",
    ["", "macs", "macs=", "=0.5", "0.5", "flops=0.5", "macs=0", "macs=0%", "macs=-1", "macs=101%", "macs=0.5x",
     "macs=nan", "macs=inf", "macs=1e", "macs==0.5", "macs=0.5=0.6", "macs=five", "macs=0.5 %%"],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"target"):
        parse_target(text)


def test_several() -> None:
    both = [("macs", 0.6), ("bytes", 10e6)]
    assert [(t.metric, t.limit) for t in parse_targets("macs=0.6,size=10MB")] == both
    assert [(t.metric, t.limit) for t in parse_targets(["macs=0.6", "size=10MB"])] == both
    assert len(parse_targets(["macs=0.6, params=0.5", "size=10MB,"])) == 3


@pytest.mark.parametrize("texts", ["", [], ",", ["", " "]])
def test_none_given(texts: str | list[str]) -> None:
    with pytest.raises(UsageError, match="no target given"):
        parse_targets(texts)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_new_biases_count_before_the_refit(share: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A refit gives biases to layers that have none; that they fit in is known before it begins, not after."""
    net, rng = Net(), np.random.default_rng(0)
    x = net.input("x", "n", 24)
    for k in range(4):
        x = net("Relu", net("MatMul", x, net.weight(f"w{k}", 24, 24)))
    net.named(net("MatMul", x, net.weight("last", 24, 5)), "y")
    model = net.model(y=["n", 5])
    whole = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    work = []

    def solved(task: Any, *rest: Any) -> None:
        work.append(task.pair.pruned.name)
        real(task, *rest)

    real = walk._solve
    monkeypatch.setattr(walk, "_solve", solved)
    result = spa.prune(
        model, target=f"params={share}", method="obspa", align=1,
        calibration={"x": rng.normal(size=(200, 24)).astype(np.float32)}, output=tmp_path / "small.onnx",
    )  # fmt: skip
    assert result.report.parameters.after <= share * whole
    assert result.report.parameters.after >= (share - 0.1) * whole
    assert work
    assert len(set(work)) == len(work)  # each reader once
