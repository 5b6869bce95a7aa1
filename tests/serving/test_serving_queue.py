"""Who runs with whom, and when; shares of versions."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spa.errors import UsageError
from spa_server.serving.options import ModelOptions, parse_options
from spa_server.serving.splitting import Splitter
from spa_server.serving.waiting import Request, RequestQueue


def waiting(rows: int, key: str | None, arrived: float, loop: asyncio.AbstractEventLoop) -> Request:
    x = np.zeros((rows, 1), np.float32)
    return Request({"x": x}, ("y",), rows, None if key is None else (key,), loop.create_future(), arrived)


LOOP = asyncio.new_event_loop()
ARRIVALS = st.lists(st.tuples(st.integers(1, 5), st.sampled_from(["a", "b", None]), st.booleans()), max_size=30)


@given(ARRIVALS, st.integers(2, 6))
def test_every_request_is_taken_once_in_order_and_only_with_its_like(
    arrivals: list[tuple[int, str | None, bool]], most: int
) -> None:
    queue = RequestQueue(most, delay=0.0)
    requests, removed = [], set()
    for k, (rows, key, stays) in enumerate(arrivals):
        request = waiting(rows, key, float(k), LOOP)
        queue.add(request)
        requests.append(request)
        if not stays:
            assert queue.remove(request)
            assert not queue.remove(request)
            removed.add(request)
    taken: list[Request] = []
    while batch := queue.take(1e9):
        rest = [request for request in requests if request not in removed and request not in taken]
        assert batch[0] is rest[0]  # the oldest of all
        assert len({request.key for request in batch}) == 1
        assert len(batch) == 1 or (batch[0].key is not None and sum(request.rows for request in batch) <= most)
        alike = [request for request in rest if request.key == batch[0].key]
        assert batch == alike[: len(batch)]
        full = len(batch) == len(alike) or sum(request.rows for request in alike[: len(batch) + 1]) > most
        assert full or batch[0].key is None
        taken += batch
    assert set(taken) | removed == set(requests)
    assert len(queue) == 0
    assert queue.due() is None


def test_a_batch_waits_until_it_is_full_or_its_oldest_has_waited() -> None:
    queue = RequestQueue(4, delay=1.0)
    for arrived in (0.0, 0.5):
        queue.add(waiting(1, "a", arrived, LOOP))
    assert queue.take(0.9) == []
    assert queue.due() == 1.0
    assert len(queue.take(1.0)) == 2
    for k in range(6):
        queue.add(waiting(1, "a", 2.0 + k / 10, LOOP))
    assert len(queue.take(2.5)) == 4
    assert queue.take(2.5) == []
    queue.add(waiting(9, None, 2.6, LOOP))
    assert [request.rows for request in queue.take(2.6)] == [9]  # what runs alone does not wait
    assert len(queue.take(3.4)) == 2


def test_a_full_batch_goes_before_an_older_one_that_is_not() -> None:
    queue = RequestQueue(2, delay=1.0)
    for key, arrived in (("a", 0.0), ("b", 0.1), ("b", 0.2)):
        queue.add(waiting(1, key, arrived, LOOP))
    assert [request.key for request in queue.take(0.3)] == [("b",), ("b",)]
    assert queue.take(0.3) == []


@pytest.mark.parametrize("callers", [1, 3, 8, 31])
def test_nobody_waits_long_for_callers_that_are_not_there(callers: int) -> None:
    """Callers who ask again a millisecond after their answer: they are joined, and only a few batches wait for more."""
    queue, now, late, rows = RequestQueue(32, delay=1.0), 0.0, 0, list[int]()
    for _ in range(400):
        for k in range(callers):
            queue.add(waiting(1, "a", now + k / 1000, LOOP))
        now += (callers - 1) / 1000
        while not (batch := queue.take(now)):
            due = queue.due()
            assert due is not None
            late, now = late + 1, max(due, now)
        rows.append(len(batch))
        now += 0.001
        while rest := queue.take(now + 5):
            rows[-1] += len(rest)
    assert late < 25
    assert set(rows) == {callers}


def test_more_callers_are_noticed() -> None:
    queue, now, sizes = RequestQueue(32, delay=1.0), 0.0, list[int]()
    here = 0
    for step in range(4000):
        callers = 2 if step < 1000 else 20
        while here < callers:
            queue.add(waiting(1, "a", now, LOOP))
            here, now = here + 1, now + 0.001
            if batch := queue.take(now):
                sizes.append(len(batch))
                here -= len(batch)
        now = max(now, queue.due() or now)
        if batch := queue.take(now):
            sizes.append(len(batch))
            here -= len(batch)
    assert np.median(sizes[200:400]) == 2
    assert np.median(sizes[-400:]) == 20


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 10), min_size=1).filter(lambda d: any(d.values())))
def test_shares_are_exact_after_every_round(weights: dict[str, float]) -> None:
    splitter = Splitter(weights)
    total = int(sum(weights.values()))
    for _ in range(3):
        counts = Counter(splitter.turn() for _ in range(total))
        assert counts == Counter({name: int(share) for name, share in weights.items() if share})


def test_turns_are_spread() -> None:
    splitter = Splitter({"dense": 0.75, "pruned": 0.25})
    turns = [splitter.turn() for _ in range(400)]
    for start in range(0, 400, 4):
        assert turns[start : start + 4].count("pruned") == 1


def test_the_guide_lists_all_options_with_their_defaults() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `?(\w+)`? \|", text, re.MULTILINE))
    shown = {
        name: {"True": "true", "0.0": "0", "600.0": "600", "{}": "none"}.get(str(value), str(value))
        for name, value in vars(ModelOptions()).items()
    }
    assert {name: rows[name] for name in shown} == shown


def test_options() -> None:
    assert parse_options({}, "config.yaml") == ModelOptions()
    given = {"versions": [1, "two"], "weights": {1: 3, "two": 1}, "sessions": 2, "queue_delay_ms": 1, "max_batch": 8}
    options = parse_options(given, "config.yaml")
    assert options.versions == ("1", "two")
    assert options.weights == {"1": 3.0, "two": 1.0}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"session": 2}, "no option 'session'; known are provider, sessions"),
        ({"sessions": 0}, "sessions must be a whole number from 1"),
        ({"sessions": True}, "sessions must be a whole number"),
        ({"sessions": 1.5}, "sessions must be a whole number"),
        ({"max_batch": 10**9}, "max_batch must be a whole number from 1 to"),
        ({"provider": "gpu"}, "provider must be auto, cpu, cuda, not 'gpu'"),
        ({"queue_delay_ms": -1}, "queue_delay_ms must be a number from 0"),
        ({"queue_delay_ms": float("nan")}, "queue_delay_ms must be a number from 0"),
        ({"run_seconds": 0}, "run_seconds must be a number from 0.01"),
        ({"check_batch": "no"}, "check_batch must be true or false"),
        ({"versions": "newest"}, "versions must be latest, all, or a list"),
        ({"versions": []}, "versions must be latest, all, or a list"),
        ({"weights": {"1": 0}}, "one of them above 0"),
        ({"weights": {"1": -1}}, "numbers of 0 or more"),
        ({"weights": [1]}, "weights must give versions numbers"),
    ],
)
def test_options_that_are_wrong(given: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        parse_options(given, "config.yaml")
    assert str(caught.value).startswith("config.yaml: ")
