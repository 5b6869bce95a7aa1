"""Messages as an attacker or a broken network would make them; of the fuzz test, and of benchmarks/server_fuzz.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import numpy as np
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from spa_server._generated_inference import service_pb2
from spa_server.app import FILES

METHODS = [m for file in (*FILES, service_pb2) for s in file.DESCRIPTOR.services_by_name.values() for m in s.methods]
_TEXTS = (
    "",
    "models/x",
    "../../etc/passwd",
    "\u202e\U0001f600" * 9,
    "a" * 5000,
    "jobs/" + "0" * 16,
    "%s%n{}",
    "'; DROP TABLE jobs; --",
)
_NUMBERS = (0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))


@dataclass(frozen=True)
class Outcome:
    """What came back."""

    method: str
    code: grpc.StatusCode


def random_message(kind: type[Message], rng: np.random.Generator, depth: int = 0) -> Message:
    """A message with fields filled at random: right types, wrong values."""
    out = kind()
    for field in out.DESCRIPTOR.fields:
        if rng.random() < 0.4 or depth > 4:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value, key = field.message_type.fields_by_name["value"], str(rng.choice(_TEXTS))
            if value.message_type is None:
                getattr(out, field.name)[key] = _value(value.cpp_type, rng)
            else:
                inner = random_message(message_factory.GetMessageClass(value.message_type), rng, depth + 1)
                getattr(out, field.name)[key].CopyFrom(inner)
        elif field.message_type is not None:
            inner = random_message(message_factory.GetMessageClass(field.message_type), rng, depth + 1)
            if field.is_repeated:
                getattr(out, field.name).extend([inner] * int(rng.integers(0, 4)))
            else:
                getattr(out, field.name).CopyFrom(inner)
        else:
            value = rng.bytes(9) if field.type == field.TYPE_BYTES else _value(field.cpp_type, rng)
            if field.is_repeated:
                getattr(out, field.name).extend([value] * int(rng.integers(0, 4)))
            else:
                setattr(out, field.name, value)
    return out


def _value(kind: int, rng: np.random.Generator) -> object:
    from google.protobuf.descriptor import FieldDescriptor as Field

    if kind == Field.CPPTYPE_STRING:
        return str(rng.choice(_TEXTS))
    if kind in (Field.CPPTYPE_BOOL,):
        return bool(rng.integers(2))
    if kind in (Field.CPPTYPE_DOUBLE, Field.CPPTYPE_FLOAT):
        return float(rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e300]))
    if kind in (Field.CPPTYPE_INT32, Field.CPPTYPE_ENUM):
        return int(rng.choice(_NUMBERS[:5]))
    number = int(rng.choice(np.array(_NUMBERS, dtype=np.int64)))
    unsigned = {Field.CPPTYPE_UINT32: 2**32 - 1, Field.CPPTYPE_UINT64: 2**64 - 1}
    return number & unsigned[kind] if kind in unsigned else number


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """The same bytes with some flipped, cut out, put in or repeated."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(0, len(out) + 1))
        match int(rng.integers(4)):
            case 0 if at < len(out):
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                del out[at : at + int(rng.integers(1, 9))]
            case 2:
                out[at:at] = rng.bytes(int(rng.integers(1, 9)))
            case 3:
                out[at:at] = out[at : at + int(rng.integers(1, 64))]
    return bytes(out)


def attack(channel: grpc.Channel, count: int, seed: int, timeout: float = 20.0) -> Iterator[Outcome]:
    """Send `count` messages, to all methods in turn; streams get several."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        method = METHODS[k % len(METHODS)]
        kind = message_factory.GetMessageClass(method.input_type)
        parts = [_bytes(kind, rng, method) for _ in range(int(rng.integers(1, 4)) if method.client_streaming else 1)]
        yield Outcome(method.full_name, _send(channel, method, parts, timeout))


def _bytes(kind: type[Message], rng: np.random.Generator, method: MethodDescriptor) -> bytes:
    data = random_message(kind, rng).SerializeToString()
    return data if rng.random() < 0.3 else mutated(data, rng)


def _send(channel: grpc.Channel, method: MethodDescriptor, parts: list[bytes], timeout: float) -> grpc.StatusCode:
    words = [("unary", "stream")[s] for s in (method.client_streaming, method.server_streaming)]
    call = getattr(channel, "_".join(words))(f"/{method.containing_service.full_name}/{method.name}")
    try:
        answer = call(iter(parts) if method.client_streaming else parts[0], timeout=timeout)
        if method.server_streaming:
            for _ in answer:
                pass
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK
