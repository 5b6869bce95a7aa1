"""What was uploaded and what jobs made of it, asked side by side through the inference service."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from spa.jobs import PruneSpec
from tests.server.running import ROOT, Running

if (ROOT / ".venv" / "triton").is_dir():
    sys.path.append(str(ROOT / ".venv" / "triton"))
inference = pytest.importorskip("tritonclient.grpc", reason="no tritonclient: `make test` puts it into .venv/triton")


def test_dense_and_pruned_side_by_side(guarded: Running, model: Path, tmp_path: Path) -> None:
    token = guarded.token("helen")
    with guarded.client(token) as client:
        name = client.push_model(model, name="served").name
        job = client.submit(PruneSpec(name, ("macs=0.6",)))
        client.wait(job.name)
        client.pull(job.name, tmp_path, only=["model.onnx"])
    id_, made = name.partition("/")[2], job.name.partition("/")[2]
    headers = {"authorization": f"Bearer {token}"}
    asker = inference.InferenceServerClient(guarded.address)
    session = ort.InferenceSession(model)
    entry = session.get_inputs()[0]
    x = np.random.default_rng(0).random([d if isinstance(d, int) else 2 for d in entry.shape], np.float32)
    given = inference.InferInput(entry.name, x.shape, "FP32")
    given.set_data_from_numpy(x)

    assert {found.name for found in asker.get_model_repository_index(headers=headers).models} == {id_}
    asker.load_model(id_, headers=headers, config=json.dumps({"versions": "all"}))
    for version, path in (("1", model), (made, tmp_path / "model.onnx"), ("", model)):
        answer = asker.infer(id_, [given], model_version=version, headers=headers)
        wanted = ort.InferenceSession(path).run(None, {entry.name: x})[0]
        np.testing.assert_allclose(answer.as_numpy(session.get_outputs()[0].name), wanted, rtol=1e-5, atol=1e-6)
    asker.unload_model(id_, headers=headers)

    stranger = {"authorization": f"Bearer {guarded.token('ivan')}"}
    assert not asker.get_model_repository_index(headers=stranger).models
    for wrong, status in ((stranger, "NOT_FOUND"), ({}, "UNAUTHENTICATED")):
        with pytest.raises(Exception, match=status):
            asker.infer(id_, [given], headers=wrong)
    asks = {"authorization": f"Bearer {guarded.token('helen', 'infer')}"}
    with pytest.raises(Exception, match="PERMISSION_DENIED"):
        asker.load_model(id_, headers=asks)
    asker.close()
