"""The command line: contracts of each command, on models that the tests build."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import spa
from spa.cli.app import app
from spa.cli.guard import statuses
from spa.cli.rules import page
from tests.command_line import Ran
from tests.small_models import attention, cnn

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(cnn(), tmp_path / "cnn.onnx")
    onnx.save(attention(), tmp_path / "attention.onnx")
    return tmp_path


def spa_process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "spa", *map(str, arguments)]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen(command, **(streams | options))


def outputs(model: Path | onnx.ModelProto, seed: int = 7) -> list[Any]:
    """What ONNX Runtime computes on made-up inputs."""
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    feeds = {
        i.name: rng.standard_normal([d if isinstance(d, int) else 3 for d in i.shape]).astype(np.float32)
        for i in session.get_inputs()
    }
    return session.run(None, feeds)


def zeroed(model: onnx.ModelProto, plan: dict[str, Any]) -> onnx.ModelProto:
    """The outside checker: exactly the plan's slices of the original set to zero, with onnx and numpy alone."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in out.graph.initializer}
    copies: dict[tuple[str, str, int], onnx.TensorProto] = {}
    for removed in plan["removed"]:
        name, where = removed["initializer"], (slice(None),) * removed["axis"] + (removed["indices"],)
        uses = removed["consumers"]
        targets = [tensors[name]] if uses is None else []
        for use in uses or ():
            key = (name, use["output"], use["input"])
            if key not in copies:
                copies[key] = out.graph.initializer.add()
                copies[key].CopyFrom(tensors[name])
                copies[key].name = f"{name}/{use['output']}/{use['input']}"
                node = next(n for n in out.graph.node if n.output[0] == use["output"])
                node.input[use["input"]] = copies[key].name
            targets.append(copies[key])
        for tensor in targets:
            array = numpy_helper.to_array(tensor).copy()
            array[where] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return out


# -- the public names --------------------------------------------------------------------------------------------------


def test_all_names_are_there_and_listed() -> None:
    public = {name for name in vars(spa) if not name.startswith("_")}
    for name in spa.__all__:
        assert getattr(spa, name) is not None
        assert not isinstance(getattr(spa, name), type(sys)), f"spa.{name} is a module"
    modules = {name for name in public if isinstance(vars(spa)[name], type(sys))}
    others = {"TYPE_CHECKING", "ModuleType", "annotations", "importlib", "sys"}
    assert public - modules - others <= set(spa.__all__)
    assert set(spa.__all__) <= set(dir(spa))
    assert len(set(spa.__all__)) == len(spa.__all__)


def test_every_error_is_public() -> None:
    import spa.errors

    errors = {n for n, v in vars(spa.errors).items() if isinstance(v, type) and issubclass(v, Exception)}
    assert errors <= set(spa.__all__)


def test_functions_stay_functions_when_the_modules_of_their_names_are_imported() -> None:
    code = (
        "import spa.verify, spa.bench, spa.explain, spa; print(callable(spa.verify), callable(spa.bench), spa.explain)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("True True <function explain")


def test_importing_spa_is_cheap() -> None:
    code = "import sys, spa; print(sorted({'numpy', 'onnx', 'onnxruntime', 'networkx', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        spa.nonsense  # noqa: B018  # reading it is the test


# -- inspect and explain -----------------------------------------------------------------------------------------------


def test_inspect_shows_groups_frozen_axes_and_totals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "inspect", folder / "cnn.onnx")
    assert ran.status == 0
    assert "stem:channel" in ran.out
    assert "graph output" in ran.out
    assert "% of them prunable" in ran.out
    assert "as a whole" not in ran.out  # kernel windows are of no interest
    assert "as a whole" in Ran(capsys, "inspect", folder / "cnn.onnx", "--verbose").out


def test_inspect_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = Ran(capsys, "inspect", folder / "cnn.onnx", "--json").json()
    assert set(body) == {"parameters", "macs", "prunable_parameters", "groups", "frozen"}
    group = next(g for g in body["groups"] if g["name"] == "expand:channel")
    assert (group["kind"], group["units"], group["exact"]) == ("channel", 32, True)
    assert group["unit_macs"] == 64 * (16 + 9 + 16)
    member = next(m for m in group["members"] if m["tensor"] == "project.weight")
    assert (member["axis"], member["role"]) == (1, "in")
    assert {"tensor", "axis", "reason", "operator", "parameters"} <= set(body["frozen"][0])
    ranks = [f["parameters"] for f in body["frozen"]]
    assert ranks == sorted(ranks, reverse=True)


