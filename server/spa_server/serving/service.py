"""The gRPC service in front of an engine: translates, asks for permission, and turns errors into statuses."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no types are shipped

from spa.version import __version__
from spa_server._generated_inference import service_pb2
from spa_server.errors import Refusal
from spa_server.serving.describe import PLATFORM, config_of, statistics_of, tensor_metadata
from spa_server.serving.engine import Engine
from spa_server.serving.errors import InvalidRequest, NotFound, Overloaded, ServingError
from spa_server.serving.messages import decode, encode, timeout_of
from spa_server.serving.wire import InferCall, InferReply, parse_call, write_reply, write_stream_reply

__all__ = ["ACTIONS", "SERVICE", "Action", "Authorise", "InferenceServicer", "add_to_server"]

SERVICE = "inference.GRPCInferenceService"
"""Full name of the service, for health and reflection."""
Action = Literal["health", "read", "infer", "manage"]
"""What a call does: asks how the server is, reads about models, runs one, or loads and unloads."""
ACTIONS: Mapping[str, Action] = MappingProxyType(
    {
        "ServerLive": "health",
        "ServerReady": "health",
        "ServerMetadata": "health",
        "ModelReady": "read",
        "ModelMetadata": "read",
        "ModelConfig": "read",
        "ModelStatistics": "read",
        "ModelInfer": "infer",
        "ModelStreamInfer": "infer",
        "RepositoryIndex": "read",
        "RepositoryModelLoad": "manage",
        "RepositoryModelUnload": "manage",
    }
)
"""Method -> what it does."""

_WINDOW = 64
"""Requests of one stream that are worked on at the same time; more are not read from the connection."""
_FINAL = "triton_enable_empty_final_response"
_RETRY_SECONDS = 0.1
_MOST_BYTES = (1 << 31) - (1 << 20)
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Authorise(Protocol):
    """Decides about one request."""

    async def __call__(self, context: grpc.aio.ServicerContext, action: Action, model: str) -> str:
        """The namespace of the caller's models in the model source: `x` is then `NAMESPACE/x` there; empty for none.

        Args:
            context: of the call.
            action: what it does.
            model: the name in the request; empty where it is about all models or the server.

        Raises: Refusal.
        """


async def _anyone(context: grpc.aio.ServicerContext, action: Action, model: str) -> str:
    return ""


def add_to_server(
    server: grpc.aio.Server, engine: Engine, authorise: Authorise = _anyone, max_answer_bytes: int = _MOST_BYTES
) -> None:
    """Let `server` answer the Open Inference Protocol with the models of `engine`.

    Args:
        server: not started yet; its option `grpc.max_receive_message_length` limits requests.
        engine: is closed by whoever made it, after the server has stopped.
        authorise: asked once for each request; by default everyone may do everything.
        max_answer_bytes: an answer that takes more is refused.
    """
    servicer = InferenceServicer(engine, authorise, max_answer_bytes)
    methods = service_pb2.DESCRIPTOR.services_by_name[SERVICE.rpartition(".")[2]].methods
    handlers = {method.name: _handler(method, getattr(servicer, method.name)) for method in methods}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


class _Malformed:
    """Stands for a request that is no message of its method."""


def _handler(method: Any, answer: Callable[..., Any]) -> grpc.RpcMethodHandler:
    """What grpc needs to know of a method; tensors stay outside of the messages of ModelInfer and ModelStreamInfer."""
    if method.name == "ModelStreamInfer":
        return grpc.stream_stream_rpc_method_handler(answer, _reader(parse_call), write_stream_reply)
    if method.name == "ModelInfer":
        return grpc.unary_unary_rpc_method_handler(answer, _reader(parse_call), write_reply)
    request = getattr(service_pb2, method.input_type.name)
    response = getattr(service_pb2, method.output_type.name)
    return grpc.unary_unary_rpc_method_handler(answer, _reader(request.FromString), response.SerializeToString)


def _reader(parse: Callable[[bytes], T]) -> Callable[[bytes], T | _Malformed]:
    """grpc would answer what it cannot read with UNKNOWN or INTERNAL."""

    def read(data: bytes) -> T | _Malformed:
        try:
            return parse(data)
        except DecodeError:
            return _Malformed()

    return read


def _refusal(error: Exception) -> Refusal:
    """The status for an error; what was not foreseen is logged and not told."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ServingError):
        retry = _RETRY_SECONDS if isinstance(error, Overloaded) else None
        return Refusal(grpc.StatusCode[error.status], error.code, str(error), retry=retry)
    _LOG.error("a request failed for a reason that was not foreseen", exc_info=error)
    return Refusal(grpc.StatusCode.INTERNAL, "internal", "the server failed; its log says why.")


