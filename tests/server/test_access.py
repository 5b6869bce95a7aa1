"""Who may do what: every method of the protos, by every kind of caller. A new method is in the matrix by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import onnx
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor

from spa.errors import UsageError
from spa.jobs import InspectSpec
from spa_server._generated_inference import service_pb2
from spa_server.app import FILES, scopes
from spa_server.client.failures import reason_of
from spa_server.client.inference import Served, target_of
from spa_server.database import connect, tokens
from tests.server.running import Running

METHODS = [m for file in (*FILES, service_pb2) for s in file.DESCRIPTOR.services_by_name.values() for m in s.methods]
SCOPES = scopes()


@dataclass(frozen=True)
class Owned:
    """What alice has."""

    model: str
    dataset: str
    job: str
    sha256: str
    entry: onnx.ValueInfoProto
    """The model's input; the model is loaded."""


NOTHING = "0" * 16
"""An id of nothing."""


@pytest.fixture(scope="module")
def owned(guarded: Running, model: Path) -> Owned:
    with guarded.client(guarded.token("alice")) as client:
        found, data = client.push_model(model), client.push_dataset(model)
        job = client.submit(InspectSpec(found.name))
        client.wait(job.name)
        entry = onnx.load(model).graph.input[0]
        Served(client).prepare([target_of(client, found.name, str)])
        return Owned(found.name, data.name, job.name, found.files[0].sha256, entry)


@pytest.fixture(scope="module")
def channel(guarded: Running) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(guarded.address) as channel:
        yield channel


def path_of(method: MethodDescriptor) -> str:
    return f"/{method.containing_service.full_name}/{method.name}"


def fill(message: Any, owned: Owned) -> Any:
    """A request about alice's things, whatever its fields are called."""
    kind = type(message).DESCRIPTOR.name
    if type(message).DESCRIPTOR.file.package == "inference":
        return ask(message, owned)
    for field in message.DESCRIPTOR.fields:
        if field.name in ("name", "parent"):
            about = owned.model if "Model" in kind else owned.dataset if "Dataset" in kind else owned.job
            setattr(message, field.name, about)
        elif field.name == "path":
            message.path = "report.json"
        elif field.name == "sha256":
            message.sha256 = owned.sha256
        elif field.name == "files" and "Create" in kind:
            message.files.add(path="net.onnx", sha256=owned.sha256)
        elif field.name == "spec":
            message.spec.inspect.model = owned.model
        elif field.name == "header":
            message.header.sha256, message.header.size = owned.sha256, 0
    return message


def ask(message: Any, owned: Owned) -> Any:
    """The same for messages of the inference service."""
    for field in message.DESCRIPTOR.fields:
        if field.name in ("name", "model_name"):
            setattr(message, field.name, owned.model.partition("/")[2])
        elif field.name == "inputs":
            shape = [dim.dim_value or 1 for dim in owned.entry.type.tensor_type.shape.dim]
            message.inputs.add(name=owned.entry.name, datatype="FP32", shape=shape)
            message.raw_input_contents.append(bytes(4 * math.prod(shape)))
    return message


def call(channel: grpc.Channel, method: MethodDescriptor, owned: Owned, token: str | None) -> list[Any]:
    """The answers. Raises: grpc.RpcError."""
    request = message_factory.GetMessageClass(method.input_type)
    answer = message_factory.GetMessageClass(method.output_type)
    words = [("unary", "stream")[s] for s in (method.client_streaming, method.server_streaming)]
    make = getattr(channel, "_".join(words))
    stub = make(path_of(method), request.SerializeToString, answer.FromString)
    message = fill(request(), owned)
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    given = iter([message]) if method.client_streaming else message
    out = stub(given, metadata=metadata, timeout=20)
    return list(out) if method.server_streaming else [out]


def refused(channel: grpc.Channel, method: MethodDescriptor, owned: Owned, token: str | None) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, owned, token)
    return caught.value


def status(channel: grpc.Channel, method: MethodDescriptor, owned: Owned, token: str | None) -> tuple[Any, str]:
    error = refused(channel, method, owned, token)
    return error.code(), reason_of(error)[0]


