"""What every request goes through: who calls, whether they may, how many at a time, and how errors are told."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no annotations

from spa_server.callers import Caller, Callers, allow
from spa_server.database.engine import is_busy
from spa_server.errors import Refusal, exhausted, refusal_of
from spa_server.logs import Audit
from spa_server.watching import Watcher

__all__ = ["OPEN", "Guard"]

_log = logging.getLogger("spa_server.requests")
OPEN = None
"""The scope of methods that any caller may use who is known."""
_PUBLIC = ("/grpc.health.v1.Health/",)
"""Of methods that answer everybody: probes of an orchestrator have no token."""
_RETRY = 2.0
_NAMES = ("name", "parent", "model_name", "request_id", "sha256")
"""Fields of requests that the audit log keeps."""


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no annotations
    """Wraps the handler of every method."""

    def __init__(
        self, scopes: Mapping[str, str | None], callers: Callers, audit: Audit, watcher: Watcher, most: int
    ) -> None:
        """
        Args:
            scopes: method (`/package.Service/Method`) -> what a caller needs; a method that is not here is refused.
            callers: tells who calls.
            audit: where it is written down.
            watcher: counts.
            most: requests at the same time.
        """
        self._scopes, self._callers, self._audit, self._watcher, self._most = scopes, callers, audit, watcher, most
        self._now = 0
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Called by grpc for each request."""
        method = handler_call_details.method
        if method not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:  # no such method: grpc answers UNIMPLEMENTED
                return None
            self._wrapped[method] = self._wrap(method, handler)
        return self._wrapped[method]

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        kind = f"{_words(handler.request_streaming)}_{_words(handler.response_streaming)}"
        behaviour = getattr(handler, kind)

        ready = _legible if handler.request_streaming else _checked

        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._visit(method, request, context):
                return await behaviour(ready(request), context)

        async def answers(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._visit(method, request, context):
                async for item in behaviour(ready(request), context):
                    yield item

        wrapped = answers if inspect.isasyncgenfunction(behaviour) else answer
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrapped, _reader(handler.request_deserializer), handler.response_serializer)

    @asynccontextmanager
    async def _visit(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        start, caller, code = time.monotonic(), None, "OK"
        peer = context.peer()  # asked at the end, when the caller may be gone, grpc would crash (1.85)
        self._now += 1
        try:
            with self._watcher.span(method, context):
                if self._now > self._most:
                    raise exhausted("requests", "the server handles as many requests as it can; come again", _RETRY)
                caller = await self._admit(method, context)
                yield
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = _named(context.code())
            raise
        except Exception as error:  # whatever it is, the caller gets a status and no traceback
            refusal = _refusal(method, error)
            code = refusal.code.name
            await context.abort(refusal.code, refusal.message, refusal.trailing)
        finally:
            self._now -= 1
            taken = time.monotonic() - start
            self._watcher.request(method, code, taken)
            if self._scopes.get(method) not in ("infer", OPEN):
                self._note(method, request, peer, caller, code, taken)

    async def _admit(self, method: str, context: grpc.aio.ServicerContext) -> Caller | None:
        if method.startswith(_PUBLIC):
            return None
        if method not in self._scopes:
            raise Refusal(grpc.StatusCode.PERMISSION_DENIED, "scope", f"{method}: nobody may call this")
        metadata = dict(context.invocation_metadata() or ())
        caller = self._callers.remembered(metadata)
        if caller is None:
            names = context.auth_context().get("x509_common_name", ())
            certificate = names[0].decode(errors="replace") if names else None
            caller = await asyncio.to_thread(self._callers.find, metadata, certificate)
        self._callers.become(caller)
        allow(caller, self._scopes[method])
        return caller

    def _note(
        self,
        method: str,
        request: Any,
        peer: str,
        caller: Caller | None,
        code: str,
        taken: float,
    ) -> None:
        fields = {name: getattr(request, name, None) for name in _NAMES}
        named = {name: value[:200] for name, value in fields.items() if isinstance(value, str) and value}
        self._audit.write(
            owner=None if caller is None else caller.owner,
            token=None if caller is None else caller.token or None,
            peer=peer,
            method=method,
            code=code,
            seconds=round(taken, 4),
            **named,
        )


class _Garbled:
    """Bytes that are no message. Left to grpc, the caller would be told that the server had failed."""


def _reader(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return _Garbled()

    return read


def _checked(request: Any) -> Any:
    if isinstance(request, _Garbled):
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "message", "these bytes are no message of this method")
    return request


async def _legible(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _words(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _named(code: Any) -> str:
    return code.name if isinstance(code, grpc.StatusCode) else "UNKNOWN"


def _refusal(method: str, error: Exception) -> Refusal:
    known = refusal_of(error)
    if known is not None:
        return known
    if is_busy(error):
        _log.error("%s: the database does not answer (%s)", method, error)
        return Refusal(grpc.StatusCode.UNAVAILABLE, "database", "the server's database does not answer", retry=_RETRY)
    if isinstance(error, OSError):
        _log.error("%s: the store does not answer (%s)", method, error)
        return Refusal(grpc.StatusCode.UNAVAILABLE, "storage", "the server's store does not answer", retry=_RETRY)
    _log.error("%s: an error nobody foresaw", method, exc_info=error)
    return Refusal(
        grpc.StatusCode.INTERNAL, "internal", f"internal error ({type(error).__name__}); see the server's log"
    )
