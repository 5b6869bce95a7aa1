"""What serving costs, and what joining requests gains.

    PYTHONPATH=server python benchmarks/serving.py [--seconds S] [--json FILE]

Overhead: one input and one output of 1 MB, batch 1. "Bare" is the session alone; "server" all that the server does with
a request from its bytes to the answer's bytes; "echo" a gRPC call that only sends the same bytes back; "call" the whole
ModelInfer, by a client that sends bytes, and by tritonclient. All are timed in turns. Medians. Where a machine has
other work, times of calls are mostly those of waiting: so the processor time that the servers take is measured, too,
with tensors of 1 MB and of 256 bytes.

Joining: 32 callers, one row each, all the time; each model without joining, joining what has gathered while a session
was busy, and also waiting for others for up to 100 ms, in turns, through gRPC and in the engine alone. Answered
requests per second; and rows per run through gRPC, as the server's statistics have it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from measure import ROOT, table, write

sys.path.insert(0, str(ROOT / "server"))

import grpc
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from spa import runtime
from spa_server._generated_inference import service_pb2
from spa_server.memory import keep_freed
from spa_server.serving import Engine, FolderSource
from spa_server.serving.messages import decode, encode
from spa_server.serving.service import SERVICE
from spa_server.serving.wire import parse_call, write_reply

MEGABYTE = 1 << 20
CALLERS = 32
ROUNDS = 4
MODELS = {
    "mlp 64-64-10": (64, 64, 10),
    "mlp 784-1024-1024-10": (784, 1024, 1024, 10),
    "mlp 784-4096-4096-10": (784, 4096, 4096, 10),
}
WAYS: dict[str, dict[str, Any]] = {
    "alone": {},
    "joined": {"max_batch": CALLERS},
    "waiting": {"max_batch": CALLERS, "queue_delay_ms": 100},
}
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


def graph(nodes: list[Any], sizes: tuple[int, int], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    body = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", sizes[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", sizes[1]])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def scaling(count: int) -> onnx.ModelProto:
    """One multiplication: as little to do as possible."""
    weights = {"w": np.ones(count, np.float32)}
    return graph([helper.make_node("Mul", ["x", "w"], ["y"])], (count, count), weights)


def mlp(sizes: tuple[int, ...]) -> onnx.ModelProto:
    rng, nodes, weights, last = np.random.default_rng(0), [], {}, "x"
    for k, (rows, columns) in enumerate(pairwise(sizes)):
        weights[f"w{k}"] = (rng.normal(size=(rows, columns)) / rows**0.5).astype(np.float32)
        end = k == len(sizes) - 2
        nodes.append(helper.make_node("MatMul", [last, f"w{k}"], ["y" if end else f"p{k}"]))
        if not end:
            nodes.append(helper.make_node("Relu", [f"p{k}"], [f"r{k}"]))
        last = f"r{k}"
    return graph(nodes, (sizes[0], sizes[-1]), weights)


def add(folder: Path, name: str, model: onnx.ModelProto, **options: Any) -> Path:
    home = folder / name / "1"
    home.mkdir(parents=True)
    onnx.save(model, home / "model.onnx")
    (folder / name / "config.yaml").write_text(json.dumps({"provider": "cpu", "threads": 1, **options}))
    return home / "model.onnx"


def request_of(name: str, x: np.ndarray) -> bytes:
    request = service_pb2.ModelInferRequest(model_name=name, raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    data: bytes = request.SerializeToString()
    return data


@contextmanager
def process(*arguments: str) -> Iterator[tuple[str, int]]:
    """A server of this machine; gives its address and process id."""
    env = {"PYTHONPATH": f"{ROOT / 'server'}:{ROOT}"}
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout is not None
        try:
            yield child.stdout.readline().split()[-1], child.pid
        finally:
            child.terminate()


async def echo() -> None:
    """A server that sends back what it gets; it keeps memory as ours does."""
    keep_freed()
    server = grpc.aio.server(options=UNLIMITED)

    async def same(data: bytes, context: Any) -> bytes:
        return data

    handlers = {"Call": grpc.unary_unary_rpc_method_handler(same)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Echo", handlers),))
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


# ---- overhead -------------------------------------------------------------------------------------------------------


def overhead(folder: Path, seconds: float) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of single calls, by what was called; and of the servers' processor time per call."""
    count = MEGABYTE // 4
    path = add(folder, "scaling", scaling(count))
    x = np.ones((1, count), np.float32)
    data = request_of("scaling", x)
    session = runtime.open_session(path, provider="cpu", threads=1)
    bare = runtime.runner(session, {"x": x})
    add(folder, "small", mlp((64, 64, 10)))
    small = request_of("small", np.ones((1, 64), np.float32))
    serving = process("-m", "spa_server.serving", str(folder), "--port", "0")
    with serving as (address, pid), process(__file__, "echo") as (other, echo_pid):
        channel, silent = (grpc.insecure_channel(target, options=UNLIMITED) for target in (address, other))
        infer, same = channel.unary_unary(f"/{SERVICE}/ModelInfer"), silent.unary_unary("/Echo/Call")
        calls: dict[str, Callable[[], object]] = {
            "bare": bare,
            "echo": partial(same, data),
            "call": partial(infer, data),
        }
        client = triton(address, x)
        if client is not None:
            calls["tritonclient"] = client
        times = in_turns(calls, seconds)
        processor = {
            "echo, 1 MB": processor_time(echo_pid, partial(same, data)),
            "ModelInfer, 1 MB": processor_time(pid, partial(infer, data)),
            "echo, 256 bytes": processor_time(echo_pid, partial(same, small)),
            "ModelInfer, 256 bytes": processor_time(pid, partial(infer, small)),
        }
    times["server"] = asyncio.run(serverside(folder, data, seconds))
    return times, processor


