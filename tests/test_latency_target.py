"""Pruning to a latency: targets, solvers with measured costs, the closed loop, and what is said of the result."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import spa
from spa.axes import LEAF
from spa.bench import Comparison
from spa.budget.efficient import efficient
from spa.budget.queues import Queue, met, queue, state
from spa.budget.targets import parse_target
from spa.budget.widths import knapsack
from spa.cli.latency import attempts, headline
from spa.cost import METRICS, CostModel, Term
from spa.errors import TargetError, UsageError
from spa.graph import load
from spa.groups import Group
from spa.latency import query
from spa.latency.align import worthwhile
from spa.latency.design import configurations
from spa.latency.loop import MEASUREMENTS, TOLERANCE, Attempt, Converged, converge
from spa.latency.observe import observed
from spa.latency.predict import Fitness, OperatorTerm, extended, predicted
from spa.latency.query import LatencyReport
from spa.latency.sizes import Follows
from spa.latency.table import read
from spa.pipeline import analyze
from tests.latency_device import blocked, measured, milliseconds
from tests.models import BUILT
from tests.test_knapsack import best_loss

# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "limit", "relative"),
    [
        ("latency=5ms", 5.0, False),
        ("latency=0.5ms", 0.5, False),
        ("latency=0.002s", 2.0, False),
        ("latency=800us", 0.8, False),
        ("latency=0.6", 0.6, True),
        ("latency=60%", 0.6, True),
    ],
)
def test_latency_targets(text: str, limit: float, relative: bool) -> None:
    found = parse_target(text)
    assert (found.metric, found.relative) == ("latency", relative)
    assert found.limit == pytest.approx(limit)


@pytest.mark.parametrize("text", ["latency=5", "latency=5MB", "latency=", "macs=5ms", "latency=0ms", "latency=120%"])
def test_wrong_latency_targets(text: str) -> None:
    with pytest.raises(UsageError, match="target"):
        parse_target(text)


# -- solvers -----------------------------------------------------------------------------------------------------------


class Stairs:
    """Padded to 16, see `spa.latency.surface.Surface`."""

    def at(self, points: list[tuple[int, ...]]) -> Any:
        return np.array([np.prod([-(-p // 16) * 16 for p in point]) for point in points], dtype=np.float64)


def chain(widths: list[int], seed: int) -> tuple[CostModel, list[Queue]]:
    """Layers one after the other, whose time is a product of padded widths."""
    rng = np.random.default_rng(seed)
    cost: Any = CostModel.__new__(CostModel)
    cost.solution = SimpleNamespace(terms={k: (LEAF, (k,)) for k in range(len(widths))}, leaves=lambda axis: (axis,))
    cost.overhead, cost.full, cost.metrics, cost.terms, cost.by_leaf = 0, list(widths), METRICS, [], {}
    pairs = list(itertools.pairwise(range(len(widths))))
    cost._add([Term("macs", 1.0, pair) for pair in pairs])
    stairs: Any = Stairs()
    whole = cost.extended(
        "latency", [OperatorTerm(stairs, tuple(Follows(a, 1, 1) for a in pair), 1e-3) for pair in pairs]
    )
    queues = []
    for k, width in enumerate(widths):
        group = Group(f"g{k}", "channel", np.zeros((width, 1), np.int64), {k: 1}, "", (), 0, 0.0, 0.0, 0.0)
        queues.append(queue(group, rng.gamma(0.7, size=width) * rng.lognormal(), 4, 4))
    return whole, queues


def loss_of(queues: list[Queue]) -> float:
    return float(sum(q.losses[q.taken] for q in queues))


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
def test_solvers_step_over_stairs(share: float) -> None:
    """No chunk alone saves anything; the optimum by brute force is met by `knapsack` and nearly by `efficient`."""
    ratios = []
    for seed in range(4):
        cost, queues = chain([32, 48, 32], seed)
        whole = cost.totals(cost.full)["latency"]
        limits = {parse_target(f"latency={share}"): share * whole}
        best = best_loss(cost, queues, limits)
        for q in queues:
            q.taken = 0
        costs = efficient(cost, queues, limits)
        assert met(costs, limits)
        assert costs["latency"] == pytest.approx(state(cost, queues)[1]["latency"])
        ratios.append(loss_of(queues) / best)
        costs, found = knapsack(cost, queues, limits)
        assert met(costs, limits)
        assert loss_of(queues) <= found.efficient + 1e-9
        ratios[-1] = min(ratios[-1], loss_of(queues) / best)
        assert all(left % 16 == 0 for q in queues if (left := q.group.units - q.removed)), "padding for nothing"
    assert min(ratios) >= 1 - 1e-9
    assert np.median(ratios) <= 1.05


def test_allowed_widths_become_chunks() -> None:
    group = Group("g", "channel", np.zeros((32, 1), np.int64), {0: 1}, "", (), 0, 0.0, 0.0, 0.0)
    found = queue(group, np.arange(32.0), 8, 4, widths=(4, 16, 24, 32))
    assert found.chunks == [8, 8, 12]
    assert queue(group, np.arange(32.0), 8, 5, widths=(4, 16, 24, 32)).chunks == [8, 8]


# -- the loop ----------------------------------------------------------------------------------------------------------


def turn(goal: float, true: Any, widths: int = 64, bias: float = 1.0) -> tuple[Converged[int], list[int]]:
    """A model of one layer: the table predicts a width's share, the machine takes `true` of it."""
    measured_widths: list[int] = []

    def solve(share: float) -> int:
        width = int(share * widths + 1e-9)
        if width < 4:
            raise TargetError("latency cannot be reached: the floor")
        return width

    def measure(width: int) -> float:
        measured_widths.append(width)
        return float(true(width / widths))

    return converge(goal, solve, lambda w: w / widths * bias, measure, lambda w: w), measured_widths