def _answering(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    @functools.wraps(method)
    async def call(self: InferenceServicer, request: Any, context: grpc.aio.ServicerContext) -> T:
        try:
            return await method(self, _checked(request), context)
        except Exception as error:  # whatever it is, the caller gets a status and no traceback
            refusal = _refusal(error)
        await context.abort(refusal.code, refusal.message, refusal.trailing)
        raise AssertionError("abort raises")

    return call


def _checked(request: T | _Malformed) -> T:
    if isinstance(request, _Malformed):
        raise InvalidRequest("the request is not a message of this method.")
    return request


class InferenceServicer:
    """The methods of inference.GRPCInferenceService; proto/inference/service.proto documents each."""

    def __init__(self, engine: Engine, authorise: Authorise, max_answer_bytes: int) -> None:
        self._engine, self._authorise, self._most_bytes = engine, authorise, max_answer_bytes

    async def _name(self, context: grpc.aio.ServicerContext, method: str, model: str) -> str:
        """The engine's name for the caller's `model`; without a model, what all names of the caller begin with.

        Raises: Refusal if the caller may not use the method.
        """
        space = await self._authorise(context, ACTIONS[method], model)
        return f"{space}/{model}" if space else model

    @_answering
    async def ServerLive(self, request: Any, context: Any) -> service_pb2.ServerLiveResponse:
        """Is the process alive?"""
        await self._name(context, "ServerLive", "")
        return service_pb2.ServerLiveResponse(live=True)

    @_answering
    async def ServerReady(self, request: Any, context: Any) -> service_pb2.ServerReadyResponse:
        """Does the process take requests?"""
        await self._name(context, "ServerReady", "")
        return service_pb2.ServerReadyResponse(ready=self._engine.ready)

    @_answering
    async def ServerMetadata(self, request: Any, context: Any) -> service_pb2.ServerMetadataResponse:
        """Name, version and extensions of the server."""
        await self._name(context, "ServerMetadata", "")
        extensions = ("model_configuration", "model_repository", "statistics")
        return service_pb2.ServerMetadataResponse(name="spa", version=__version__, extensions=extensions)

    @_answering
    async def ModelReady(self, request: service_pb2.ModelReadyRequest, context: Any) -> service_pb2.ModelReadyResponse:
        """Is a version of a model loaded?"""
        name = await self._name(context, "ModelReady", request.name)
        try:
            self._engine.model(name).get(request.version)
        except NotFound:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=self._engine.ready)

    @_answering
    async def ModelMetadata(
        self, request: service_pb2.ModelMetadataRequest, context: Any
    ) -> service_pb2.ModelMetadataResponse:
        """Inputs and outputs of a model."""
        model = self._engine.model(await self._name(context, "ModelMetadata", request.name))
        signature = model.get(request.version).signature
        return service_pb2.ModelMetadataResponse(
            name=request.name,
            versions=[loaded.version for loaded in model.in_order()],
            platform=PLATFORM,
            inputs=map(tensor_metadata, signature.inputs),
            outputs=map(tensor_metadata, signature.outputs),
        )

    @_answering
    async def ModelConfig(
        self, request: service_pb2.ModelConfigRequest, context: Any
    ) -> service_pb2.ModelConfigResponse:
        """How a model is served."""
        loaded = self._engine.model(await self._name(context, "ModelConfig", request.name)).get(request.version)
        return service_pb2.ModelConfigResponse(config=config_of(request.name, loaded))

    @_answering
    async def ModelStatistics(
        self, request: service_pb2.ModelStatisticsRequest, context: Any
    ) -> service_pb2.ModelStatisticsResponse:
        """How often models ran, and what it took."""
        name = await self._name(context, "ModelStatistics", request.name)
        if request.name:
            model = self._engine.model(name)
            chosen = [model.get(request.version)] if request.version else model.in_order()
        else:
            chosen = [loaded for loaded in self._engine.loaded() if loaded.model.startswith(name)]
        cut = len(name) - len(request.name)
        return service_pb2.ModelStatisticsResponse(
            model_stats=[statistics_of(loaded.model[cut:], loaded) for loaded in chosen]
        )

    @_answering
    async def ModelInfer(self, request: InferCall, context: Any) -> InferReply:
        """Runs a model once."""
        return await self._infer(request, context)

    async def _infer(self, call: InferCall, context: Any) -> InferReply:
        name = await self._name(context, "ModelInfer", call.message.model_name)
        feeds = await decode(call)
        answer = await self._engine.infer(
            name,
            feeds,
            version=call.message.model_version,
            outputs=[output.name for output in call.message.outputs],
            deadline=_deadline(context, timeout_of(call.message)),
        )
        return await encode(answer, call, self._most_bytes)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[InferCall | _Malformed], context: Any
    ) -> AsyncIterator[InferReply | service_pb2.ModelStreamInferResponse]:
        """Runs models for a stream of requests; answers come in their order."""
        started: asyncio.Queue[asyncio.Task[InferReply | service_pb2.ModelStreamInferResponse] | None]
        started = asyncio.Queue(_WINDOW)
        tasks: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            try:
                async for request in request_iterator:
                    task = asyncio.create_task(self._in_stream(request, context))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await started.put(task)
            finally:
                await started.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await started.get()) is not None:
                yield await task
        finally:
            reader.cancel()
            for task in list(tasks):
                task.cancel()

    async def _in_stream(
        self, call: InferCall | _Malformed, context: Any
    ) -> InferReply | service_pb2.ModelStreamInferResponse:
        try:
            reply = await self._infer(_checked(call), context)
        except Exception as error:  # one request fails, the stream goes on
            failed = service_pb2.ModelInferResponse(id="" if isinstance(call, _Malformed) else call.message.id)
            return service_pb2.ModelStreamInferResponse(error_message=_refusal(error).message, infer_response=failed)
        if not isinstance(call, _Malformed) and _FINAL in call.message.parameters:
            reply.message.parameters["triton_final_response"].bool_param = True
        return reply

    @_answering
    async def RepositoryIndex(
        self, request: service_pb2.RepositoryIndexRequest, context: Any
    ) -> service_pb2.RepositoryIndexResponse:
        """All models and versions, loaded or not."""
        _one_repository(request.repository_name)
        space = await self._name(context, "RepositoryIndex", "")
        response = service_pb2.RepositoryIndexResponse()
        for entry in await self._engine.index():
            if entry.model.startswith(space) and (entry.state == "READY" or not request.ready):
                name = entry.model[len(space) :]
                response.models.add(name=name, version=entry.version, state=entry.state, reason=entry.reason)
        return response

    @_answering
    async def RepositoryModelLoad(
        self, request: service_pb2.RepositoryModelLoadRequest, context: Any
    ) -> service_pb2.RepositoryModelLoadResponse:
        """Loads a model, or loads it anew."""
        _one_repository(request.repository_name)
        name = await self._name(context, "RepositoryModelLoad", request.model_name)
        await self._engine.load(name, _given_options(request.parameters))
        return service_pb2.RepositoryModelLoadResponse()

    @_answering
    async def RepositoryModelUnload(
        self, request: service_pb2.RepositoryModelUnloadRequest, context: Any
    ) -> service_pb2.RepositoryModelUnloadResponse:
        """Stops serving a model."""
        _one_repository(request.repository_name)
        await self._engine.unload(await self._name(context, "RepositoryModelUnload", request.model_name))
        return service_pb2.RepositoryModelUnloadResponse()


def _deadline(context: Any, timeout: float | None) -> float | None:
    """When a request's time is over, on the event loop's clock: the call's own deadline or its parameter's."""
    left = [seconds for seconds in (context.time_remaining(), timeout) if seconds is not None]
    return asyncio.get_running_loop().time() + min(left) if left else None


def _one_repository(name: str) -> None:
    if name:
        raise InvalidRequest(f"there is no repository {name!r}: leave repository_name empty.")


def _given_options(parameters: Mapping[str, service_pb2.ModelRepositoryParameter]) -> Mapping[Any, Any] | None:
    for name in parameters:
        if name != "config":
            raise InvalidRequest(f"parameter {name!r} is not known: only 'config' can be given with a model to load.")
    if "config" not in parameters:
        return None
    try:
        options = json.loads(parameters["config"].string_param)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise InvalidRequest("parameter 'config' must be a JSON object of options, such as {\"sessions\": 2}.")
    return options
