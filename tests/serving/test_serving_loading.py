"""The engine without a network around it: models that are loaded, replaced and unloaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from spa import runtime
from spa.errors import UsageError
from spa_server.serving import Engine, FolderSource, Limits, Trial
from spa_server.serving.errors import (
    InvalidRequest,
    LimitReached,
    NotFound,
    NotLoadable,
    ShuttingDown,
)
from spa_server.serving.trial import try_opening
from tests.serving import nets
from tests.serving.engines import LONG, turns, with_engine, x_of


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


def test_types_that_cannot_be_run_together(tmp_path: Path) -> None:
    text, half = TensorProto.STRING, TensorProto.BFLOAT16
    network = nets.model(
        [helper.make_node("Identity", ["a"], ["p"]), helper.make_node("Identity", ["b"], ["q"])],
        [nets.info("a", text, ["n"]), nets.info("b", half, ["n"])],
        [nets.info("p", text, ["n"]), nets.info("q", half, ["n"])],
    )
    nets.add(tmp_path, "net", "1", network)

    async def work(engine: Engine) -> None:
        with pytest.raises(NotLoadable, match="input 'a' is text, which ONNX Runtime does not take beside bfloat16"):
            await engine.load("net")

    with_engine(tmp_path, work)


@pytest.mark.parametrize("location", ["weights.bin", "../../../secret.bin", "link.bin", "absolute"])
def test_external_data_lie_beside_the_model(tmp_path: Path, location: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.arange(12, dtype=np.float32).tobytes())
    network = nets.linear()
    weight = network.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=str(secret) if location == "absolute" else location)
    home = nets.add(tmp_path / "models", "net", "1", network).parent
    (home / "weights.bin").write_bytes(secret.read_bytes())
    (home / "link.bin").symlink_to(secret)

    async def work(engine: Engine) -> None:
        if location == "weights.bin":
            await engine.load("net")
            answer = await engine.infer("net", {"x": np.ones((1, 4), np.float32)})
            assert answer.outputs[0][1].tolist() == [[18, 22, 26]]
        else:
            with pytest.raises(NotLoadable, match=r"External data path|Absolute path"):
                await engine.load("net")

    with_engine(tmp_path / "models", work)


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


def test_more_versions_than_may_be_loaded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nets.add(tmp_path, name, "1", nets.linear())

    async def work(engine: Engine) -> None:
        await engine.load("a")
        await engine.load("a")
        with pytest.raises(LimitReached, match="unload a model first"):
            await engine.load("b")
        await engine.unload("a")
        outcomes = await asyncio.gather(engine.load("a"), engine.load("b"), return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["LimitReached", "NoneType"]  # either is first

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


class Watched(FolderSource):
    """Counts the files that are held open."""

    held = 0

    @contextlib.contextmanager
    def open(self, model: str, version: str) -> Iterator[Path]:
        with super().open(model, version) as path:
            self.held += 1
            try:
                yield path
            finally:
                self.held -= 1


def test_files_are_held_for_as_long_as_they_are_served(tmp_path: Path) -> None:
    nets.add(tmp_path, "net", "1", nets.linear())
    nets.add(tmp_path, "net", "2", nets.linear()).write_bytes(b"nonsense")

    async def main() -> None:
        source = Watched(tmp_path)
        engine = Engine(source)
        with pytest.raises(NotLoadable):
            await engine.load("net", {"versions": "all"})
        assert source.held == 0
        await engine.load("net", {"versions": [1]})
        assert source.held == 1
        await engine.load("net", {"versions": [1], "sessions": 2})
        await asyncio.sleep(0.2)  # what was there is closed on its own
        assert source.held == 1
        await engine.unload("net")
        assert source.held == 0
        await engine.close()

    asyncio.run(main())


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
