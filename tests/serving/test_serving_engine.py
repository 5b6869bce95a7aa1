"""The engine without a network around it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa import runtime
from spa.errors import UsageError
from spa_server.serving import Engine, FolderSource, Limits, Trial
from spa_server.serving.errors import (
    InvalidRequest,
    NotFound,
    NotLoadable,
    Overloaded,
    ServingError,
    ShuttingDown,
    TooLate,
)
from spa_server.serving.trial import try_opening
from tests.serving import nets

T = TypeVar("T")


def with_engine(folder: Path, work: Callable[[Engine], Awaitable[T]], limits: Limits | None = None) -> T:
    """Run `work` with an engine, and close it; nothing may be left behind that nobody looked at."""
    complaints: list[dict[str, Any]] = []

    async def main() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        engine = Engine(FolderSource(folder), limits)
        try:
            return await work(engine)
        finally:
            await engine.close()
            gc.collect()

    result = asyncio.run(main())
    assert complaints == []
    return result


def x_of(rows: int, seed: int = 0, columns: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def reference(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return runtime.run(runtime.open_session(path, provider="cpu", threads=1), feeds)


def turns(count: int) -> dict[str, np.ndarray]:
    return {"x": np.zeros(1, np.float32), "turns": np.array([count])}


LONG = 200_000
"""Turns of `nets.patient` that take some tenths of a second."""


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


@pytest.mark.parametrize(
    ("network", "config", "says"),
    [
        (nets.batch_normed(), "max_batch: 4", "requests must not be joined: output 'y' of a request depends on"),
        (nets.quantized_together(), "max_batch: 4", "requests must not be joined: output 'y' of a request depends on"),
        (nets.scaled_together(), "max_batch: 4", "requests must not be joined: output 'y' of a request depends on"),
        (nets.patient(), "max_batch: 4", "axis 0 of input 'turns' is not a batch"),
        (nets.linear(), "provider: cuda", "CUDA was asked for but is not available"),
        (nets.linear(), "sessions: no", "sessions must be a whole number"),
        (nets.linear(), "sessions: [", "config.yaml cannot be read as YAML"),
        (nets.linear(), "- 1", "must hold options"),
        (nets.linear(), "versions: [7]", "no version '7'; it has 1"),
        (nets.linear(), "weights: {2: 1}", "no version '2'; it has 1"),
    ],
)
def test_models_that_cannot_be_served_as_asked(
    tmp_path: Path, network: onnx.ModelProto, config: str, says: str
) -> None:
    if "cuda" in config and runtime.cuda_problem() is None:
        pytest.skip("there may be a GPU")
    nets.add(tmp_path, "net", "1", network, config)

    async def work(engine: Engine) -> None:
        with pytest.raises(NotLoadable, match=says) as caught:
            await engine.load("net")
        assert "net" in str(caught.value)
        with pytest.raises(NotFound, match="model 'net' is not loaded"):
            await engine.infer("net", {"x": x_of(1)})

    with_engine(tmp_path, work)


def test_rows_that_depend_on_each_other_are_joined_only_if_told_so(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.batch_normed(), "max_batch: 4\ncheck_batch: false")
    with_engine(tmp_path, lambda engine: engine.load("net"))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.linear()).write_bytes(b"nonsense")

    async def work(engine: Engine) -> None:
        with pytest.raises(NotLoadable, match="version '1' of model 'net' cannot be loaded"):
            await engine.load("net")
        (entry,) = await engine.index()
        assert (entry.state, entry.version) == ("UNAVAILABLE", "1")
        assert "ONNX Runtime cannot load" in entry.reason
        nets.add(tmp_path, "net", "1", nets.linear())
        await engine.load("net")
        assert [entry.state for entry in await engine.index()] == ["READY"]

    with_engine(tmp_path, work)


def test_a_trial_before_a_model_is_opened(tmp_path: Path) -> None:
    """A product of constants: 120 kB in the file, and 900 MB that ONNX Runtime computes when it opens the model."""
    kind, column = TensorProto.FLOAT, np.ones((15_000, 1), np.float32)
    network = nets.model(
        [helper.make_node("Mul", ["column", "row"], ["huge"]), helper.make_node("Add", ["x", "huge"], ["y"])],
        [nets.info("x", kind, [1])],
        [nets.info("y", kind, ["n", "m"])],
        {"column": column, "row": column.T.copy()},
    )
    nets.add(tmp_path, "huge", "1", network)
    nets.add(tmp_path, "net", "1", nets.linear())
    nets.add(tmp_path, "nonsense", "1", nets.linear()).write_bytes(b"nonsense")

    async def work(engine: Engine) -> None:
        with pytest.raises(NotLoadable, match="'huge' cannot be loaded: opening it took more than 500000000 bytes"):
            await engine.load("huge")
        with pytest.raises(NotLoadable, match="ONNX Runtime cannot load"):
            await engine.load("nonsense")
        await engine.load("net")
        np.testing.assert_array_equal((await engine.infer("net", {"x": x_of(0)})).outputs[0][1], np.zeros((0, 3)))

    with_engine(tmp_path, work, Limits(trial=Trial(max_bytes=500_000_000)))
    with pytest.raises(NotLoadable, match=r"more than 0\.01 s"):
        try_opening(tmp_path / "net" / "1" / "model.onnx", Trial(seconds=0.01))


def test_a_type_that_the_protocol_lacks(tmp_path: Path) -> None:
    kind = TensorProto.FLOAT8E4M3FN
    network = nets.model(
        [helper.make_node("Identity", ["x"], ["y"])], [nets.info("x", kind, ["n"])], [nets.info("y", kind, ["n"])]
    )
    nets.add(tmp_path, "net", "1", network)

    async def work(engine: Engine) -> None:
        with pytest.raises(NotLoadable, match=r"input 'x' has type tensor\(float8e4m3fn\)"):
            await engine.load("net")

    with_engine(tmp_path, work)


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    inner = tmp_path / "models"
    nets.add(inner, "net", "1", nets.linear())
    nets.add(tmp_path, "secret", "1", nets.linear())

    async def work(engine: Engine) -> None:
        assert [entry.model for entry in await engine.index()] == ["net"]
        for name in ("../secret", "net/../../secret", ".", "..", "", "secret", str(tmp_path / "secret"), "net\0"):
            with pytest.raises(NotFound, match="there is no model"):
                await engine.load(name)

    with_engine(inner, work)
    with pytest.raises(UsageError, match="is not a folder"):
        FolderSource(tmp_path / "nowhere")


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
    nets.add(tmp_path, "net", "1", nets.linear())

    async def work(engine: Engine) -> None:
        await engine.load("net")
        with pytest.raises(Overloaded, match="1600 more would exceed 1000"):
            await engine.infer("net", {"x": x_of(100)})
        for _ in range(3):
            await engine.infer("net", {"x": x_of(60)})

    with_engine(tmp_path, work, Limits(max_bytes=1000))


def test_more_versions_than_may_be_loaded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nets.add(tmp_path, name, "1", nets.linear())

    async def work(engine: Engine) -> None:
        await engine.load("a")
        await engine.load("a")
        with pytest.raises(Overloaded, match="unload a model first"):
            await engine.load("b")
        await engine.unload("a")
        await engine.load("b")

    with_engine(tmp_path, work, Limits(max_versions=1))


def test_unloading_answers_what_was_accepted(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.patient())

    async def work(engine: Engine) -> None:
        await engine.load("net")
        tasks = [asyncio.create_task(engine.infer("net", turns(LONG // 4))) for _ in range(4)]
        await asyncio.sleep(0.01)
        unloading = asyncio.create_task(engine.unload("net"))
        await asyncio.sleep(0.01)
        assert [entry.state for entry in await engine.index()] == ["UNLOADING"]
        with pytest.raises(NotFound):
            await engine.infer("net", turns(1))
        await unloading
        for task in tasks:
            assert task.done()
            assert task.result().outputs[0][1].tolist() == [LONG // 4]
        assert [entry.state for entry in await engine.index()] == [""]
        with pytest.raises(NotFound):
            await engine.unload("net")

    with_engine(tmp_path, work)


def test_a_version_is_replaced_while_it_answers(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.linear(1.0))
    x = x_of(1)

    async def work(engine: Engine) -> None:
        await engine.load("net")
        before = engine.loaded()[0]
        base = (await engine.infer("net", {"x": x})).outputs[0][1]
        stop, seen = asyncio.Event(), []

        async def ask() -> None:
            while not stop.is_set():
                seen.append((await engine.infer("net", {"x": x})).outputs[0][1])
                await asyncio.sleep(0)

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        for scale in (2.0, 4.0):
            nets.add(tmp_path, "net", "1", nets.linear(scale))
            await engine.load("net")
            await asyncio.sleep(0.02)
        stop.set()
        await asyncio.gather(*asking)
        ratios = {round(float(array[0, 0] / base[0, 0]), 3) for array in seen}
        assert ratios == {1.0, 2.0, 4.0}
        assert engine.loaded()[0] is not before
        kept = engine.loaded()[0]
        await engine.load("net")
        assert engine.loaded()[0] is kept  # nothing has changed

    with_engine(tmp_path, work)


def test_a_failed_reload_leaves_what_was_there(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.linear())

    async def work(engine: Engine) -> None:
        await engine.load("net")
        nets.add(tmp_path, "net", "2", nets.linear()).write_bytes(b"nonsense")
        with pytest.raises(NotLoadable):
            await engine.load("net", {"versions": "all"})
        states = [(entry.version, entry.state) for entry in await engine.index()]
        assert states == [("1", "READY"), ("2", "UNAVAILABLE")]
        assert (await engine.infer("net", {"x": x_of(1)})).version == "1"
        with pytest.raises(InvalidRequest, match="no option 'session'"):
            await engine.load("net", {"session": 2})

    with_engine(tmp_path, work)


def test_versions(tmp_path: Path) -> None:
    for version in ("2", "10", "9", "draft"):
        nets.add(tmp_path, "net", version, nets.linear())
    x = {"x": x_of(1)}

    async def work(engine: Engine) -> None:
        await engine.load("net")
        assert [loaded.version for loaded in engine.loaded()] == ["10"]
        await engine.load("net", {"versions": "all"})
        assert [loaded.version for loaded in engine.loaded()] == ["draft", "2", "9", "10"]
        assert (await engine.infer("net", x)).version == "10"
        assert (await engine.infer("net", x, version="draft")).version == "draft"
        with pytest.raises(NotFound, match="version '3' of model 'net' is not loaded; loaded: draft, 2, 9, 10"):
            await engine.infer("net", x, version="3")
        await engine.load("net", {"weights": {"2": 3, "9": 1}})
        assert [loaded.version for loaded in engine.loaded()] == ["2", "9"]
        answers = [(await engine.infer("net", x)).version for _ in range(40)]
        assert (answers.count("2"), answers.count("9")) == (30, 10)

    with_engine(tmp_path, work)


def test_closing(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.patient())

    async def work(engine: Engine) -> None:
        await engine.load("net")
        task = asyncio.create_task(engine.infer("net", turns(LONG)))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        assert not engine.ready
        for refused in (engine.infer("net", turns(1)), engine.load("net")):
            with pytest.raises(ShuttingDown):
                await refused
        await closing
        assert task.result().outputs[0][1].tolist() == [LONG]
        assert engine.loaded() == []

    with_engine(tmp_path, work)


def test_every_error_has_a_status_of_grpc() -> None:
    import grpc

    kinds = ServingError.__subclasses__()
    assert len({kind.status for kind in kinds}) == len(kinds) == 7
    for kind in kinds:
        assert kind.status in grpc.StatusCode.__members__
