"""The service, asked with messages of its own: what the usual client never sends."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from spa_server._generated_inference import service_pb2
from spa_server.errors import Refusal
from spa_server.serving import Engine, FolderSource, Limits
from spa_server.serving.codec import to_raw, to_typed
from spa_server.serving.datatypes import BY_NAME
from spa_server.serving.service import ACTIONS, SERVICE, add_to_server
from tests.serving import nets
from tests.serving.process import ServerProcess

SERVICE_METHODS = service_pb2.DESCRIPTOR.services_by_name[SERVICE.rpartition(".")[2]].methods_by_name
TYPED = sorted(set(BY_NAME) - {"FP16", "BF16"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    root = tmp_path_factory.mktemp("models")
    for datatype in nets.KINDS:
        nets.add(root, f"echo-{datatype}", "1", nets.echo(datatype))
    nets.add(root, "linear", "1", nets.linear(), "max_batch: 8\nqueue_delay_ms: 1")
    with ServerProcess(root, "--max-message-mb", "8", "--max-pending-mb", "64") as process:
        yield process


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as found:
        yield found


def call(channel: grpc.Channel, method: str, request: Any) -> Any:
    """Send a message, or any bytes."""
    found = SERVICE_METHODS[method]
    response = getattr(service_pb2, found.output_type.name)
    send = (lambda data: data) if isinstance(request, bytes) else type(request).SerializeToString
    return channel.unary_unary(f"/{SERVICE}/{method}", send, response.FromString)(request, timeout=20)


def status_of(channel: grpc.Channel, method: str, request: Any) -> tuple[str, str]:
    try:
        call(channel, method, request)
    except grpc.RpcError as error:
        return error.code().name, error.details()
    return "OK", ""


def echo_request(datatype: str, raw: bool) -> service_pb2.ModelInferRequest:
    kind = BY_NAME[datatype]
    values = ["", "naïve ☃", "x"] if datatype == "BYTES" else [0, 1, 1]
    array = np.array([values, values], kind.dtype)
    request = service_pb2.ModelInferRequest(model_name=f"echo-{datatype}", id="7")
    for name, part in (("a", array), ("b", array[0])):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=part.shape)
        if raw:
            request.raw_input_contents.append(bytes(to_raw(part, kind)))
        elif kind.field is not None:
            getattr(tensor.contents, kind.field).extend(to_typed(part, kind))
    return request


@pytest.mark.parametrize("datatype", TYPED)
def test_lists_are_answered_with_lists(channel: grpc.Channel, datatype: str) -> None:
    request = echo_request(datatype, raw=False)
    response = call(channel, "ModelInfer", request)
    assert not response.raw_output_contents
    assert [(t.name, t.datatype, list(t.shape)) for t in response.outputs] == [
        ("second", datatype, [3]),
        ("first", datatype, [2, 3]),
    ]
    assert [t.contents for t in response.outputs] == [request.inputs[1].contents, request.inputs[0].contents]


@pytest.mark.parametrize("datatype", nets.KINDS)
def test_raw_tensors_are_answered_raw(channel: grpc.Channel, datatype: str) -> None:
    request = echo_request(datatype, raw=True)
    response = call(channel, "ModelInfer", request)
    assert list(response.raw_output_contents) == list(request.raw_input_contents)[::-1]
    assert not any(tensor.HasField("contents") for tensor in response.outputs)


def linear(**more: Any) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="linear", **more)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    return request


def test_requests_that_are_wrong(channel: grpc.Channel) -> None:
    def refusal(change: Callable[[service_pb2.ModelInferRequest], Any], raw: bool = False) -> str:
        request = linear(raw_input_contents=[b"\0" * 16]) if raw else linear()
        change(request)
        status, details = status_of(channel, "ModelInfer", request)
        assert status == "INVALID_ARGUMENT"
        return details

    assert "has 4 elements, but fp32_contents holds 0" in refusal(lambda r: None)
    assert "must have its elements in fp32_contents, not in int_contents" in refusal(
        lambda r: r.inputs[0].contents.int_contents.extend([1, 2, 3, 4])
    )
    assert "contents beside raw_input_contents" in refusal(
        lambda r: r.inputs[0].contents.fp32_contents.append(1), raw=True
    )
    assert "1 inputs, but 2 raw_input_contents" in refusal(lambda r: r.raw_input_contents.append(b""), raw=True)
    assert "datatype 'FLOAT', which is none of BOOL" in refusal(lambda r: setattr(r.inputs[0], "datatype", "FLOAT"))
    assert "FP16, which needs raw_input_contents" in refusal(lambda r: setattr(r.inputs[0], "datatype", "FP16"))
    assert "'timeout' must be a whole number" in refusal(
        lambda r: r.parameters["timeout"].MergeFrom(service_pb2.InferParameter(string_param="soon")), raw=True
    )
    assert (
        "no repository 'other'"
        in status_of(channel, "RepositoryIndex", service_pb2.RepositoryIndexRequest(repository_name="other"))[1]
    )


def test_what_is_no_message(channel: grpc.Channel) -> None:
    for name, method in SERVICE_METHODS.items():
        if method.input_type.fields and not method.client_streaming:
            status, details = status_of(channel, name, b"\xff\xff\xff")
            assert (status, details) == ("INVALID_ARGUMENT", "the request is not a message of this method.")


def memory_of(process: ServerProcess) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{process.process.pid}/status").read_text(encoding="ascii")
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def mutated(rng: random.Random, data: bytes) -> bytes:
    mutant = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 4))):
        at = rng.randrange(len(mutant) + 1)
        match rng.choice((0, 0, 0, 1, 2, 3)):
            case 0:
                mutant[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                mutant[at:at] = rng.randbytes(rng.randrange(1, 12))
            case 2:
                del mutant[at : at + rng.randrange(1, 8)]
            case _:
                mutant[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" * 8))
    return bytes(mutant)


def test_mutated_messages(channel: grpc.Channel, server: ServerProcess) -> None:
    rng = random.Random(0)
    seeds = [("ModelInfer", echo_request(kind, raw=True)) for kind in nets.KINDS]
    seeds += [("ModelInfer", echo_request(kind, raw=False)) for kind in TYPED]
    seeds += [
        ("ModelReady", service_pb2.ModelReadyRequest(name="linear", version="1")),
        ("ModelMetadata", service_pb2.ModelMetadataRequest(name="linear", version="1")),
        ("ModelConfig", service_pb2.ModelConfigRequest(name="linear", version="1")),
        ("ModelStatistics", service_pb2.ModelStatisticsRequest(name="linear")),
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True)),
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="linear")),
    ]
    before, statuses = memory_of(server), Counter[str]()
    for k in range(600):
        method, message = seeds[k % len(seeds)]
        statuses[status_of(channel, method, mutated(rng, message.SerializeToString()))[0]] += 1
    assert statuses.keys() <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}, statuses
    assert statuses["OK"] > 30
    assert statuses["INVALID_ARGUMENT"] > 100
    assert memory_of(server) - before < 64 << 20
    assert call(channel, "ModelInfer", echo_request("FP32", raw=True)).id == "7"


def test_a_stream_survives_what_is_no_message(channel: grpc.Channel) -> None:
    good = echo_request("INT8", raw=True).SerializeToString()
    stream = channel.stream_stream(
        f"/{SERVICE}/ModelStreamInfer", None, service_pb2.ModelStreamInferResponse.FromString
    )
    answers = list(stream(iter([good, b"\xff\xff", good]), timeout=20))
    assert [answer.error_message for answer in answers] == ["", "the request is not a message of this method.", ""]
    assert answers[2].infer_response.id == "7"


def test_a_server_that_cannot_start(tmp_path: Path, server: ServerProcess) -> None:
    for folder, port, says in (
        (tmp_path / "nowhere", "0", "is not a folder: give one that holds NAME/VERSION/model.onnx"),
        (tmp_path, server.address.rpartition(":")[2], "is taken: choose another --port, or 0"),
    ):
        with pytest.raises(AssertionError) as caught, ServerProcess(folder, "--port", port):
            pass
        last = str(caught.value).splitlines()[-1]  # grpc may have said something before
        assert last.startswith("error: ")
        assert says in last
        assert "Traceback" not in str(caught.value)


def test_reflection_and_health(channel: grpc.Channel) -> None:
    from google.protobuf import descriptor_pb2
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    ask = reflection_pb2.ServerReflectionRequest
    names = ("grpc.health.v1.Health", SERVICE)
    requests = [ask(list_services=""), *(ask(file_containing_symbol=name) for name in (*names, "no.such.Thing"))]
    listed, *files, missing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(requests))
    assert set(names) <= {service.name for service in listed.list_services_response.service}
    for name, file in zip(names, files, strict=True):
        protos = map(descriptor_pb2.FileDescriptorProto.FromString, file.file_descriptor_response.file_descriptor_proto)
        assert name in {f"{proto.package}.{service.name}" for proto in protos for service in proto.service}
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=SERVICE))
    assert health.status == health_pb2.HealthCheckResponse.SERVING


# ---- permission -----------------------------------------------------------------------------------------------------


class Spaces:
    """Two callers, each with models of their own; one of them may only look."""

    def __init__(self, folder: Path) -> None:
        self._folder = FolderSource(folder)

    def models(self) -> list[str]:
        return [name.replace("-", "/", 1) for name in self._folder.models()]

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._folder, name)
        return lambda model, *rest: method(model.replace("/", "-", 1), *rest)


async def authorise(context: Any, action: str, model: str) -> str:
    caller = dict(context.invocation_metadata()).get("caller")
    if caller is None:
        raise Refusal(grpc.StatusCode.UNAUTHENTICATED, "no-token", "say who you are.")
    if caller == "guest" and action == "manage":
        raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "scope", "guests may not load models.")
    return str(caller)


def with_service(
    folder: Path, work: Callable[[grpc.aio.Channel], Awaitable[None]], limits: Limits | None = None
) -> None:
    async def main() -> None:
        engine, server = Engine(Spaces(folder), limits), grpc.aio.server()
        add_to_server(server, engine, authorise)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await work(channel)
        await server.stop(None)
        await engine.close()

    asyncio.run(main())


def test_callers_see_their_own_models_only(tmp_path: Path) -> None:
    nets.add(tmp_path, "owner-net", "1", nets.linear())
    nets.add(tmp_path, "guest-net", "1", nets.lookup())
    nets.add(tmp_path, "owner-other", "1", nets.lookup())

    async def work(channel: grpc.aio.Channel) -> None:
        async def ask(caller: str | None, method: str, **fields: Any) -> Any:
            found = SERVICE_METHODS[method]
            request = getattr(service_pb2, found.input_type.name)(**fields)
            response = getattr(service_pb2, found.output_type.name)
            stub = channel.unary_unary(f"/{SERVICE}/{method}", type(request).SerializeToString, response.FromString)
            return await stub(request, metadata=() if caller is None else (("caller", caller),))

        async def status(*arguments: Any, **fields: Any) -> str:
            try:
                await ask(*arguments, **fields)
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "OK"

        await ask("owner", "RepositoryModelLoad", model_name="net")
        await ask("owner", "RepositoryModelLoad", model_name="other")
        assert await status("guest", "RepositoryModelLoad", model_name="net") == "PERMISSION_DENIED"
        assert await status("guest", "RepositoryModelUnload", model_name="net") == "PERMISSION_DENIED"
        for method, fields in (("ModelMetadata", {"name": "net"}), ("ModelInfer", {"model_name": "net"})):
            assert await status("guest", method, **fields) == "NOT_FOUND"
        assert await status("guest", "ModelMetadata", name="../owner/net") == "NOT_FOUND"
        assert await status("guest", "ModelStatistics", name="net") == "NOT_FOUND"
        for caller, names in (("owner", ["net", "other"]), ("guest", ["net"])):
            index = await ask(caller, "RepositoryIndex")
            assert [entry.name for entry in index.models] == names
        mine = await ask("owner", "ModelStatistics")
        assert [entry.name for entry in mine.model_stats] == ["net", "other"]
        assert not (await ask("guest", "ModelStatistics")).model_stats
        assert (await ask("owner", "ModelMetadata", name="net")).name == "net"
        for method in SERVICE_METHODS:
            if method != "ModelStreamInfer":
                assert await status(None, method) == "UNAUTHENTICATED", method

    with_service(tmp_path, work)


def test_refusals_have_details_for_programs(tmp_path: Path) -> None:
    from google.rpc import error_details_pb2, status_pb2

    nets.add(tmp_path, "owner-net", "1", nets.patient())

    async def work(channel: grpc.aio.Channel) -> None:
        def ask(turns: int, rows: int = 1) -> Any:
            request = service_pb2.ModelInferRequest(model_name="net")
            request.inputs.add(name="x", datatype="FP32", shape=[rows]).contents.fp32_contents.extend([0.0] * rows)
            request.inputs.add(name="turns", datatype="INT64", shape=[1]).contents.int64_contents.append(turns)
            stub = channel.unary_unary(
                f"/{SERVICE}/ModelInfer",
                service_pb2.ModelInferRequest.SerializeToString,
                service_pb2.ModelInferResponse.FromString,
            )
            return stub(request, metadata=(("caller", "owner"),))

        load = service_pb2.RepositoryModelLoadRequest(model_name="net")
        stub = channel.unary_unary(f"/{SERVICE}/RepositoryModelLoad", type(load).SerializeToString, None)
        await stub(load, metadata=(("caller", "owner"),))
        busy = ask(1 << 40)
        await asyncio.sleep(0.2)
        for rows, reason, retries in ((1, "overloaded", True), (9, "limit", False)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(1, rows)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            trailing = dict(caught.value.trailing_metadata())
            status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
            assert (status.code, status.message) == (8, caught.value.details())
            error = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(error)
            assert error.reason == reason
            assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details) is retries
        busy.cancel()

    with_service(tmp_path, work, Limits(max_bytes=20))


def test_every_method_says_what_it_does() -> None:
    assert set(ACTIONS) == set(SERVICE_METHODS)


def test_in_a_stream_a_refusal_is_the_answer(tmp_path: Path) -> None:
    async def work(channel: grpc.aio.Channel) -> None:
        stream = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            service_pb2.ModelInferRequest.SerializeToString,
            service_pb2.ModelStreamInferResponse.FromString,
        )
        (answer,) = [found async for found in stream(iter([linear()]))]
        assert answer.error_message == "say who you are."

    nets.add(tmp_path, "owner-net", "1", nets.linear())
    with_service(tmp_path, work)
