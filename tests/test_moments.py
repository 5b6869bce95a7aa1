"""Merged moments against two passes of numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spa.executors.collect import Profile
from spa.moments import Joint

Array = np.ndarray


def part(x: Array, t: Array) -> Joint:
    """Moments of rows x [rows, g, d] and t [rows, g, m], each part centred on its own mean."""
    mx, mt = x.mean(0), t.mean(0)
    dx, dt = x - mx, t - mt
    return Joint(
        len(x),
        mx,
        mt,
        np.einsum("ngd,nge->gde", dx, dx),
        np.einsum("ngm,ngd->gmd", dt, dx),
        np.einsum("ngm,ngm->gm", dt, dt),
    )


def merged(x: Array, t: Array, bounds: list[int]) -> Joint:
    total: Joint | None = None
    for a, b in itertools.pairwise(bounds):
        if a == b:
            continue
        if total is None:
            total = part(x[a:b], t[a:b])
        else:
            total.merge(part(x[a:b], t[a:b]))
    assert total is not None
    return total


def check(joint: Joint, x: Array, t: Array, rtol: float) -> None:
    whole = part(x, t)
    assert joint.rows == len(x)
    np.testing.assert_allclose(joint.mean_x, x.mean(0), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(joint.mean_t, t.mean(0), rtol=rtol, atol=1e-12)
    for got, want in ((joint.covariance, whole.xx), (joint.cross, whole.tx), (joint.variance_t, whole.tt)):
        expected = want / len(x)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max(initial=1e-300))
    for g in range(x.shape[1]):
        np.testing.assert_allclose(joint.covariance[g], np.cov(x[:, g].T, bias=True).reshape(x.shape[2], -1),
                                   rtol=1e-8, atol=rtol * np.abs(joint.covariance).max())  # fmt: skip
    np.testing.assert_allclose(joint.variance_t, t.var(axis=0), rtol=1e-8, atol=1e-300)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 60), max_size=6), st.sampled_from([0.0, 1.0, 1e4]))
def test_any_split_gives_the_same(seed: int, cuts: list[int], offset: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 2, 4)) + offset * rng.uniform(0.5, 1.5, (2, 4))
    t = rng.normal(size=(60, 2, 3)) + x[..., :3] - offset
    check(merged(x, t, [0, *sorted(cuts), 60]), x, t, 1e-9)


@pytest.mark.parametrize("batch", [1, 7, 32, 60])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_batch_size_and_order(batch: int, offset: float) -> None:
    rng = np.random.default_rng(3)
    x, t = rng.normal(size=(60, 1, 5)) + offset, rng.normal(size=(60, 1, 2)) - offset
    order = rng.permutation(60)
    bounds = [*range(0, 60, batch), 60]
    one, other = merged(x, t, bounds), merged(x[order], t[order], bounds)
    for name in ("covariance", "variance_t", "mean_x", "mean_t"):
        got, want = getattr(one, name), getattr(other, name)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())
    check(one, x, t, 1e-9)


def test_without_targets() -> None:
    x = np.random.default_rng(4).normal(size=(20, 3, 2))
    none = np.zeros((20, 3, 0))
    joint = merged(x, none, [0, 5, 20])
    assert joint.cross.shape == (3, 0, 2)
    check(joint, x, none, 1e-9)


# -- profiles --------------------------------------------------------------------------------------------------------


def profile(groups: list[Array]) -> Profile:
    """From samples [n, positions, channels] whose numbers of positions differ."""
    stack = [s for g in groups for s in g]
    return Profile(
        np.stack([s.mean(0) for s in stack]),
        np.stack([s.var(0) for s in stack]),
        np.stack([np.abs(s).mean(0) for s in stack]),
        np.array([len(s) for s in stack]),
    )


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pooled_profiles_are_the_variance_over_everything(offset: float) -> None:
    """VBP's statistics: over samples and positions together, divided by one less than their number."""
    rng = np.random.default_rng(5)
    groups = [rng.normal(size=(n, t, 6)) * rng.uniform(0.1, 4, 6) + offset for n, t in ((4, 9), (3, 1), (5, 17))]
    flat = np.concatenate([g.reshape(-1, 6) for g in groups])
    mine = profile(groups)
    mean, variance = mine.pooled()
    assert mine.rows == len(flat)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(variance, flat.var(axis=0, ddof=1), rtol=1e-9)
    power = np.stack([np.square(s).mean(0) for g in groups for s in g])
    np.testing.assert_allclose(mine.power(), power, rtol=1e-12)


def test_one_observation_has_no_variance() -> None:
    mean, variance = profile([np.ones((1, 1, 3))]).pooled()
    np.testing.assert_array_equal(mean, 1)
    np.testing.assert_array_equal(variance, 0)
