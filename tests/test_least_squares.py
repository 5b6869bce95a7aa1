"""Elimination and refit against numpy's least squares on the samples themselves, and against trying everything."""

from __future__ import annotations

import itertools
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa.least_squares import (
    DAMPINGS,
    Consumer,
    Refitter,
    damped,
    greedy,
    loss_of,
    one_shot,
    refit,
    swapped,
    transfer,
)

Array = np.ndarray
TINY = 1e-13


def samples(rng: np.random.Generator, rows: int, width: int) -> Array:
    """Correlated inputs with different scales and means."""
    mixing = rng.normal(size=(width, width)) + np.eye(width)
    return rng.normal(size=(rows, width)) @ mixing * rng.uniform(0.3, 3, width) + rng.normal(0, 5, width)


def covariance(x: Array, y: Array | None = None) -> Array:
    y = x if y is None else y
    return (y - y.mean(0)).T @ (x - x.mean(0)) / len(x)


def with_intercept(x: Array, t: Array) -> tuple[Array, float]:
    """Weights [m, d] and the mean squared error (summed over targets) of the best affine map."""
    design = np.hstack([x, np.ones((len(x), 1))])
    solution, *_ = np.linalg.lstsq(design, t, rcond=None)
    return solution[:-1].T, float(np.square(design @ solution - t).sum() / len(x))


# -- refit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_refit_is_least_squares_with_an_intercept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, t = samples(rng, 200, 7), rng.normal(size=(200, 4)) * 3 + 2
    t += np.sin(x[:, :4])
    got = refit(covariance(x), covariance(x, t), rng.normal(size=(4, 7)), TINY)
    np.testing.assert_allclose(got, with_intercept(x, t)[0], rtol=1e-8, atol=1e-8)


def test_the_ridge_pulls_towards_the_prior() -> None:
    """The same problem with one more row per weight: sqrt(ridge) w = sqrt(ridge) prior."""
    rng = np.random.default_rng(5)
    rows, d, m, damping = 60, 6, 3, 0.3
    x, t, prior = samples(rng, rows, d), rng.normal(size=(rows, m)), rng.normal(size=(m, d))
    ridge = damping * np.trace(covariance(x)) / d
    top = (x - x.mean(0)) / np.sqrt(rows), (t - t.mean(0)) / np.sqrt(rows)
    design = np.vstack([top[0], np.sqrt(ridge) * np.eye(d)])
    target = np.vstack([top[1], np.sqrt(ridge) * prior.T])
    expected = np.linalg.lstsq(design, target, rcond=None)[0].T
    np.testing.assert_allclose(refit(covariance(x), covariance(x, t), prior, damping), expected, rtol=1e-9, atol=1e-9)


def test_one_refitter_serves_many_targets() -> None:
    rng = np.random.default_rng(6)
    x, prior = samples(rng, 80, 5), rng.normal(size=(2, 5))
    refitter = Refitter(covariance(x), prior, 1e-2)
    for _ in range(3):
        cross = rng.normal(size=(2, 5))
        np.testing.assert_array_equal(refitter(cross), refit(covariance(x), cross, prior, 1e-2))


def test_a_refit_of_many_outputs_is_that_of_each() -> None:
    rng = np.random.default_rng(14)
    x, prior, cross = samples(rng, 50, 4), rng.normal(size=(9000, 4)), rng.normal(size=(9000, 4))
    found = refit(covariance(x), cross, prior, 1e-2)
    for part in (slice(0, 7), slice(4090, 4100), slice(8999, 9000)):
        np.testing.assert_allclose(found[part], refit(covariance(x), cross[part], prior[part], 1e-2), rtol=1e-12)


def test_a_covariance_that_rounding_made_indefinite() -> None:
    """Cholesky factors do not exist; the problem still has its solution."""
    matrix = np.diag([4.0, 1.0, -1e-3])
    found = refit(matrix, np.array([[4.0, 1.0, -1e-3]]), np.zeros((1, 3)), 1e-9)
    np.testing.assert_allclose(found, np.ones((1, 3)), rtol=1e-5)


