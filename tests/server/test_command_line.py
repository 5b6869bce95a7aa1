"""`spa serve`, `spa token`, `spa remote`, and `spa prune --server`."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, get_args, get_type_hints

import onnx
import pytest

from spa.cli import main
from spa.cli.prune import prune
from spa.errors import UsageError
from spa.typed import members
from spa_server.client.login import file
from spa_server.client.work import specified
from tests.command_line import Ran
from tests.server.running import Running
from tests.small_models import cached


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("SPA_SERVER", "SPA_TOKEN", "SPA_SERVER_CA"):
        monkeypatch.delenv(name, raising=False)


def test_pruning_far_away_looks_like_pruning_here(
    server: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    options = ("--target", "macs=0.7", "--kinds", "channel", "--align", "4", "--json", "--no-cache")
    local = Ran(capsys, "prune", model, "-o", here / "out.onnx", "--plan", here / "plan.json", *options)
    far = Ran(
        capsys,
        "prune",
        model,
        "-o",
        there / "out.onnx",
        "--plan",
        there / "plan.json",
        *options,
        "--server",
        server.address,
    )
    assert (local.status, far.status) == (0, 0), far.err
    for name in ("out.onnx", "plan.json"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    mine, other = local.json(), far.json()
    for body in (mine, other):
        for key in ("seconds", "output", "plan"):
            body.pop(key)
    assert mine == other
    assert sorted(path.name for path in there.iterdir()) == ["out.onnx", "plan.json"]


def test_a_cache_may_shrink_far_away_too(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "cached.onnx"
    onnx.save(cached(), model)
    options = ("--target", "params=0.8", "--align", "1", "--allow-io", "past.*", "--allow-io", "present.*", "--json")
    told = []
    for name, where in (("here", ()), ("there", ("--server", server.address))):
        (tmp_path / name).mkdir()
        paths = ("-o", tmp_path / name / "out.onnx", "--report", tmp_path / name / "page.html", "--no-latency")
        ran = Ran(capsys, "prune", model, *paths, *options, *where)
        assert ran.status == 0, ran.err
        told.append(ran.json())
    here, there = tmp_path / "here", tmp_path / "there"
    assert (here / "out.onnx").read_bytes() == (there / "out.onnx").read_bytes()
    assert told[0]["border"]
    assert told[0]["border"] == told[1]["border"]
    sizes = [d.dim_value for d in onnx.load(there / "out.onnx").graph.input[1].type.tensor_type.shape.dim]
    assert 0 < sizes[2] < 16


_TOLD = {"context", "plan", "report", "no_latency", "server", "json", "verbose", "no_cache"}
"""Parameters of `spa prune` about what is told of the result and where, and about this machine."""


def test_servers_know_all_options_of_pruning(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the command hands to the function that does the work here, it hands to the one that lets a server."""
    values: dict[str, object] = {"out": tmp_path / "out.onnx", "target": "macs=0.9", "dim": "n=3"}
    arguments = [str(model)]
    for name, hint in get_type_hints(prune, include_extras=True).items():
        if name in _TOLD | {"model", "return"}:
            continue
        kind, option = get_args(hint)[:2]
        texts = [text for text in (option.default, *(option.param_decls or ())) if str(text).startswith("--")]
        flag = texts[0] if texts else f"--{name.replace('_', '-')}"
        choices = [choice for member in members(kind) for choice in get_args(member) if isinstance(choice, str)]
        arguments += [flag] if kind is bool else [flag, str(values.get(name, choices[-1] if choices else "7"))]
    seen: list[dict[str, Any]] = []

    def note(source: Path, **options: Any) -> None:
        seen.append(options)
        raise UsageError("enough")

    monkeypatch.setattr("spa.pipeline.prune", note)
    monkeypatch.setattr("spa.cli.remote.far", lambda *_, **__: note)
    for where in ([], ["--server", "127.0.0.1:9"]):
        assert main(["prune", *arguments, *where]) == UsageError.exit_status
    here, there = ({k: v for k, v in options.items() if k not in ("progress", "reached")} for options in seen)
    assert here == there
    spec = specified(model, "out.onnx", there)
    assert {name for name in there if getattr(spec, name, None) in (None, ())} == {"output", "cache"}


@pytest.mark.slow
def test_samples_are_sent(server: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    import onnx

    name = onnx.load(model).graph.input[0].name
    shape = [d.dim_value or 16 for d in onnx.load(model).graph.input[0].type.tensor_type.shape.dim][1:]
    np.savez(tmp_path / "x.npz", **{name: np.random.default_rng(0).random((16, *shape), np.float32)})
    options = ("--target", "macs=0.7", "--method", "obspa", "--calibration", tmp_path / "x.npz", "--json")
    for out, where in (("a.onnx", ()), ("b.onnx", ("--server", server.address))):
        assert Ran(capsys, "prune", model, "-o", tmp_path / out, *options, *where).status == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_failure_far_away_is_told_as_one_here(
    server: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("prune", model, "-o", tmp_path / "out.onnx", "--target", "macs=0.001")
    local = Ran(capsys, *arguments)
    far = Ran(capsys, *arguments, "--server", server.address)
    assert (local.status, far.status) == (7, 7)
    assert local.err.splitlines()[-1] == far.err.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))


