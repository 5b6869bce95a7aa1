"""The wire format with tensors beside the message is protobuf's own; the stubs are those of the committed protos."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from spa_server._generated_inference import service_pb2
from spa_server.serving.wire import InferReply, parse_call, write_reply, write_stream_reply

ROOT = Path(__file__).parents[2]


def request(tensors: int = 2) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name="net", model_version="3", id="é")
    message.parameters["timeout"].int64_param = 7
    message.parameters["share"].double_param = 0.5
    for k in range(tensors):
        message.inputs.add(name=f"x{k}", datatype="FP32", shape=[k, 300])
        message.outputs.add(name=f"y{k}")
        message.raw_input_contents.append(bytes(range(256)) * k)
    return message


def as_protobuf(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """What protobuf itself reads: the message without its tensors, and these."""
    try:
        message = service_pb2.ModelInferRequest.FromString(data)
    except DecodeError:
        return None
    raw = list(message.raw_input_contents)
    message.ClearField("raw_input_contents")
    return message.SerializeToString(deterministic=True), raw


def as_read(data: bytes) -> tuple[bytes, list[bytes]] | None:
    try:
        call = parse_call(data)
    except DecodeError:
        return None
    return call.message.SerializeToString(deterministic=True), [bytes(tensor) for tensor in call.raw]


@pytest.mark.parametrize("tensors", [0, 1, 2, 5, 400])
def test_requests_are_read_as_protobuf_reads_them(tensors: int) -> None:
    data = request(tensors).SerializeToString()
    found = as_read(data)
    assert found is not None
    assert found == as_protobuf(data)
    assert len(found[1]) == tensors


def test_mutated_requests_are_read_as_protobuf_reads_them() -> None:
    rng = random.Random(0)
    data = request(3).SerializeToString()
    outcomes = set()
    for _ in range(3000):
        mutant = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(mutant) + 1)
            match rng.randrange(3):
                case 0:
                    mutant[at : at + 1] = bytes([rng.randrange(256)])
                case 1:
                    mutant[at:at] = rng.randbytes(rng.randrange(1, 12))
                case _:
                    del mutant[at : at + rng.randrange(1, 8)]
        found = as_read(bytes(mutant))
        assert found == as_protobuf(bytes(mutant))
        outcomes.add(found is None)
    assert outcomes == {True, False}


def test_random_bytes_are_read_as_protobuf_reads_them() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        data = bytes(rng.choice((0x3A, 0x0A, 0x00, 0x01, 0x7F, 0x80, 0xFF, rng.randrange(256))) for _ in range(20))
        assert as_read(data) == as_protobuf(data)


@pytest.mark.parametrize("sizes", [[], [0], [1, 127, 128], [1 << 14, 3, 1 << 21]])
def test_answers_are_what_protobuf_would_write(sizes: list[int]) -> None:
    message = service_pb2.ModelInferResponse(model_name="net", id="7")
    message.outputs.add(name="y", datatype="FP32", shape=[1])
    tensors = [bytes(k % 251 for k in range(size)) for size in sizes]
    whole = service_pb2.ModelInferResponse()
    whole.CopyFrom(message)
    whole.raw_output_contents.extend(tensors)
    reply = InferReply(message, [memoryview(tensor) for tensor in tensors])
    assert write_reply(reply) == whole.SerializeToString()
    stream = service_pb2.ModelStreamInferResponse(infer_response=whole)
    assert write_stream_reply(reply) == stream.SerializeToString()


BOTH = """
import sys
def ours():
    from spa_server._generated_inference import service_pb2
    return service_pb2
def theirs():
    from tritonclient.grpc import service_pb2
    return service_pb2
pair = [ours(), theirs()] if sys.argv[1] == "ours" else [theirs(), ours()][::-1]
one, other = pair
message = one.ModelInferRequest(model_name="net", raw_input_contents=[b"abc"])
assert other.ModelInferRequest.FromString(message.SerializeToString()).model_name == "net"
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_our_messages_and_those_of_the_client_fit_into_one_process(first: str) -> None:
    pytest.importorskip("tritonclient.grpc")
    paths = os.pathsep.join([str(ROOT / "server"), str(ROOT), *filter(None, sys.path)])
    env = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", BOTH, first], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


def test_names_and_numbers_are_those_of_the_client() -> None:
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2")
    configs = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from spa_server._generated_inference import model_config_pb2

    def fields(descriptor: Descriptor) -> dict[str, tuple[object, ...]]:
        return {
            f.name: (f.number, f.type, f.is_repeated, f.message_type and f.message_type.full_name)
            for f in descriptor.fields
        }

    def compare(mine: Descriptor, other: Descriptor) -> None:
        assert mine.full_name == other.full_name
        assert fields(mine).items() <= fields(other).items()
        for enum in mine.enum_types:
            assert enum.values_by_name.keys() <= other.enum_types_by_name[enum.name].values_by_name.keys()
            for value in enum.values:
                assert other.enum_types_by_name[enum.name].values_by_name[value.name].number == value.number
        for nested in mine.nested_types:
            compare(nested, other.nested_types_by_name[nested.name])

    for module, reference in ((service_pb2, theirs), (model_config_pb2, configs)):
        for name, message in module.DESCRIPTOR.message_types_by_name.items():
            compare(message, reference.DESCRIPTOR.message_types_by_name[name])
    types = {value.name: value.number for value in model_config_pb2.DataType.DESCRIPTOR.values}
    assert types == {value.name: value.number for value in configs.DataType.DESCRIPTOR.values}
    (service,) = service_pb2.DESCRIPTOR.services_by_name.values()
    known = theirs.DESCRIPTOR.services_by_name[service.name].methods_by_name
    for method in service.methods:
        other = known[method.name]
        assert method.input_type.full_name == other.input_type.full_name
        assert method.output_type.full_name == other.output_type.full_name
        assert (method.client_streaming, method.server_streaming) == (other.client_streaming, other.server_streaming)