def test_every_method_says_what_it_needs() -> None:
    assert {path_of(m) for m in METHODS} == {name for name in SCOPES if not name.startswith("/grpc.")}
    assert len(METHODS) >= 18 + 12
    assert set(SCOPES.values()) <= {*tokens.SCOPES, None}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_nobody_gets_in_without_a_good_token(
    guarded: Running, channel: grpc.Channel, owned: Owned, method: MethodDescriptor
) -> None:
    expired = guarded.token("alice", lifetime=0.01)
    time.sleep(0.02)
    good = guarded.token("alice")
    forged = good[:-4] + ("AAAA" if good[-4:] != "AAAA" else "BBBB")
    revoked = guarded.token("alice")
    database = connect(f"sqlite:///{guarded.data / 'spa.db'}")
    tokens.revoke(database, revoked.split("_")[1])
    database.close()
    for token in (None, "", "nonsense", "spa_x_y", forged, expired, revoked):
        assert status(channel, method, owned, token) == (grpc.StatusCode.UNAUTHENTICATED, "token")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_a_token_without_the_scope_is_not_enough(
    guarded: Running, channel: grpc.Channel, owned: Owned, method: MethodDescriptor
) -> None:
    others = [scope for scope in tokens.SCOPES if scope != SCOPES[path_of(method)]]
    token = guarded.token("alice", *others)
    if SCOPES[path_of(method)] is None:  # how the server itself is: any token is enough
        assert all(call(channel, method, owned, guarded.token("alice", scope)) for scope in tokens.SCOPES)
        return
    assert status(channel, method, owned, token) == (grpc.StatusCode.PERMISSION_DENIED, "scope")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_other_owners_see_nothing(
    guarded: Running, channel: grpc.Channel, owned: Owned, method: MethodDescriptor
) -> None:
    """What is named is not there, as if it were nowhere; lists are empty; bytes that somebody else sent count as not
    sent."""
    token = guarded.token("bob")
    made_up = replace(owned, **{kind: f"{kind}s/{NOTHING}" for kind in ("model", "dataset", "job")})
    if method.name not in ANSWERED:
        codes = {
            "CreateModel": grpc.StatusCode.FAILED_PRECONDITION,
            "CreateDataset": grpc.StatusCode.FAILED_PRECONDITION,
            "Upload": grpc.StatusCode.DATA_LOSS,
        }
        found = refused(channel, method, owned, token)
        assert found.code() is codes.get(method.name, grpc.StatusCode.NOT_FOUND)
        assert unnamed(found.details(), owned) == unnamed(refused(channel, method, made_up, token).details(), owned)
        return
    answers, nothing = (call(channel, method, things, token) for things in (owned, made_up))
    text = unnamed("".join(str(answer) for answer in answers), owned)
    assert text == unnamed("".join(str(answer) for answer in nothing), owned)
    assert not any(word in text for word in ("alice", "complete", "READY", "outputs"))


ANSWERED = (
    *("ListModels", "ListDatasets", "ListJobs", "GetUpload", "GetAccount"),
    *("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelStreamInfer", "RepositoryIndex"),
)
"""Methods that answer everybody who is known; a stream of requests is answered with an error for each."""


def unnamed(text: str, owned: Owned) -> str:
    """Without the ids of what was asked for."""
    for name in (owned.model, owned.dataset, owned.job):
        text = text.replace(name.partition("/")[2], NOTHING)
    return text


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.full_name)
def test_the_owner_is_let_in(guarded: Running, channel: grpc.Channel, owned: Owned, method: MethodDescriptor) -> None:
    """The requests of this matrix are good ones: it is the caller that the others were refused for."""
    if method.name.startswith("Delete"):
        pytest.skip("the others need what it would delete")
    token = guarded.token("alice", SCOPES[path_of(method)] or "read")
    if method.name == "Upload":
        assert status(channel, method, owned, token)[0] is grpc.StatusCode.DATA_LOSS  # no bytes have that digest
    else:
        assert all("error_message" not in str(answer) for answer in call(channel, method, owned, token))
    if method.name == "RepositoryModelUnload":
        load = next(m for m in METHODS if m.name == "RepositoryModelLoad")
        call(channel, load, owned, token)


def test_deleting_is_for_owners(guarded: Running, owned: Owned, model: Path) -> None:
    with guarded.client(guarded.token("carol")) as client:
        mine = client.push_model(model).name
        client.delete(mine)
        with pytest.raises(Exception, match="no such thing"):
            client.delete(owned.model)


def test_a_revoked_token_is_worthless_soon(guarded: Running) -> None:
    text = guarded.token("dave")
    with guarded.client(text) as client:
        assert client.account().owner == "dave"
        database = connect(f"sqlite:///{guarded.data / 'spa.db'}")
        tokens.revoke(database, text.split("_")[1])
        database.close()
        time.sleep(5.2)
        with pytest.raises(UsageError, match="revoked"):
            client.account()


def test_secrets_are_written_nowhere(guarded: Running, owned: Owned) -> None:
    text = guarded.token("erin")
    with guarded.client(text) as client:
        client.account()
    secret = text.split("_", 2)[2].encode()
    for path in guarded.folder.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes(), path
    audit = (guarded.data / "audit.log").read_text()
    assert '"owner": "erin"' in audit
    assert f'"token": "{text.split("_")[1]}"' in audit
    assert '"code": "NOT_FOUND"' in audit or "alice" in audit


def test_a_method_of_no_service_is_unimplemented(guarded: Running, channel: grpc.Channel) -> None:
    stub = channel.unary_unary("/spa.v1.JobService/Nothing", lambda x: x, lambda x: x)
    with pytest.raises(grpc.RpcError) as caught:
        stub(b"", metadata=[("authorization", f"Bearer {guarded.token('alice')}")])
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
