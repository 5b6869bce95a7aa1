"""A real server, and the protocol's usual client, tritonclient, as it is."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import spa
from spa import runtime
from tests.serving import nets
from tests.serving.process import ServerProcess

grpcclient: Any = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
utils: Any = pytest.importorskip("tritonclient.utils")

LONG = 200_000
"""Turns of `nets.patient` that take some tenths of a second."""
JOINED = "max_batch: 16\nqueue_delay_ms: 2\nsessions: 2\nthreads: 1\nmax_queue: 1000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for datatype in nets.KINDS:
        nets.add(root, f"echo-{datatype}", "1", nets.echo(datatype))
    nets.add(root, "linear", "1", nets.linear(), JOINED)
    nets.add(root, "lookup", "1", nets.lookup(), JOINED)
    nets.add(root, "patient", "1", nets.patient(), "max_queue: 2")
    nets.add(root, "wide", "1", nets.linear(sizes=(1, 1 << 16)))
    nets.add(root, "refused", "1", nets.batch_normed(), "max_batch: 2")
    dense = nets.add(root, "cnn", "1", nets.cnn(), "versions: all\nweights: {1: 3, 2: 1}\n" + JOINED)
    (root / "cnn" / "2").mkdir()
    spa.prune(dense, target="macs=0.6", output=root / "cnn" / "2" / "model.onnx")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with ServerProcess(folder, "--max-message-mb", "64") as process:
        yield process
    assert process.errors.count("warning") == 1  # the model that is refused


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Any]:
    with grpcclient.InferenceServerClient(server.address) as found:
        yield found


def tensor(name: str, array: np.ndarray, datatype: str | None = None) -> Any:
    found = grpcclient.InferInput(name, list(array.shape), datatype or utils.np_to_triton_dtype(array.dtype))
    found.set_data_from_numpy(array)
    return found


def refused(client: Any, status: str, says: str, model: str, inputs: list[Any], **more: Any) -> None:
    with pytest.raises(utils.InferenceServerException, match=says) as caught:
        client.infer(model, inputs, **more)
    assert caught.value.status() == f"StatusCode.{status}"


def turns(count: int) -> list[Any]:
    return [tensor("x", np.zeros(1, np.float32)), tensor("turns", np.array([count]))]


def reference(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return runtime.run(runtime.open_session(path, provider="cpu", threads=1), feeds)


# ---- what there is --------------------------------------------------------------------------------------------------


def test_server_and_models(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("cnn")
    assert client.is_model_ready("cnn", "2")
    assert not client.is_model_ready("cnn", "3")
    assert not client.is_model_ready("nothing")
    metadata = client.get_server_metadata()
    assert metadata.name == "spa"
    assert set(metadata.extensions) == {"model_configuration", "model_repository", "statistics"}
    model = client.get_model_metadata("cnn")
    assert list(model.versions) == ["1", "2"]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("x", "FP32", [-1, 3, 8, 8])]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [("y", "FP32", [-1, 10])]
    config = client.get_model_config("cnn").config
    assert config.max_batch_size == 16
    assert list(config.input[0].dims) == [3, 8, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert config.instance_group[0].count == 2
    assert client.get_model_config("patient").config.max_batch_size == 0
    index = {(m.name, m.version): (m.state, m.reason) for m in client.get_model_repository_index().models}
    assert index["cnn", "2"] == ("READY", "")
    state, reason = index["refused", "1"]
    assert state == "UNAVAILABLE"
    assert "requests must not be joined" in reason


# ---- answers --------------------------------------------------------------------------------------------------------


def sample(datatype: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if datatype == "BYTES":
        words = [b"", b"a", b"\0nul", "naïve ☃".encode(), b"x" * 1000]
        flat = np.empty(int(np.prod(shape)), object)
        flat[:] = [words[k % 5] for k in range(flat.size)]
        return flat.reshape(shape)
    if datatype == "BF16":
        return rng.normal(size=shape).astype(ml_dtypes.bfloat16)
    if datatype == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    dtype = np.dtype(utils.triton_to_np_dtype(datatype))
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("datatype", nets.KINDS)
def test_every_type_comes_back_bit_for_bit(client: Any, datatype: str) -> None:
    a, b = sample(datatype, (5, 3), 0), sample(datatype, (7,), 1)
    answer = client.infer(f"echo-{datatype}", [tensor("b", b, datatype), tensor("a", a, datatype)])
    for name, sent in (("first", a), ("second", b)):
        np.testing.assert_array_equal(answer.as_numpy(name), sent)
    assert [output.name for output in answer.get_response().outputs] == ["second", "first"]
    only = client.infer(
        f"echo-{datatype}",
        [tensor("a", a, datatype), tensor("b", b[:0], datatype)],
        outputs=[grpcclient.InferRequestedOutput("first")],
    )
    assert [output.name for output in only.get_response().outputs] == ["first"]


@pytest.mark.parametrize("version", ["1", "2"])
def test_dense_and_pruned_answer_as_onnx_runtime_does(client: Any, folder: Path, version: str) -> None:
    path = folder / "cnn" / version / "model.onnx"
    for rows in (1, 3, 16, 40):
        x = np.random.default_rng(rows).normal(size=(rows, 3, 8, 8)).astype(np.float32)
        answer = client.infer("cnn", [tensor("x", x)], model_version=version, request_id=f"r{rows}")
        np.testing.assert_array_equal(answer.as_numpy("y"), reference(path, {"x": x})["y"])
        response = answer.get_response()
        assert (response.id, response.model_version, response.model_name) == (f"r{rows}", version, "cnn")


def test_requests_are_shared_by_weight(client: Any) -> None:
    x = tensor("x", np.zeros((1, 3, 8, 8), np.float32))
    versions = [client.infer("cnn", [x]).get_response().model_version for _ in range(40)]
    assert (versions.count("1"), versions.count("2")) == (30, 10)


@pytest.mark.parametrize("model", ["linear", "lookup"])
def test_64_at_a_time(server: ServerProcess, folder: Path, model: str) -> None:
    path = folder / model / "1" / "model.onnx"
    rng = np.random.default_rng(0)
    feeds: list[dict[str, np.ndarray]] = [
        {"x": rng.normal(size=(1 + k % 3, 4)).astype(np.float32)}
        if model == "linear"
        else {"index": rng.integers(0, 5, 1 + k % 3)}
        for k in range(512)
    ]
    name = "y" if model == "linear" else "row"

    def worker(part: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
        with grpcclient.InferenceServerClient(server.address) as own:
            return [own.infer(model, [tensor(*feed) for feed in one.items()]).as_numpy(name) for one in part]

    with grpcclient.InferenceServerClient(server.address) as client, ThreadPoolExecutor(64) as pool:
        before = client.get_inference_statistics(model).model_stats[0]
        answers = list(pool.map(worker, [feeds[k::64] for k in range(64)]))
        after = client.get_inference_statistics(model).model_stats[0]
    session = runtime.open_session(path, provider="cpu", threads=1)
    for k, part in enumerate(answers):
        for feed, array in zip(feeds[k::64], part, strict=True):
            expected = runtime.run(session, feed)[name]
            # a product of more rows may take another kernel, which may round a sum of 4 products otherwise
            np.testing.assert_array_max_ulp(array, expected, maxulp=16 if model == "linear" else 0)
    assert after.inference_stats.success.count - before.inference_stats.success.count == 512
    assert after.execution_count - before.execution_count < 512
    assert after.inference_stats.fail.count == before.inference_stats.fail.count


def test_large_tensors(client: Any, folder: Path) -> None:
    x = np.arange(200, dtype=np.float32)[:, None]  # the answer has 52 MB
    answer = client.infer("wide", [tensor("x", x)]).as_numpy("y")
    np.testing.assert_array_equal(answer, reference(folder / "wide" / "1" / "model.onnx", {"x": x})["y"])
    more = tensor("x", np.arange(300, dtype=np.float32)[:, None])
    refused(client, "RESOURCE_EXHAUSTED", "the answer takes 78643200 bytes, more than the 67108864", "wide", [more])
    refused(client, "RESOURCE_EXHAUSTED", "larger than max", "wide", [tensor("x", np.zeros((1 << 25, 1), np.float32))])
    assert client.is_server_live()


# ---- streams --------------------------------------------------------------------------------------------------------


def test_a_stream_answers_in_order_and_survives_errors(client: Any) -> None:
    got: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: got.put((result, error)))
    for k in range(200):
        index = np.array([k % 5 if k % 10 else 99])
        client.async_stream_infer("lookup", [tensor("index", index)], request_id=str(k))
    outcomes = [got.get(timeout=30) for _ in range(200)]
    client.stop_stream()
    for k, (result, error) in enumerate(outcomes):
        if k % 10:
            assert result.get_response().id == str(k)
            assert result.as_numpy("row").tolist() == [[2 * (k % 5), 2 * (k % 5) + 1]]
        else:
            assert "Gather" in str(error)


def test_a_stream_says_which_answer_is_final(client: Any) -> None:
    got: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: got.put((result, error)))
    x = tensor("x", np.zeros((1, 4), np.float32))
    client.async_stream_infer("linear", [x], enable_empty_final_response=True)
    result, error = got.get(timeout=30)
    client.stop_stream()
    assert error is None
    assert result.get_response().parameters["triton_final_response"].bool_param


def test_a_client_that_leaves_a_stream(client: Any, server: ServerProcess) -> None:
    """Its requests would take a year each."""
    client.start_stream(callback=lambda result, error: None)
    for _ in range(30):
        client.async_stream_infer("patient", turns(1 << 45))
    time.sleep(0.1)
    client.stop_stream(cancel_requests=True)
    with grpcclient.InferenceServerClient(server.address) as other:
        other.infer("patient", turns(1), client_timeout=10)


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_requests_that_are_wrong(client: Any) -> None:
    x = tensor("x", np.zeros((1, 4), np.float32))
    short = grpcclient.InferInput("x", [2, 4], "FP32")
    short._raw_content = b"\0" * 12
    refused(client, "NOT_FOUND", "model 'nothing' is not loaded", "nothing", [x])
    refused(client, "NOT_FOUND", "version '9' of model 'linear'", "linear", [x], model_version="9")
    refused(client, "INVALID_ARGUMENT", "input 'x' is missing", "linear", [])
    refused(client, "INVALID_ARGUMENT", "input 'x' is given twice", "linear", [x, x])
    refused(client, "INVALID_ARGUMENT", "takes 32 bytes, but 12 were sent", "linear", [short])
    refused(client, "INVALID_ARGUMENT", "must have datatype FP32, not INT64", "linear", [tensor("x", np.array([[1]]))])
    refused(client, "INVALID_ARGUMENT", "sequences of requests are not supported", "linear", [x], sequence_id=5)
    classes = grpcclient.InferRequestedOutput("y", class_count=2)
    refused(client, "INVALID_ARGUMENT", "answers as classes are not supported", "linear", [x], outputs=[classes])
    shared = grpcclient.InferInput("x", [1, 4], "FP32")
    shared.set_shared_memory("region", 16)
    refused(client, "INVALID_ARGUMENT", "shared memory are? not supported", "linear", [shared])
    refused(client, "INVALID_ARGUMENT", "Gather", "lookup", [tensor("index", np.array([7]))])
    with pytest.raises(utils.InferenceServerException, match="UNIMPLEMENTED"):
        client.get_trace_settings()


def test_time_that_runs_out(client: Any) -> None:
    blocking = threading.Thread(target=lambda: client.infer("patient", turns(5 * LONG)))
    blocking.start()
    time.sleep(0.1)
    try:
        # whoever notices first says so
        refused(client, "DEADLINE_EXCEEDED", "Deadline|time was over", "patient", turns(1), client_timeout=0.05)
        refused(client, "DEADLINE_EXCEEDED", "time was over after", "patient", turns(1), timeout=20_000)
        both = {"timeout": 20_000, "client_timeout": 30}
        refused(client, "DEADLINE_EXCEEDED", "time was over after", "patient", turns(1), **both)
    finally:
        blocking.join()


def test_more_requests_than_may_wait(server: ServerProcess) -> None:
    def ask(_: int) -> str:
        with grpcclient.InferenceServerClient(server.address) as own:
            try:
                own.infer("patient", turns(LONG))
            except utils.InferenceServerException as error:
                return str(error.status())
            return "OK"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(ask, range(8)))
    assert set(outcomes) == {"OK", "StatusCode.RESOURCE_EXHAUSTED"}
    assert outcomes.count("OK") >= 3


# ---- loading and unloading ------------------------------------------------------------------------------------------


def test_loading_with_other_options(client: Any) -> None:
    client.load_model("echo-FP64", config='{"sessions": 3}')
    assert client.get_model_config("echo-FP64").config.instance_group[0].count == 3
    client.unload_model("echo-FP64")
    assert not client.is_model_ready("echo-FP64")
    client.load_model("echo-FP64")
    assert client.get_model_config("echo-FP64").config.instance_group[0].count == 1
    for options, says in (
        ({"config": '{"session": 3}'}, "no option 'session'"),
        ({"config": "[1]"}, "must be a JSON object"),
        ({"config": "{"}, "must be a JSON object"),
        ({"config": "{}", "files": {"file:1/model.onnx": b"x"}}, "is not known: only 'config'"),
    ):
        with pytest.raises(utils.InferenceServerException, match=says):
            client.load_model("echo-FP64", **options)
    for call in (client.load_model, client.unload_model):
        with pytest.raises(utils.InferenceServerException, match="NOT_FOUND"):
            call("nothing")
    with pytest.raises(utils.InferenceServerException, match=r"FAILED_PRECONDITION.*must not be joined"):
        client.load_model("refused")


def test_models_come_and_go_under_load(server: ServerProcess) -> None:
    stop = threading.Event()

    def ask() -> tuple[int, set[str]]:
        count, problems = 0, set()
        x = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32)
        expected = None
        with grpcclient.InferenceServerClient(server.address) as own:
            while not stop.is_set():
                try:
                    y = own.infer("linear", [tensor("x", x)]).as_numpy("y")
                except utils.InferenceServerException as error:
                    problems.add(f"{error.status()}: {error.message()}")
                    continue
                expected = y if expected is None else expected
                np.testing.assert_array_max_ulp(y, expected, maxulp=16)
                count += 1
        return count, problems

    with grpcclient.InferenceServerClient(server.address) as client, ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        try:
            for k in range(10):
                if k % 2:
                    client.unload_model("linear")
                client.load_model("linear", config=f'{{"max_batch": 4, "sessions": {1 + k % 3}}}')
                time.sleep(0.05)
            client.load_model("linear")
        finally:
            stop.set()
        results = [future.result() for future in asking]
    assert all(count > 10 for count, _ in results)
    # a request either has its answer, or came while there was no model: none is lost on the way
    problems = set().union(*(found for _, found in results))
    assert problems <= {"StatusCode.NOT_FOUND: model 'linear' is not loaded: check the name, or load it first."}


def test_stopping_answers_what_was_accepted(tmp_path: Path) -> None:
    nets.add(tmp_path, "patient", "1", nets.patient())
    with ServerProcess(tmp_path) as own, ThreadPoolExecutor(4) as pool:
        clients = [grpcclient.InferenceServerClient(own.address) for _ in range(4)]
        answers = [pool.submit(client.infer, "patient", turns(LONG)) for client in clients]
        while clients[0].get_inference_statistics("patient").model_stats[0].inference_stats.queue.count < 1:
            time.sleep(0.01)
        time.sleep(0.2)
        assert own.stop() == 0
        assert [answer.result().as_numpy("y").tolist() for answer in answers] == [[LONG]] * 4