def test_inspect_counts_with_the_sizes_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Ran(capsys, "inspect", folder / "attention.onnx", "--json", "--dim", "time=10").json()["macs"]
    two = Ran(capsys, "inspect", folder / "attention.onnx", "--json", "--dim", "time=10", "--dim", "batch=2").json()[
        "macs"
    ]
    assert two == 2 * one


def test_explain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "explain", folder / "cnn.onnx", "stem.weight")
    assert ran.status == 0
    assert "path: stem.weight[1] -- Conv stem -- x[1]" in ran.out
    body = Ran(capsys, "explain", folder / "cnn.onnx", "stem.weight", "--json").json()
    assert [a["prunable"] for a in body["axes"]] == [True, False, False, False]


# -- prune, apply, verify ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_prune_json_and_the_outside_checker(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, plan = folder / f"{name}.onnx", folder / "out.onnx", folder / "plan.json"
    ran = Ran(capsys, "prune", model, "-o", out, "--target", "macs=0.6", "--plan", plan, "--json")
    assert ran.status == 0
    body = ran.json()
    for key in ("macs", "parameters", "bytes"):
        assert body[key]["after"] < body[key]["before"]
    assert body["macs"]["after"] <= 0.6 * body["macs"]["before"]
    assert body["bytes"] == {"before": model.stat().st_size, "after": out.stat().st_size}
    assert body["groups"] > 0
    assert body["removed_units"] > 0
    assert body["verify"]["exact"] is True
    assert body["verify"]["max_rel_error"] <= 1e-4
    assert {"load", "analyze", "score", "plan", "rewrite", "verify"} <= set(body["seconds"])

    written = json.loads(plan.read_text())
    assert {"version", "model", "removed"} <= set(written)
    reference, pruned = outputs(zeroed(onnx.load(model), written)), outputs(out)
    for a, b in zip(reference, pruned, strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())  # another order of summation
    assert not np.allclose(outputs(model)[0], pruned[0], atol=1e-3)


def test_prune_says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "prune", folder / "cnn.onnx", "-o", folder / "out.onnx", "--target", "macs=0.5")
    assert ran.status == 0
    for text in (
        "MACs",
        "parameters",
        "expand:channel",
        "proof: the pruned model equals the original",
        "seconds: load",
    ):
        assert text in ran.out
    assert "not automatically faster" in ran.out
    assert "spa bench" in ran.out
    assert not ran.err


def test_apply_gives_the_same_bytes_and_verify_agrees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, plan, again = (folder / n for n in ("cnn.onnx", "out.onnx", "plan.json", "again.onnx"))
    assert Ran(capsys, "prune", model, "-o", out, "--target", "params=0.6", "--plan", plan).status == 0
    body = Ran(capsys, "apply", model, plan, "-o", again, "--json").json()
    assert again.read_bytes() == out.read_bytes()
    assert body["verify"]["exact"] is True
    assert Ran(capsys, "apply", model, plan, "-o", again, "--no-verify", "--json").json()["verify"] is None
    ran = Ran(capsys, "verify", model, out, "--plan", plan, "--json")
    assert ran.status == 0
    assert ran.json()["passed"] is True
    assert "proof:" in Ran(capsys, "verify", model, out, "--plan", plan).out


def test_verify_refuses_another_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out, other, plan = (folder / n for n in ("cnn.onnx", "out.onnx", "other.onnx", "plan.json"))
    Ran(capsys, "prune", model, "-o", out, "--target", "macs=0.6", "--plan", plan)
    Ran(capsys, "prune", model, "-o", other, "--target", "macs=0.6", "--criterion", "random")
    ran = Ran(capsys, "verify", model, other, "--plan", plan, "--json")
    assert ran.status == 8
    assert ran.json()["passed"] is False
    assert ran.json()["error"]["code"] == "verify"
    assert ran.err.count("\n") == 1


