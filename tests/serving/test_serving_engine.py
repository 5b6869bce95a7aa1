"""The engine without a network around it: requests."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from spa_server.serving import Engine, Limits
from spa_server.serving.errors import (
    InvalidRequest,
    LimitReached,
    Overloaded,
    ServingError,
    TooLate,
)
from tests.serving import nets
from tests.serving.engines import LONG, reference, turns, with_engine, x_of


def test_answers_are_onnx_runtimes(tmp_path: Path) -> None:
    path = nets.add(tmp_path, "net", "1", nets.linear())
    feeds = {"x": x_of(5)}

    async def work(engine: Engine) -> None:
        await engine.load("net")
        answer = await engine.infer("net", feeds)
        ((spec, array),) = answer.outputs
        assert (spec.name, answer.version) == ("y", "1")
        np.testing.assert_array_equal(array, reference(path, feeds)["y"])

    with_engine(tmp_path, work)


@pytest.mark.parametrize("sessions", [1, 3])
def test_joined_requests_get_their_own_rows(tmp_path: Path, sessions: int) -> None:
    config = f"max_batch: 16\nqueue_delay_ms: 20\nsessions: {sessions}\nthreads: 1"
    path = nets.add(tmp_path, "net", "1", nets.linear(), config)
    feeds = [{"x": x_of(1 + k % 3, seed=k)} for k in range(60)]

    async def work(engine: Engine) -> None:
        await engine.load("net")
        answers = await asyncio.gather(*(engine.infer("net", feed) for feed in feeds))
        for feed, answer in zip(feeds, answers, strict=True):
            ((_, array),) = answer.outputs
            assert array.shape == (len(feed["x"]), 3)
            # one matrix product of more rows: another kernel, whose sums of 4 products may round differently
            np.testing.assert_array_max_ulp(array, reference(path, feed)["y"], maxulp=16)
        (loaded,) = engine.loaded()
        assert loaded.statistics.runs <= 12
        assert max(loaded.statistics.by_rows) <= 16
        assert loaded.statistics.success.count == 60
        assert loaded.statistics.rows == sum(len(feed["x"]) for feed in feeds)

    with_engine(tmp_path, work)


def test_joined_rows_that_are_only_moved_are_bit_for_bit(tmp_path: Path) -> None:
    path = nets.add(tmp_path, "net", "1", nets.lookup(), "max_batch: 8\nqueue_delay_ms: 20")
    feeds = [{"index": np.arange(k % 5)} for k in range(1, 40)]

    async def work(engine: Engine) -> None:
        await engine.load("net")
        answers = await asyncio.gather(*(engine.infer("net", feed) for feed in feeds))
        for feed, answer in zip(feeds, answers, strict=True):
            np.testing.assert_array_equal(answer.outputs[0][1], reference(path, feed)["row"])
        assert engine.loaded()[0].statistics.runs < 20

    with_engine(tmp_path, work)


def test_requests_of_other_shapes_are_not_joined(tmp_path: Path) -> None:
    info, kind = nets.info, TensorProto.FLOAT
    network = nets.model(
        [helper.make_node("Neg", ["x"], ["y"])], [info("x", kind, ["n", "m"])], [info("y", kind, ["n", "m"])]
    )
    nets.add(tmp_path, "net", "1", network, "max_batch: 8\nqueue_delay_ms: 20")
    feeds = [{"x": x_of(1, seed=k, columns=1 + k % 2)} for k in range(8)]

    async def work(engine: Engine) -> None:
        await engine.load("net")
        answers = await asyncio.gather(*(engine.infer("net", feed) for feed in feeds))
        for feed, answer in zip(feeds, answers, strict=True):
            np.testing.assert_array_equal(answer.outputs[0][1], -feed["x"])
        assert engine.loaded()[0].statistics.by_rows.keys() == {4}

    with_engine(tmp_path, work)


def test_a_request_that_fails_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.lookup(), "max_batch: 8\nqueue_delay_ms: 50")

    async def work(engine: Engine) -> None:
        await engine.load("net")
        indices = [0, 1, 99, 3, 4]
        outcomes = await asyncio.gather(
            *(engine.infer("net", {"index": np.array([k])}) for k in indices), return_exceptions=True
        )
        for index, outcome in zip(indices, outcomes, strict=True):
            if index == 99:
                assert isinstance(outcome, InvalidRequest)
                assert "Gather" in str(outcome)
            else:
                assert not isinstance(outcome, BaseException)
                assert outcome.outputs[0][1].tolist() == [[2 * index, 2 * index + 1]]
        assert engine.loaded()[0].statistics.fail.count == 1

    with_engine(tmp_path, work)


@pytest.mark.parametrize(
    ("feeds", "outputs", "says"),
    [
        ({}, (), "input 'x' is missing"),
        ({"x": x_of(1), "z": x_of(1)}, (), "no input 'z'; it has 'x'"),
        ({"x": x_of(1).astype(np.float64)}, (), "input 'x' must have datatype FP32, not FP64"),
        ({"x": x_of(1, columns=5)}, (), r"input 'x' must have shape \[-1, 4\], not \[1, 5\]"),
        ({"x": x_of(1)[0]}, (), r"must have shape \[-1, 4\], not \[4\]"),
        ({"x": x_of(1)}, ("z",), "no output 'z'; it has 'y'"),
        ({"x": x_of(1)}, ("y", "y"), "asked for twice"),
    ],
)
def test_requests_that_do_not_fit(tmp_path: Path, feeds: Any, outputs: Any, says: str) -> None:
    nets.add(tmp_path, "net", "1", nets.linear())

    async def work(engine: Engine) -> None:
        await engine.load("net")
        with pytest.raises(InvalidRequest, match=says):
            await engine.infer("net", feeds, outputs=outputs)

    with_engine(tmp_path, work)


def test_joined_inputs_must_agree_on_their_rows(tmp_path: Path) -> None:
    info, kind = nets.info, TensorProto.FLOAT
    network = nets.model(
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [info("a", kind, ["n", 2]), info("b", kind, ["n", 2])],
        [info("y", kind, ["n", 2])],
    )
    nets.add(tmp_path, "net", "1", network, "max_batch: 8")

    async def work(engine: Engine) -> None:
        await engine.load("net")
        with pytest.raises(InvalidRequest, match="'b' has 1 rows where another input has 2"):
            await engine.infer("net", {"a": x_of(2, columns=2), "b": x_of(1, columns=2)})

    with_engine(tmp_path, work)


def test_a_deadline_that_passes_in_the_queue(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.patient())

    async def work(engine: Engine) -> None:
        await engine.load("net")
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(engine.infer("net", turns(LONG)))
        await asyncio.sleep(0.01)
        start = loop.time()
        with pytest.raises(TooLate, match="time was over after"):
            await engine.infer("net", turns(1), deadline=start + 0.03)
        assert not first.done()
        assert loop.time() - start < 0.5
        await first

    with_engine(tmp_path, work)


def test_a_cancelled_request_is_not_run(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.patient())

    async def work(engine: Engine) -> None:
        await engine.load("net")
        tasks = [asyncio.create_task(engine.infer("net", turns(LONG if k == 0 else k))) for k in range(5)]
        await asyncio.sleep(0.01)
        for k in (2, 3):
            tasks[k].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(answer, asyncio.CancelledError) for answer in answers] == [False, False, True, True, False]
        assert engine.loaded()[0].statistics.runs == 3

    with_engine(tmp_path, work)


def test_a_request_that_is_cancelled_at_the_last_moment_does_not_join(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.linear(), "max_batch: 2\nqueue_delay_ms: 5000")

    async def work(engine: Engine) -> None:
        await engine.load("net")
        (loaded,) = engine.loaded()
        first = loaded.submit({"x": x_of(1)}, ["y"], None)
        first.cancel()
        await loaded.submit({"x": x_of(1)}, ["y"], None)  # the event loop had no turn in between
        assert loaded.statistics.by_rows.keys() == {1}

    with_engine(tmp_path, work)


def test_tensors_are_let_go_at_once(tmp_path: Path) -> None:
    """And not when the garbage collector comes."""
    nets.add(tmp_path, "net", "1", nets.linear(), "max_batch: 4\nqueue_delay_ms: 20")

    async def work(engine: Engine) -> None:
        await engine.load("net")
        inputs = [x_of(1), x_of(1)]
        seen = [weakref.ref(x) for x in inputs]
        gc.collect()
        gc.disable()
        try:
            answers = await asyncio.gather(*(engine.infer("net", {"x": x}) for x in inputs))
            assert engine.loaded()[0].statistics.by_rows.keys() == {2}
            seen += [weakref.ref(answer.outputs[0][1]) for answer in answers]
            del inputs, answers
            await asyncio.sleep(0.02)
            assert [found() for found in seen] == [None] * 4
        finally:
            gc.enable()

    with_engine(tmp_path, work)


@pytest.mark.parametrize("how", ["cancelled", "deadline", "too long"])
def test_a_run_that_nobody_waits_for_is_stopped(tmp_path: Path, how: str) -> None:
    """The first request alone would take a year."""
    nets.add(tmp_path, "net", "1", nets.patient(), "run_seconds: 0.2" if how == "too long" else "")

    async def work(engine: Engine) -> None:
        await engine.load("net")
        deadline = asyncio.get_running_loop().time() + 0.2 if how == "deadline" else None
        endless = asyncio.create_task(engine.infer("net", turns(1 << 45), deadline=deadline))
        await asyncio.sleep(0.05)
        if how == "cancelled":
            endless.cancel()
        answer = await engine.infer("net", turns(3))
        assert answer.outputs[0][1].tolist() == [3]
        (outcome,) = await asyncio.gather(endless, return_exceptions=True)
        says = {"cancelled": "", "deadline": "while it ran", "too long": "the run was stopped after 0.2 s"}[how]
        assert isinstance(outcome, asyncio.CancelledError if how == "cancelled" else TooLate)
        assert says in str(outcome)

    with_engine(tmp_path, work)


def test_a_joined_run_goes_on_while_somebody_waits(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.patient_rows(), "max_batch: 4\nqueue_delay_ms: 20\ncheck_batch: false")
    feeds = {"x": np.zeros(1, np.float32), "turns": np.array([LONG])}

    async def work(engine: Engine) -> None:
        await engine.load("net")
        tasks = [asyncio.create_task(engine.infer("net", feeds)) for _ in range(3)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        tasks[2].cancel()
        assert (await tasks[1]).outputs[0][1].tolist() == [LONG]
        assert engine.loaded()[0].statistics.by_rows.keys() == {3}

    with_engine(tmp_path, work)


def test_more_requests_than_may_wait(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.patient(), "max_queue: 2")

    async def work(engine: Engine) -> None:
        await engine.load("net")
        tasks = [asyncio.create_task(engine.infer("net", turns(LONG))) for _ in range(5)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(outcome, Overloaded) for outcome in outcomes] == [False] * 3 + [True] * 2
        await engine.infer("net", turns(1))

    with_engine(tmp_path, work)


def test_more_bytes_than_may_wait(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.patient_rows(), "max_queue: 100")

    async def work(engine: Engine) -> None:
        await engine.load("net")
        with pytest.raises(LimitReached, match="the inputs have 1200 bytes, more than the 1000 of all requests"):
            await engine.infer("net", {"x": np.zeros(100, np.float32), "turns": np.zeros(100, np.int64)})
        feeds = {"x": np.zeros(50, np.float32), "turns": np.full(50, LONG // 10)}
        for _ in range(2):
            tasks = [asyncio.create_task(engine.infer("net", feeds)) for _ in range(3)]
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(outcome, Overloaded) for outcome in outcomes] == [False, True, True]
            assert "requests of 600 bytes are being answered, and 600 more would exceed 1000" in str(outcomes[1])

    with_engine(tmp_path, work, Limits(max_bytes=1000))


def test_every_error_has_a_status_of_grpc() -> None:
    import grpc

    kinds = ServingError.__subclasses__()
    assert len({kind.code for kind in kinds}) == len(kinds) == 8
    for kind in kinds:
        assert kind.status in grpc.StatusCode.__members__


def test_the_engine_needs_no_grpc() -> None:
    code = "import sys, spa_server.serving; print(*{name.split('.')[0] for name in sys.modules})"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert not {"grpc", "sqlalchemy", "torch", "typer"} & set(done.stdout.split())