@pytest.mark.parametrize("goal", [0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    "true",
    [
        lambda x: x,
        lambda x: 1.3 * x,
        lambda x: x * (0.6 + 0.4 * x),
        lambda x: 0.2 + 0.8 * x,
        lambda x: x**2,
        lambda x: x**0.5,
    ],
)
def test_the_loop_meets_the_goal(true: Any, goal: float) -> None:
    """Whatever the table gets wrong, as long as wider is slower."""
    found, tried = turn(goal, true, widths=2048)
    assert abs(found.measured / goal - 1) <= TOLERANCE
    assert len(found.attempts) == len(tried) <= MEASUREMENTS
    assert len(set(tried)) == len(tried), "a solution was measured twice"
    assert found.measured == pytest.approx(true(found.solution / 2048))


def test_a_good_table_needs_one_measurement() -> None:
    found, tried = turn(0.5, lambda x: x, widths=2048)
    assert len(tried) == 1
    assert found.attempts[0].predicted == pytest.approx(found.measured)


def test_coarse_widths_give_the_slowest_that_is_fast_enough() -> None:
    found, _ = turn(0.6, lambda x: np.ceil(4 * x) / 4, widths=64)
    assert found.measured == 0.5
    assert 25 <= found.solution <= 32


def test_noise_of_a_percent_is_no_obstacle() -> None:
    rng = np.random.default_rng(0)
    for goal in (0.4, 0.5, 0.6, 0.7):
        found, _ = turn(goal, lambda x: 1.2 * x * (1 + 0.01 * rng.standard_normal()), widths=512)
        assert abs(found.measured / goal - 1) <= TOLERANCE


def test_what_cannot_be_reached_names_the_best() -> None:
    with pytest.raises(TargetError, match=r"the best that was measured is 0\.5"):
        turn(0.3, lambda x: 0.5 + 0.5 * x, widths=1024)
    with pytest.raises(TargetError, match="the floor"):
        converge(0.01, lambda share: _fail(), lambda s: 0.0, lambda s: 0.0, lambda s: 0)


def _fail() -> int:
    raise TargetError("latency cannot be reached: the floor")


# -- the whole ---------------------------------------------------------------------------------------------------------


class Watch:
    """The machine is a formula, a third slower than the table has it."""

    def __init__(self, graph: Any, setting: Any, folder: Path, dims: Any = None, inputs: Any = None) -> None:
        self.graph, self.analysis, self.original = graph, analyze(graph), folder / "original.onnx"
        self.dense = milliseconds(graph, self.analysis, {}, blocked)

    def _of(self, model: Any) -> float:
        analysis = analyze(model)
        graph: Any = SimpleNamespace(model=model)
        ms = milliseconds(graph, analysis, {}, blocked)
        return self.dense * (ms / self.dense) ** 0.75

    def ratio(self, model: Any) -> tuple[float, float]:
        return self.dense, self._of(model)

    def times(self, path: Path) -> tuple[float, float]:
        return self.dense, self.dense if path == self.original else self._of(onnx.load(path))

    def comparison(self, path: Path) -> Comparison:
        speed = self.dense / self._of(onnx.load(path))
        return Comparison(speed, speed - 0.01, speed + 0.01, 0.95, "faster")


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CNN and its table, measured on a device that is a formula."""
    folder = tmp_path_factory.mktemp("profiled")
    onnx.save(BUILT["residual_cnn"].build(), folder / "m.onnx")
    graph = load(folder / "m.onnx")
    analysis = analyze(graph)
    result = measured(graph, analysis, configurations(analysis.groups, 40), blocked)
    observed(result, analysis, graph.sha256).write(folder / "t.json")
    return folder / "t.json"


@pytest.fixture
def table(profiled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, and that device is this machine."""
    monkeypatch.setattr("spa.closed_loop.Stopwatch", Watch)
    monkeypatch.setattr("spa.closed_loop.is_here", lambda table: True)
    return profiled


@pytest.mark.parametrize("allocation", ["global", "uniform", "efficient", "knapsack"])
def test_pruning_to_a_measured_latency(table: Path, allocation: Any) -> None:
    out = table.with_name("out.onnx")
    result = spa.prune(
        table.with_name("m.onnx"), target="latency=0.6", output=out, latency_table=table, allocation=allocation
    )
    found = result.report.latency
    assert found is not None
    assert found.measured
    assert found.asked == 0.6
    assert found.share == pytest.approx(0.6, rel=0.15 if allocation == "uniform" else 0.06)
    assert found.share <= 0.6 * (1 + TOLERANCE)
    assert found.predicted < found.share  # the table was wrong, and was corrected
    body = result.report.to_json()["latency"]
    assert body["share"] == found.share
    assert len(body["attempts"]) == len(found.attempts) >= 1


def test_absolute_and_joint_targets(table: Path) -> None:
    graph = load(table.with_name("m.onnx"))
    dense = milliseconds(graph, analyze(graph), {}, blocked)
    source = table.with_name("m.onnx")
    result = spa.prune(source, target=[f"latency={0.7 * dense}ms", "params=0.5"], latency_table=table)
    assert result.report.latency is not None
    assert result.report.latency.asked == pytest.approx(0.7)
    assert result.report.latency.after_ms <= 0.7 * dense * (1 + TOLERANCE)
    assert result.report.parameters.after <= 0.5 * result.report.parameters.before


def test_a_table_chooses_the_widths_of_other_targets(table: Path) -> None:
    """`--align auto`: kernels that pad to 16 leave 32, 16, or little; without a table 24 of 32 are kept, too."""
    source = table.with_name("m.onnx")
    graph = load(source)
    analysis = analyze(graph)
    cost = extended(analysis, predicted(read(table), graph.sha256, analysis).terms).cost
    allowed = worthwhile(cost, analysis.groups)
    assert 24 not in allowed["stem:channel"]
    odd = []
    for options in ({"latency_table": table}, {}):
        result = spa.prune(source, target="macs=0.75", allocation="uniform", **options)  # type: ignore[arg-type]  # either
        odd.append([g.name for g in result.plan.groups if g.units - len(g.removed) not in allowed[g.name]])
    assert odd[0] == []
    assert "stem:channel" in odd[1]


def test_a_table_of_another_machine_only_predicts(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spa.closed_loop.is_here", query.is_here)
    result = spa.prune(table.with_name("m.onnx"), target="latency=0.6", latency_table=table)
    found = result.report.latency
    assert found is not None
    assert not found.measured
    assert found.versus_original is None
    assert found.share == found.predicted <= 0.6
    assert headline(found).startswith("predicted, not measured")


def test_a_table_without_the_model_is_refused(table: Path) -> None:
    onnx.save(BUILT["unet"].build(), table.with_name("other.onnx"))
    with pytest.raises(UsageError, match=r"t\.json: the latency table has no measurements of this model"):
        spa.prune(table.with_name("other.onnx"), target="latency=0.6", latency_table=table)


def test_steps_know_latency(table: Path) -> None:
    result = spa.prune(table.with_name("m.onnx"), target="latency=0.6", latency_table=table, steps=2)
    assert result.report.latency is not None
    assert result.report.latency.share <= 0.6 * (1 + TOLERANCE)


def test_a_family_by_latency(table: Path, tmp_path: Path) -> None:
    """Points keep to their share as the table has it, and say what the machine takes; `pick` chooses by that."""
    source = table.with_name("m.onnx")
    samples = np.random.default_rng(0).normal(size=(96, 3, 12, 12)).astype(np.float32)
    given = {"calibration": samples, "method": "flap", "latency_table": table, "cache": tmp_path / "cache"}
    family = spa.frontier(source, output=tmp_path / "family", shares=(0.8, 0.6), minimise="latency", **given)
    watch = Watch(load(source), None, tmp_path)
    whole = family.original["latency"]
    assert [p.share for p in family.points] == [0.6, 0.8]
    for point in family.points:
        assert point.costs["latency"] <= point.share * whole
        cut = spa.apply(source, family.folder / point.plan).model
        assert point.measured_ms == pytest.approx(watch.ratio(cut)[1])
        assert point.measured_ms > point.costs["latency"]  # the table is wrong on this machine
    small, large = family.points
    between = (small.measured_ms + large.measured_ms) / 2
    found = spa.pick(family, target=f"latency={between}ms", calibration=samples)
    assert found.plan.removed == spa.apply(source, family.folder / small.plan).plan.removed
    with pytest.raises(TargetError, match="no point"):
        spa.pick(family, target=f"latency={small.measured_ms * 0.9}ms", calibration=samples)


# -- what is said ------------------------------------------------------------------------------------------------------


def said(verdict: Any, measured: bool = True, share: float = 0.6) -> LatencyReport:
    versus = Comparison(1 / share, 1.5, 1.7, 0.95, verdict) if measured else None
    tries = (Attempt(0.59, 0.59, 0.7), Attempt(0.5, 0.5, share))
    return LatencyReport(
        measured, 10.0, 10 * share, 0.6, 0.5, versus, tries, Fitness(0.9, 0.02, 0.1), "cpu", "ort", "cpu", 1, 1
    )


def test_only_what_was_measured_to_be_faster_is_called_so() -> None:
    assert headline(said("faster")).startswith("faster: 1.67x")
    assert headline(said("slower")).startswith("NOT faster: slower than the original")
    assert headline(said("no measurable difference")).startswith("NOT faster: not measurably faster")
    assert "faster:" not in headline(said("faster", measured=False))
    assert headline(None).startswith("latency was not measured")


def test_a_missed_target_is_said() -> None:
    assert len(attempts(said("faster"))) == 2
    assert "nearest" in attempts(said("faster", share=0.5))[1]
    assert "0.59" not in attempts(said("faster"))[0]
    assert "59.0% -> 70.0%" in attempts(said("faster"))[-1]