def test_options_reach_the_library(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = folder / "plan.json"
    options: dict[str, object] = {
        "criterion": "l1",
        "aggregation": "max",
        "normalisation": "gaussian",
        "allocation": "uniform",
        "scope": "all",
        "kinds": "head,neuron",
        "ignore": "q.*",
        "align": 2,
        "min-keep": "head=2,8",
        "seed": 3,
        "dim": "time=7",
    }
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    target = ["--target", "params=0.9", "--target", "macs=0.95"]
    done = Ran(
        capsys,
        "prune",
        folder / "attention.onnx",
        "-o",
        folder / "o.onnx",
        *target,
        *flags,
        "--plan",
        plan,
        "--no-verify",
    )
    assert done.status == 0, done.err
    assert "not verified" in done.out
    body = json.loads(plan.read_text())
    assert body["settings"] | {"targets": None} == {
        "targets": None,
        "method": "l1",
        "compensate": "none",
        "recalibrate": "none",
        "sensitivity": False,
        "calibration": None,
        "criterion": "l1",
        "aggregation": "max",
        "normalisation": "gaussian",
        "allocation": "uniform",
        "scope": "all",
        "kinds": ["head", "neuron"],
        "ignore": ["q.*"],
        "align": 2,
        "min_keep": "head=2,8",
        "seed": 3,
    }
    assert [g["name"] for g in body["groups"]] == ["up:neuron"]


def test_inputs_from_a_file_are_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(folder / "in.npz", x=np.ones((1, 3, 8, 8), np.float32))
    arguments = ["prune", folder / "cnn.onnx", "-o", folder / "o.onnx", "--target", "macs=0.7", "--json", "--inputs"]
    assert Ran(capsys, *arguments, folder / "in.npz").json()["verify"]["max_rel_error"] <= 1e-4
    np.savez(folder / "bad.npz", z=np.ones(3, np.float32))
    assert Ran(capsys, *arguments, folder / "bad.npz").status == 2


def test_an_existing_output_is_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.onnx"
    out.write_text("an older result")
    assert Ran(capsys, "prune", folder / "cnn.onnx", "-o", out, "--target", "macs=0.7").status == 0
    onnx.checker.check_model(onnx.load(out), full_check=True)


# -- bench and rules ---------------------------------------------------------------------------------------------------


def test_bench(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "cnn.onnx"
    options = ["--provider", "cpu", "--threads", 1, "--batch", 2, "--repeats", 8, "--seconds", 1, "--seed", 1]
    body = Ran(capsys, "bench", model, model, *options, "--json").json()
    assert [m["name"] for m in body["models"]] == [str(model), f"{model} #2"]
    assert body["batch"] == 2
    assert body["models"][1]["versus_first"]["verdict"]
    ran = Ran(capsys, "bench", model, "--repeats", 5, "--provider", "cpu", "--dim", "batch=1")
    assert ran.status == 0
    assert "p50 ms" in ran.out


def test_rules(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "rules")
    assert ran.status == 0
    assert "b (g i) ~, (g o) i ~, (g o) -> b (g o) ~" in ran.out
    entries = Ran(capsys, "rules", "--json").json()["operators"]
    conv = next(e for e in entries if e["operator"] == "Conv")
    assert (conv["domain"], conv["since"], conv["zero"]) == ("ai.onnx", 1, "one of inputs 0, 1 and input 2")
    assert Ran(capsys, "rules", "--markdown").out == page()
    assert Ran(capsys, "rules", "--markdown", "--json").status == 2


def test_the_operator_page_is_up_to_date() -> None:
    """Make it anew with `python -m spa rules --markdown > docs/operators.md`."""
    assert (ROOT / "docs/operators.md").read_text(encoding="utf-8") == page()


# -- what everything has in common -------------------------------------------------------------------------------------


def test_the_fixed_names() -> None:
    """Others script against these."""
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    assert list(commands) == [
        "export", "inspect", "explain", "prune", "convert", "apply", "verify", "frontier", "pick", "implant",
        "finetune", "export-torch", "import-weights", "quantize", "float16", "opset", "ort", "run",
        "profile", "bench", "rules", "methods", "serve", "remote", "token",
    ]  # fmt: skip
    groups = {name: commands.pop(name).commands for name in ("remote", "token")}  # type: ignore[attr-defined]  # groups
    assert list(groups["remote"]) == [
        "login", "push", "prune", "infer", "bench", "submit", "watch", "pull", "jobs", "cancel", "delete",
    ]  # fmt: skip
    assert list(groups["token"]) == ["create", "list", "revoke"]
    commands |= {f"{group} {name}": c for group, found in groups.items() for name, c in found.items()}
    options = {name: {o for p in c.params for o in p.opts} for name, c in commands.items()}
    assert options["remote prune"] == options["prune"]
    assert all("--json" in found for found in options.values())
    wanted = "--method --calibration --samples --batch --memory --compensate --recalibrate "
    wanted += (
        "--target --criterion --scope --kinds --ignore --align --min-keep --seed --plan -o --output --dim --inputs"
    )
    assert set(wanted.split()) <= options["prune"]
    assert "--plan" in options["verify"]


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "--version").out == f"spa {spa.__version__}\n"
    ran = Ran(capsys, "prune", "--help")
    assert ran.status == 0
    assert "Exit status" in ran.out
    ran = Ran(capsys)
    assert ran.status == 2
    assert "inspect" in ran.out


def test_exit_statuses_are_documented() -> None:
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    for status, code, _ in statuses():
        assert f"| {status} | {f'`{code}`' if code else ''} |" in page
    epilog = str(app.info.epilog)
    assert all(f"{status} " in epilog for status, code, _ in statuses() if code)


def test_python_m_spa() -> None:
    process = spa_process("--version")
    assert process.communicate(timeout=60) == (f"spa {spa.__version__}\n", "")
    assert process.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently there")
def test_a_reader_that_goes_away_is_no_error() -> None:
    process = spa_process("rules", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_nothing_behind(number: signal.Signals, status: int, folder: Path) -> None:
    before = {p.name for p in folder.iterdir()}
    code = (
        "import sys, time, spa.finish\n"
        "def wait(*a, **k): print('ready', flush=True); time.sleep(60)\n"
        "spa.finish.compared = wait\n"
        "from spa.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["prune", "cnn.onnx", "-o", "o.onnx", "--target", "macs=0.6", "--plan", "p.json"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in background jobs
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in err
    assert {p.name for p in folder.iterdir()} == before


def test_an_unforeseen_error_asks_for_a_report(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise KeyError("lost\nmore")

    monkeypatch.setattr("spa.pipeline.analyze", broken)
    ran = Ran(capsys, "inspect", folder / "cnn.onnx", "--json")
    assert ran.status == 70
    assert ran.json()["error"]["code"] == "internal"
    assert "please report" in ran.err
    assert "Traceback" not in ran.err
    assert ran.err.count("\n") == 1
    assert "Traceback" in Ran(capsys, "inspect", folder / "cnn.onnx", "--verbose").err
    monkeypatch.setenv("SPA_DEBUG", "1")
    assert "Traceback" in Ran(capsys, "inspect", folder / "cnn.onnx").err


def test_the_input_is_never_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "cnn.onnx"
    before = model.read_bytes()
    link = folder / "link.onnx"
    link.symlink_to(model)
    for out in (model, link, folder / "." / "cnn.onnx"):
        assert Ran(capsys, "prune", model, "-o", out, "--target", "macs=0.6").status == 2
    arguments = ["prune", model, "-o", folder / "o.onnx", "--target", "macs=0.6", "--plan"]
    for plan in (model, folder / "o.onnx"):
        assert Ran(capsys, *arguments, plan).status == 2
    assert model.read_bytes() == before
    assert not (folder / "o.onnx").exists()


def test_external_data_of_the_input_is_never_overwritten(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = folder / "big.onnx"
    onnx.save(cnn(), model, save_as_external_data=True, location="o.onnx.data", size_threshold=0)
    before = (folder / "o.onnx.data").read_bytes()
    assert Ran(capsys, "prune", model, "-o", folder / "o.onnx", "--target", "macs=0.6").status == 2
    assert (folder / "o.onnx.data").read_bytes() == before
    assert Ran(capsys, "prune", model, "-o", folder / "p.onnx", "--target", "macs=0.6").status == 0
