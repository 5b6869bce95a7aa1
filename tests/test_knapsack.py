"""Knapsacks against brute force, and widths by knapsacks against brute force and against `efficient`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import spa
from spa.axes import LEAF
from spa.budget import parse_targets, select
from spa.budget.efficient import efficient
from spa.budget.knapsack import choose, pack
from spa.budget.queues import Queue, met, queue, state
from spa.budget.targets import Target
from spa.budget.widths import knapsack
from spa.cost import METRICS, CostModel, Term
from spa.groups import Analysis, Group
from tests.command_line import Ran
from tests.models import BUILT
from tests.small_models import cnn

# -- keep or not, one limit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_pack_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 11))
    values, costs = rng.gamma(1.0, size=n), rng.integers(0, 12, n) * int(rng.integers(1, 4))
    capacity = int(rng.integers(0, costs.sum() + 3))
    subsets = [np.array(s, dtype=bool) for s in itertools.product((False, True), repeat=n)]
    best = max(values[s].sum() for s in subsets if costs[s].sum() <= capacity)
    found = pack(values, costs, capacity)
    assert found.optimal
    assert costs[found.chosen].sum() <= capacity
    assert found.value == pytest.approx(best) == values[found.chosen].sum()

    greedy = pack(values, costs, capacity, cells=0)
    assert costs[greedy.chosen].sum() <= capacity
    assert best / 2 - 1e-12 <= greedy.value <= best + 1e-12
    assert greedy.value == pytest.approx(values[greedy.chosen].sum())


def test_pack_takes_what_it_has_room_for() -> None:
    values, costs = np.array([60.0, 100.0, 120.0]), np.array([10, 20, 30]) * 1_000_000_007
    assert pack(values, costs, 50 * 1_000_000_007).chosen.tolist() == [False, True, True], "divided by what they share"
    assert pack(values, costs, 50 * 1_000_000_007, cells=0).chosen.tolist() == [True, True, False], "by value per cost"
    assert pack(values, costs, 0).value == 0
    for wrong in ((-values, costs, 1), (values, -costs, 1), (values, costs, -1)):
        with pytest.raises(ValueError, match="must not be negative"):
            pack(*wrong)


# -- one of several, many limits ---------------------------------------------------------------------------------------


def random_choices(seed: int) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Losses that grow and costs that fall with the choice; limits between nothing and everything."""
    rng = np.random.default_rng(seed)
    limits = int(rng.integers(1, 4))
    losses, costs = [], []
    for _ in range(rng.integers(1, 6)):
        n = int(rng.integers(1, 6))
        losses.append(np.r_[0.0, rng.gamma(0.5, size=n).cumsum()] * 10.0 ** (-(seed % 9)))
        saved = rng.integers(0, 9, (limits, n)).cumsum(axis=1) * 10.0 ** (seed % 7)
        costs.append(-np.c_[np.zeros((limits, 1)), saved])
    return losses, costs, np.floor(sum(c[:, -1] for c in costs) * rng.uniform(0.1, 1.05, limits))


@pytest.mark.parametrize("seed", range(60))
def test_choice_is_optimal(seed: int) -> None:
    losses, costs, limits = random_choices(seed)
    best = min(
        (
            float(sum(v[k] for v, k in zip(losses, picks, strict=True)))
            for picks in itertools.product(*[range(len(v)) for v in losses])
            if (sum(c[:, k] for c, k in zip(costs, picks, strict=True)) <= limits).all()
        ),
        default=None,
    )
    found = choose(losses, costs, limits)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert (sum(c[:, k] for c, k in zip(costs, found.picks, strict=True)) <= limits).all()
        assert found.loss == pytest.approx(best, rel=2e-5)
        assert found.loss == pytest.approx(sum(v[k] for v, k in zip(losses, found.picks, strict=True)))
        assert found.bound <= best * (1 + 1e-9)
        assert found == choose(losses, costs, limits)


