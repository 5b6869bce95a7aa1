"""A request of a megabyte does not cost the kernel new pages each time."""

from __future__ import annotations

import platform
from pathlib import Path

import grpc
import numpy as np
import pytest

from spa_server._generated_inference import service_pb2
from spa_server.serving.service import SERVICE
from tests.serving import nets
from tests.serving.process import ServerProcess


def faults(pid: int) -> int:
    """Pages that the kernel had to provide so far."""
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[7])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_is_used_again(tmp_path: Path) -> None:
    nets.add(tmp_path, "wide", "1", nets.linear(sizes=(1, 1 << 18)))
    request = service_pb2.ModelInferRequest(model_name="wide", raw_input_contents=[np.ones(1, np.float32).tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    data = request.SerializeToString()
    with ServerProcess(tmp_path) as server, grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for _ in range(30):
            infer(data)
        before = faults(server.process.pid)
        for _ in range(50):
            assert len(infer(data)) > 1 << 20
        assert (faults(server.process.pid) - before) / 50 < 100  # an answer alone has 256 pages
