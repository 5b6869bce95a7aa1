"""Statuses of gRPC as errors of this package, so that they read as those of local work."""

from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from spa.errors import SpaError, UsageError, kinds
from spa_server.errors import DETAILS

__all__ = ["error_of", "is_passing", "job_error", "reason_of"]

_KINDS = {kind.code: kind for kind in kinds() if kind is not SpaError}
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.OUT_OF_RANGE)


def reason_of(error: grpc.RpcError) -> tuple[str, dict[str, str]]:
    """The reason and metadata of an `ErrorInfo`; empty without one."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS:
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason, dict(info.metadata)
    return "", {}


def is_passing(error: grpc.RpcError) -> bool:
    """Whether the same call may do in a moment: the connection broke, or something is in the way."""
    return error.code() in _PASSING


def error_of(error: grpc.RpcError, address: str) -> SpaError:
    """What to raise for a status."""
    reason, _ = reason_of(error)
    message = str(error.details() or "").strip()
    if error.code() is grpc.StatusCode.UNAVAILABLE and not reason:
        return SpaError(f"{address}: the server does not answer; check the address, and whether it wants TLS (--ca)")
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return UsageError(f"{address}: {message}")
    kind = _KINDS.get(reason)
    if kind is not None:
        return kind(message)
    return SpaError(f"{address}: {message or error.code().name}")


def job_error(code: str, message: str, name: str) -> SpaError:
    """What to raise for a job that failed."""
    kind = _KINDS.get(code, SpaError)
    return kind(message if kind is not SpaError else f"{name}: {message}")
