"""The job layer, without any server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import spa
from spa.jobs import (
    BenchmarkSpec,
    Event,
    FinetuneSpec,
    FrontierSpec,
    InspectSpec,
    JobCancelled,
    MetricEvent,
    ProfileSpec,
    PruneSpec,
    StageEvent,
    Store,
    read,
    run,
)


@pytest.fixture
def store(tmp_path: Path, model: Path) -> Store:
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    samples = {"input": rng.random((24, 3, 8, 8), np.float32)}
    name = onnx.load(model).graph.input[0].name
    shape = [d.dim_value or 24 for d in onnx.load(model).graph.input[0].type.tensor_type.shape.dim]
    samples = {name: rng.random((24, *shape[1:]), np.float32), "labels": rng.integers(0, 10, 24)}
    np.savez(tmp_path / "data.npz", **samples)
    files = {"models/1": model, "datasets/1": tmp_path / "data.npz"}
    return Store(files, tmp_path / "out", tmp_path / "work", tmp_path / "cache")


def never() -> bool:
    return False


def test_inspect(store: Store, model: Path) -> None:
    from spa.explain import inspection

    run(InspectSpec("models/1", page=True), store, lambda event: None, never)
    assert json.loads((store.output / "report.json").read_text()) == json.loads(
        json.dumps(inspection(spa.analyze(model)))
    )
    assert "<html" in (store.output / "page.html").read_text()


def test_prune_is_spa_prune(store: Store, model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    spec = PruneSpec(
        "models/1", ("macs=0.7",), "small.onnx", method="obspa", calibration="datasets/1", align="4", samples=16
    )
    run(spec, store, events.append, never)
    local = spa.prune(
        model,
        target="macs=0.7",
        output=tmp_path / "small.onnx",
        method="obspa",
        calibration=tmp_path / "data.npz",
        align=4,
        samples=16,
    )
    assert (store.output / "small.onnx").read_bytes() == (tmp_path / "small.onnx").read_bytes()
    assert (
        json.loads((store.output / "plan.json").read_text())["removed"] == json.loads(local.plan.to_json())["removed"]
    )
    assert list((tmp_path / "cache").iterdir())  # measurements are there for the next job
    assert StageEvent("verify", 0, 1) in events


def test_frontier_goes_on_where_it_was(store: Store) -> None:
    spec = FrontierSpec("models/1", shares=(0.9, 0.7), calibration="datasets/1", page=True)
    seen: list[Event] = []

    def stop() -> bool:
        return any(event == StageEvent("frontier", 1, 2) for event in seen)

    with pytest.raises(JobCancelled):
        run(spec, store, seen.append, stop)
    first = json.loads((store.work / "family" / "frontier.json").read_text())["points"]
    assert len(first) == 1
    run(spec, store, lambda event: None, never)
    report = json.loads((store.output / "report.json").read_text())
    assert {point["share"] for point in report["points"]} == {0.9, 0.7}
    names = {path.name for path in store.output.rglob("*") if path.is_file()}
    assert names == {"report.json", "frontier.json", "frontier.html", "0.9.json", "0.7.json"}


@pytest.mark.slow
def test_finetune_reports_epochs_and_keeps_its_state(store: Store) -> None:
    pytest.importorskip("torch")
    events: list[Event] = []
    spec = FinetuneSpec("models/1", "datasets/1", "tuned.onnx", epochs=2, batch=8, seed=1)
    run(spec, store, events.append, never)
    metrics = [event for event in events if isinstance(event, MetricEvent)]
    assert [event.epoch for event in metrics] == [0, 1, 2]
    assert "loss" in metrics[1].values
    assert (store.output / "tuned.onnx").is_file()
    assert list(store.work.iterdir())


@pytest.mark.slow
def test_profile_and_benchmark(store: Store, tmp_path: Path) -> None:
    from spa.latency.table import read as read_table

    run(ProfileSpec("models/1", models=4, passes=1, seconds=0.01), store, lambda event: None, never)
    assert read_table(store.output / "table.json").models
    assert json.loads((store.output / "report.json").read_text())["models"] >= 4
    run(BenchmarkSpec(("models/1",), repeats=5, seconds=0.1, memory=False), store, lambda event: None, never)
    assert json.loads((store.output / "report.json").read_text())["models"]


def test_a_cancelled_job_stops_at_its_next_step(store: Store) -> None:
    seen: list[Event] = []
    with pytest.raises(JobCancelled):
        run(PruneSpec("models/1", ("macs=0.7",)), store, seen.append, lambda: len(seen) >= 3)
    assert len(seen) == 3
    assert not list(store.output.iterdir())


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "a job needs `kind`"),
        ({"kind": "prun"}, "did you mean 'prune'"),
        ({"kind": "prune", "model": "models/1"}, "'target' is missing"),
        ({"kind": "prune", "model": "models/1", "target": []}, "target: name one"),
        ({"kind": "prune", "model": "net.onnx", "target": ["macs=1"]}, "is no reference"),
        ({"kind": "inspect", "model": "models/../x"}, "is no reference"),
        ({"kind": "inspect", "model": "models/1", "page": "yes"}, "true or false"),
        ({"kind": "prune", "model": "models/1", "target": ["macs=1"], "inputs": "/etc/passwd"}, "is no reference"),
        (
            {"kind": "prune", "model": "models/1", "target": ["macs=1"], "preprocess": "/etc/x.json"},
            "looks like a file",
        ),
        ({"kind": "prune", "model": "models/1", "target": ["macs=1"], "output_name": "../x"}, "plain file name"),
        ({"kind": "prune", "model": "models/1", "target": ["macs=1"], "output_name": "plan.json"}, "plain file name"),
        ({"kind": "prune", "model": "models/1", "target": ["macs=1"], "align": "x"}, "auto or a number"),
        ({"kind": "prune", "model": "models/1", "target": ["macs=1"], "scope": "some"}, "one of exact, all"),
        ({"kind": "benchmark", "models": []}, "name one at least"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(body: dict[str, object], says: str) -> None:
    with pytest.raises(spa.UsageError) as caught:
        read(body)
    assert says in str(caught.value)
