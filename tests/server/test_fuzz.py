"""Messages and models that make no sense: every answer is a proper status, and the server goes on."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import grpc
import numpy as np
import pytest

import spa
from spa.jobs import InspectSpec
from spa_server._generated import jobs_pb2, models_pb2
from spa_server.client import Client
from tests.server.mutations import attack, mutated
from tests.server.running import Running

PROPER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.ALREADY_EXISTS,
}
"""Others, such as INTERNAL, UNKNOWN or DEADLINE_EXCEEDED, would be errors of ours."""


def test_messages(server: Running) -> None:
    with grpc.insecure_channel(server.address) as channel, server.client() as client:
        codes = Counter(outcome.code for outcome in attack(channel, 600, seed=0))
        assert codes.keys() <= PROPER, codes
        assert codes[grpc.StatusCode.INVALID_ARGUMENT] > 20, codes
        assert client.account().owner == "local"
    assert "nobody foresaw" not in server.text()


@pytest.mark.slow
def test_models(server: Running, model: Path, tmp_path: Path) -> None:
    """Whatever a job makes of a damaged model, it ends with a reason, and the worker's end is not the server's."""
    rng, data = np.random.default_rng(1), model.read_bytes()
    ended = []
    with server.client() as client:
        for k in range(4):
            broken = mutated(data, rng)
            path = tmp_path / f"{hashlib.sha256(broken).hexdigest()}.bin"
            path.write_bytes(broken)
            files = client.push_dataset(path).files
            name = client._models.CreateModel(models_pb2.CreateModelRequest(files=files)).model.name
            ended.append(_outcome(client, name))
            assert k == len(ended) - 1
    assert all(code in ("", "model", "unsupported", "external-data") for code in ended), ended


def _outcome(client: Client, name: str) -> str:
    job = client.submit(InspectSpec(name))
    try:
        done = client.wait(job.name)
    except spa.SpaError:
        done = client.job(job.name)
    assert done.state in (jobs_pb2.JOB_STATE_SUCCEEDED, jobs_pb2.JOB_STATE_FAILED)
    assert "Traceback" not in done.error.message
    return str(done.error.code)