def test_login_push_watch_pull(
    guarded: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    token = guarded.token("frida")
    assert Ran(capsys, "remote", "jobs").status == 2
    wrong = Ran(capsys, "remote", "login", guarded.address, "--token", "spa_no_no")
    assert wrong.status == 2
    assert not file().exists()
    done = Ran(capsys, "remote", "login", guarded.address, "--token", token, "--json")
    assert done.json()["owner"] == "frida"
    assert stat.S_IMODE(os.stat(file()).st_mode) == 0o600

    names = Ran(capsys, "remote", "push", model, "--json").json()["names"]
    assert names[str(model)].startswith("models/")
    pruned = Ran(capsys, "remote", "prune", model, "-o", tmp_path / "out.onnx", "--target", "macs=0.7", "--json")
    assert pruned.status == 0, pruned.err
    jobs = Ran(capsys, "remote", "jobs", "--json").json()["jobs"]
    assert [(job["kind"], job["state"]) for job in jobs] == [("prune", "succeeded")]
    job = jobs[0]["name"]
    assert set(Ran(capsys, "remote", "watch", job, "--json").json()["files"]) == {
        "out.onnx",
        "plan.json",
        "report.json",
    }
    pulled = Ran(capsys, "remote", "pull", job, "-o", tmp_path / "files", "--file", "out.onnx", "--json").json()
    assert pulled == {"files": [str(tmp_path / "files" / "out.onnx")]}
    assert (tmp_path / "files" / "out.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert Ran(capsys, "remote", "cancel", job).status == 0
    assert Ran(capsys, "remote", "delete", job, names[str(model)]).status == 0
    assert Ran(capsys, "remote", "jobs", "--json").json() == {"jobs": []}
    assert Ran(capsys, "remote", "pull", job).status == 1


def test_measuring_far_away(server: Running, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--repeats", "5", "--seconds", "0.1", "--provider", "cpu", "--server", server.address)
    far = Ran(capsys, "bench", model, *options, "--json")
    assert far.status == 0, far.err
    assert [row["name"] for row in far.json()["models"]] == ["net.onnx"]
    assert "net.onnx" in Ran(capsys, "bench", model, *options).out
    swept = Ran(capsys, "bench", model, *options, "--batch", "1,3", "--json").json()
    assert [report["batch"] for report in swept["reports"]] == [1, 3]


@pytest.mark.slow
def test_any_job_from_a_file(server: Running, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.onnx").write_bytes(model.read_bytes())
    job = tmp_path / "job.yaml"
    job.write_text("kind: benchmark\nmodels: [net.onnx, net.onnx]\nrepeats: 5\nmemory: false\n", encoding="utf-8")
    name = Ran(capsys, "remote", "submit", job, "--server", server.address, "--json").json()["job"]
    assert Ran(capsys, "remote", "watch", name, "--server", server.address).status == 0
    job.write_text("kind: benchmarks", encoding="utf-8")
    assert Ran(capsys, "remote", "submit", job, "--server", server.address).status == 2
    job.write_text("kind: inspect\nmodel: nowhere.onnx", encoding="utf-8")
    assert Ran(capsys, "remote", "submit", job, "--server", server.address).status == 3


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "remote", "jobs", "--server", "127.0.0.1:9")
    assert ran.status == 1
    assert "the server does not answer" in ran.err


def test_a_token_is_not_sent_unencrypted_over_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "remote", "login", "192.0.2.1:50051", "--token", "spa_a_b")
    assert ran.status == 2
    assert "unencrypted" in ran.err


def test_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("data: data", encoding="utf-8")
    (tmp_path / "data").mkdir()
    made = Ran(capsys, "token", "create", "--owner", "ann", "--scope", "read,run", "--config", config, "--json").json()
    assert (made["owner"], made["scopes"]) == ("ann", ["read", "run"])
    assert made["token"].startswith(f"spa_{made['id']}_")
    listed = Ran(capsys, "token", "list", "--config", config, "--json")
    assert made["token"].split("_", 2)[2] not in listed.out
    assert listed.json()["tokens"][0]["revoked"] is None
    assert Ran(capsys, "token", "revoke", made["id"], "--config", config).status == 0
    assert Ran(capsys, "token", "list", "--config", config, "--json").json()["tokens"][0]["revoked"]
    for arguments in (("revoke", "nothing"), ("create", "--owner", "x", "--scope", "all"), ("create", "--owner", " ")):
        assert Ran(capsys, "token", *arguments, "--config", config).status == 2


def test_serve_checks_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("workers: {count: 3}", encoding="utf-8")
    ran = Ran(capsys, "serve", "--config", config, "--check", "--json")
    assert ran.json()["listen"] == "127.0.0.1:50051"
    assert Ran(capsys, "serve", "--config", config, "--executor", "slurm", "--check").status == 2
    config.write_text("listen: 0.0.0.0:50051", encoding="utf-8")
    assert Ran(capsys, "serve", "--config", config, "--check").status == 2
    config.write_text("database: mysql://x", encoding="utf-8")
    ran = Ran(capsys, "serve", "--config", config, "--data", tmp_path / "d")
    assert ran.status == 2
    assert json.dumps("database")[1:-1] in ran.err
