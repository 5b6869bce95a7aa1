"""Metrics on held-out samples, against other formulas; their standard errors, against repeated draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spa.budget.targets import Goal, parse_goal, parse_request
from spa.errors import UsageError
from spa.frontier.judge import chosen, tolerance
from spa.metrics import METRICS, Batch, drop_of

RNG = np.random.default_rng(0)


def batch(outputs: Any, dense: Any = None, labels: Any = None, **feeds: Any) -> Batch:
    feeds = feeds or {"x": np.zeros((len(outputs), 1), np.float32)}
    return Batch(feeds, labels, {"y": outputs if dense is None else dense}, {"y": outputs})


def test_top_k_is_that_of_sorting() -> None:
    scores = RNG.integers(0, 6, (200, 9)).astype(np.float32)  # many ties
    labels = RNG.integers(0, 9, 200)
    order = np.argsort(-scores, axis=1, kind="stable")
    for name, k in (("top1", 1), ("top5", 5)):
        expected = (order[:, :k] == labels[:, None]).any(axis=1)
        assert METRICS[name].rows(batch(scores, labels=labels)).tolist() == expected.tolist()
    assert METRICS["top1"].rows(batch(scores, labels=labels)).tolist() == (scores.argmax(1) == labels).tolist()


def test_agreement_and_divergence() -> None:
    a, b = RNG.normal(size=(50, 7)), RNG.normal(size=(50, 7))
    assert METRICS["agreement"].rows(batch(b, a)).tolist() == (a.argmax(1) == b.argmax(1)).tolist()
    np.testing.assert_allclose(METRICS["divergence"].rows(batch(b, a)), ((a - b) ** 2).sum(axis=1))


def test_perplexity_counts_what_is_no_padding() -> None:
    """Against a loop over tokens."""
    scores, tokens = RNG.normal(size=(3, 6, 11)), RNG.integers(0, 11, (3, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    expected = []
    for row in range(3):
        losses = []
        for t in range(5):
            if mask[row, t + 1]:
                p = np.exp(scores[row, t]) / np.exp(scores[row, t]).sum()
                losses.append(-np.log(p[tokens[row, t + 1]]))
        expected.append(np.mean(losses))
    found = METRICS["perplexity"].rows(batch(scores, input_ids=tokens, attention_mask=mask))
    np.testing.assert_allclose(found, expected)
    assert METRICS["perplexity"].value(float(np.mean(expected))) == pytest.approx(np.exp(np.mean(expected)))


@pytest.mark.parametrize("name", ["top1", "perplexity"])
def test_the_standard_error_is_the_spread_of_repeated_measurements(name: str) -> None:
    """Of 4,000 draws of 150 paired samples; an unpaired error would be twice as large."""
    metric, draws, n = METRICS[name], 4000, 150
    rng = np.random.default_rng(1)
    if name == "top1":
        dense = (rng.random((draws, n)) < 0.8).astype(float)
        flipped = rng.random((draws, n)) < 0.05
        pruned = np.where(flipped, 1 - dense, dense)
    else:
        dense = rng.gamma(4.0, 0.4, (draws, n))
        pruned = dense + 0.1 + 0.05 * rng.normal(size=(draws, n))
    found = [drop_of(metric, a, b) for a, b in zip(dense, pruned, strict=True)]
    spread = float(np.std([d.drop for d in found], ddof=1))
    errors = np.array([d.error for d in found])
    assert float(np.sqrt(np.square(errors).mean())) == pytest.approx(spread, rel=0.06)
    assert spread < 0.6 * float(np.std([d.after for d in found], ddof=1))


def test_lower_is_better_the_other_way_round() -> None:
    worse = drop_of(METRICS["divergence"], np.zeros(4), np.array([0.1, 0.2, 0.3, 0.4]))
    assert (worse.before, worse.after, worse.drop) == (0.0, pytest.approx(0.25), pytest.approx(0.25))
    assert drop_of(METRICS["top1"], np.ones(4), np.array([1.0, 1, 1, 0])).drop == pytest.approx(0.25)
    assert drop_of(METRICS["top1"], np.ones(1), np.ones(1)).error is None


def test_a_limit_that_is_just_kept_to() -> None:
    """0.8 - 0.75 is more than 0.05 in binary; one sample more is too much."""
    dense = (np.arange(100) < 80).astype(float)
    assert 0.8 - 0.75 > 0.05
    assert drop_of(METRICS["top1"], dense, (np.arange(100) < 75).astype(float)).within(0.05)
    assert not drop_of(METRICS["top1"], dense, (np.arange(100) < 74).astype(float)).within(0.05)


# -- targets -----------------------------------------------------------------------------------------------------------


def test_goals() -> None:
    assert parse_goal("top1-drop=0.01") == Goal("top1", 0.01, False, "top1-drop=0.01")
    assert parse_goal(" Metric-Drop = 2% ") == Goal("metric", 0.02, True, "Metric-Drop = 2%")
    assert parse_goal("perplexity-drop=0") == Goal("perplexity", 0.0, False, "perplexity-drop=0")
    assert parse_goal("macs=0.6") is None
    targets, goal = parse_request("size=2MB,top1-drop=0.01")
    assert [t.text for t in targets] == ["size=2MB"]
    assert goal == parse_goal("top1-drop=0.01")
    assert parse_request(["top1-drop=0.01"]) == ((), goal)
    assert parse_request("macs=0.6")[1] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy-drop=0.1", r"unknown metric 'accuracy'.*top1"),
        ("top1-drop=lots", r"cannot read target 'top1-drop=lots'; write for example top1-drop=0.01"),
        ("top1-drop=-1", "cannot read target"),
        ("top1-drop=5MB", "cannot read target"),
        ("top1-drop=0.1,top5-drop=0.1", "only one metric can be a target"),
        ("", "no target given"),
        ("speed=2", "cannot read target"),
    ],
)
def test_what_is_no_target(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_request(text)


def test_a_percentage_of_what() -> None:
    """Points where a metric is a share, else a share of the dense model's value."""
    goal = Goal("metric", 0.05, True, "")
    assert tolerance(goal, METRICS["top1"], 0.8) == 0.05
    assert tolerance(goal, METRICS["perplexity"], 4.0) == pytest.approx(0.2)
    assert tolerance(goal, lambda outputs, labels: 0.0, 40.0) == pytest.approx(2.0)
    assert tolerance(Goal("metric", 0.05, False, ""), METRICS["perplexity"], 4.0) == 0.05


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("top1", batch(RNG.normal(size=(4, 3))), "needs labels"),
        ("top1", batch(RNG.normal(size=(4, 3)), labels=np.array([0, 1, 2, 3])), "between 0 and 2"),
        ("top1", batch(RNG.normal(size=(4, 2, 3)), labels=np.zeros(4, int)), "do not fit"),
        ("agreement", batch(RNG.normal(size=4)), "scores of classes"),
        ("perplexity", batch(RNG.normal(size=(4, 5, 3))), "token ids"),
        ("divergence", batch(np.zeros((4, 3), np.int64)), "floating-point"),
    ],
)
def test_metrics_that_do_not_fit(name: str, given: Batch, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METRICS[name].rows(given)


def test_which_metric() -> None:
    from spa.calibration.data import assemble

    x = {"x": np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)}
    bare, labelled = (assemble("a", "a", [x], labels, None) for labels in (None, np.arange(6)))
    assert getattr(chosen(None, labelled), "name", "") == "top1"
    assert getattr(chosen(None, bare), "name", "") == "divergence"
    assert getattr(chosen("top5", bare), "name", "") == "top5"
    with pytest.raises(UsageError, match="unknown metric 'f1'"):
        chosen("f1", bare)
    with pytest.raises(UsageError, match="two metrics"):
        chosen("top5", bare, parse_goal("top1-drop=1%"))
    assert getattr(chosen(None, bare, parse_goal("agreement-drop=1%")), "name", "") == "agreement"
