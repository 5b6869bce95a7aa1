"""Upload and download through the server, against a bare gRPC stream of the same bytes in the same run.

    python benchmarks/server_transfer.py [--gigabytes 2] [--rounds 3] [--folder FOLDER] [--json FILE]

Bare: a grpc.aio server that throws pieces away, and one that sends pieces of memory; messages of the generated code, of
the same sizes, and the same kind of client. "Bytes": the same streams without messages, which is the least that gRPC
takes. Ours: bytes are hashed on both sides, written, synced to disk, renamed and recorded; downloads are hashed and
written. "Disk": writing the same bytes to a file and syncing it, and nothing else. Each round times all of them in
turn, with other bytes, so that nothing is known before. All processes keep memory that they have freed. Memory is the
server's largest resident set. Processor seconds are those of both sides; where other work runs on the machine, their
ratio says more than that of times.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from measure import ROOT, table, write

sys.path.insert(0, str(ROOT / "server"))

import grpc
import numpy as np

from spa_server._generated import artifacts_pb2, uploads_pb2
from spa_server.memory import keep_freed
from tests.server.running import Running

PIECE = 1 << 20
LIMITS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
REQUEST = artifacts_pb2.DownloadRequest
ANSWER = uploads_pb2.UploadResponse


@dataclass(frozen=True)
class Took:
    """Seconds of one transfer."""

    wall: float
    processor: float
    """Of both sides together."""


def bare(port: Any) -> None:
    """A server that does nothing with what it gets."""
    keep_freed()

    async def take(requests: Any, context: Any) -> uploads_pb2.UploadResponse:
        size = 0
        async for request in requests:
            size += len(request.data)
        return ANSWER(size=size)

    async def take_bytes(requests: Any, context: Any) -> uploads_pb2.UploadResponse:
        size = 0
        async for data in requests:
            size += len(data)
        return ANSWER(size=size)

    async def give(request: artifacts_pb2.DownloadRequest, context: Any) -> Any:
        data = bytes(PIECE)
        for _ in range(request.limit // PIECE):
            yield artifacts_pb2.DownloadResponse(data=data)

    async def give_bytes(request: artifacts_pb2.DownloadRequest, context: Any) -> Any:
        data = bytes(PIECE)
        for _ in range(request.limit // PIECE):
            yield data

    async def serve() -> None:
        server = grpc.aio.server(options=LIMITS)
        response = artifacts_pb2.DownloadResponse.SerializeToString
        upload, download = grpc.stream_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers = {
            "Take": upload(take, uploads_pb2.UploadRequest.FromString, ANSWER.SerializeToString),
            "TakeBytes": upload(take_bytes, None, ANSWER.SerializeToString),
            "Give": download(give, REQUEST.FromString, response),
            "GiveBytes": download(give_bytes, REQUEST.FromString, None),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Bare", handlers),))
        port.value = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


def pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            yield data


def largest(pid: int) -> float:
    """MB of the largest resident set so far."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    return float("nan")


