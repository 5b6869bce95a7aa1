"""Refusals, and how they reach a client: a status with details as google.rpc.Status defines them.

https://cloud.google.com/apis/design/errors; every status has an `ErrorInfo` whose reason is stable text for programs.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage  # type: ignore[import-untyped]  # no annotations
from google.protobuf.duration_pb2 import Duration  # type: ignore[import-untyped]  # no annotations
from google.protobuf.message import Message  # type: ignore[import-untyped]  # no annotations
from google.rpc import error_details_pb2, status_pb2

from spa.errors import SpaError, UsageError

__all__ = ["DETAILS", "DOMAIN", "Refusal", "refusal_of"]

DOMAIN = "spa"
DETAILS = "grpc-status-details-bin"
"""The key of trailing metadata that carries a google.rpc.Status."""


class Refusal(Exception):
    """A request that is answered with a status other than OK."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str,
        message: str,
        *,
        field: str | None = None,
        retry: float | None = None,
        **metadata: str,
    ) -> None:
        """
        Args:
            code: the status.
            reason: stable text for programs, in lower case with dashes.
            message: one sentence.
            field: of the request, where one is wrong.
            retry: seconds after which the same request may do.
            metadata: more for programs.
        """
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, _short(message)
        self.field, self.retry = None if field is None else _short(field, 200), retry
        self.metadata = {name: _short(value, 200) for name, value in metadata.items()}

    @property
    def trailing(self) -> tuple[tuple[str, bytes], ...]:
        """Trailing metadata."""
        details: list[Message] = [
            error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        ]
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(field=self.field, description=self.message)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if self.retry is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(code=self.code.value[0], message=self.message, details=map(_packed, details))
        return ((DETAILS, status.SerializeToString()),)


def _short(text: str, most: int = 1000) -> str:
    """At most so many bytes: a status travels in headers, of which connections take 8 KB, and three times a byte that
    is not ASCII."""
    data = text.encode(errors="replace")
    return text if len(data) <= most else data[:most].decode(errors="ignore") + " ..."


def _packed(message: Message) -> AnyMessage:
    out = AnyMessage()
    out.Pack(message)
    return out


def invalid(field: str, message: str) -> Refusal:
    """A field of the request is wrong."""
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, "usage", message, field=field)


def not_found(name: str) -> Refusal:
    """There is no such thing, or it belongs to somebody else: the answer is the same."""
    return Refusal(grpc.StatusCode.NOT_FOUND, "not-found", f"{name}: there is no such thing of yours", name=name)


def exhausted(reason: str, message: str, retry: float) -> Refusal:
    """Too much, for now."""
    return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, retry=retry)


def refusal_of(error: BaseException) -> Refusal | None:
    """How a foreseen error of the library is answered; None if it is none."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, SpaError):
        code = (
            grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, UsageError) else grpc.StatusCode.FAILED_PRECONDITION
        )
        known: dict[str, Any] = {"field": str(error).partition(":")[0]} if isinstance(error, UsageError) else {}
        return Refusal(code, error.code, str(error), **known)
    return None