def test_errors_on_other_samples() -> None:
    """`transfer` is the squared error of a refit on one half, measured on the other, up to what no weight changes."""
    rng = np.random.default_rng(12)
    x, prior = samples(rng, 120, 6), rng.normal(size=(3, 6))
    t = x @ rng.normal(size=(6, 3)) + rng.normal(size=(120, 3))
    parts = [(covariance(x[k::2]), covariance(x[k::2], t[k::2])) for k in range(2)]

    def error(weight: Array) -> float:
        test, target = x[1::2] - x[1::2].mean(0), t[1::2] - t[1::2].mean(0)
        return float(np.square(test @ weight.T - target).sum() / len(test))

    got = transfer(*parts[0], *parts[1], prior)
    expected = [error(refit(*parts[0], prior, damping)) - error(prior) for damping in DAMPINGS]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-9)
    both = [np.stack([part, part]) for part in (*parts[0], *parts[1], prior)]
    np.testing.assert_allclose(transfer(*both), 2 * np.array(expected), rtol=1e-6, atol=1e-9)
    assert (transfer(np.zeros((2, 2)), np.zeros((1, 2)), np.eye(2), np.ones((1, 2)), np.ones((1, 2))) == 0).all()


@pytest.mark.parametrize("noise", [0.03, 1.0, 30.0])
def test_errors_of_many_outputs_are_estimated(noise: float) -> None:
    """Random combinations of outputs tell as much about the ridges as all of them."""
    rng = np.random.default_rng(13)
    outputs, columns, rows = 3000, 24, 120
    x, true = samples(rng, rows, columns), rng.normal(size=(columns, outputs))
    t, prior = x @ true + noise * rng.normal(size=(rows, outputs)), true.T + rng.normal(size=(outputs, columns))
    halves = [(covariance(x[k::2]), covariance(x[k::2], t[k::2])) for k in range(2)]
    got = transfer(*halves[0], *halves[1], prior)
    exact = sum(
        transfer(halves[0][0], halves[0][1][part], halves[1][0], halves[1][1][part], prior[part])
        for part in np.array_split(np.arange(outputs), 10)
    )
    assert np.argmin(got) == np.argmin(exact)
    np.testing.assert_allclose(got, exact, atol=0.15 * np.ptp(exact))


