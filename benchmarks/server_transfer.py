"""Upload and download through the server, against a bare gRPC stream of the same bytes in the same run.

    python benchmarks/server_transfer.py [--gigabytes 2] [--rounds 3] [--json FILE]

Bare: a grpc.aio server that throws pieces away, and one that sends pieces of memory; the same sizes of pieces, the same
client. Ours: bytes are hashed on both sides, written, synced to disk, renamed and recorded; downloads are hashed and
written. Each round times all four in turn, with other bytes, so that nothing is known before. Memory is the server's
largest resident set.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, table, write

sys.path.insert(0, str(ROOT / "server"))

import grpc
import numpy as np

from spa_server._generated import artifacts_pb2, uploads_pb2
from tests.server.running import Running

PIECE = 1 << 20
LIMITS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def bare(port: Any) -> None:
    """A server that does nothing with what it gets."""

    async def take(requests: Any, context: Any) -> uploads_pb2.UploadResponse:
        size = 0
        async for request in requests:
            size += len(request.data)
        return uploads_pb2.UploadResponse(size=size)

    async def give(request: artifacts_pb2.DownloadRequest, context: Any) -> Any:
        data = bytes(PIECE)
        for _ in range(request.limit // PIECE):
            yield artifacts_pb2.DownloadResponse(data=data)

    async def serve() -> None:
        server = grpc.aio.server(options=LIMITS)
        response = artifacts_pb2.DownloadResponse.SerializeToString
        handlers = {
            "Take": grpc.stream_unary_rpc_method_handler(
                take, uploads_pb2.UploadRequest.FromString, uploads_pb2.UploadResponse.SerializeToString
            ),
            "Give": grpc.unary_stream_rpc_method_handler(give, artifacts_pb2.DownloadRequest.FromString, response),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", handlers),))
        port.value = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def pieces(path: Path) -> Iterator[uploads_pb2.UploadRequest]:
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            yield uploads_pb2.UploadRequest(data=data)


def largest(pid: int) -> float:
    """MB of the largest resident set so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    return float("nan")


def once(channel: grpc.Channel, server: Running, path: Path, folder: Path, size: int) -> dict[str, float]:
    out = {}
    take = channel.stream_unary(
        "/bare.Bare/Take", uploads_pb2.UploadRequest.SerializeToString, uploads_pb2.UploadResponse.FromString
    )
    give = channel.unary_stream(
        "/bare.Bare/Give", artifacts_pb2.DownloadRequest.SerializeToString, artifacts_pb2.DownloadResponse.FromString
    )
    start = time.perf_counter()
    assert take(pieces(path)).size == size
    out["bare upload"] = time.perf_counter() - start
    with server.client() as client:
        start = time.perf_counter()
        model = client.push_dataset(path)
        out["upload"] = time.perf_counter() - start
        start = time.perf_counter()
        got = sum(len(part.data) for part in give(artifacts_pb2.DownloadRequest(limit=size)))
        out["bare download"] = time.perf_counter() - start
        assert got == size
        from spa_server.client.transfers import download

        start = time.perf_counter()
        target = folder / "back"
        download(client._artifacts, model.name, model.files[0], target, lambda *_: None)
        out["download"] = time.perf_counter() - start
        assert target.stat().st_size == size
        target.unlink()
        client.delete(model.name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = int(arguments.gigabytes * 1e9) // PIECE * PIECE
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Value("i", 0)
    process = spawn.Process(target=bare, args=(port,), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.05)
    rows: list[dict[str, float]] = []
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, grpc.insecure_channel(f"127.0.0.1:{port.value}", LIMITS) as channel:
        folder = Path(name)
        server = Running(folder / "server", retention={"uploads": "1s", "every": "1s"}).start()
        assert server.process is not None
        before = largest(server.process.pid)
        for _ in range(arguments.rounds):
            path = folder / "data.bin"
            with open(path, "wb") as file:
                for _ in range(size // PIECE):
                    file.write(rng.bytes(PIECE))
            rows.append(once(channel, server, path, folder, size))
        memory = {"before": before, "after": largest(server.process.pid)}
        server.stop()
    process.terminate()
    speed = {name: median(size / row[name] / 1e6 for row in rows) for name in rows[0]}
    share = {way: median(row[f"bare {way}"] / row[way] for row in rows) for way in ("upload", "download")}
    lines = [(way, f"{speed[f'bare {way}']:.0f}", f"{speed[way]:.0f}", f"{share[way]:.2f}") for way in share]
    print(table(("", "bare MB/s", "server MB/s", "share"), lines))
    print(f"server's memory: {memory['before']:.0f} MB when started, {memory['after']:.0f} MB at most")
    write(arguments.json, {"bytes": size, "rounds": rows, "speed": speed, "share": share, "memory": memory})


if __name__ == "__main__":
    main()