@pytest.mark.parametrize("convex", [True, False])
def test_choice_agrees_with_highs(convex: bool) -> None:
    """The branch and bound of HiGHS on the same problem, of a size beyond brute force."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    rng = np.random.default_rng(5)
    losses, costs = [], []
    for _ in range(12):
        steps = rng.gamma(0.5, size=10) * rng.lognormal()
        losses.append(np.r_[0.0, (np.sort(steps) if convex else steps).cumsum()])
        costs.append(-rng.lognormal(size=2)[:, None] * np.arange(11))
    limits = np.array([0.4, 0.3]) * sum(c[:, -1] for c in costs)
    one = np.kron(np.eye(12), np.ones(11))
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(np.concatenate(costs, axis=1), -np.inf, limits)]
    flat = np.concatenate(losses)
    other = milp(flat, constraints=constraints, bounds=Bounds(0, 1), integrality=np.ones(132))
    found = choose(losses, costs, limits)
    assert found is not None
    assert found.loss == pytest.approx(other.fun, rel=2e-4)
    assert found.bound <= other.fun * (1 + 1e-6)


# -- widths ------------------------------------------------------------------------------------------------------------


class Multilinear(CostModel):
    """A chain of layers, and a few products of sizes besides, one of them with a square."""

    def __init__(self, widths: Sequence[int], rng: np.random.Generator) -> None:
        leaves: Any = SimpleNamespace(terms={k: (LEAF, (k,)) for k in range(len(widths))}, leaves=lambda axis: (axis,))
        self.solution, self.overhead, self.full, self.metrics = leaves, 0, list(widths), METRICS
        last = len(widths) - 1
        chain = [(0,), *((k, k + 1) for k in range(last)), (last,), (0, 0), *rng.integers(0, last + 1, (2, 3)).tolist()]
        self.terms = [Term(m, float(rng.integers(1, 50)), tuple(a)) for a in chain for m in ("macs", "parameters")]
        self.by_leaf = {leaf: [k for k, t in enumerate(self.terms) if leaf in t.axes] for leaf in range(last + 1)}


def random_problem(seed: int, widths: Sequence[int], targets: str, step: int = 1) -> tuple[Any, Any, Any]:
    """A cost model, queues and limits that can be reached."""
    rng = np.random.default_rng(seed)
    cost = Multilinear(widths, rng)
    queues = []
    for k, width in enumerate(widths):
        group = Group(f"g{k}", "channel", np.zeros((width, 1), np.int64), {k: 1}, "", (), 0, 0.0, 0.0, 0.0)
        scores = rng.gamma(0.7, size=width) * rng.lognormal()
        curve = np.r_[0.0, rng.permutation(scores).cumsum()] if seed % 3 == 0 else None
        queues.append(queue(group, scores, step, 1, curve))
    full = dict(cost.totals(cost.full)) | {"units": float(sum(widths))}
    limits = {t: t.bound(full[t.metric]) for t in parse_targets(targets)}
    return cost, queues, limits


def best_loss(cost: CostModel, queues: Sequence[Queue], limits: dict[Target, float]) -> float:
    """Of all widths that meet the limits."""
    best = np.inf
    for taken in itertools.product(*[range(len(q.chunks) + 1) for q in queues]):
        for q, k in zip(queues, taken, strict=True):
            q.taken = k
        loss = sum(q.losses[q.taken] for q in queues)
        if loss < best and met(state(cost, queues)[1], limits):
            best = loss
    return float(best)


TARGETS = ["macs=0.6", "macs=0.6,params=0.6", "units=0.6", "macs=0.7,params=0.5,units=0.8"]


def test_widths_near_the_optimum() -> None:
    """Never worse than `efficient`; nearly always the best there is, although costs are products."""
    ratios, before = [], []
    for seed in range(40):
        widths = np.random.default_rng(seed).integers(4, 9, size=2 + seed % 3).tolist()
        cost, queues, limits = random_problem(seed, widths, TARGETS[seed % 4], step=1 + seed % 2)
        best = best_loss(cost, queues, limits)
        costs, found = knapsack(cost, queues, limits)
        assert met(costs, limits)
        assert costs == pytest.approx(state(cost, queues)[1])
        loss = sum(q.losses[q.taken] for q in queues)
        assert loss == pytest.approx(found.loss)
        for q in queues:
            q.taken = 0
        efficient(cost, queues, limits)
        greedy = sum(q.losses[q.taken] for q in queues)
        assert found.efficient == pytest.approx(greedy)
        assert loss <= greedy * (1 + 1e-12)
        assert found.bound <= found.loss
        ratios.append(loss / best)
        before.append(greedy / best)
    assert np.mean(np.array(ratios) <= 1 + 1e-5) >= 0.9
    assert max(ratios) < 1.3
    assert np.mean(ratios) - 1 < 0.5 * (np.mean(before) - 1)


@pytest.mark.parametrize(("count", "width"), [(40, 250), (200, 50)])
def test_ten_thousand_units(count: int, width: int) -> None:
    cost, queues, limits = random_problem(1, [width] * count, "macs=0.5,params=0.45")
    start = time.process_time()
    costs, found = knapsack(cost, queues, limits)
    assert time.process_time() - start < 5
    assert met(costs, limits)
    assert found.loss <= found.efficient
    assert found.gap < 0.02
    assert max(found.reached.values()) > 0.98


def test_nothing_to_lose() -> None:
    """No loss anywhere: what the targets need leaves, and no more."""
    cost, queues, limits = random_problem(2, [6, 6, 6], "macs=0.5")
    for q in queues:
        q.losses = [0.0] * len(q.losses)
    costs, found = knapsack(cost, queues, limits)
    assert met(costs, limits)
    assert (found.loss, found.gap) == (0.0, 0.0)
    for q in queues:
        q.taken -= q.taken > 0
        assert not q.taken or not met(state(cost, queues)[1], limits)
        q.taken += 1


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["residual_cnn", "vit_split", "decoder", "lstm_tagger", "unet"])
def analysis(request: pytest.FixtureRequest) -> Analysis:
    return spa.analyze(BUILT[request.param].build())


@pytest.mark.parametrize("targets", ["macs=0.6", "macs=0.65,params=0.7"])
def test_models_meet_targets_with_less_loss(analysis: Analysis, targets: str) -> None:
    """By the running sums of scores: never more than `efficient` loses, and the tightest target is used up."""
    rng = np.random.default_rng(7)
    scores = {g.name: rng.gamma(1.0, size=g.units) * rng.lognormal() for g in analysis.groups}

    def run(allocation: Any) -> Any:
        return select(analysis, analysis.groups, scores, parse_targets(targets), allocation=allocation, align=1)

    found, greedy = run("knapsack"), run("efficient")
    losses = [sum(scores[g.name][list(units)].sum() for g, units in s.removed) for s in (found, greedy)]
    assert losses[0] <= losses[1] * (1 + 1e-9)
    assert greedy.optimality is None
    assert found.optimality.loss == pytest.approx(losses[0])
    assert found.optimality.efficient == pytest.approx(losses[1])
    limits = {t.text: t.bound(found.original[t.metric]) for t in parse_targets(targets)}
    reached = {t.text: found.costs[t.metric] / limits[t.text] for t in parse_targets(targets)}
    assert found.optimality.reached == pytest.approx(reached)
    assert all(share <= 1 + 1e-9 for share in reached.values())
    assert max(reached.values()) >= 0.97, "some groups have a handful of units"
    assert found == run("knapsack")


def test_curves_decide() -> None:
    """A curve that says the scores are wrong is believed."""
    analysis = spa.analyze(BUILT["two_layers"].build())
    first, second = analysis.groups
    scores = {first.name: np.ones(first.units), second.name: np.ones(second.units)}
    curves = {first.name: np.zeros(first.units + 1), second.name: np.arange(second.units + 1.0)}
    targets = parse_targets("macs=0.7")
    chosen = select(
        analysis, analysis.groups, scores, targets, allocation="knapsack", align=1, min_keep=lambda g: 1, curves=curves
    )
    assert [g.name for g, _ in chosen.removed] == [first.name]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both forms of output tell how good the widths are, and nothing else is on stdout."""
    model, out = tmp_path / "m.onnx", tmp_path / "o.onnx"
    onnx.save(cnn(), model)
    arguments = [
        "prune",
        model,
        "-o",
        out,
        "--target",
        "macs=0.6",
        "--target",
        "params=0.7",
        "--allocation",
        "knapsack",
    ]
    body = Ran(capsys, *arguments, "--json").json()
    assert set(body["optimality"]) == {"loss", "bound", "gap", "efficient", "reached", "rounds", "settled"}
    assert "widths: predicted loss within" in Ran(capsys, *arguments).out
    assert Ran(capsys, *arguments[:-2], "--json").json()["optimality"] is None


def test_report() -> None:
    """What `spa.prune` tells; and a plan that is verified like any other."""
    result = spa.prune(BUILT["residual_cnn"].build(), target=["macs=0.7", "params=0.8"], allocation="knapsack")
    found = result.report.optimality
    assert found is not None
    assert set(found.reached) == {"macs=0.7", "params=0.8"}
    assert result.report.to_json()["optimality"]["loss"] == found.loss <= found.efficient
    assert result.plan.settings["allocation"] == "knapsack"
    assert result.report.macs.after <= 0.7 * result.report.macs.before
    assert result.report.parameters.after <= 0.8 * result.report.parameters.before
    assert spa.prune(BUILT["residual_cnn"].build(), target="macs=0.7").report.optimality is None
