"""A server put together, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor  # type: ignore[import-untyped]  # no annotations
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spa.errors import OutputError, SpaError, UsageError
from spa_server._generated import (
    account_pb2,
    account_pb2_grpc,
    artifacts_pb2,
    jobs_pb2,
    jobs_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    options_pb2,
    uploads_pb2,
)
from spa_server.blobs import Blobs
from spa_server.callers import Callers, current
from spa_server.cleaning import keep_clean
from spa_server.config import Config, listener, seconds, size
from spa_server.database import Database, connect
from spa_server.execution.dispatcher import Dispatcher
from spa_server.execution.executor import executor_of
from spa_server.guard import OPEN, Guard
from spa_server.logs import Audit
from spa_server.memory import keep_freed
from spa_server.names import owner_folder
from spa_server.owned import OwnedModels
from spa_server.services import transfers
from spa_server.services.account import Account
from spa_server.services.collections import Datasets, Models
from spa_server.services.jobs import Changes, Jobs
from spa_server.serving import Engine, Trial
from spa_server.serving import Limits as ServingLimits
from spa_server.serving.reflection import Descriptors
from spa_server.serving.service import ACTIONS, SERVICE, Action, add_to_server
from spa_server.uploads import Uploads
from spa_server.watching import Watcher

__all__ = ["FILES", "Server", "run", "scopes"]

_log = logging.getLogger("spa_server")
FILES = (account_pb2, artifacts_pb2, jobs_pb2, models_pb2, uploads_pb2)
"""Modules whose services this server has."""
_SERVING: Mapping[Action, str | None] = {"health": OPEN, "read": "infer", "infer": "infer", "manage": "operate"}
"""What callers of the inference service need."""
_CHUNK = 1 << 20
_GRACE = 5.0
"""Seconds that requests have to end when the server stops."""


def scopes() -> dict[str, str | None]:
    """What each method needs, read off the protos.

    Raises:
        RuntimeError: a method says nothing; the server must not start.
    """
    out: dict[str, str | None] = {}
    for module in FILES:
        file: FileDescriptor = module.DESCRIPTOR
        for service in file.services_by_name.values():
            for method in service.methods:
                extensions: Any = method.GetOptions().Extensions
                scope = extensions[options_pb2.scope]
                if not scope:
                    raise RuntimeError(f"{method.full_name} says not what a caller needs")
                name = options_pb2.Scope.Name(scope).removeprefix("SCOPE_").lower()
                out[f"/{service.full_name}/{method.name}"] = name
    for name, action in ACTIONS.items():
        out[f"/{SERVICE}/{name}"] = _SERVING[action]
    for version in ("v1", "v1alpha"):
        out[f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"] = OPEN
    return out


class Server:
    """One server. Belongs to one event loop."""

    def __init__(self, config: Config, database: Database, blobs: Blobs, name: str) -> None:
        """
        Args:
            config: what was said.
            database: where jobs are.
            blobs: where files are.
            name: of this server; the same whenever it is started again.
        """
        self._config, self._database, self._blobs = config, database, blobs
        quota = size(config.quotas.bytes)
        self.uploads = Uploads(database, blobs, config.data / "uploads", size(config.limits.upload), quota)
        self._changes, self.watcher = Changes(), Watcher()
        self.dispatcher = Dispatcher(config, database, blobs, executor_of(config, name), name, self._changes.tell)
        self._audit = Audit(config.audit or config.data / "audit.log")
        self.callers = Callers(database, tokens=config.tokens)
        self._message = size(config.limits.message)
        guard = Guard(scopes(), self.callers, self._audit, self.watcher, config.limits.requests)
        options = [
            ("grpc.max_receive_message_length", self._message),
            ("grpc.max_send_message_length", self._message),
            ("grpc.so_reuseport", 0),
        ]
        self._grpc = grpc.aio.server(interceptors=[guard], options=options)
        self._health = health.aio.HealthServicer()
        self._engine: Engine | None = None
        self._cleaner: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen, and take jobs. Raises: SpaError if the address cannot be listened on."""
        await self._add_services()
        place = listener(self._config.listen)
        try:
            if (credentials := _credentials(self._config)) is not None:
                self.port = self._grpc.add_secure_port(self._config.listen, credentials)
            else:
                self.port = self._grpc.add_insecure_port(self._config.listen)
        except RuntimeError as error:
            raise SpaError(f"cannot listen on {self._config.listen}; is the port taken?") from error
        if not self.port:
            raise SpaError(f"cannot listen on {self._config.listen}; is the port taken, or the certificate damaged?")
        if self._config.metrics.listen is not None:
            self.watcher.serve(self._config.metrics.listen, lambda: self.dispatcher.running)
        if self._config.tracing.endpoint is not None:
            self.watcher.trace(self._config.tracing.endpoint)
        await self.dispatcher.start()
        await self._grpc.start()
        self._cleaner = asyncio.create_task(keep_clean(self._config, self._database, self._blobs, self.uploads))
        _log.info("listening on %s:%d", place.host, self.port)

    async def _add_services(self) -> None:
        limits, quotas = self._config.limits, self._config.quotas
        account = Account(
            self._database,
            chunk=min(_CHUNK, self._message // 2),
            quota_bytes=size(quotas.bytes),
            quota_jobs=quotas.open,
        )
        jobs = Jobs(self._database, self.dispatcher, self._changes, quotas.open)
        incomings = transfers.Incomings(self.uploads)
        artifacts = transfers.Artifacts(self._database, self._blobs)
        account_pb2_grpc.add_AccountServiceServicer_to_server(account, self._grpc)
        transfers.add_to_server(self._grpc, incomings, artifacts)
        models_pb2_grpc.add_ModelServiceServicer_to_server(Models(self._database, limits.files), self._grpc)
        models_pb2_grpc.add_DatasetServiceServicer_to_server(Datasets(self._database, limits.files), self._grpc)
        jobs_pb2_grpc.add_JobServiceServicer_to_server(jobs, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        names = [service.full_name for module in FILES for service in module.DESCRIPTOR.services_by_name.values()]
        if self._config.serving.enabled:
            self._add_serving()
            names.append(SERVICE)
        if self._config.reflection:
            all_names = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(all_names, self._grpc, Descriptors())
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _add_serving(self) -> None:
        serving = self._config.serving
        trial = Trial(seconds(serving.time), size(serving.memory))
        limits = ServingLimits(serving.versions, size(serving.pending), trial)
        source = OwnedModels(self._database, self._blobs, self._config.data / "opening")
        self._engine = Engine(source, limits)
        add_to_server(self._grpc, self._engine, _space, self._message)

    async def stop(self) -> None:
        """Say that the end is near, let jobs end or give them back, and stop. No accepted work is lost."""
        _log.info("stopping: %d jobs at work", self.dispatcher.running)
        await self._health.enter_graceful_shutdown()
        await self.dispatcher.drain(seconds(self._config.drain))
        await self._grpc.stop(_GRACE)
        if self._engine is not None:
            await self._engine.close()
        if self._cleaner is not None:
            self._cleaner.cancel()
        await asyncio.to_thread(self.watcher.close)
        self._audit.close()
        _log.info("stopped")


async def _space(context: grpc.aio.ServicerContext, action: Action, model: str) -> str:
    """Everybody has models of their own; the guard has checked the scope."""
    return owner_folder(current().owner)


def run(config: Config, told: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        config: what was said.
        told: told the address when the server answers.

    Raises:
        SpaError: something that is needed is not there.
    """
    keep_freed()
    with _folder(config.data) as name:
        database = connect(config.database_url)
        try:
            asyncio.run(_serve(config, database, Blobs(config.blobs_url), name, told))
        finally:
            database.close()


async def _serve(config: Config, database: Database, blobs: Blobs, name: str, told: Callable[[str], None]) -> None:
    done, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, done.set)
    server = Server(config, database, blobs, name)
    await server.start()
    told(f"{listener(config.listen).host}:{server.port}")
    await done.wait()
    await server.stop()


@contextlib.contextmanager
def _folder(data: Path) -> Iterator[str]:
    """The server's folder, for one server at a time; the name of the server to which it belongs.

    Raises:
        OutputError: it cannot be made.
        UsageError: another server uses it.
    """
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(data / "server.id", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise OutputError(f"{data}: cannot be used ({error.strerror}); name another folder with `data`") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{data}: another server uses this folder; stop it, or name another one") from None
        name = os.read(handle, 64).decode().strip()
        if not name:
            name = secrets.token_hex(8)
            os.write(handle, name.encode())
        yield name
    finally:
        os.close(handle)


def _credentials(config: Config) -> grpc.ServerCredentials | None:
    tls = config.tls
    if tls.certificate is None or tls.key is None:
        return None
    try:
        pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
        clients = tls.client_ca.read_bytes() if tls.client_ca is not None else None
    except OSError as error:
        raise UsageError(f"tls: {error.filename} cannot be read ({error.strerror})") from error
    return grpc.ssl_server_credentials([pair], clients, clients is not None)