def processor(pid: int) -> float:
    """Seconds that this process and another one have taken. Linux only."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    other = sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks)
    return time.process_time() + other / 1e9


def timed(pid: int, call: Callable[[], object]) -> Took:
    before, start = processor(pid), time.perf_counter()
    call()
    wall = time.perf_counter() - start
    return Took(wall, processor(pid) - before)


def on_disk(path: Path, target: Path) -> None:
    with open(target, "xb") as file:
        for data in pieces(path):
            file.write(data)
        os.fsync(file.fileno())
    target.unlink()


def bare_calls(channel: grpc.Channel, path: Path, size: int) -> dict[str, Callable[[], object]]:
    take = channel.stream_unary("/bare.Bare/Take", uploads_pb2.UploadRequest.SerializeToString, ANSWER.FromString)
    take_bytes = channel.stream_unary("/bare.Bare/TakeBytes", None, ANSWER.FromString)
    give = channel.unary_stream("/bare.Bare/Give", REQUEST.SerializeToString, artifacts_pb2.DownloadResponse.FromString)
    give_bytes = channel.unary_stream("/bare.Bare/GiveBytes", REQUEST.SerializeToString, None)

    def checked(got: int) -> None:
        assert got == size

    return {
        "bare upload": lambda: checked(take(uploads_pb2.UploadRequest(data=data) for data in pieces(path)).size),
        "bytes upload": lambda: checked(take_bytes(pieces(path)).size),
        "bare download": lambda: checked(sum(len(part.data) for part in give(REQUEST(limit=size)))),
        "bytes download": lambda: checked(sum(map(len, give_bytes(REQUEST(limit=size))))),
    }


def once(
    calls: dict[str, Callable[[], object]], bare_pid: int, server: Running, path: Path, folder: Path
) -> dict[str, Took]:
    assert server.process is not None
    out, pid, target = {}, server.process.pid, folder / "back"
    with server.client() as client:
        for way in ("upload", "download"):
            for kind in ("bare", "bytes"):
                out[f"{kind} {way}"] = timed(bare_pid, calls[f"{kind} {way}"])
            if way == "upload":
                os.sync()
                out["disk"] = timed(bare_pid, partial(on_disk, path, target))
                out[way] = timed(pid, partial(client.push_dataset, path))
                model = next(client.datasets())
            else:
                get = partial(client._transfers.download, model.name, model.files[0], target, lambda *_: None)
                out[way] = timed(pid, get)
        assert target.stat().st_size == path.stat().st_size
        target.unlink()
        client.delete(model.name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where files go; a temporary one by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_freed()
    size = int(arguments.gigabytes * 1e9) // PIECE * PIECE
    spawn = multiprocessing.get_context("spawn")
    port = spawn.Value("i", 0)
    process = spawn.Process(target=bare, args=(port,), daemon=True)
    process.start()
    while not port.value:
        time.sleep(0.05)
    assert process.pid is not None
    rows: list[dict[str, Took]] = []
    rng = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as name,
        grpc.insecure_channel(f"127.0.0.1:{port.value}", LIMITS) as channel,
    ):
        folder = Path(name)
        path = folder / "data.bin"
        calls = bare_calls(channel, path, size)
        server = Running(folder / "server", retention={"uploads": "1s", "every": "1s"}).start()
        assert server.process is not None
        before = largest(server.process.pid)
        for _ in range(arguments.rounds):
            with open(path, "wb") as file:
                for _ in range(size // PIECE):
                    file.write(rng.bytes(PIECE))
            os.sync()
            rows.append(once(calls, process.pid, server, path, folder))
        memory = {"before": before, "after": largest(server.process.pid)}
        server.stop()
    process.terminate()
    report(rows, size)
    print(f"server's memory: {memory['before']:.0f} MB when started, {memory['after']:.0f} MB at most")
    plain = [{kind: asdict(took) for kind, took in row.items()} for row in rows]
    write(arguments.json, {"bytes": size, "rounds": plain, "memory": memory})


def report(rows: list[dict[str, Took]], size: int) -> None:
    lines = []
    for way in ("upload", "download"):
        share, least, work = (
            median(getattr(row[f"{kind} {way}"], what) / getattr(row[way], what) for row in rows)
            for kind, what in (("bare", "wall"), ("bytes", "wall"), ("bare", "processor"))
        )
        speed = [median(size / row[f"{kind}{way}"].wall / 1e6 for row in rows) for kind in ("bare ", "bytes ", "")]
        seconds = [median(row[f"{kind}{way}"].processor / size * 1e9 for row in rows) for kind in ("bare ", "")]
        lines.append((way, *(f"{v:.0f}" for v in speed), f"{share:.2f}", f"{least:.2f}"))
        lines[-1] += (*(f"{v:.2f}" for v in seconds), f"{work:.2f}")
    head = ("", "bare MB/s", "bytes MB/s", "server MB/s", "share of bare", "of bytes")
    print(table((*head, "bare processor s/GB", "server", "share"), lines))
    print(f"disk: {median(size / row['disk'].wall / 1e6 for row in rows):.0f} MB/s written and synced")


if __name__ == "__main__":
    main()
