"""What serving refuses or fails at, in one tree.

    ServingError
    ├── InvalidRequest   INVALID_ARGUMENT      the request does not fit the model or the protocol
    ├── NotFound         NOT_FOUND             no such model or version, or not loaded
    ├── NotLoadable      FAILED_PRECONDITION   the model is there but cannot be served as asked
    ├── Overloaded       RESOURCE_EXHAUSTED    too much is waiting; the same request may work later
    ├── LimitReached     RESOURCE_EXHAUSTED    more than this server takes on; trying again does not help
    ├── TooLate          DEADLINE_EXCEEDED     its time ran out before its turn
    ├── ShuttingDown     UNAVAILABLE           the server takes no more requests
    └── RunFailed        INTERNAL              ONNX Runtime failed on a valid request

`status` is the name of the gRPC status. Nothing here imports grpc: the engine works without.
"""

from __future__ import annotations

from typing import ClassVar

from spa.errors import SpaError

__all__ = [
    "InvalidRequest",
    "LimitReached",
    "NotFound",
    "NotLoadable",
    "Overloaded",
    "RunFailed",
    "ServingError",
    "ShuttingDown",
    "TooLate",
]


class ServingError(SpaError):
    """Base of what serving foresees."""

    code = "serving"
    status: ClassVar[str] = "UNKNOWN"


class InvalidRequest(ServingError):
    """The request does not fit the model or the protocol."""

    code = "invalid-request"
    status = "INVALID_ARGUMENT"


class NotFound(ServingError):
    """There is no such model or version, or it is not loaded."""

    code = "not-found"
    status = "NOT_FOUND"


class NotLoadable(ServingError):
    """The model is there but cannot be served as asked."""

    code = "not-loadable"
    status = "FAILED_PRECONDITION"


class Overloaded(ServingError):
    """Too much is waiting; the same request may work later."""

    code = "overloaded"
    status = "RESOURCE_EXHAUSTED"


class LimitReached(ServingError):
    """More than this server takes on; trying again does not help."""

    code = "limit"
    status = "RESOURCE_EXHAUSTED"


class TooLate(ServingError):
    """The request's time ran out before its turn."""

    code = "too-late"
    status = "DEADLINE_EXCEEDED"


class ShuttingDown(ServingError):
    """The server takes no more requests."""

    code = "shutting-down"
    status = "UNAVAILABLE"


class RunFailed(ServingError):
    """ONNX Runtime failed on a valid request."""

    code = "run-failed"
    status = "INTERNAL"
