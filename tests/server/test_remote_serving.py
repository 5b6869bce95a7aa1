"""`spa remote infer` and `spa remote bench`: models of a server, asked from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from spa.jobs import InspectSpec, PruneSpec
from tests.command_line import Ran
from tests.server.running import Running
from tests.serving import nets
from tests.serving.process import ServerProcess


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("SPA_SERVER", "SPA_TOKEN", "SPA_SERVER_CA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def given(model: Path, tmp_path: Path) -> Path:
    entry = ort.InferenceSession(model).get_inputs()[0]
    shape = [d if isinstance(d, int) else 3 for d in entry.shape]
    np.savez(tmp_path / "x.npz", **{entry.name: np.random.default_rng(0).random(shape, np.float32)})
    return tmp_path / "x.npz"


def test_answers_are_those_of_onnx_runtime(
    guarded: Running, model: Path, given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is sent, its name on the server, and what a job made of it; loaded by itself."""
    token = guarded.token("mia")
    with guarded.client(token) as client:
        name = client.push_model(model).name
        job = client.submit(PruneSpec(name, ("macs=0.6",), output_name="small.onnx"))
        client.wait(job.name)
        client.pull(job.name, tmp_path)
        inspected = client.submit(InspectSpec(name)).name
        client.wait(inspected)
    assert Ran(capsys, "remote", "login", guarded.address, "--token", token).status == 0
    x = dict(np.load(given))
    for text, path in ((model, model), (name, model), (job.name, tmp_path / "small.onnx")):
        out = tmp_path / "y.npz"
        more = ("--load",) if text == job.name else ()
        ran = Ran(capsys, "remote", "infer", text, "--inputs", given, "-o", out, "--json", *more)
        assert ran.status == 0, ran.err
        session = ort.InferenceSession(path)
        (wanted,), (output,) = session.run(None, x), session.get_outputs()
        np.testing.assert_allclose(np.load(out)[output.name], wanted, rtol=1e-5, atol=1e-6)
        assert ran.json()["outputs"] == [{"name": output.name, "type": "float32", "shape": list(wanted.shape)}]
        assert ran.json()["version"] == (job.name.partition("/")[2] if text == job.name else "1")
    made_up = Ran(capsys, "remote", "infer", name, "--batch", "5", "--json")
    assert made_up.json()["outputs"][0]["shape"][0] == 5
    wrong = Ran(capsys, "remote", "infer", inspected)
    assert (wrong.status, "makes no model" in wrong.err) == (2, True)

    ran = Ran(capsys, "remote", "bench", name, job.name, "--callers", "1,3", "--seconds", "0.5", "--json")
    assert ran.status == 0, ran.err
    rows = ran.json()["models"]
    assert [(row["name"], row["callers"]) for row in rows] == [(name, 1), (job.name, 1), (name, 3), (job.name, 3)]
    assert all(row["requests"] > 5 and row["requests_per_second"] > 0 and row["max_ms"] > 0 for row in rows)
    assert "requests/s" in Ran(capsys, "remote", "bench", name, "--seconds", "0.2").out


def test_versions_are_not_loaded_beside_others_unasked(
    guarded: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may have loaded them with options of their own."""
    monkeypatch.setenv("SPA_TOKEN", guarded.token("nora"))
    monkeypatch.setenv("SPA_SERVER", guarded.address)
    with guarded.client(guarded.token("nora")) as client:
        name = client.push_model(model).name
        job = client.submit(PruneSpec(name, ("macs=0.7",))).name
        client.wait(job)
    assert Ran(capsys, "remote", "infer", name).status == 0
    refused = Ran(capsys, "remote", "infer", job)
    assert (refused.status, "--load" in refused.err) == (2, True)
    assert Ran(capsys, "remote", "infer", job, "--load").status == 0
    assert Ran(capsys, "remote", "infer", name).status == 0


def test_what_cannot_be_asked_is_said(
    guarded: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPA_SERVER", guarded.address)
    monkeypatch.setenv("SPA_TOKEN", guarded.token("olga"))
    np.savez(tmp_path / "wrong.npz", nothing=np.zeros(3, np.float32))
    out = tmp_path / "y.npz"
    for arguments, status, words in (
        (("nowhere.onnx",), 2, "is no file"),
        (("models/nothing",), 1, "no model 'nothing'"),
        (("jobs/nothing",), 1, "no such thing"),
        ((model, "--inputs", tmp_path / "wrong.npz"), 2, "is no input"),
        ((model, "--inputs", tmp_path / "missing.npz"), 2, "cannot be read"),
        ((model, "--inputs", tmp_path / "wrong.npz", "--batch", "3"), 2, "made-up inputs"),
        ((model, "-o", tmp_path / "no" / "y.npz"), 10, "does not exist"),
    ):
        ran = Ran(capsys, "remote", "infer", *arguments, *(() if "-o" in arguments else ("-o", out)))
        assert (ran.status, words in ran.err) == (status, True), (arguments, ran.err)
    assert not out.exists()
    monkeypatch.setenv("SPA_TOKEN", guarded.token("olga", "infer", "read", "write"))
    fresh = tmp_path / "fresh.onnx"
    fresh.write_bytes(model.read_bytes())
    ran = Ran(capsys, "remote", "infer", fresh)
    assert (ran.status, "scope 'operate'" in ran.err) == (1, True)
    assert Ran(capsys, "remote", "bench", model, "--callers", "0").status == 2
    assert Ran(capsys, "remote", "bench", model, "--server", "127.0.0.1:9").status == 1


def test_a_server_of_a_folder_is_asked_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What comes back can be sent again: types that numpy's files do not have included."""
    kinds = ("FP32", "BF16", "FP16", "BYTES", "BOOL", "INT64")
    for datatype in kinds:
        nets.add(tmp_path / "models", f"echo-{datatype}", "7", nets.echo(datatype))
    first, second = tmp_path / "one.npz", tmp_path / "two.npz"
    with ServerProcess(tmp_path / "models") as server:
        there = ("--server", server.address)
        for datatype in kinds:
            ran = Ran(capsys, "remote", "infer", f"echo-{datatype}@7", "--batch", "3", "-o", first, *there)
            assert ran.status == 0, ran.err
            one = dict(np.load(first))
            np.savez(tmp_path / "x.npz", a=one["first"], b=one["second"])
            ran = Ran(
                capsys, "remote", "infer", f"echo-{datatype}", "--inputs", tmp_path / "x.npz", "-o", second, *there
            )
            assert ran.status == 0, ran.err
            for name, array in np.load(second).items():
                assert (array.dtype, array.shape) == (one[name].dtype, one[name].shape)
                assert array.tobytes() == one[name].tobytes()
        assert Ran(capsys, "remote", "infer", "other", *there).status == 1