def test_what_the_data_does_not_see_keeps_its_weight() -> None:
    """Inputs that are constant, and inputs that are always equal: only the visible part may change."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=(100, 3))
    x = np.hstack([x, x[:, :1], np.full((100, 1), 4.0)])
    prior = rng.normal(size=(2, 5))
    cov = covariance(x)
    same = refit(cov, prior @ cov, prior, 1e-2)
    np.testing.assert_allclose(same, prior, atol=1e-12)
    got = refit(cov, rng.normal(size=(2, 4)) @ cov[:4], prior, 1e-4)
    np.testing.assert_allclose(got[:, 4], prior[:, 4], atol=1e-10)
    np.testing.assert_allclose(got[:, 0] - got[:, 3], prior[:, 0] - prior[:, 3], atol=1e-10)
    assert np.isfinite(refit(np.zeros((3, 3)), np.zeros((1, 3)), np.ones((1, 3)), 1e-2)).all()


def test_the_ridge_is_relative() -> None:
    cov = np.diag([1.0, 3.0])
    np.testing.assert_allclose(damped(cov, 0.1), np.diag([1.2, 3.2]))
    np.testing.assert_allclose(damped(cov * 1e6, 0.1), np.diag([1.2, 3.2]) * 1e6)


# -- losses --------------------------------------------------------------------------------------------------------


def problem(rng: np.random.Generator, units: int, widths: list[int], damping: float = 1e-10) -> list[Consumer]:
    """Consumers with blocks of at most these widths; some units feed fewer columns, and some columns no unit."""
    out = []
    for width in widths:
        blocks = rng.integers(0 if width > 1 else 1, width + 1, units)
        d = int(blocks.sum()) + int(rng.integers(1, 3))
        columns = np.full((units, width), -1, dtype=np.int64)
        order = iter(rng.permutation(d).tolist())
        for u, n in enumerate(blocks.tolist()):
            columns[u, rng.permutation(width)[:n]] = [next(order) for _ in range(n)]
        m = int(rng.choice([1, 3, 3 * d]))  # tall ones are rotated into less
        cov = covariance(samples(rng, 4 * d + 5, d))
        out.append(Consumer.of(rng.normal(size=(m, d)), cov, columns, float(rng.uniform(0.2, 3)), damping))
    return out


def eliminated(matrix: Array, columns: list[int]) -> Array:
    """Schur complement of `columns` by Gaussian elimination; in as many digits as the numbers of the matrix have."""
    a = matrix.copy()
    for k in columns:
        a = a - np.outer(a[:, k], a[k]) / a[k, k]
    rest = [k for k in range(len(a)) if k not in columns]
    return a[np.ix_(rest, rest)]


def reference_loss(consumers: list[Consumer], removed: list[int], digits: int = 60) -> float:
    """The part of the removed inputs that the others cannot explain, from the covariance itself.

    In 60 digits: what is left of a variance after others explained all but a millionth of a millionth of it would be
    noise in double precision (`digits` 16), and the reference less exact than what it judges.
    """
    total = 0.0
    number = np.vectorize(Decimal, otypes=[object]) if digits > 16 else np.asarray
    with localcontext(prec=digits):
        for c in consumers:
            d = len(c.inverse)
            wide = np.block([[c.inverse, np.eye(d)], [np.eye(d), np.zeros((d, d))]])
            cov = -eliminated(number(wide), list(range(d)))
            gone = sorted({k for u in removed for k in c.columns[u].tolist() if k >= 0})
            unexplained = eliminated(cov, [k for k in range(d) if k not in gone])
            w = number(c.weight[:, gone]) if gone else np.zeros((1, 0))
            total += c.importance * float(np.sum((w @ unexplained) * w))
    return total


def test_the_loss_is_the_residual_of_a_fit_on_samples() -> None:
    """With an intercept, on real rows: what the removed columns add to the output and the others cannot replace."""
    rng = np.random.default_rng(8)
    x, w = samples(rng, 300, 8), rng.normal(size=(5, 8))
    columns = np.array([[0, 5], [1, -1], [-1, 2], [7, 3]])
    for removed in ([0], [1, 3], [0, 1, 2], [0, 1, 2, 3]):
        gone = [k for u in removed for k in columns[u].tolist() if k >= 0]
        stay = [k for k in range(8) if k not in gone]
        expected = 2.5 * with_intercept(x[:, stay], x[:, gone] @ w[:, gone].T)[1]
        consumer = Consumer.of(w, covariance(x), columns, 2.5, TINY)
        assert loss_of([consumer], np.array(removed)) == pytest.approx(expected, rel=1e-7)
    assert loss_of([consumer], np.array([], dtype=np.int64)) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_losses_of_random_problems(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = int(rng.integers(2, 7))
    consumers = problem(rng, units, rng.integers(1, 4, int(rng.integers(1, 4))).tolist(), 10.0 ** rng.integers(-9, 0))
    count = int(rng.integers(1, units + 1))
    removed = rng.permutation(units)[:count]
    assert loss_of(consumers, removed) == pytest.approx(reference_loss(consumers, removed.tolist()), rel=1e-9)
    alone = [reference_loss(consumers, [u]) for u in range(units)]
    np.testing.assert_allclose(one_shot(consumers), alone, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_greedy_adds_up(seed: int) -> None:
    """After each unit the running loss is that of the set so far, each unit comes once, and the first is the best."""
    rng = np.random.default_rng(seed)
    units = int(rng.integers(2, 9))
    consumers = problem(rng, units, rng.integers(1, 4, int(rng.integers(1, 4))).tolist(), 1e-6)
    found = greedy(consumers)
    assert sorted(found.order.tolist()) == list(range(units))
    assert found.loss[0] == 0
    for k in range(1, units + 1):
        expected = reference_loss(consumers, found.order[:k].tolist())
        assert found.loss[k] == pytest.approx(expected, rel=1e-5, abs=1e-9)
        # each step takes what costs least by then
        before = found.order[: k - 1].tolist()
        left = [u for u in range(units) if u not in before]
        best = min(reference_loss(consumers, [*before, u]) for u in left)
        assert expected == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_several_at_once() -> None:
    """With fewer rounds than units the loss at the end of each round is still exact."""
    rng = np.random.default_rng(9)
    consumers = problem(rng, 10, [1, 2], 1e-3)
    found = greedy(consumers, steps=4)  # three at a time
    for k in (3, 6, 9, 10):
        assert found.loss[k] == pytest.approx(reference_loss(consumers, found.order[:k].tolist()), rel=1e-6)
    assert (np.diff(found.loss) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_exchanging_never_hurts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = int(rng.integers(2, 9))
    consumers = problem(rng, units, rng.integers(1, 4, int(rng.integers(1, 4))).tolist(), 1e-3)
    count = int(rng.integers(1, units + 1))
    for start in (rng.permutation(units)[:count], np.argsort(one_shot(consumers), kind="stable")[:count]):
        better = swapped(consumers, start)
        assert len(set(better.tolist())) == count
        assert loss_of(consumers, better) <= loss_of(consumers, start) * (1 + 1e-9)


def test_close_to_the_best_of_all_subsets() -> None:
    """Greedy with exchanges: never better than the optimum, mostly equal, and on the whole better than one shot."""
    hits, ratios, worse = 0, [], []
    for seed in range(60):
        rng = np.random.default_rng(1000 + seed)
        consumers = problem(rng, 8, [1, 2], 1e-3)
        count = 2 + seed % 4
        best = min(loss_of(consumers, np.array(s)) for s in itertools.combinations(range(8), count))
        single = loss_of(consumers, np.argsort(one_shot(consumers), kind="stable")[:count])
        mine = loss_of(consumers, swapped(consumers, greedy(consumers).order[:count]))
        assert mine >= best * (1 - 1e-9)
        hits += mine <= best * (1 + 1e-9)
        ratios.append(mine / best)
        worse.append(single / best)
    assert hits >= 45
    assert np.mean(ratios) < 1.05
    assert np.mean(ratios) < np.mean(worse)


def test_better_than_one_shot() -> None:
    """Greedy with exchanges is never worse than the ranking of single units, and often better."""
    better = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        units = int(rng.integers(4, 10))
        consumers = problem(rng, units, rng.integers(1, 4, int(rng.integers(1, 4))).tolist(), 1e-3)
        count = int(rng.integers(1, units))
        single = loss_of(consumers, np.argsort(one_shot(consumers), kind="stable")[:count])
        mine = loss_of(consumers, swapped(consumers, greedy(consumers).order[:count]))
        assert mine <= single * (1 + 1e-9)
        better += mine < single * 0.99
    assert better > 40


def test_duplicates_leave_for_nothing() -> None:
    """Of units whose inputs depend on each other, all but one copy cost (nearly) nothing; the last one costs."""
    rng = np.random.default_rng(11)
    x = rng.normal(size=(400, 4))
    x = np.hstack([x, x @ rng.normal(size=(4, 3))])
    spread = covariance(x)
    consumer = Consumer.of(rng.normal(size=(6, 7)), spread, np.arange(7)[:, None], 1.0, 1e-8)
    found = greedy([consumer])
    scale = float(np.sum(consumer.weight @ spread * consumer.weight))
    assert found.loss[3] < 1e-6 * scale
    assert found.loss[4] > 1e-3 * scale


def test_unread_units_cost_nothing() -> None:
    columns = np.array([[0], [-1], [1]])
    consumer = Consumer.of(np.ones((2, 2)), np.eye(2), columns, 1.0, 0.0)
    np.testing.assert_allclose(one_shot([consumer]), [2, 0, 2])
    assert greedy([consumer]).order[0] == 1
    assert loss_of([consumer], np.array([1])) == 0.0
    assert swapped([consumer], np.array([0])).tolist() == [1]
