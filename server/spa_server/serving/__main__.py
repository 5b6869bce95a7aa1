"""`python -m spa_server.serving FOLDER`: serves the models of a folder to everyone on this machine, by loopback."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

import grpc
import typer
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spa.errors import SpaError
from spa_server.memory import keep_freed
from spa_server.serving.engine import Engine, Limits
from spa_server.serving.reflection import Descriptors
from spa_server.serving.service import SERVICE, add_to_server
from spa_server.serving.source import FolderSource
from spa_server.serving.trial import Trial

_HOST = "127.0.0.1"
_GRACE = 30.0  # seconds


def main(
    folder: Annotated[Path, typer.Argument(help="Holds NAME/VERSION/model.onnx, and NAME/config.yaml for options.")],
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8001,
    max_message_mb: Annotated[int, typer.Option(min=1, max=2047, help="Largest request and answer.")] = 256,
    max_pending_mb: Annotated[int, typer.Option(min=1, help="Inputs of all requests without answer.")] = 1024,
    trial: Annotated[bool, typer.Option(help="Open each model in a process with limits first.")] = False,
) -> None:
    """Serve the models of FOLDER with the Open Inference Protocol, on loopback and without TLS or tokens."""
    try:
        source = FolderSource(folder)
    except SpaError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from error
    keep_freed()
    limits = Limits(max_bytes=max_pending_mb << 20, trial=Trial() if trial else None)
    asyncio.run(_serve(source, port, max_message_mb << 20, limits))


async def _serve(source: FolderSource, port: int, most_bytes: int, limits: Limits) -> None:
    engine = Engine(source, limits)
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", most_bytes),
            ("grpc.max_send_message_length", most_bytes),
            ("grpc.so_reuseport", 0),  # or a second server would share the port in silence
        ]
    )
    add_to_server(server, engine, max_answer_bytes=most_bytes)
    try:
        bound = server.add_insecure_port(f"{_HOST}:{port}")
    except RuntimeError as error:
        print(f"error: port {port} of {_HOST} is taken: choose another --port, or 0.", file=sys.stderr)
        raise SystemExit(2) from error
    for name in source.models():
        try:
            await engine.load(name)
        except SpaError as error:
            print(f"warning: {error}", file=sys.stderr)
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server, Descriptors())
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    for service in ("", SERVICE):
        await status.set(service, health_pb2.HealthCheckResponse.SERVING)
    await server.start()
    print(f"serving on {_HOST}:{bound}", flush=True)
    await stop.wait()
    await status.enter_graceful_shutdown()
    await server.stop(_GRACE)
    await engine.close()


if __name__ == "__main__":
    typer.run(main)