def processor_time(pid: int, call: Callable[[], object], count: int = 300) -> float:
    """Milliseconds that a process takes for one call. Linux only."""

    def taken() -> int:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text(encoding="ascii").split()[0]) for task in tasks)

    for _ in range(20):
        call()
    before = taken()
    for _ in range(count):
        call()
    return (taken() - before) / count / 1e6


def in_turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            call()  # the one before left other things in the caches
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def triton(address: str, x: np.ndarray) -> Callable[[], object] | None:
    try:
        import tritonclient.grpc as grpcclient
    except ImportError:
        return None
    client = grpcclient.InferenceServerClient(address)
    tensor = grpcclient.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return lambda: client.infer("scaling", [tensor]).as_numpy("y")


async def serverside(folder: Path, data: bytes, seconds: float) -> list[float]:
    """What the server does between grpc's two ends, in this process."""
    engine, times = Engine(FolderSource(folder)), []
    await engine.load("scaling")
    end = time.perf_counter() + seconds / 2
    while time.perf_counter() < end:
        start = time.perf_counter()
        call = parse_call(data)
        answer = await engine.infer("scaling", await decode(call))
        write_reply(await encode(answer, call, 1 << 31))
        times.append((time.perf_counter() - start) * 1e3)
    await engine.close()
    return times


# ---- joining --------------------------------------------------------------------------------------------------------


async def per_second(ask: Callable[[], Awaitable[object]], seconds: float) -> float:
    count, end = 0, time.perf_counter() + seconds

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await ask()
            count += 1

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return count / (time.perf_counter() - start)


def named(label: str, way: str) -> str:
    return f"{label}-{way}".replace(" ", "-")


async def joining(folder: Path, address: str, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Requests per second, by model and by how they were asked; and rows per run."""
    found: dict[str, dict[str, list[float]]] = {}
    engine = Engine(FolderSource(folder))
    async with grpc.aio.insecure_channel(address, options=UNLIMITED) as channel:
        stub = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for label, sizes in MODELS.items():
            x = np.ones((1, sizes[0]), np.float32)
            rates = found.setdefault(label, {})
            for _ in range(ROUNDS):
                for way in WAYS:
                    name = named(label, way)
                    await engine.load(name)
                    data = request_of(name, x)
                    rates.setdefault(f"grpc {way}", []).append(await per_second(partial(stub, data), seconds))
                    rates.setdefault(f"engine {way}", []).append(
                        await per_second(partial(engine.infer, name, {"x": x}), seconds)
                    )
            for way in WAYS:
                rates[f"rows {way}"] = [await rows_per_run(channel, named(label, way))]
    await engine.close()
    return found


async def rows_per_run(channel: grpc.aio.Channel, name: str) -> float:
    stub = channel.unary_unary(f"/{SERVICE}/ModelStatistics")
    answer = await stub(service_pb2.ModelStatisticsRequest(name=name).SerializeToString())
    (found,) = service_pb2.ModelStatisticsResponse.FromString(answer).model_stats
    return float(found.inference_count / found.execution_count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=["echo"], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each part")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.mode == "echo":
        asyncio.run(echo())
        return
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        times, processor = overhead(Path(one), arguments.seconds)
        for label, sizes in MODELS.items():
            for way, options in WAYS.items():
                add(Path(two), named(label, way), mlp(sizes), **options)
        with process("-m", "spa_server.serving", two, "--port", "0") as (address, _):
            rates = asyncio.run(joining(Path(two), address, arguments.seconds / ROUNDS / 6))
    rows = []
    for name, values in times.items():
        low, *_, high = quantiles(values, n=10)
        rows.append([name, f"{median(values):.3f}", f"{low:.3f}", f"{high:.3f}", str(len(values))])
    print(table(["1 MB in, 1 MB out", "median ms", "10 %", "90 %", "calls"], rows))
    mine = median(times["server"]) - median(times["bare"])
    print(f"server - bare: {mine:.3f} ms; call - echo - bare: {over_echo(times):.3f} ms\n")
    print(table(["processor time of the server", "ms per call"], [[k, f"{v:.3f}"] for k, v in processor.items()]), "\n")
    head = [
        f"requests per second, {CALLERS} callers",
        "alone",
        "joined",
        "times",
        "waiting",
        "times",
        "rows per run",
    ]
    print(table(head, list(ratios(rates))))
    write(arguments.json, {"milliseconds": times, "processor_ms": processor, "per_second": rates})


def over_echo(times: dict[str, list[float]]) -> float:
    return median(times["call"]) - median(times["echo"]) - median(times["bare"])


def ratios(rates: dict[str, dict[str, list[float]]]) -> Iterator[list[str]]:
    for label, found in rates.items():
        for where in ("engine", "grpc"):
            alone, *others = (median(found[f"{where} {way}"]) for way in WAYS)
            cells = [cell for rate in others for cell in (f"{rate:.0f}", f"{rate / alone:.2f}")]
            rows = ", ".join(f"{found[f'rows {way}'][0]:.1f}" for way in WAYS) if where == "grpc" else ""
            yield [f"{label}, {where}", f"{alone:.0f}", *cells, rows]


if __name__ == "__main__":
    main()
